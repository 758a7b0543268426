# SPDX-License-Identifier: Apache-2.0
"""ldmatrix, movmatrix and mma. Fragments are laid out by the formulas of the PTX ISA manual.

Products are summed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .data import addresses
from .floats import widen_bf16
from .memory import Access
from .operands import Frame, Mask, Modifiers, instruction, operands
from .syntax import Instruction, Operand, PtxError, Vector
from .warp import Collective

Position = Callable[[int, int, int], "tuple[int, int]"]


def _layout(rows: int, columns: int, elements: int, position: Position) -> np.ndarray:
    """For each element of a matrix, its place among [lane, i], the fragments' elements.

    `position` gives row and column of element i of a fragment, by the lane's groupID and threadID_in_group.
    """
    places = np.full((rows, columns), -1)
    for lane in range(32):
        for i in range(elements):
            places[position(i, lane >> 2, lane % 4)] = lane * elements + i
    if (places < 0).any():
        raise AssertionError("a layout leaves elements out")
    return places


# Matrix Fragments for mma.m16n8k8 and for mma.m16n8k16 with floating point type: A and B of 16-bit elements
_A = {
    8: _layout(16, 8, 4, lambda i, group, thread: (group if i < 2 else group + 8, thread * 2 + (i & 1))),
    16: _layout(
        16,
        16,
        8,
        lambda i, group, thread: (
            group if 0 <= i < 2 or 4 <= i < 6 else group + 8,
            thread * 2 + (i & 1) + (8 if i >= 4 else 0),
        ),
    ),
}
_B = {
    8: _layout(8, 8, 2, lambda i, group, thread: (thread * 2 + i, group)),
    16: _layout(16, 8, 4, lambda i, group, thread: (thread * 2 + (i & 1) + (8 if i >= 2 else 0), group)),
}
# C and D, of .f32
_C = _layout(16, 8, 4, lambda i, group, thread: (group if i < 2 else group + 8, thread * 2 + (i & 1)))


def _warps(mask: Mask) -> np.ndarray | slice:
    return slice(None) if mask is True else mask.reshape(-1, 32)[:, 0]


def _fragments(registers: list[np.ndarray], warps: np.ndarray | slice) -> np.ndarray:
    """[warp, lane, register]"""
    first = registers[0].reshape(-1, 32)[warps]
    fragments = np.empty((*first.shape, len(registers)), first.dtype)
    for i, register in enumerate(registers):
        fragments[:, :, i] = register.reshape(-1, 32)[warps]
    return fragments


def _registers(ins: Instruction, operand: Operand, count: int) -> tuple[Operand, ...]:
    if not isinstance(operand, Vector) or len(operand.parts) != count:
        ins.fail(f"expected {count} registers in braces")
    return operand.parts


@instruction("mma")
def _mma(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Collective:
    modifiers.one("sync")
    modifiers.one("aligned")
    k = int(modifiers.one("m16n8k8", "m16n8k16").removeprefix("m16n8k"))
    modifiers.one("row")
    modifiers.one("col")
    modifiers.type("f32")
    kind = modifiers.type("f16", "bf16")
    modifiers.type(kind)
    modifiers.type("f32")
    d, a, b, c = operands(ins, 4)
    left = [frame.source(x, "b32") for x in _registers(ins, a, k // 4)]
    right = [frame.source(x, "b32") for x in _registers(ins, b, k // 8)]
    addend = [frame.source(x, "f32") for x in _registers(ins, c, 4)]
    result = [frame.target(x, "f32") for x in _registers(ins, d, 4)]

    def elements(registers: list[np.ndarray], warps: np.ndarray | slice) -> np.ndarray:
        """Of each warp, in the order of lanes and then of the fragment."""
        fragments = _fragments(registers, warps)
        halves = fragments.view(np.uint16).reshape(len(fragments), -1)
        return halves.view(np.float16) if kind == "f16" else widen_bf16(halves)

    places_of_a, places_of_b = _A[k], _B[k]

    def run(mask: Mask) -> None:
        warps = _warps(mask)
        matrix_a = elements(left, warps).take(places_of_a, axis=1).astype(np.float64)
        matrix_b = elements(right, warps).take(places_of_b, axis=1).astype(np.float64)
        sums = _fragments(addend, warps).reshape(len(matrix_a), -1)
        product = np.matmul(matrix_a, matrix_b) + sums.take(_C, axis=1)
        sums[:, _C] = product
        for i, target in enumerate(result):
            target.reshape(-1, 32)[warps] = sums[:, i::4]

    return Collective(frame, ins, None, run, aligned=True)


@instruction("ldmatrix")
def _ldmatrix(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Collective:
    modifiers.one("sync")
    modifiers.one("aligned")
    modifiers.one("m8n8")
    count = int(modifiers.one("x1", "x2", "x4")[1])
    transposed = modifiers.flag("trans")
    space = modifiers.optional("shared", "shared::cta")
    modifiers.type("b16")
    d, a = operands(ins, 2)
    if space is None:
        raise PtxError("generic addresses are not supported")
    targets = [frame.target(x, "b32") for x in _registers(ins, d, count)]
    where = addresses(frame, a)
    access = Access(frame.block.memory, ins, "shared", 16, write=False)
    # threads 0-7 point at the rows of the first matrix, 8-15 at those of the second, and so on
    all_pointers = (np.arange(frame.block.lanes).reshape(-1, 32)[:, : 8 * count]).reshape(-1)

    def run(mask: Mask) -> None:
        warps = _warps(mask)
        pointers = all_pointers if mask is True else all_pointers[mask[all_pointers]]
        rows = access.load(where(pointers), pointers, np.dtype(np.uint16), 8)
        matrices = rows.reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        # lane t gets elements 2 (t % 4) and 2 (t % 4) + 1 of row t / 4
        fragments = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
        for i, target in enumerate(targets):
            target.reshape(-1, 32)[warps] = fragments[:, i]

    return Collective(frame, ins, None, run, aligned=True)


@instruction("movmatrix")
def _movmatrix(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Collective:
    modifiers.one("sync")
    modifiers.one("aligned")
    modifiers.one("m8n8")
    modifiers.one("trans")
    modifiers.type("b16")
    d, a = operands(ins, 2)
    target, source = frame.target(d, "b32"), frame.source(a, "b32")

    def run(mask: Mask) -> None:
        warps = _warps(mask)
        matrices = source.reshape(-1, 32)[warps].copy().view(np.uint16).reshape(-1, 8, 8)
        fragments = np.ascontiguousarray(matrices.transpose(0, 2, 1)).reshape(-1, 64).view(np.uint32)
        target.reshape(-1, 32)[warps] = fragments

    return Collective(frame, ins, None, run, aligned=True)
