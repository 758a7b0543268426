# SPDX-License-Identifier: Apache-2.0
"""Loads libpalmette.so, which registers every operator under ``torch.ops.palmette``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# PALMETTE_LIBRARY names another build of the same library, for instance one with debug information.
LIBRARY = Path(os.environ.get("PALMETTE_LIBRARY") or Path(__file__).parent / "lib" / "libpalmette.so")

if not LIBRARY.is_file():
    raise ImportError(
        f"palmette's compiled library is missing ({LIBRARY.name} in {LIBRARY.parent}): build it with "
        "pip install --no-build-isolation ."
    )
torch.ops.load_library(str(LIBRARY))


def call(op: Callable[..., T], *args: Any) -> T:
    """Calls an operator; what it finds wrong with the *values* of its arguments becomes a ValueError.

    Shapes and dtypes are checked in Python. Values (an index out of range, a cycle) are only read by the
    operator, whose errors the stable ABI can only deliver as RuntimeError.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        if " must be " in str(error).partition("\n")[0]:
            raise ValueError(str(error)) from None
        raise
