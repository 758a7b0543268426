# SPDX-License-Identifier: Apache-2.0
"""One stage in a process of its own: reads commands as lines of JSON, answers with lines of JSON."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import ScheduleGPipe

from ..activation_store import ActivationStore
from ..delta_codec import DeltaCodec
from ..long_runs import keep_freed_memory, write_atomically
from ..pipeline_parallel import Edge, QuantPipelineStage
from .link import TokenBucket
from .model import load_stage, load_windows, next_token_loss
from .settings import METHODS, Settings


class PacedStage(QuantPipelineStage):
    """A stage that keeps to a rate by itself.

    Attributes:
        bucket: Says when a message may leave.
    """

    bucket = TokenBucket()

    def _begin(self, op: Any, tensor: Tensor, **options: Any) -> Any:
        if op is not dist.isend:
            return op(tensor, **options)
        return self.bucket.send(op, tensor, **options)


class Worker:
    """A rank of the pipeline.

    Args:
        rank: 0 or 1.
        method: a key of METHODS.
        settings: of the run.
        model: directory of a checkpoint; None: SmolLM2.
        timeout: seconds, as for the stage.
    """

    def __init__(self, rank: int, method: str, settings: Settings, model: str | None, timeout: float) -> None:
        self.rank, self.settings = rank, settings
        torch.manual_seed(settings.seed)
        windows = load_windows(model, settings.context, settings.samples + settings.held_out)
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(windows), generator=generator)
        self.train = windows[order[: settings.samples]]
        self.held_out = windows[order[settings.samples :]]
        self.module, channels = load_stage(model, rank, settings.layers)

        def store() -> ActivationStore:
            return ActivationStore(capacity=settings.samples, slot_shape=(settings.context, channels))

        how = METHODS[method]
        self.forward_codec = how.forward(store)
        edge = Edge(forward=self.forward_codec, backward=how.backward)
        self.stage = PacedStage(
            self.module,
            rank,
            2,
            torch.device("cpu"),
            input_edge=edge if rank == 1 else None,
            output_edge=edge if rank == 0 else None,
            timeout=timeout,
        )
        self.schedule = ScheduleGPipe(self.stage, settings.microbatches, loss_fn=next_token_loss)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), settings.learning_rate, weight_decay=0.0)
        self.steps = 0

    def samples_of(self, step: int) -> Tensor:
        """Numbers of the samples of a step: every epoch has an order of its own."""
        epoch, place = divmod(step, self.settings.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(self.settings.samples, generator=generator)
        return order[place * self.settings.batch :][: self.settings.batch]

    def step(self) -> dict[str, Any]:
        """One step of training. Rank 1 knows the loss; rank 0 is the last to be ready, and takes the time."""
        settings = self.settings
        begin = time.perf_counter()
        rate = settings.learning_rate * min(1.0, (self.steps + 1) / settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        ids = self.samples_of(self.steps)
        if isinstance(self.forward_codec, DeltaCodec):
            self.stage.set_sample_ids(ids, next_ids=self.samples_of(self.steps + 1))
        sent = self.stage.wire_bytes.forward + self.stage.wire_bytes.backward
        tokens = self.train[ids]
        losses: list[Tensor] = []
        if self.rank == 0:
            self.schedule.step(tokens[:, :-1])
        else:
            self.schedule.step(target=tokens, losses=losses)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return {
            "loss": None if self.rank == 0 else torch.stack(losses).mean().item(),
            "seconds": time.perf_counter() - begin,
            "bytes": self.stage.wire_bytes.forward + self.stage.wire_bytes.backward - sent,
        }

    def evaluate(self) -> float | None:
        """Mean loss on the held-out samples."""
        total = 0.0
        self.module.eval()
        for tokens in self.held_out.split(self.settings.batch):
            losses: list[Tensor] = []
            if self.rank == 0:
                self.schedule.eval(tokens[:, :-1])
            else:
                self.schedule.eval(target=tokens, losses=losses)
                total += torch.stack(losses).mean().item() * len(tokens)
        self.module.train()
        return None if self.rank == 0 else total / len(self.held_out)

    def save(self, path: Path) -> None:
        state = {
            "steps": self.steps,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_atomically(path, lambda file: torch.save(state, file))
        if isinstance(self.forward_codec, DeltaCodec):
            self.forward_codec.store.save(path.with_suffix(".store"))

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.steps = state["steps"]
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.forward_codec, DeltaCodec):
            self.forward_codec.store = ActivationStore.load(path.with_suffix(".store"))

    def digest(self) -> str:
        """SHA-256 of the parameters."""
        found = hashlib.sha256()
        for parameter in self.module.parameters():
            found.update(parameter.detach().numpy().tobytes())
        return found.hexdigest()

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Does what a command says."""
        match command["do"]:
            case "step":
                return self.step()
            case "evaluate":
                return {"loss": self.evaluate()}
            case "save":
                self.save(Path(command["path"]))
            case "load":
                self.load(Path(command["path"]))
            case "rate":
                self.stage.bucket.rate = command["rate"]
            case "digest":
                return {"digest": self.digest()}
        return {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--settings", required=True)
    parser.add_argument("--model")
    parser.add_argument("--master", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = json.loads(options.settings)
    settings["ratios"] = tuple(settings["ratios"])
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{options.master}:{options.port}",
        rank=options.rank,
        world_size=2,
        timeout=timedelta(seconds=options.timeout),
    )
    worker = Worker(options.rank, options.method, Settings(**settings), options.model, options.timeout)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        try:
            result = worker.answer(json.loads(line))
        except Exception as error:  # the other process tells the user
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
            raise
        print(json.dumps(result), file=answers)
    os._exit(0)  # the peer may be gone: nothing to say good-bye to


if __name__ == "__main__":
    main()
