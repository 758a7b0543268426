# SPDX-License-Identifier: Apache-2.0
"""2-digit addition behind shared instructions: what is asked, and what an answer is worth."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

# SmolLM2-135M-Instruct solves 38% of 100 problems behind these (greedy), 16% of its samples at temperature 1;
# with "12+35=47" it is 11%, with "Q: What is 12 + 35?" 6%.
INSTRUCTIONS = """Answer each question with a number.

Question: 12 + 35
Answer: 47
Question: 48 + 27
Answer: 75
Question: 66 + 58
Answer: 124
"""


@dataclass(frozen=True)
class Problem:
    """A sum of two numbers in [10, 99]."""

    a: int
    b: int

    @property
    def question(self) -> str:
        return f"Question: {self.a} + {self.b}\nAnswer:"

    def reward(self, answer: str) -> float:
        """1 for the right sum on the first line, else 0."""
        found = re.match(r"\s*(\d+)\s*(?:\n|$)", answer)
        return float(found is not None and int(found[1]) == self.a + self.b)


class Task:
    """Problems for training and others that are held out, and how they are written in tokens.

    Args:
        tokenizer: of the model.
        pool, held_out: how many problems of each; which ones is the same in all runs, so that accuracies
            compare.

    Attributes:
        instructions: tokens that all problems begin with.
        train, held_out: problems; none is among both.
        end_tokens: tokens that end an answer.

    Raises:
        ValueError: there are fewer problems.
    """

    def __init__(self, tokenizer: Any, pool: int, held_out: int) -> None:
        self.tokenizer = tokenizer
        everything = [Problem(a, b) for a in range(10, 100) for b in range(10, 100)]
        if pool + held_out > len(everything):
            raise ValueError(
                f"pool and held_out must be at most {len(everything)} together, got {pool} and {held_out}"
            )
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0)).tolist()
        self.held_out = [everything[i] for i in order[:held_out]]
        self.train = [everything[i] for i in order[held_out : held_out + pool]]
        self.instructions: list[int] = tokenizer(INSTRUCTIONS, add_special_tokens=False)["input_ids"]
        end = tokenizer("\n", add_special_tokens=False)["input_ids"]
        special = getattr(tokenizer, "eos_token_id", None)
        self.end_tokens = sorted({end[0], *([] if special is None else [special])})

    def question(self, problem: Problem) -> list[int]:
        """Its tokens, behind the instructions."""
        tokens: list[int] = self.tokenizer(problem.question, add_special_tokens=False)["input_ids"]
        return tokens

    def reward(self, problem: Problem, tokens: list[int]) -> float:
        """Of an answer's tokens, the end token included; an answer that does not end is wrong."""
        if not tokens or tokens[-1] not in self.end_tokens:
            return 0.0
        text: str = self.tokenizer.decode(tokens[:-1])
        return problem.reward(text)
