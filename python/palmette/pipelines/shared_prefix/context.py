# SPDX-License-Identifier: Apache-2.0
"""What a forward depends on beside its inputs: random numbers and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU's generator and the device's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextmanager
def random_state_of(states: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    """Within, random numbers begin from ``states`` (None: go on); afterwards they are where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if states is not None:
            torch.set_rng_state(states[0])
            if device.type == "cuda":
                torch.cuda.set_rng_state(states[1], device)
        yield


def autocast_of(device: torch.device) -> torch.autocast:
    """Autocast as it is now, to be entered later or again.

    It keeps no casts of weights: one made without a graph, in a prefix that is going to run again, would be
    taken for the pass with one.
    """
    kind = device.type
    return torch.autocast(
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    )
