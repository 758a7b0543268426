# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism whose stages exchange encoded activations and gradients.

``QuantPipelineStage`` takes the place of ``torch.distributed.pipelining.PipelineStage``; schedules, models
and launching stay as they are. What a stage sends of one microbatch is one message of bytes whose size both
ends know, so receivers have their buffers from the beginning.

Source: TAH-Quant (arXiv 2506.01352) and AQ-SGD (arXiv 2206.01299) for what is encoded; their public code has
pipelines of its own.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from palmette._checks import check_at_least
from palmette._codec_checks import ENCODED, aligned
from palmette.codecs import Codec

from .activation_store import ActivationStore, sample_ids
from .delta_codec import DeltaCodec, DeltaPlan
from .watched_transfers import BACKWARD, FORWARD, PipelineError, Place, WatchedTransfer

TORCH_VERSIONS = ("2.13",)
_HOOKS = (
    "get_fwd_recv_ops",
    "get_fwd_send_ops",
    "get_bwd_recv_ops",
    "get_bwd_send_ops",
    "_retrieve_recv_activations",
    "_retrieve_recv_grads",
    "_warmup_forward_vote",
    "_warmup_backward_result",
    "_send_meta",
    "_recv_meta",
    "_is_same_rank",
    "_resolve_peer_global_rank",
    "_prepare_forward_infra",
    "clear_runtime_states",
)

EdgeCodec = Codec | DeltaCodec | None


@dataclass(frozen=True)
class Edge:
    """How tensors travel between two neighbouring stages. Both ends have to be given the same; reprs tell.

    Of each direction, either one codec for all floating tensors (float32, bfloat16, float16) of the edge, or
    a sequence with one for each in the order of the stage's outputs; for gradients, of those that travel.
    None sends a tensor as it is. Tensors of other dtypes always travel as they are.

    Attributes:
        forward: For activations. A ``DeltaCodec`` belongs to one tensor of one end of one edge.
        backward: For gradients.
    """

    forward: EdgeCodec | Sequence[EdgeCodec] = None
    backward: Codec | Sequence[Codec | None] | None = None

    def __post_init__(self) -> None:
        for name, allowed in ((FORWARD, (Codec, DeltaCodec)), (BACKWARD, (Codec,))):
            for codec in self.codecs(name):
                if codec is not None and not isinstance(codec, allowed):
                    wanted = " or ".join(kind.__name__ for kind in allowed)
                    raise ValueError(f"{name} must be a {wanted} or None, got {codec!r}")

    def codecs(self, direction: str) -> tuple[Any, ...]:
        """One for all tensors, or one for each."""
        value = getattr(self, direction)
        return tuple(value) if isinstance(value, Sequence) else (value,)

    def deltas(self) -> list[DeltaCodec]:
        return [codec for codec in self.codecs(FORWARD) if isinstance(codec, DeltaCodec)]


@dataclass
class WireBytes:
    """Bytes that a stage has sent: activations, gradients, and what stages agree on between steps."""

    forward: int = 0
    backward: int = 0
    setup: int = 0


