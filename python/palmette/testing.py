# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of Palmette and of code that uses it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from palmette import _library  # registers the operators

EMULATORS = ("emulated", "emulated_check")
_ORDERS = ("forward", "reverse", "random")
_H100_SHARED = 227 << 10
_settings = (0, 1, 32, _H100_SHARED, 0)  # of the emulators, as emulator() set them last
_lock = threading.Lock()  # of _settings and _recordings
_callback = threading.local()  # .running: this thread is in a callback of recorded_launches()


@functools.cache
def _emulator(name: str) -> ctypes.CDLL | None:
    """The emulator's library, opened; None where it is not built."""
    path = _library.LIBRARY.parent / f"libpalmette_{name}.so"
    if not path.is_file():
        return None
    torch.ops.palmette._load_gpu_library(str(path))
    return ctypes.CDLL(str(path))


def _emulators() -> list[ctypes.CDLL]:
    return [library for name in EMULATORS if (library := _emulator(name)) is not None]


def backends() -> tuple[str, ...]:
    """Names of what CPU tensors can run on here.

    The bodies that this machine runs, best first, down to ``"scalar"``; then the emulators of a GPU that are
    built: ``"emulated"``, and ``"emulated_check"``, which looks at every access to memory; then ``"cuda"``,
    where there is a GPU and kernels for it.
    """
    for name in EMULATORS:
        _emulator(name)
    cuda = torch.cuda.is_available() and torch.ops.palmette._gpu_kernels("cuda") != ""
    return (*torch.ops.palmette._backends().split(", "), *(("cuda",) if cuda else ()))


def current_backend() -> str:
    """Name of the CPU body in use.

    Raises:
        RuntimeError: the environment variable PALMETTE_ISA names a body that this machine does not run.
    """
    return str(torch.ops.palmette._set_backend(""))


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the enclosed code on one CPU body, or on the GPU kernels as the emulator executes them, or a GPU.

    The choice is global to the process, not to the thread; but for ``"cuda"``, which is the thread's.

    Args:
        name: ``"scalar"``, ``"avx2"``, ``"avx2x16"``, ``"avx512"``, ``"emulated"``, ``"emulated_check"`` or
            ``"cuda"``: there, operators' CPU tensors are copied to the GPU, and results back, at each call.

    Raises:
        ValueError: the backend does not exist, is not built, or this machine does not run it.
        RuntimeError: the environment variable PALMETTE_ISA names a body that this machine does not run.
    """
    if name not in backends():
        raise ValueError(f"backend must be one of {', '.join(backends())}, got {name!r}")
    if name == "cuda":
        with _OperatorsOn("cuda"):
            yield
        return
    previous = torch.ops.palmette._set_backend(name)
    try:
        yield
    finally:
        torch.ops.palmette._set_backend(previous)


# Arguments whose values an operator checks before a kernel runs: always, or where they are on the CPU.
_HOST_ARGUMENTS = {"nodes", "tree_counts", "draft_tokens", "src_slots", "dst_slots"}
_HOST_ARGUMENTS |= {"q_indptr", "cmp_indptr", "token_indptr", "key_start"}


class _OperatorsOn(TorchDispatchMode):
    """While entered, the package's operators with GPU kernels run on copies of their tensors on a device.

    Results come back to the CPU, and so does what an operator changes in place. So tests that make CPU
    tensors are tests of a GPU too. Copies are of whole storages: they have the strides of the tensors, and
    what shared memory shares it there. Tables that operators read on the host stay where they are.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = torch.device(device)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        if func.namespace != "palmette" or not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            return func(*args, **kwargs)
        if any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)  # the operator's fake looks at shapes only
        arguments = func._schema.arguments
        given = dict(zip((x.name for x in arguments), args, strict=False)) | kwargs
        copies: dict[int, torch.Tensor] = {}  # bytes there, by the address here

        def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
            empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            return empty.set_(tensor.untyped_storage())

        def there(tensor: torch.Tensor) -> torch.Tensor:
            address = tensor.untyped_storage().data_ptr()
            if address not in copies:
                copies[address] = bytes_of(tensor).to(self.device, copy=True)
            copy = torch.empty(0, dtype=tensor.dtype, device=self.device)
            place = (tensor.storage_offset(), tensor.size(), tensor.stride())
            return copy.set_(copies[address].untyped_storage(), *place)

        moved = {
            key: value if key in _HOST_ARGUMENTS else tree_map_only(torch.Tensor, there, value)
            for key, value in given.items()
        }
        result = func(**moved)
        written = {x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write}
        for tensor in tree_leaves([given[key] for key in written & given.keys()]):
            if tensor is not None:
                bytes_of(tensor).copy_(copies[tensor.untyped_storage().data_ptr()])
        return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), result)


