# SPDX-License-Identifier: Apache-2.0
"""Both stages over a link, method after method; what is done is kept, and a run that was ended goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..long_runs import Budget, Progress, claim, write_json
from .link import SlowLink
from .settings import METHODS, Settings


class WorkerError(RuntimeError):
    """A stage has ended, or reports an error."""


class Pipeline:
    """The two processes of a method.

    Args:
        link: between them.
        method, settings, model: as for the worker.
        timeout: seconds, as for the stage.

    Raises:
        WorkerError: a process ends instead of getting ready.
    """

    def __init__(
        self, link: SlowLink, method: str, settings: Settings, model: str | None, timeout: float
    ) -> None:
        self.link = link
        self.workers: list[subprocess.Popen[str]] = []
        try:
            self._start(method, settings, model, timeout)
        except BaseException:
            self.__exit__()
            raise

    def _start(self, method: str, settings: Settings, model: str | None, timeout: float) -> None:
        link = self.link
        link.set_rate(None)
        with socket.socket() as found:  # free here, and in the other namespace anyway
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        for rank in range(2):
            command = [sys.executable, "-m", "palmette.pipelines.train_pipeline.worker"]
            command += ["--rank", str(rank), "--method", method, "--timeout", str(timeout)]
            command += ["--settings", json.dumps(dataclasses.asdict(settings))]
            command += ["--master", link.address(), "--port", str(port)]
            command += [] if model is None else ["--model", model]
            self.workers.append(
                subprocess.Popen(
                    link.command(rank, command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for this process, which ends them
                    env={**os.environ, **link.environment(), "HF_HUB_OFFLINE": "1"},
                )
            )
        self._answers()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()

    def ask(self, do: str, **each: Sequence[Any]) -> list[dict[str, Any]]:
        """Has both do the same, with an argument for each, and returns their answers."""
        for rank, worker in enumerate(self.workers):
            assert worker.stdin is not None
            try:
                print(
                    json.dumps({"do": do, **{name: values[rank] for name, values in each.items()}}),
                    file=worker.stdin,
                    flush=True,
                )
            except BrokenPipeError:
                raise WorkerError(f"stage {rank} has ended with status {worker.wait()}") from None
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for rank, worker in enumerate(self.workers):
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                raise WorkerError(f"stage {rank} has ended with status {worker.wait()}")
            answer = json.loads(line)
            if "error" in answer:
                raise WorkerError(f"stage {rank}: {answer['error']}")
            answers.append(answer)
        return answers

    def set_rate(self, bits_per_second: float | None) -> None:
        self.link.set_rate(bits_per_second)
        if not self.link.shaped:
            self.ask("rate", rate=[bits_per_second] * 2)

    def step(self) -> dict[str, float]:
        """A step's loss, seconds, and bytes of both directions."""
        first, second = self.ask("step")
        return {
            "loss": second["loss"],
            "seconds": first["seconds"],
            "bytes": first["bytes"] + second["bytes"],
        }


