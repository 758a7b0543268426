# SPDX-License-Identifier: Apache-2.0
"""Processes of a pipeline for tests, and what they run."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from palmette.codecs import FixpointCodec
from palmette.pipelines import ActivationStore, DeltaCodec
from palmette.pipelines.pipeline_parallel import Edge, PipelineError, QuantPipelineStage
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
LIMIT = 60  # seconds for what takes a few
PRELOAD = ["palmette.pipelines.pipeline_parallel"]


# ---- codecs


EIGHT = FixpointCodec(8, grid="full-range")
FOUR = FixpointCodec(4, grid="full-range")


@dataclass(frozen=True)
class Damaging(FixpointCodec):
    """Alters one byte of the wire number ``at``."""

    at: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", itertools.count())

    def encode(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        wire = super().encode(x, out=out)
        if next(self.count) == self.at:
            wire[70] ^= 1
        return wire


# ---- processes


def _enter(rank: int, size: int, folder: Path, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=LIMIT),
        )
        result = function(rank, size, *arguments)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, folder / f"{rank}.partial")
    (folder / f"{rank}.partial").rename(folder / f"{rank}.result")
    os._exit(0)  # threads of a broken process group are not waited for


def run(folder: Path, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, size, *arguments)`` in processes; None for one that has been killed or has stopped."""
    folder = folder / f"run{time.monotonic_ns()}"
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes = [
        context.Process(target=_enter, args=(rank, size, folder, function, arguments), daemon=True)
        for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + LIMIT
        missing = set(range(size))
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not (folder / f"{rank}.result").exists()}
            if all(_gone(processes[rank]) for rank in missing):
                break
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
            process.join()
    files = [folder / f"{rank}.result" for rank in range(size)]
    results = [torch.load(file, weights_only=False) if file.exists() else None for file in files]
    for result in results:
        assert not isinstance(result, str), result
    return results


def _gone(process: Any) -> bool:
    """Ended, or stopped by a signal."""
    if process.exitcode is not None:
        return True
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except FileNotFoundError:
        return True


# ---- models


class Layer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(x))


class Pair(nn.Module):
    """A layer that gives a second tensor to the next one, or takes it."""

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        self.layer, self.last = layer, last

    def forward(self, x: Tensor, side: Tensor | None = None) -> Any:
        y = self.layer(x if side is None else x + side[..., None])
        return y if self.last else (y, y.mean(-1))


class Several(nn.Module):
    """Passes several tensors of odd shapes and dtypes on; some without gradients, one not contiguous."""

    def __init__(self, channels: int, first: bool, last: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.ones(1))
        self.first, self.last = first, last

    def forward(self, x: Tensor, *rest: Tensor) -> Any:
        if self.first:
            x = x.to(torch.bfloat16)
            rest = (x[..., 0].float() * self.scale, x[..., 0] > 0, torch.arange(x.shape[0] * 3).view(-1, 3))
        side, mask, numbers = rest
        x = x + self.mix(x) * mask[..., None]
        side = side.t().contiguous().t() * self.scale + numbers.sum()
        return x.float().sum(-1) + side if self.last else (x, side, mask, numbers)


def modules(size: int, channels: int, kind: str = "layer") -> list[nn.Module]:
    torch.manual_seed(1)
    if kind == "several":
        return [Several(channels, i == 0, i == size - 1) for i in range(size)]
    return [Layer(channels) for _ in range(size)]


def batches(
    steps: int, shape: Sequence[int], out: Sequence[int] | None = None
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(*shape, generator=generator), torch.randn(*(out or shape), generator=generator))
        for _ in range(steps)
    ]


