# SPDX-License-Identifier: Apache-2.0
"""Generators of random numbers that are functions of what they are for."""

from __future__ import annotations

import hashlib

import torch


def generator_for(*purpose: int | str) -> torch.Generator:
    """A generator whose draws depend on ``purpose`` alone, and on all of it.

    Torch's CPU generator looks at the low 32 bits of a seed only, so purposes are hashed instead of being put
    side by side in one number.
    """
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