@dataclass
class Record:
    """What is known of a method.

    Attributes:
        losses, seconds: Of each step of training, without a limit to the link.
        bytes: Sent in each step, both directions.
        held_out: Losses after training, and before it.
        timed: By the link's rate in bits per second: seconds of the timed steps. ``"0"``: no limit.
        digests: Of the two stages' parameters after training.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    timed: dict[str, list[float]] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)

    @property
    def steady_bytes(self) -> float:
        """Of a step of the last epoch, in the median."""
        return statistics.median(self.bytes[-max(1, len(self.bytes) // 3) :])


class Run:
    """One directory of results, its options, and the phases.

    Args:
        settings: What to do.
        model: Directory of a checkpoint; None: SmolLM2.
        methods: Keys of METHODS; ``"fp32"`` first.
        directory: Where everything is kept.
        link: Between the stages.
        progress: As for ``train_sparse``: title, total and done to something that ticks.
        budget: Steps that this process may take.
        timeout: Seconds that a stage waits for the other.

    Raises:
        ValueError: the directory holds a run with other options, or something else.
    """

    def __init__(
        self,
        settings: Settings,
        model: str | None,
        methods: Sequence[str],
        directory: Path,
        link: SlowLink,
        progress: Progress,
        budget: Budget,
        timeout: float,
    ) -> None:
        self.settings, self.model, self.methods = settings, model, list(methods)
        self.directory, self.link, self.progress = directory, link, progress
        self.budget, self.timeout = budget, timeout
        self._claim()
        self.records = {method: self._record(method) for method in self.methods}

    def _claim(self) -> None:
        """Make the directory this run's, or see that it is."""
        options = {**dataclasses.asdict(self.settings), "model": self.model, "torch": str(torch.__version__)}
        claim(self.directory, {**options, "link": self.link.description})

    def _file(self, method: str) -> Path:
        return self.directory / f"{method}.json"

    def _record(self, method: str) -> Record:
        file = self._file(method)
        return Record(**json.loads(file.read_text())) if file.exists() else Record()

    def _write(self, method: str) -> None:
        write_json(self._file(method), dataclasses.asdict(self.records[method]))

    def _states(self, method: str, steps: int) -> list[str]:
        return [str(self.directory / f"{method}-{rank}-{steps}.pt") for rank in range(2)]

    def all_phases(self) -> dict[str, Record]:
        """Trains and times every method that is not done yet.

        Raises:
            StoppedError: the budget is used up.
            WorkerError: a stage has ended.
        """
        for method in self.methods:
            record = self.records[method]
            wanted = {"0", *(f"{rate:.0f}" for rate in self.rates())} if self.records["fp32"].losses else None
            if len(record.losses) == self.settings.steps and wanted == set(record.timed) and record.digests:
                continue
            with Pipeline(self.link, method, self.settings, self.model, self.timeout) as pipeline:
                if not record.held_out:
                    record.held_out.append(pipeline.ask("evaluate")[1]["loss"])
                if record.losses:
                    pipeline.ask("load", path=self._states(method, len(record.losses)))
                self._train(method, pipeline)
                self._time(method, pipeline)
        return self.records

    def _train(self, method: str, pipeline: Pipeline) -> None:
        settings, record = self.settings, self.records[method]
        done = len(record.losses)
        each = settings.steps_per_epoch
        with self.progress(f"{METHODS[method].title}, training", settings.steps, done) as tick:
            steps: list[dict[str, float]] = []
            for step in range(done, settings.steps):
                self.budget.take()
                steps.append(pipeline.step())
                tick(1, f"loss {steps[-1]['loss']:.3f}")
                if (step + 1) % each:
                    continue
                # what is written first is of use only with what is written last
                pipeline.ask("save", path=self._states(method, step + 1))
                before = len(record.losses)
                record.losses += [s["loss"] for s in steps]
                record.seconds += [s["seconds"] for s in steps]
                record.bytes += [int(s["bytes"]) for s in steps]
                steps = []
                self._write(method)
                for old in self._states(method, before):
                    for file in (Path(old), Path(old).with_suffix(".store")):
                        file.unlink(missing_ok=True)
        if len(record.held_out) < 2:
            record.held_out.append(pipeline.ask("evaluate")[1]["loss"])
        record.digests = [answer["digest"] for answer in pipeline.ask("digest")]
        self._write(method)

    def compute_seconds(self) -> float:
        """Of a step in float32 when the link has no limit."""
        fp32 = self.records["fp32"]
        times = fp32.timed.get("0") or fp32.seconds[-max(1, len(fp32.seconds) // 2) :]
        return statistics.median(times)

    def rates(self) -> list[float]:
        """Bits per second, one for each of the settings' ratios."""
        bits = self.records["fp32"].steady_bytes * 8
        # three digits are enough, and make the same rate of the same times when a run goes on
        return [float(f"{bits / (ratio * self.compute_seconds()):.3g}") for ratio in self.settings.ratios]

    def _time(self, method: str, pipeline: Pipeline) -> None:
        record, timed = self.records[method], self.settings.timed
        if "0" not in record.timed:
            record.timed["0"] = self._timed(
                pipeline, None, max(timed, 5), f"{METHODS[method].title}, no limit"
            )
            self._write(method)
        for rate in self.rates():
            key = f"{rate:.0f}"
            if key not in record.timed:
                title = f"{METHODS[method].title}, {rate / 1e6:.3g} Mbit/s"
                record.timed[key] = self._timed(pipeline, rate, timed, title)
                self._write(method)

    def _timed(self, pipeline: Pipeline, rate: float | None, steps: int, title: str) -> list[float]:
        pipeline.set_rate(rate)
        times = []
        with self.progress(title, steps, 0) as tick:
            for _ in range(steps):
                self.budget.take()
                times.append(pipeline.step()["seconds"])
                tick(1, f"{times[-1]:.2f} s")
        pipeline.set_rate(None)
        return times