@contextlib.contextmanager
def emulator(
    *,
    order: str = "forward",
    seed: int = 1,
    warp_size: int = 32,
    shared_limit: int = 227 << 10,
    count_requests: bool = False,
) -> Iterator[None]:
    """How the emulators execute kernels while the enclosed code runs: in all threads, until it is left.

    Args:
        order: of blocks, warps and lanes: ``"forward"``, ``"reverse"`` or ``"random"``.
        seed: of the random order, at least 0; the same seed is the same schedule.
        warp_size: 32, or 64 as on some AMD GPUs, where kernels use no tensor cores.
        shared_limit: bytes of shared memory that a block may have. Default: an H100's.
        count_requests: ``"emulated_check"`` counts requests, sectors and conflicts of banks too, which makes
            it slower.

    Raises:
        ValueError: order or warp_size is unknown, seed or shared_limit out of range.
    """
    if order not in _ORDERS:
        raise ValueError(f"order must be one of {', '.join(_ORDERS)}, got {order!r}")
    if warp_size not in (32, 64):
        raise ValueError(f"warp_size must be 32 or 64, got {warp_size}")
    for name, value in (("seed", seed), ("shared_limit", shared_limit)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise ValueError(f"{name} must be an integer in [0, 2^63), got {value!r}")

    def configure(settings: tuple[int, int, int, int, int]) -> tuple[int, int, int, int, int]:
        global _settings
        with _changing():
            for library in _emulators():
                kind, drawn, lanes, limit, count = settings
                library.palmette_emulator_configure(
                    kind, ctypes.c_uint64(drawn), lanes, ctypes.c_uint64(limit), count
                )
            before, _settings = _settings, settings
        return before

    before = configure((_ORDERS.index(order), seed, warp_size, shared_limit, int(count_requests)))
    try:
        yield
    finally:
        configure(before)


@dataclass(frozen=True)
class Traffic:
    """Bytes that kernels moved between one tensor and the chip, each time an instruction asked for them.

    With ``emulator(count_requests=True)``, also what a warp asks for by one instruction (a request), and the
    sectors of 32 bytes that the requests touch.
    """

    read: int
    written: int
    atomic: int
    read_requests: int = 0
    read_sectors: int = 0
    write_requests: int = 0
    write_sectors: int = 0


def traffic(name: str) -> Traffic:
    """What the last operator on ``"emulated_check"`` moved of a tensor, by the argument's name (``"k"``).

    An operator that ran on another backend since, or whose arguments were refused, has left it as it was.

    Raises:
        ValueError: that operator had no such tensor, or the check build of the emulator is missing.
    """
    library = _emulator("emulated_check")
    counts = (ctypes.c_uint64 * 7)()
    if library is None or not library.palmette_emulator_traffic(name.encode(), counts):
        raise ValueError(f"name must be a tensor of the last operator on 'emulated_check', got {name!r}")
    return Traffic(*counts)


@dataclass(frozen=True)
class SharedTraffic:
    """What shared memory did for the warps of an operator.

    Attributes:
        requests: what a warp asks for by one instruction.
        wavefronts: a wavefront gives each of the 32 banks one word of 4 bytes.
        least: wavefronts that the same words would take if no two of a request shared a bank.
        conflicts: wavefronts above the least, by line of the source (``"product.cuh:30"``).
    """

    requests: int
    wavefronts: int
    least: int
    conflicts: dict[str, int]


def shared_traffic() -> SharedTraffic:
    """What the last operator on ``"emulated_check"`` did to shared memory.

    It is counted in the enclosed code of ``emulator(count_requests=True)``; elsewhere all counts are 0.

    Raises:
        ValueError: the check build of the emulator is missing.
    """
    library = _emulator("emulated_check")
    if library is None:
        raise ValueError("the backend 'emulated_check' is not built")
    counts = (ctypes.c_uint64 * 3)()
    library.palmette_emulator_shared_traffic.restype = ctypes.c_char_p
    conflicts: dict[str, int] = {}
    for line in library.palmette_emulator_shared_traffic(counts).decode().splitlines():
        place, wavefronts = line.rsplit(" ", 1)
        conflicts[place] = conflicts.get(place, 0) + int(wavefronts)
    requests, wavefronts, least = counts
    return SharedTraffic(requests, wavefronts, least, conflicts)


@dataclass(frozen=True)
class LaunchMemory:
    """A tensor that a kernel may touch: the bytes at ``address``, from the first element to the last."""

    name: str
    address: int
    writable: bool
    before: bytes
    after: bytes | None = None


@dataclass(frozen=True)
class RecordedLaunch:
    """A kernel as an emulator ran it, with all that another machine needs to run it too."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: bytes
    memory: tuple[LaunchMemory, ...]


class _Extent(ctypes.Structure):  # csrc/gpu/library.h
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("writable", ctypes.c_bool),
    )


class _LaunchRecord(ctypes.Structure):  # csrc/gpu/emulator/record.h
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("parameters", ctypes.c_void_p),
        ("parameter_bytes", ctypes.c_uint64),
        ("extents", ctypes.POINTER(_Extent)),
        ("num_extents", ctypes.c_uint64),
    )


_Recorder = ctypes.CFUNCTYPE(None, ctypes.POINTER(_LaunchRecord), ctypes.c_int)


def _three(extents: ctypes.Array[ctypes.c_uint32]) -> tuple[int, int, int]:
    return extents[0], extents[1], extents[2]


class _Recording:
    """What one ``recorded_launches()`` has seen so far."""

    def __init__(
        self, before: Callable[[str], None] | None, then: Callable[[RecordedLaunch], None] | None
    ) -> None:
        self.before, self.then = before, then
        self.launches: list[RecordedLaunch] = []
        self.started = False  # between before and after a launch
        self.error: BaseException | None = None  # of a callback: nothing may be thrown through the emulator

    def see(self, launch: _LaunchRecord, done: bool) -> None:
        if self.error is not None:
            return
        try:
            if not done:
                self.started = True
                self._start(launch)
            elif self.started:  # else the recording has begun within a launch of another thread
                self.started = False
                self._finish()
        except BaseException as error:
            self.error = error

    def _start(self, launch: _LaunchRecord) -> None:
        if self.before is not None:
            self.before(launch.name.decode())
        memory = (
            LaunchMemory(e.name.decode(), e.data, e.writable, ctypes.string_at(e.data, e.bytes))
            for e in launch.extents[: launch.num_extents]
        )
        parameters = ctypes.string_at(launch.parameters, launch.parameter_bytes)
        shape = _three(launch.grid), _three(launch.block)
        name = launch.name.decode()
        self.launches.append(RecordedLaunch(name, *shape, launch.shared_bytes, parameters, tuple(memory)))

    def _finish(self) -> None:
        memory = (
            replace(m, after=ctypes.string_at(m.address, len(m.before))) for m in self.launches[-1].memory
        )
        self.launches[-1] = replace(self.launches[-1], memory=tuple(memory))
        if self.then is not None:
            self.then(self.launches[-1])


_recordings: list[_Recording] = []


@_Recorder
def _record(pointer: ctypes._Pointer[_LaunchRecord], done: int) -> None:
    _callback.running = True
    try:
        for recording in tuple(_recordings):
            recording.see(pointer.contents, bool(done))
    finally:
        _callback.running = False


def _change_recordings(add: _Recording | None = None, remove: _Recording | None = None) -> None:
    with _changing():
        _recordings[:] = [r for r in _recordings if r is not remove] + ([] if add is None else [add])
        for library in _emulators():
            library.palmette_emulator_record(_record if _recordings else None)


@contextlib.contextmanager
def _changing() -> Iterator[None]:
    """Holds the lock; within a callback, whose operator others wait for, that would be for ever."""
    if getattr(_callback, "running", False):
        raise RuntimeError("a callback of recorded_launches() cannot change the emulators")
    with _lock:
        yield


@contextlib.contextmanager
def recorded_launches(
    then: Callable[[RecordedLaunch], None] | None = None,
    *,
    before: Callable[[str], None] | None = None,
) -> Iterator[list[RecordedLaunch]]:
    """The kernels that the emulators run in the enclosed code, each with its memory before and after.

    An operator may launch several kernels, of which one reads what another wrote: a ``LaunchMemory``'s
    ``before`` is what memory holds right before a launch. Launches of all threads are recorded, and those of
    a recording within a recording by both. When an operator fails, its last launch has no ``after``.

    Args:
        then: is called with every launch when it is done, before the operator goes on. It cannot run
            operators on the emulator.
        before: is called with the name of every kernel right before it runs. Operators have checked their
            arguments by then: what it changes in memory is what a launch of a captured CUDA graph would find.

    Raises:
        Exception: what ``then`` or ``before`` raised, at the end of the enclosed code; nothing was recorded
            from then on.
    """
    recording = _Recording(before, then)
    _change_recordings(add=recording)
    try:
        yield recording.launches
    finally:
        _change_recordings(remove=recording)
    if recording.error is not None:
        raise recording.error


def assert_accurate(
    actual: torch.Tensor,
    expected: torch.Tensor,
    baseline: torch.Tensor | None = None,
    *,
    factor: float = 2.0,
    atol: float = 1e-6,
    name: str = "result",
) -> None:
    """Compares a kernel's result with a float64 reference.

    inf and NaN have to be at the same places; elsewhere the largest error is at most ``factor`` times the
    largest error of ``baseline``, plain PyTorch in the same dtype, plus ``atol``.

    Args:
        actual: the result, any floating dtype.
        expected: the reference in float64, same shape.
        baseline: the same computation by plain PyTorch in the dtype of the inputs. Default: none, only
            ``atol`` counts.

    Raises:
        AssertionError: with the place and the size of the largest error.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name} must be {list(expected.shape)}, got {list(actual.shape)}")
    got, want = actual.detach().double(), expected.detach().double()
    for kind, mask in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (mask(got) != mask(want)).nonzero()
        if len(wrong):
            place = tuple(wrong[0].tolist())
            raise AssertionError(f"{name}: {kind} differs at {place}: got {got[place]}, wanted {want[place]}")
    finite = torch.isfinite(want)
    error = torch.where(finite, (got - want).abs(), 0.0)
    limit = atol
    if baseline is not None:
        allowed = torch.where(finite, (baseline.detach().double() - want).abs(), 0.0).nan_to_num(0.0)
        limit += factor * (allowed.max().item() if allowed.numel() else 0.0)
    if error.numel() and error.max().item() > limit:
        flat = int(error.argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
        raise AssertionError(
            f"{name}: error {error.max().item():.3g} at {place}, limit {limit:.3g}: "
            f"got {got[place]}, wanted {want[place]}"
        )
