# SPDX-License-Identifier: Apache-2.0
"""Moves, addresses, loads and stores, atomics, fences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .floats import narrow, widen
from .memory import SHARED, WINDOW_BITS, WINDOWS, Access, in_window
from .operands import (
    Frame,
    Mask,
    Modifiers,
    Plain,
    apply,
    apply_ufunc,
    dtype_of,
    instruction,
    lanes_of,
    operands,
)
from .syntax import TYPE_BITS, Address, Instruction, Operand, PtxError, Register, Sink, Vector

Addresses = Callable[["np.ndarray | None"], np.ndarray]  # of the lanes with these numbers, as int64


def addresses(frame: Frame, operand: Operand) -> Addresses:
    """Reads the addresses of [register + offset], [variable + offset] or [offset]."""
    if not isinstance(operand, Address):
        raise PtxError(f"{operand} is no address")
    base, offset = operand.base, operand.offset
    if isinstance(base, Register):
        array = frame.source(base, f"u{frame.bits(base.name)}")
        if array.dtype.itemsize < 4:
            raise PtxError(f"{base.name} is no address")
    else:
        start = 0 if base is None else frame.address_of(base.name) + base.offset
        array = frame.block.constant(start, np.dtype(np.uint64))

    def read(lanes: np.ndarray | None) -> np.ndarray:
        values = array if lanes is None else array[lanes]
        wide = values.view(np.int64) if values.dtype.itemsize == 8 else values.astype(np.int64)
        return wide + offset if offset else wide

    return read


# ---- moves


@instruction("mov")
def _mov(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    kind = modifiers.type("pred", "b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64")
    d, a = operands(ins, 2)
    if isinstance(a, Vector):
        return _pack(frame, ins, kind, d, a)
    if isinstance(d, Vector):
        return _unpack(frame, ins, kind, d, a)
    return apply(frame.target(d, kind), lambda x: x, frame.source(a, kind))


def _pack(frame: Frame, ins: Instruction, kind: str, d: Operand, a: Vector) -> Plain:
    """The first element goes to the lowest bits."""
    part = TYPE_BITS[kind] // len(a.parts)
    if f"b{part}" not in TYPE_BITS or part * len(a.parts) != TYPE_BITS[kind]:
        ins.fail("a vector of this many elements")
    target = frame.target(d, f"b{TYPE_BITS[kind]}")
    sources = [frame.source(x, f"b{part}") for x in a.parts]

    def run(mask: Mask) -> None:
        np.copyto(target, np.stack(sources, axis=1).view(target.dtype)[:, 0], where=mask)

    return run


def _unpack(frame: Frame, ins: Instruction, kind: str, d: Vector, a: Operand) -> Plain:
    count = len(d.parts)
    part = TYPE_BITS[kind] // count
    if f"b{part}" not in TYPE_BITS or part * count != TYPE_BITS[kind]:
        ins.fail("a vector of this many elements")
    source = frame.source(a, f"b{TYPE_BITS[kind]}")
    targets = [(i, frame.target(x, f"b{part}")) for i, x in enumerate(d.parts) if not isinstance(x, Sink)]

    def run(mask: Mask) -> None:
        parts = source.copy().view(dtype_of(f"b{part}")).reshape(-1, count)  # a result may be the source
        for i, target in targets:
            np.copyto(target, parts[:, i], where=mask)

    return run


@instruction("cvta")
def _cvta(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    to = modifiers.flag("to")
    space = modifiers.one("global", "shared", "shared::cta", "local", "const", "param")
    kind = modifiers.type("u64")
    d, a = operands(ins, 2)
    target, source = frame.target(d, kind), frame.source(a, kind)
    if space in ("shared", "shared::cta"):
        window = frame.block.constant(SHARED << WINDOW_BITS, np.dtype(np.uint64))
        return apply_ufunc(target, np.subtract if to else np.add, source, window)
    return apply_ufunc(target, np.positive, source)


@instruction("isspacep")
def _isspacep(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    space = modifiers.one("global", "shared", "shared::cta", "local", "const", "param")
    d, a = operands(ins, 2)
    window = WINDOWS[space.removesuffix("::cta")]
    return apply(frame.target(d, "pred"), lambda x: in_window(x, window), frame.source(a, "u64"))


# ---- loads and stores

_SPACES = ("global", "shared", "shared::cta", "local", "const", "param", "param::entry", "param::func")


def _space(modifiers: Modifiers) -> str | None:
    found = modifiers.optional(*_SPACES)
    return None if found is None else found.split("::")[0]


def _ordering(modifiers: Modifiers) -> None:
    """Memory orders and scopes: threads here see every write at once."""
    if modifiers.optional("weak", "volatile", "relaxed", "acquire", "release", "acq_rel") in (
        "relaxed", "acquire", "release", "acq_rel",
    ):  # fmt: skip
        modifiers.one("cta", "gpu", "sys")


def _caching(modifiers: Modifiers) -> None:
    """Hints to caches."""
    modifiers.optional("ca", "cg", "cs", "lu", "cv", "wb", "wt")
    modifiers.optional(
        "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate"
    )
    modifiers.optional("L2::64B", "L2::128B", "L2::256B")


def _vector(ins: Instruction, modifiers: Modifiers, operand: Operand) -> tuple[Operand, ...]:
    count = {None: 1, "v2": 2, "v4": 4}[modifiers.optional("v2", "v4")]
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    if len(parts) != count:
        ins.fail(f"{len(parts)} registers for {count} elements")
    return parts


_MEMORY_TYPES = tuple(name for name in TYPE_BITS if TYPE_BITS[name] in (8, 16, 32, 64) and name[-2:] != "x2")


@instruction("ld")
def _ld(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    _ordering(modifiers)
    space = _space(modifiers)
    if modifiers.flag("nc") and space != "global":
        ins.fail(".nc is for .global")
    _caching(modifiers)
    d, a = operands(ins, 2)
    parts = _vector(ins, modifiers, d)
    kind = modifiers.type(*_MEMORY_TYPES)
    dtype, count = dtype_of(kind), len(parts)
    access = Access(frame.block.memory, ins, space, dtype.itemsize * count, write=False)
    where = addresses(frame, a)
    targets = [frame.extending_target(part, kind) for part in parts]

    def run(mask: Mask) -> None:
        lanes = lanes_of(mask)
        values = access.load(where(lanes), lanes, dtype, count)
        at = slice(None) if lanes is None else lanes
        if count == 1:
            array, bits = targets[0]
            array[at] = values.view(bits)
        else:
            for i, (array, bits) in enumerate(targets):
                array[at] = values[:, i].view(bits)

    return run


@instruction("st")
def _st(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    _ordering(modifiers)
    space = _space(modifiers)
    if space == "const":
        ins.fail(".const is not written")
    _caching(modifiers)
    a, b = operands(ins, 2)
    parts = _vector(ins, modifiers, b)
    kind = modifiers.type(*_MEMORY_TYPES)
    plain = f"b{TYPE_BITS[kind]}"  # so that NaN keeps its bits
    dtype, count = dtype_of(plain), len(parts)
    access = Access(frame.block.memory, ins, space, dtype.itemsize * count, write=True)
    where = addresses(frame, a)
    sources = [frame.source(part, kind, widest=64).view(dtype) for part in parts]

    def run(mask: Mask) -> None:
        lanes = lanes_of(mask)
        at = slice(None) if lanes is None else lanes
        if count == 1:
            values = sources[0][at]
        else:
            first = sources[0][at]
            values = np.empty((len(first), count), dtype)
            values[:, 0] = first
            for i in range(1, count):
                values[:, i] = sources[i][at]
        access.store(where(lanes), lanes, values)

    return run


# ---- atomics

_INTEGER = ("u32", "s32", "u64", "s64")
_ATOMIC_TYPES = {
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
    "exch": ("b32", "b64"),
    "cas": ("b16", "b32", "b64"),
    "add": ("u32", "s32", "u64", "f32", "f64", "f16", "f16x2", "bf16", "bf16x2"),
    "inc": ("u32",),
    "dec": ("u32",),
    "min": _INTEGER,
    "max": _INTEGER,
}


def _atomic_function(operation: str, kind: str) -> Callable[..., np.ndarray]:
    if operation == "add" and kind not in (*_INTEGER, "f32", "f64"):
        return lambda old, b: narrow(kind, widen(kind, old) + widen(kind, b)).view(old.dtype)
    one = np.uint32(1)
    functions: dict[str, Callable[..., np.ndarray]] = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "exch": lambda old, b: b,
        "cas": lambda old, b, c: np.where(old == b, c, old),
        "inc": lambda old, b: np.where(old >= b, np.uint32(0), old + one),
        "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - one),
    }
    return functions[operation]


@instruction("atom", "red")
def _atomic(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    modifiers.optional("relaxed", "acquire", "release", "acq_rel")
    modifiers.optional("cta", "gpu", "sys")
    space = _space(modifiers)
    operation = modifiers.one(*_ATOMIC_TYPES)
    packed = modifiers.flag("noftz")
    kind = modifiers.type(*_ATOMIC_TYPES[operation])
    if space not in (None, "global", "shared") or packed != (operation == "add" and "16" in kind):
        ins.fail("an atomic operation that is not known")
    count = 2 if operation == "cas" else 1
    if ins.name == "atom":
        d, a, *inputs = operands(ins, 2 + count)
        target = frame.target(d, kind)
    else:
        a, *inputs = operands(ins, 1 + count)
        target = None
    dtype = dtype_of(kind)
    access = Access(frame.block.memory, ins, space, dtype.itemsize, write=True)
    where = addresses(frame, a)
    sources = [frame.source(operand, kind) for operand in inputs]
    function = _atomic_function(operation, kind)

    def run(mask: Mask) -> None:
        lanes = lanes_of(mask)
        at = slice(None) if lanes is None else lanes
        there = where(lanes)
        values = [source[at] for source in sources]
        pieces = access.split(there, lanes)
        old = np.empty(len(there), dtype)
        for buffer, which, offsets in pieces:
            cells = buffer.rows(dtype, 1)
            old[which] = _in_order(cells, access.index(offsets), [v[which] for v in values], function)
        access.count(pieces, there, lanes, False)
        access.count(pieces, there, lanes, True)
        if target is not None:
            target[at] = old

    return run


def _in_order(
    cells: np.ndarray, index: np.ndarray, values: list[np.ndarray], function: Callable[..., np.ndarray]
) -> np.ndarray:
    """One lane after the other; returns what each of them found."""
    if len(np.unique(index)) == len(index):
        old = cells[index]
        cells[index] = function(old, *values)
        return old
    old = np.empty(len(index), cells.dtype)
    for i, cell in enumerate(index.tolist()):
        old[i] = cells[cell]
        cells[cell : cell + 1] = function(old[i : i + 1], *(v[i : i + 1] for v in values))
    return old


# ---- what has no effect here


@instruction("membar")
def _membar(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    modifiers.one("cta", "gl", "sys")
    operands(ins, 0)
    return lambda mask: None


@instruction("fence")
def _fence(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    modifiers.optional("sc", "acq_rel")
    modifiers.one("cta", "gpu", "sys")
    operands(ins, 0)
    return lambda mask: None


@instruction("prefetch", "prefetchu")
def _prefetch(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    modifiers.optional("global", "local")
    modifiers.one("L1", "L2", "L2::evict_last", "L2::evict_normal")
    (a,) = operands(ins, 1)
    addresses(frame, a)
    return lambda mask: None


@instruction("nanosleep")
def _nanosleep(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    modifiers.type("u32")
    operands(ins, 1)
    return lambda mask: None
