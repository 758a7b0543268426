# SPDX-License-Identifier: Apache-2.0
"""Optional dependencies: imported late, and one clear sentence when one is missing."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """An optional package that a pipeline needs is not installed."""


def require(module: str, purpose: str, *, install: str | None = None) -> Any:
    """Import an optional dependency.

    Args:
        module: Name of the module to import.
        purpose: What needs it, the subject of the error message.
        install: What to hand to ``pip install``; the top-level name of ``module`` by default.

    Raises:
        MissingExtraError: ``module`` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            raise  # the package is there and misses something of its own: that message is the better one
        raise MissingExtraError(
            f"{purpose} needs the package {package}, which is not installed: pip install {install or package}"
        ) from None