def loss_function(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def one_process(
    parts: list[nn.Module], data: list[tuple[Tensor, Tensor]], chunks: int
) -> list[dict[str, Any]]:
    """For each step: outputs, losses, and every gradient after every microbatch."""
    steps = []
    for x, target in data:
        step: dict[str, Any] = {"outputs": [], "losses": [], "grads": [[] for _ in parts]}
        for part in parts:
            part.zero_grad()
        for x_mb, target_mb in zip(x.tensor_split(chunks), target.tensor_split(chunks), strict=True):
            value: Any = (x_mb,)
            for part in parts:
                value = part(*value)
                value = value if isinstance(value, tuple) else (value,)
            loss = loss_function(value[0], target_mb)
            loss.backward()
            step["outputs"].append(value[0].detach())
            step["losses"].append(loss.detach())
            for grads, part in zip(step["grads"], parts, strict=True):
                grads.append([p.grad.clone() for p in part.parameters()])
        steps.append(step)
    return steps


# ---- what the processes run


def exact(
    rank: int, size: int, name: str, kind: str, shape: Sequence[int], chunks: int, edge: Edge | None
) -> list[dict[str, Any]]:
    """As ``one_process``, of this stage; with torch's own stage if there is no edge."""
    part = modules(size, shape[-1], kind)[rank]
    if edge is None:
        stage: PipelineStage = PipelineStage(part, rank, size, torch.device("cpu"))
    else:
        stage = QuantPipelineStage(
            part, rank, size, torch.device("cpu"), input_edge=edge, output_edge=edge, timeout=30
        )
    schedule = SCHEDULES[name](stage, chunks, loss_fn=loss_function)
    backward = stage.backward_one_chunk
    grads: list[list[Tensor]] = []

    def recording(*arguments: Any, **options: Any) -> None:
        backward(*arguments, **options)
        grads.append([p.grad.clone() for p in part.parameters()])

    stage.backward_one_chunk = recording
    steps = []
    for x, target in batches(2, shape, shape[:2] if kind == "several" else None):
        part.zero_grad()
        grads.clear()
        losses: list[Tensor] = []
        output = schedule.step(*[x] * (rank == 0), target=target, losses=losses)
        step: dict[str, Any] = {"grads": list(grads), "scaled": [p.grad.clone() for p in part.parameters()]}
        if rank == size - 1:
            step["losses"] = [loss.detach() for loss in losses]
            step["outputs"] = [o.detach() for o in output.tensor_split(chunks)]
        steps.append(step)
    return steps


def training(
    rank: int,
    size: int,
    edges: Sequence[Edge],
    steps: int,
    chunks: int = 2,
    timeout: float = 30,
    name: str = "1f1b",
) -> dict[str, Any]:
    """Losses of a model that learns one batch, or an error. ``edges[i]``: as rank i sees them."""
    part = modules(size, 16)[rank]
    stage = QuantPipelineStage(
        part,
        rank,
        size,
        torch.device("cpu"),
        input_edge=edges[rank],
        output_edge=edges[rank],
        timeout=timeout,
    )
    schedule = SCHEDULES[name](stage, chunks, loss_fn=loss_function)
    optimizer = torch.optim.SGD(part.parameters(), 0.5)
    x, target = batches(1, (4, 3, 16))[0]
    result: dict[str, Any] = {"losses": [], "error": None}
    begin = time.monotonic()
    try:
        for _ in range(steps):
            losses: list[Tensor] = []
            optimizer.zero_grad()
            schedule.step(*[x] * (rank == 0), target=target, losses=losses)
            optimizer.step()
            result["losses"].append([loss.item() for loss in losses])
    except PipelineError as error:
        result["error"] = {"text": str(error), "where": (error.direction, error.peer, error.microbatch)}
    except ValueError as error:
        result["error"] = {"text": str(error), "where": None}
    result["seconds"] = time.monotonic() - begin
    result["bytes"] = stage.wire_bytes
    return result


def failing(
    rank: int, size: int, victim: int, sent: int, at_step: int, name: str, timeout: float
) -> dict[str, Any] | None:
    """A signal ends or stops one process in a step (-1: before the first); what the others see, and when."""
    part = modules(size, 16)[rank]
    stage = QuantPipelineStage(part, rank, size, torch.device("cpu"), timeout=timeout)
    schedule = SCHEDULES[name](stage, 4, loss_fn=loss_function)
    x, target = batches(1, (4, 3, 16))[0]
    dist.barrier()
    step, begin = 0, time.monotonic()
    count = itertools.count()
    if rank == victim:
        if at_step < 0:
            os.kill(os.getpid(), sent)
        part.register_forward_pre_hook(
            lambda *_: os.kill(os.getpid(), sent) if step == at_step and next(count) == 1 else None
        )
    try:
        for step in range(3):  # noqa: B007
            begin = time.monotonic()
            schedule.step(*[x] * (rank == 0), target=target, losses=[])
    except PipelineError as error:
        seconds = time.monotonic() - begin
        return {
            "step": step,
            "seconds": seconds,
            "text": str(error),
            "peer": error.peer,
            "stage": error.stage,
        }
    return None


EPOCHS = (([0, 1, 2, 3], [4, 5, 6, 7]), ([2, 1, 7, 0], [4, 3, 3, 6]), ([5, 1, 2, 3], [6, 0, 4, 7]))


def _delta_edge(store: ActivationStore) -> Edge:
    return Edge(forward=DeltaCodec(store, bits=4, grid="full-range"), backward=EIGHT)


def remembering(rank: int, size: int, scenario: str) -> dict[str, Any]:
    """Three epochs of AQ-SGD; what each has cost, and the stores."""
    torch.manual_seed(3)
    samples = torch.randn(8, 6, 16)
    target = samples.flip(2)
    part = modules(size, 16)[rank]
    stores = [ActivationStore(capacity=7, slot_shape=(6, 16)) for _ in range(2)]
    edges = [_delta_edge(store) for store in stores]
    if scenario in ("pair", "unnamed"):
        part = Pair(part, rank == size - 1)
    if scenario == "pair":
        edges = [Edge([edge.forward, None], [edge.backward, None]) for edge in edges]
    stage = QuantPipelineStage(
        part,
        rank,
        size,
        torch.device("cpu"),
        input_edge=edges[0],
        output_edge=edges[1],
        timeout=30,
        check_every=2,
    )
    own = ([] if rank == 0 else [stores[0]]) + ([] if rank == size - 1 else [stores[1]])
    schedule = SCHEDULES["1f1b" if size == 2 else "gpipe"](stage, 2, loss_fn=loss_function)
    optimizer = torch.optim.SGD(part.parameters(), 0.2)
    result: dict[str, Any] = {"bytes": [], "losses": [], "error": None, "evaluated": []}
    steps = [ids for epoch in EPOCHS for ids in epoch]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, ids in enumerate(steps):
            before = stage.wire_bytes.forward
            if scenario != "forgotten" or number == 0:
                mine = ids[::-1] if scenario == "confused" and rank == 1 and number == 3 else ids
                follow = steps[number + 1] if number + 1 < len(steps) else None
                stage.set_sample_ids(torch.tensor(mine), next_ids=follow)
            losses: list[Tensor] = []
            optimizer.zero_grad()
            try:
                schedule.step(*[samples[ids]] * (rank == 0), target=target[ids], losses=losses)
            except (PipelineError, ValueError) as error:
                result["error"] = str(error)
                break
            optimizer.step()
            result["losses"].append([loss.item() for loss in losses])
            result["bytes"].append(stage.wire_bytes.forward - before)
            if scenario == f"lost at {rank}" and number == 2:
                own[0].invalidate([4])
            if scenario == "diverge" and number == 2 and rank == 1:
                stores[0]._rows[stores[0]._entries[4].slot, 3, 5] += 0.25
                stores[0].invalidate([2])
                stores[0].write([stores[0]._entries[4]], stores[0][4])
            if scenario == "evaluate":
                tables = [store.table() for store in own]
                rows = [{sample: store[sample] for sample in store} for store in own]
                with torch.no_grad():
                    output = schedule.eval(*[samples[ids]] * (rank == 0), target=target[ids])
                assert all(torch.equal(a, store.table()) for a, store in zip(tables, own, strict=True))
                assert all(torch.equal(r[i], s[i]) for r, s in zip(rows, own, strict=True) for i in r)
                result["evaluated"].append((output, [p.detach().clone() for p in part.parameters()]))
    result["warnings"] = [str(w.message) for w in caught if w.category is RuntimeWarning]
    if result["error"] is not None:
        return result
    result["tables"] = [store.table() for store in own]
    result["rows"] = [{sample: store[sample] for sample in store} for store in own]
    result["repaired"] = stage.repaired
    result["digests"] = [store.digest() for store in own]
    return result


def sharing(rank: int, size: int) -> dict[str, Any]:
    """A stage in the middle whose edges have one store."""
    edge = _delta_edge(ActivationStore(capacity=7, slot_shape=(6, 16)))
    try:
        QuantPipelineStage(nn.Identity(), 1, 3, torch.device("cpu"), input_edge=edge, output_edge=edge)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def resuming(rank: int, size: int, folder: Path, steps: int, killed_in: int | None) -> dict[str, Any]:
    """Trains from the last checkpoint that all ranks have, if there is one; saves after every second step."""
    torch.manual_seed(4)
    samples = torch.randn(8, 6, 16)
    target = samples.flip(2)
    part = modules(size, 16)[rank]
    optimizer = torch.optim.Adam(part.parameters(), 0.01)
    done = max(
        (n for n in range(steps + 1) if all((folder / f"{n}-{r}.store").exists() for r in range(size))),
        default=0,
    )
    dist.barrier()
    if done:
        saved = torch.load(folder / f"{done}-{rank}.model")
        part.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        store = ActivationStore.load(folder / f"{done}-{rank}.store")
    else:
        store = ActivationStore(capacity=6, slot_shape=(6, 16), dtype=torch.bfloat16)
    edge = _delta_edge(store)
    stage = QuantPipelineStage(
        part, rank, size, torch.device("cpu"), input_edge=edge, output_edge=edge, timeout=20
    )
    schedule = Schedule1F1B(stage, 2, loss_fn=loss_function)
    result: dict[str, Any] = {"first": done, "losses": [], "error": None}
    order = torch.Generator().manual_seed(5)
    plan = [torch.randperm(8, generator=order)[:4] for _ in range(steps)]
    step = done
    if rank == 1:
        part.register_forward_pre_hook(
            lambda *_: os.kill(os.getpid(), signal.SIGKILL) if step == killed_in else None
        )
    try:
        for step in range(done, steps):
            ids = plan[step]
            losses: list[Tensor] = []
            optimizer.zero_grad()
            stage.set_sample_ids(ids)
            schedule.step(*[samples[ids]] * (rank == 0), target=target[ids], losses=losses)
            optimizer.step()
            result["losses"].append([loss.item() for loss in losses])
            if step % 2 == 1:
                state = {"model": part.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, folder / f"{step + 1}-{rank}.model")
                store.save(folder / f"{step + 1}-{rank}.store")
    except PipelineError as error:
        result["error"] = str(error)
    result["digest"] = store.digest()
    return result
