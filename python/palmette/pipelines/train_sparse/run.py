# SPDX-License-Identifier: Apache-2.0
"""All phases, each of which is skipped or gone on with when the directory has it already."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..long_runs import Budget, Progress, claim, write_json
from .data import Corpus, load_corpus
from .model import LanguageModel
from .recall import RecallTraining
from .settings import RECALL_KINDS, TEXT_KINDS, Settings
from .text import TextTask, generate
from .training import History, Schedule, Task, train


@dataclass
class Results:
    """What the report is made of.

    Attributes:
        settings: Of the run.
        corpus: The text.
        text, recall: Histories by kind of attention.
        parameters: Learnt numbers by ``"text"`` or ``"recall"`` and kind.
        keys_read: Keys that a layer reads for the last query, likewise, at the training lengths.
        accuracies: Of recall, by kind and length.
        generation: What ``text.generate`` returned.
    """

    settings: Settings
    corpus: Corpus
    text: dict[str, History]
    recall: dict[str, History]
    parameters: dict[str, dict[str, int]]
    keys_read: dict[str, dict[str, int]]
    accuracies: dict[str, dict[int, float]]
    generation: dict[str, Any]


class Run:
    """One directory of results, its options, and the phases.

    Args:
        settings: What to do.
        seed: Of weights and data.
        directory: Where everything is kept.
        progress: As for ``training.train``.
        budget: Steps that this process may take.

    Raises:
        ValueError: the directory holds a run with other options, or something else.
    """

    def __init__(
        self, settings: Settings, seed: int, directory: Path, progress: Progress, budget: Budget
    ) -> None:
        self.settings, self.seed, self.directory = settings, seed, directory
        self.progress, self.budget = progress, budget
        self.corpus = load_corpus(settings.corpus_limit)
        self.text_task = TextTask(self.corpus, settings.batch, settings.context, settings.windows, seed)
        self.recall_task = RecallTraining(
            settings.task, settings.stages, settings.recall.steps, settings.recall_tokens, seed
        )
        self._claim()

    def _claim(self) -> None:
        """Make the directory this run's, or see that it is."""
        options = {
            **dataclasses.asdict(self.settings),
            "seed": self.seed,
            # sums are rounded in another order with other threads or another torch
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "text_sha256": self.corpus.digest,
        }
        claim(self.directory, options)

    def all_phases(self) -> Results:
        """Train and evaluate everything that is not done yet.

        Raises:
            StoppedError: the budget is used up.
        """
        settings = self.settings
        text_models, text = self._train_all("text", TEXT_KINDS)
        recall_models, recall = self._train_all("recall", RECALL_KINDS)
        accuracies = {kind: self._accuracies(recall_models[kind]) for kind in RECALL_KINDS}
        generation = self._generation(text_models["nsa"])
        lengths = {"text": settings.context, "recall": settings.recall_lengths[-1]}
        models = {"text": text_models, "recall": recall_models}
        return Results(
            settings,
            self.corpus,
            text,
            recall,
            {name: {kind: m.num_parameters for kind, m in some.items()} for name, some in models.items()},
            {name: {k: m.keys_read(lengths[name]) for k, m in some.items()} for name, some in models.items()},
            accuracies,
            generation,
        )

    def estimate(self, tick: Callable[[int, str], None]) -> float:
        """Seconds that the steps which are left will take, from one step of each model and sequence length.

        ``tick(1, note)`` is called per model.
        """
        seconds = 0.0
        for name, kinds in (("text", TEXT_KINDS), ("recall", RECALL_KINDS)):
            task, schedule = self._task(name)
            for kind in kinds:
                left = range(self._steps_done(name, kind), schedule.steps)
                model = self._model(name, kind)
                for first, steps in self._parts(name, left):
                    task.loss(model, first)[0].backward()
                    times = []
                    for _ in range(2):
                        begin = time.perf_counter()
                        task.loss(model, first)[0].backward()
                        times.append(time.perf_counter() - begin)
                    seconds += statistics.mean(times) * steps
                tick(1, f"{name}, {kind}")
        return seconds

    def _parts(self, name: str, left: range) -> list[tuple[int, int]]:
        """First step, and number of steps, of each part of ``left`` whose steps cost the same."""
        if name == "text":
            return [(left.start, len(left))] if left else []
        parts = []
        for stage in self.settings.stages:
            inside = [step for step in left if step < stage.until * self.settings.recall.steps]
            if inside:
                parts.append((inside[0], len(inside)))
            left = left[len(inside) :]
        return parts

    def _task(self, name: str) -> tuple[Task, Schedule]:
        if name == "text":
            return self.text_task, self.settings.text
        return self.recall_task, self.settings.recall

    def _model(self, name: str, kind: str) -> LanguageModel:
        sizes = self.settings.text_model if name == "text" else self.settings.recall_model
        return LanguageModel(kind, sizes, self.seed)

    def _checkpoint(self, name: str, kind: str) -> Path:
        return self.directory / f"{name}-{kind}.pt"

    def _steps_done(self, name: str, kind: str) -> int:
        file = self._checkpoint(name, kind)
        if not file.exists():
            return 0
        return len(torch.load(file, weights_only=True, mmap=True)["history"]["losses"])

    def _train_all(
        self, name: str, kinds: tuple[str, ...]
    ) -> tuple[dict[str, LanguageModel], dict[str, History]]:
        task, schedule = self._task(name)
        models, histories = {}, {}
        for kind in kinds:
            model = models[kind] = self._model(name, kind)
            histories[kind] = train(
                model,
                task,
                schedule,
                self._checkpoint(name, kind),
                title=f"{name}, {kind}",
                progress=self.progress,
                budget=self.budget,
            )
        return models, histories

    def _accuracies(self, model: LanguageModel) -> dict[int, float]:
        settings = self.settings
        file = self.directory / f"recall-{model.kind}.json"
        known: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        missing = [length for length in settings.recall_lengths if str(length) not in known]
        total = len(settings.recall_lengths) * settings.recall_sequences
        done = total - len(missing) * settings.recall_sequences
        with self.progress(f"recall, {model.kind}, accuracy", total, done) as tick:
            for length in missing:
                known[str(length)] = self.recall_task.final(model, length, settings.recall_sequences, tick)
                write_json(file, known)
        return {length: known[str(length)] for length in settings.recall_lengths}

    def _generation(self, model: LanguageModel) -> dict[str, Any]:
        settings = self.settings
        file = self.directory / "generation.json"
        if file.exists():
            found: dict[str, Any] = json.loads(file.read_text())
            return found
        prompt = self.corpus.held_out_windows(1, settings.prompt)[0, :-1]
        total = settings.generated + settings.recomputed
        with self.progress("generation", total, 0) as tick:
            found = generate(model, prompt, settings.generated, settings.recomputed, tick)
        write_json(file, found)
        return found


def losses_digest(history: History) -> str:
    """SHA-256 of all losses to the last bit: the same for runs with and without interruptions."""
    exact = ",".join(
        loss.hex() for loss in [*history.losses, *(value for _, _, value in history.evaluations)]
    )
    return hashlib.sha256(exact.encode()).hexdigest()
