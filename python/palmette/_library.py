# SPDX-License-Identifier: Apache-2.0
"""Loads libpalmette.so, which registers every operator under ``torch.ops.palmette``."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch

# PALMETTE_LIBRARY names another build of the same library, for instance one with debug information.
LIBRARY = Path(os.environ.get("PALMETTE_LIBRARY") or Path(__file__).parent / "lib" / "libpalmette.so")

if not LIBRARY.is_file():
    raise ImportError(
        f"palmette's compiled library is missing ({LIBRARY.name} in {LIBRARY.parent}): build it with "
        "pip install --no-build-isolation ."
    )
torch.ops.load_library(str(LIBRARY))

# The CUDA kernels, where they have been built. They load without a GPU or a driver.
_CUDA = LIBRARY.with_name("libpalmette_cuda.so")
if _CUDA.is_file():
    try:
        torch.ops.palmette._load_gpu_library(str(_CUDA))
    except RuntimeError as error:
        warnings.warn(f"palmette: the CUDA kernels are left out: {error}", RuntimeWarning, stacklevel=2)


@functools.cache
def _written(op: torch._ops.OpOverload) -> tuple[int, ...]:
    """Which arguments the operator writes to."""
    infos = (argument.alias_info for argument in op._schema.arguments)
    return tuple(i for i, info in enumerate(infos) if info is not None and info.is_write)


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Calls an operator; what it finds wrong with the *values* of its arguments becomes a ValueError.

    Shapes and dtypes are checked in Python. Values (an index out of range, a cycle) are only read by the
    operator, whose errors the stable ABI can only deliver as RuntimeError.

    Tensors that the operator writes to get a new version, so that autograd notices when one of them was
    saved for a backward pass.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        result = op(*args)
    except RuntimeError as error:
        if " must be " in str(error).partition("\n")[0]:
            raise ValueError(str(error)) from None
        raise
    for i in _written(op):
        if not args[i].is_inference():
            torch.autograd.graph.increment_version(args[i])
    return result
