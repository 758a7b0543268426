# SPDX-License-Identifier: Apache-2.0
"""``python -m palmette demo``: a real language model decodes trees, next to every other way of doing it.

Three workloads: few-shot branches of one prompt, a tree of thoughts, and token trees of speculative decoding.
Each runs with Palmette, with a cascade written by hand on PyTorch's own kernels, with masked SDPA over all
tokens, and, on some of the steps, with per-sequence SDPA. All must choose the same tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ...integrations._extras import MissingExtraError, require
from .errors import DisagreementError
from .inputs import QUICK, Sizes, text_tokens, tiny_model


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m palmette demo",
        description="Decode trees with a real language model: Palmette next to per-sequence attention, "
        "masked attention and a cascade written by hand.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sizes = Sizes()
    parser.add_argument(
        "--quick", action="store_true", help="a tiny random model, seconds: to see that all works"
    )
    parser.add_argument(
        "--model", help="directory of a Llama- or Qwen-style checkpoint; default: SmolLM2-135M-Instruct"
    )
    parser.add_argument("--output", type=Path, default=Path("palmette-demo"), help="where the results go")
    parser.add_argument("--threads", type=int, help="CPU threads; default: what PyTorch takes")
    parser.add_argument("--seed", type=int, default=0, help="of the tree of thoughts")
    parser.add_argument("--branches", type=int, default=sizes.branches, help="few-shot: branches")
    parser.add_argument("--tokens", type=int, default=sizes.tokens, help="few-shot: tokens per branch")
    parser.add_argument(
        "--prompt", type=int, default=sizes.prompt, help="few-shot, token trees: tokens of the prompt"
    )
    parser.add_argument(
        "--levels", type=int, default=sizes.levels, help="tree of thoughts: branchings (recorded: 9)"
    )
    parser.add_argument(
        "--thought-scale",
        type=float,
        default=sizes.thought_scale,
        help="tree of thoughts: length over the recorded",
    )
    return parser.parse_args(arguments)


@contextmanager
def _bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    tqdm = require("tqdm", "palmette demo")
    with tqdm.tqdm(desc=description, total=total, leave=False, file=sys.stderr, dynamic_ncols=True) as bar:
        yield lambda count=1: bar.update(min(count, bar.total - bar.n)) and None


def run(options: argparse.Namespace) -> int:
    """Run the demo and write its results."""
    begin = time.perf_counter()
    for package in ("matplotlib", "tqdm", "transformers"):
        require(package, "palmette demo", install="'palmette[demo]'")
    from ..models import MODEL_NAME, load_model
    from . import report
    from .workloads import Demo

    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be positive, got {options.threads}")
        torch.set_num_threads(options.threads)
    require("transformers.utils.logging", "palmette demo").disable_progress_bar()
    if options.quick:
        sizes = QUICK
        model, text = tiny_model(options.seed)
        model_name = "a random Llama of two layers"
    else:
        sizes = Sizes(
            prompt=options.prompt,
            branches=options.branches,
            tokens=options.tokens,
            levels=options.levels,
            thought_scale=options.thought_scale,
        )
        with _bar("loading the model", 1):
            model, tokenizer = load_model(options.model)
        text = text_tokens(tokenizer, max(sizes.prompt, sizes.thought_prompt))
        model_name = Path(options.model).name if options.model else MODEL_NAME
    options.output.mkdir(parents=True, exist_ok=True)
    demo = Demo(model, text, sizes, seed=options.seed, output=options.output, progress=_bar)
    results = []
    for result in demo.run():
        results.append(result)
        for difference in result.differences:
            print(f"near tie, {result.name}: {difference}")
    seconds = time.perf_counter() - begin
    print(report.write(results, options.output, model_name, seconds, {**vars(sizes), "seed": options.seed}))
    ties = sum(len(result.differences) for result in results)
    agreement = f"but for {ties} near ties" if ties else "without exception"
    print(f"all methods chose the same tokens, {agreement}; {seconds:.0f} s; results in {options.output}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m palmette demo``; returns the exit status."""
    # nothing is fetched from a hub: said before transformers is imported, which reads it once
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = parse_arguments(arguments)
    try:
        return run(options)
    except (MissingExtraError, DisagreementError, OSError, ValueError) as error:
        print(f"palmette demo: {error}", file=sys.stderr)
        return 1