class QuantPipelineStage(PipelineStage):
    """A pipeline stage that sends encoded activations and gradients.

    For ``ScheduleGPipe`` and ``Schedule1F1B``. Shapes are inferred in the first step, as always; every
    microbatch of a schedule has the same. Both neighbours have to be of this class. Stages that are
    neighbours on one rank pass tensors as they are.

    At the first step the ends of each edge compare their codecs. With a ``DeltaCodec`` on an edge, both ends
    must be told the samples of each training step (``set_sample_ids``), and compare their stores at the first
    step and then regularly; samples that differ are forgotten by both, with a warning, and sent in full next
    time. In evaluation (``schedule.eval``, or a schedule without a loss) activations travel as they are on
    such an edge, and no store changes.

    Args:
        submodule: what the stage computes.
        stage_index: 0 .. num_stages - 1.
        num_stages: of the whole pipeline.
        device: of the submodule and of the wires.
        input_edge: from stage ``stage_index - 1``; ignored by the first stage.
        output_edge: to stage ``stage_index + 1``; ignored by the last stage. Default of both: nothing is
            encoded.
        timeout: seconds to wait for one message, including the time that the peer computes before it sends.
            With NCCL the timeout of the process group counts instead.
        check_every: training steps from one comparison of the stores of a DeltaCodec to the next.
        group: process group of the pipeline. Default: the world.
        dw_builder: as for ``PipelineStage``.

    Attributes:
        wire_bytes: What has been sent so far.
        repaired: Samples that were forgotten because two stores differed, of all comparisons.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: this version of PyTorch is not one that the class was tested with.
        PipelineError: in a step: a peer is dead or gone, nothing arrives within the timeout, a wire is
            corrupt, or the ends of an edge have different codecs. The step is lost, and with it the pipeline:
            end the processes, start them again and load the last checkpoint.
    """

    def __init__(
        self,
        submodule: torch.nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        *,
        input_edge: Edge | None = None,
        output_edge: Edge | None = None,
        timeout: float = 300.0,
        check_every: int = 100,
        group: dist.ProcessGroup | None = None,
        dw_builder: Callable[[], Callable[..., None]] | None = None,
    ) -> None:
        _check_torch()
        check_at_least(1, check_every=check_every)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < 1e9:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
        for name, edge in (("input_edge", input_edge), ("output_edge", output_edge)):
            if edge is not None and not isinstance(edge, Edge):
                raise ValueError(f"{name} must be an Edge, got {type(edge).__name__}")
        device = torch.device(device)
        super().__init__(submodule, stage_index, num_stages, device, group=group, dw_builder=dw_builder)
        self.timeout = float(timeout)
        self.check_every = check_every
        self.wire_bytes = WireBytes()
        self.repaired = 0
        self._input_edge = Edge() if self.is_first or input_edge is None else input_edge
        self._output_edge = Edge() if self.is_last or output_edge is None else output_edge
        stores = [delta.store for delta in self._input_edge.deltas() + self._output_edge.deltas()]
        if len({id(store) for store in stores}) != len(stores):
            raise ValueError("every DeltaCodec of a stage must have a store of its own, got a shared one")
        own = dist.group.WORLD if group is None else group
        assert own is not None
        backend = own._get_backend(device)
        # Where messages are coalesced, nobody waits for a single one, and the backend watches over them.
        self._watched = not getattr(backend, "supports_coalescing", False)
        self._wires: dict[tuple[str, bool, int], Tensor] = {}
        self._incoming: dict[tuple[str, int], _Message] = {}
        self._samples: _Samples | None = None  # of the next step
        self._step_samples: _Samples | None = None
        self._num_microbatches = 0
        self._agreed = False
        self._steps = 0

    def set_sample_ids(
        self,
        ids: Sequence[int] | Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        *,
        next_ids: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Names the samples of the next training step; on every rank with a DeltaCodec, before each.

        Args:
            ids: [B], int64, one for each sample of the whole batch, in its order. Schedules split the batch
                into microbatches along dimension 0 like ``torch.tensor_split``, and so are these.
            lengths: [B], tokens of each sample that count, as for ``DeltaCodec.plan``. Default: all.
            next_ids: of the step after, to be read from disk in the meantime.

        Raises:
            ValueError: there is not one length for each id.
        """
        samples = sample_ids(ids)
        sizes = None if lengths is None else sample_ids(lengths)
        if sizes is not None and len(sizes) != len(samples):
            raise ValueError(f"lengths must be [B] = [{len(samples)}], got [{len(sizes)}]")
        self._samples = _Samples(samples, sizes)
        for delta in self._input_edge.deltas() + self._output_edge.deltas():
            delta.store.prefetch(samples)
            if next_ids is not None:
                delta.store.prefetch(next_ids)

    # ---- torch's hooks: what travels

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        buffers = [op.tensor for op in super().get_fwd_recv_ops(fwd_chunk_id)]
        return self._receive(FORWARD, fwd_chunk_id, self.stage_index - 1, self._input_edge, buffers)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        buffers = [op.tensor for op in super().get_bwd_recv_ops(bwd_chunk_id)]
        return self._receive(BACKWARD, bwd_chunk_id, self.stage_index + 1, self._output_edge, buffers)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        tensors = [op.tensor for op in super().get_fwd_send_ops(fwd_chunk_id)]
        expected = [tuple(meta.shape) for meta in self._stage_meta.outputs or ()]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if tensors and shapes != expected:
            raise ValueError(
                f"outputs of stage {self.stage_index} must have the shapes of the first microbatch, "
                f"{expected}, got {shapes} in microbatch {fwd_chunk_id}: is the batch split evenly?"
            )
        return self._send(FORWARD, fwd_chunk_id, self.stage_index + 1, self._output_edge, tensors)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        tensors = [op.tensor for op in super().get_bwd_send_ops(bwd_chunk_id)]
        return self._send(BACKWARD, bwd_chunk_id, self.stage_index - 1, self._input_edge, tensors)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        self._decode(FORWARD, fwd_chunk_id)
        return super()._retrieve_recv_activations(fwd_chunk_id)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        self._decode(BACKWARD, bwd_chunk_id)
        return super()._retrieve_recv_grads(bwd_chunk_id)

    def _receive(
        self, direction: str, microbatch: int, peer: int, edge: Edge, buffers: list[Tensor]
    ) -> list[dist.P2POp]:
        """One operation for the message that fills all buffers."""
        if not buffers:
            return []
        place = self._place(peer, direction, microbatch)
        with place.explaining("receiving"):
            parts, size, room = self._parts(edge, direction, microbatch, buffers)
        # gloo ends the process when a message is longer than its buffer, as it might be if stores differed
        wire = self._wire(direction, False, microbatch, room if self._watched else size)
        self._incoming[direction, microbatch] = _Message(place, parts, wire)
        return [self._operation(dist.irecv, wire, place)]

    def _send(
        self, direction: str, microbatch: int, peer: int, edge: Edge, tensors: list[Tensor]
    ) -> list[dist.P2POp]:
        if not tensors:
            return []
        place = self._place(peer, direction, microbatch)
        with place.explaining("encoding"), torch.no_grad():
            parts, size, _ = self._parts(edge, direction, microbatch, tensors)
            wire = self._wire(direction, True, microbatch, size)
            for part in parts:
                part.encode(wire)
        self._count(direction, size)
        return [self._operation(dist.isend, wire, place)]

    def _decode(self, direction: str, microbatch: int) -> None:
        message = self._incoming.pop((direction, microbatch), None)
        if message is None:  # a neighbour on this rank has passed its tensors
            return
        with message.place.explaining("decoding"), torch.no_grad():
            for part in message.parts:
                part.decode(message.wire)

    def _parts(
        self, edge: Edge, direction: str, microbatch: int, tensors: list[Tensor]
    ) -> tuple[list[_Part], int, int]:
        """The parts of a message, its bytes, and the bytes that it could have at most."""
        floating = sum(tensor.dtype in ENCODED for tensor in tensors)
        codecs = edge.codecs(direction)
        if len(codecs) == 1 and not isinstance(getattr(edge, direction), Sequence):
            if isinstance(codecs[0], DeltaCodec) and floating > 1:
                raise ValueError(
                    f"{direction} must name the tensor that a DeltaCodec is for, in a sequence with a codec "
                    f"for each of {floating} floating tensors, got {codecs[0]!r} for all"
                )
            codecs *= floating
        if len(codecs) != floating:
            raise ValueError(
                f"{direction} must have a codec for each of {floating} tensors, got {len(codecs)}"
            )
        remaining = iter(codecs)
        parts = []
        size = spare = 0
        for tensor in tensors:
            codec = next(remaining) if tensor.dtype in ENCODED else None
            if isinstance(codec, DeltaCodec) and not self.has_backward:
                codec = None
            plan = None
            if isinstance(codec, DeltaCodec):
                plan = self._plan(codec, microbatch, tensor)
                num_bytes = plan.wire_size
                spare += plan.room - num_bytes
            elif codec is not None:
                num_bytes = codec.wire_size(tensor.shape)
            else:
                num_bytes = tensor.numel() * tensor.element_size()
            parts.append(_Part(tensor.detach(), codec, plan, size, size + num_bytes))
            size = aligned(size + num_bytes)
        return parts, size, aligned(size + spare)

    def _plan(self, codec: DeltaCodec, microbatch: int, tensor: Tensor) -> DeltaPlan:
        if self._step_samples is None:
            raise ValueError("set_sample_ids must be called before each training step, got no ids")
        ids, lengths = self._step_samples
        count = max(self._num_microbatches, 1)
        begin, end = _chunk(len(ids), count, microbatch)
        sizes = None if lengths is None else lengths[begin:end]
        return codec.plan(ids[begin:end], tensor.shape, lengths=sizes)

    def _wire(self, direction: str, sends: bool, microbatch: int, size: int) -> Tensor:
        """A buffer of the microbatch, in which nothing else is until the step is over."""
        key = direction, sends, microbatch
        wire = self._wires.get(key)
        if wire is None or wire.numel() < size:
            wire = self._wires[key] = torch.zeros(size, dtype=torch.uint8, device=self.device)
        return wire[:size]

    def _count(self, direction: str, num_bytes: int) -> None:
        setattr(self.wire_bytes, direction, getattr(self.wire_bytes, direction) + num_bytes)

    def _place(self, peer: int, direction: str, microbatch: int | None) -> Place:
        return Place(self.stage_index, peer, self.stage_index_to_group_rank[peer], direction, microbatch)

    def _operation(self, op: Callable[..., Any], wire: Tensor, place: Place) -> dist.P2POp:
        operation = dist.P2POp(op, wire, self._resolve_peer_global_rank(place.peer), self.group)
        if self._watched:
            operation.op = WatchedTransfer(op, self._begin, place, self.timeout)
        return operation

    def _begin(self, op: Callable[..., Any], tensor: Tensor, **options: Any) -> Any:
        """Begins a transfer, where nothing is coalesced."""
        return op(tensor, **options)

    # ---- torch's hooks: before the first microbatch

    def clear_runtime_states(self) -> None:
        """A step begins."""
        super().clear_runtime_states()
        self._incoming.clear()
        if self.has_backward:  # evaluation leaves the ids to the next step of training
            self._step_samples, self._samples = self._samples, None
            if self._agreed and self._steps % self.check_every == 0:
                self._compare_stores()
            self._steps += 1

    def _prepare_forward_infra(
        self,
        num_microbatches: int,
        args: Any,
        kwargs: dict[str, Any] | None = None,
        has_backward: bool = False,
    ) -> Any:
        self._num_microbatches = num_microbatches
        return super()._prepare_forward_infra(num_microbatches, args, kwargs, has_backward)

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        """Torch asks here whether shapes are known; they never are. The codecs are compared instead."""
        for peer, edge in self._neighbours():
            mine = self._description(edge)
            theirs = self._exchange(peer, mine.encode()).decode()
            if mine != theirs:
                raise PipelineError(
                    f"stage {self.stage_index}: its edge with stage {peer} must have the same codecs at both "
                    f"ends, got {mine} here and {theirs} there",
                    stage=self.stage_index,
                    peer=peer,
                    direction="setup",
                    microbatch=None,
                )
        self._compare_stores()
        self._agreed = True
        return torch.zeros(1, dtype=torch.int32, device=self.device)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.zeros(1, dtype=torch.int32, device=self.device)

    def _send_meta(self, meta: Any, dst_stage: int) -> None:
        self._send_bytes(dst_stage, pickle.dumps(meta))

    def _recv_meta(self, src_stage: int) -> Any:
        return pickle.loads(self._receive_bytes(src_stage))

    def _neighbours(self) -> Iterator[tuple[int, Edge]]:
        """Stages on other ranks, the previous one first: so a chain of exchanges cannot lock."""
        for exists, peer, edge in (
            (not self.is_first, self.stage_index - 1, self._input_edge),
            (not self.is_last, self.stage_index + 1, self._output_edge),
        ):
            if exists and not self._is_same_rank(peer):
                yield peer, edge

    def _description(self, edge: Edge) -> str:
        checks = f", compared every {self.check_every} steps" if edge.deltas() else ""
        return f"{edge!r}{checks} in a pipeline of {self.num_stages}"

    def _compare_stores(self) -> None:
        """Both ends of every edge forget the samples in which their stores differ."""
        for peer, edge in self._neighbours():
            for delta in edge.deltas():
                store = delta.store
                digest = store.digest().to_bytes(8, "little")
                if self._exchange(peer, digest) == digest:
                    continue
                self._repair(peer, store)

    def _repair(self, peer: int, store: ActivationStore) -> None:
        table = store.table()
        theirs = bytearray(self._exchange(peer, table.numpy().tobytes()))
        other = torch.frombuffer(theirs, dtype=torch.int64).view(-1, 3) if theirs else table[:0]
        forgotten = store.repair(other)
        self.repaired += len(forgotten)
        some = f"{forgotten[:8]}{' ...' if len(forgotten) > 8 else ''}"
        warnings.warn(
            f"stages {self.stage_index} and {peer} have stored different activations of {len(forgotten)} "
            f"samples, {some}; they are sent in full next time",
            RuntimeWarning,
            stacklevel=2,
        )

    def _exchange(self, peer: int, payload: bytes) -> bytes:
        """Sends bytes to a neighbour and returns what it sends."""
        if peer > self.stage_index:
            self._send_bytes(peer, payload)
            return self._receive_bytes(peer)
        received = self._receive_bytes(peer)
        self._send_bytes(peer, payload)
        return received

    def _send_bytes(self, peer: int, payload: bytes) -> None:
        self._transfer(dist.isend, torch.tensor([len(payload)], dtype=torch.int64), peer)
        if payload:
            self._transfer(dist.isend, torch.frombuffer(bytearray(payload), dtype=torch.uint8), peer)
        self._count("setup", 8 + len(payload))

    def _receive_bytes(self, peer: int) -> bytes:
        size = int(self._transfer(dist.irecv, torch.zeros(1, dtype=torch.int64), peer))
        if size == 0:
            return b""
        return self._transfer(dist.irecv, torch.zeros(size, dtype=torch.uint8), peer).numpy().tobytes()

    def _transfer(self, op: Callable[..., Any], message: Tensor, peer: int) -> Tensor:
        operation = self._operation(op, message.to(self.device), self._place(peer, "setup", None))
        end = {"group_dst" if op is dist.isend else "group_src": operation.group_peer}
        operation.op(operation.tensor, group=operation.group, **end).wait()
        return operation.tensor.cpu()


# ---- messages


class _Samples(NamedTuple):
    ids: list[int]
    lengths: list[int] | None


class _Part(NamedTuple):
    """A tensor's bytes in a message, from start to end."""

    tensor: Tensor
    codec: EdgeCodec
    plan: DeltaPlan | None
    start: int
    end: int

    def encode(self, message: Tensor) -> None:
        wire = message[self.start : self.end]
        if isinstance(self.codec, DeltaCodec):
            assert self.plan is not None
            self.codec.encode(self.tensor, self.plan, out=wire)
        elif self.codec is not None:
            self.codec.encode(self.tensor, out=wire)
        else:
            wire.view(self.tensor.dtype).view(self.tensor.shape).copy_(self.tensor)

    def decode(self, message: Tensor) -> None:
        wire = message[self.start : self.end]
        tensor = self.tensor
        if self.codec is None:
            tensor.copy_(wire.view(tensor.dtype).view(tensor.shape))
            return
        out = (
            tensor
            if tensor.is_contiguous()
            else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        )
        if isinstance(self.codec, DeltaCodec):
            assert self.plan is not None
            self.codec.decode(wire, self.plan, tensor.shape, dtype=tensor.dtype, out=out)
        else:
            self.codec.decode(wire, tensor.shape, dtype=tensor.dtype, out=out)
        if out is not tensor:
            tensor.copy_(out)


@dataclass(frozen=True)
class _Message:
    place: Place
    parts: list[_Part]
    wire: Tensor


def _chunk(total: int, count: int, index: int) -> tuple[int, int]:
    """Where ``torch.tensor_split`` begins and ends a part."""
    each, more = divmod(total, count)
    begin = index * each + min(index, more)
    return begin, begin + each + (index < more)


def _check_torch() -> None:
    version = str(torch.__version__)
    if ".".join(version.split(".")[:2]) not in TORCH_VERSIONS:
        raise RuntimeError(
            f"QuantPipelineStage must run with PyTorch {' or '.join(TORCH_VERSIONS)}, whose pipelines it was "
            f"tested with (it replaces private methods), got {version}"
        )
    missing = [name for name in _HOOKS if not hasattr(PipelineStage, name)]
    if missing:
        raise RuntimeError(f"PipelineStage must have the methods that are replaced, got none of {missing}")
