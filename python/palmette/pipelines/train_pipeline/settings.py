# SPDX-License-Identifier: Apache-2.0
"""How large everything is, and what is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...codecs import CastCodec, Codec, FixpointCodec, TahCodec
from ..activation_store import ActivationStore
from ..delta_codec import DeltaCodec


@dataclass(frozen=True)
class Settings:
    """Everything that decides the losses, but for the model.

    Attributes:
        layers: Of the model, half of them in either stage; None: all.
        context: Tokens of a sample.
        batch: Samples of a step.
        microbatches: That a batch is cut into.
        samples, epochs: Every sample is seen once in each epoch.
        held_out: Samples for evaluation.
        learning_rate: Of AdamW, after a warm-up of ``warmup`` steps.
        ratios: Rates of the link: so that the bytes of a step in float32 take so many times the seconds that
            a step computes.
        timed: Steps that are timed at each rate.
        seed: Of the order of samples.
    """

    layers: int | None = None
    context: int = 128
    batch: int = 2
    microbatches: int = 2
    samples: int = 32
    epochs: int = 4
    held_out: int = 16
    learning_rate: float = 2e-5
    warmup: int = 6
    ratios: tuple[float, ...] = (0.25, 1.0, 4.0, 16.0)
    timed: int = 3
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs


DEFAULT = Settings()
QUICK = Settings(layers=2, context=32, batch=4, samples=8, epochs=3, held_out=4, timed=2, ratios=(1.0, 8.0))


class Method(NamedTuple):
    """A way to send.

    Attributes:
        title: For tables.
        forward: Makes the codec of activations, given the store for those that need one.
        backward: The codec of gradients.
    """

    title: str
    forward: Callable[[Callable[[], ActivationStore]], Codec | DeltaCodec]
    backward: Codec


_PLAIN = TahCodec(allocation="none", gate="never")
METHODS = {
    "fp32": Method("fp32", lambda store: CastCodec(), CastCodec()),
    "bf16": Method("bf16", lambda store: CastCodec(torch.bfloat16), CastCodec(torch.bfloat16)),
    "plain": Method("plain 4-bit", lambda store: _PLAIN, _PLAIN),
    "aq-sgd": Method("AQ-SGD (fw 4, bw 8)", lambda store: DeltaCodec(store(), bits=4), FixpointCodec(8)),
    "tah": Method("TAH (fw 3/4, bw 6)", lambda store: TahCodec(), FixpointCodec(6)),
    "tah-range": Method(
        "TAH, range gate (fw 3/4, bw 6)", lambda store: TahCodec(gate="range"), FixpointCodec(6)
    ),
    "tah-delta": Method(
        "TAH of deltas (fw 3/4, bw 6)", lambda store: DeltaCodec(store(), codec=TahCodec()), FixpointCodec(6)
    ),
}
