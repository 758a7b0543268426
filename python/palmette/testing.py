# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of Palmette and of code that uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from palmette import _library as _library  # registers the operators


def backends() -> tuple[str, ...]:
    """Names of the CPU bodies that this machine runs, best first; the last one is always ``"scalar"``."""
    return tuple(torch.ops.palmette._backends().split(", "))


def current_backend() -> str:
    """Name of the CPU body in use.

    Raises:
        RuntimeError: the environment variable PALMETTE_ISA names a body that this machine does not run.
    """
    return str(torch.ops.palmette._set_backend(""))


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the enclosed code on one CPU body: ``"scalar"``, ``"avx2"``, ``"avx2x16"`` or ``"avx512"``.

    The choice is global to the process, not to the thread.

    Raises:
        ValueError: the body does not exist or this machine does not run it.
    """
    if name not in backends():
        raise ValueError(f"backend must be one of {', '.join(backends())}, got {name!r}")
    previous = torch.ops.palmette._set_backend(name)
    try:
        yield
    finally:
        torch.ops.palmette._set_backend(previous)


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
