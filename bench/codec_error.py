# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.codec_error [--out FILE.md]``: errors of tile quantization, option by option.

Relative errors on synthetic tiles with outliers and on activations of SmolLM2, and the perplexity of SmolLM2
with a quantized boundary in its middle.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import palmette
import torch
from palmette import TahCodec
from palmette.nn import QuantBoundary
from palmette.pipelines.models import load_model
from palmette.pipelines.train_sparse.report import table
from torch import Tensor

LAYER = 15  # the boundary is behind so many layers
TEXT = Path("/usr/share/common-licenses/GPL-3")
TOKENS, WINDOW = 6144, 512

# public: what the first version of TAH-Quant's code does
OPTIONS: dict[str, dict[str, Any]] = {
    "all 4 bits, no transform": {"allocation": "none", "gate": "never"},
    "public: tokens 3/4, ratio gate, unrounded": {"rounded": False},
    "... rounded metadata": {},
    "... range gate": {"gate": "range"},
    "... tiles 3/4, range gate": {"allocation": "tile", "gate": "range"},
    "... fp32 metadata": {"allocation": "tile", "gate": "range", "metadata": "fp32"},
    "all 4 bits, every tile transformed": {"allocation": "none", "gate": "always"},
    "all 4 bits, range gate": {"allocation": "none", "gate": "range"},
}


def relative_error(x: Tensor, **options: Any) -> float:
    decoded = palmette.tah_decode(palmette.tah_encode(x, **options), x.shape)
    return float((decoded - x).norm() / x.norm())


def synthetic(outliers: int) -> Tensor:
    """[1, 4096, 64]: normal numbers, in every tile so many of them about 60."""
    draw = torch.Generator().manual_seed(outliers)
    x = torch.randn(1, 4096, 64, generator=draw)
    place = torch.rand(4096, 64, generator=draw).argsort(1)[:, :outliers]
    size = 60 * (1 + 0.1 * torch.rand(4096, outliers, generator=draw))
    sign = torch.randn(4096, outliers, generator=draw).sign()
    x[0].scatter_(1, place, size * sign)
    return x


@torch.no_grad()
def activations(model: Any, tokens: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """What is behind some layers, [B, S, C]."""
    found: dict[int, Tensor] = {}
    hooks = [
        model.model.layers[layer - 1].register_forward_hook(
            lambda _, __, out, layer=layer: found.update({layer: out[0] if isinstance(out, tuple) else out})
        )
        for layer in layers
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, codec: TahCodec | None) -> float:
    boundary = QuantBoundary(codec, None)

    def through(_: Any, __: Any, out: Any) -> Any:
        return (boundary(out[0]), *out[1:]) if isinstance(out, tuple) else boundary(out)

    hook = model.model.layers[LAYER - 1].register_forward_hook(through)
    total = 0.0
    for window in tokens:
        logits = model(window[None, :-1]).logits
        total += float(torch.nn.functional.cross_entropy(logits[0].float(), window[1:]))
    hook.remove()
    return math.exp(total / len(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    model, tokenizer = load_model()
    model.set_attn_implementation("sdpa")
    ids = torch.tensor(tokenizer(TEXT.read_text(), verbose=False)["input_ids"])[:TOKENS]
    tokens = ids.view(-1, WINDOW)
    outliers = (0, 1, 2, 4)
    data = {f"{n} outliers": synthetic(n) for n in outliers}
    layers = (5, LAYER, 25)
    data |= {f"layer {n}": x for n, x in activations(model, tokens, layers).items()}
    rows = [
        [name, *(f"{relative_error(x, **options):.4f}" for x in data.values())]
        for name, options in OPTIONS.items()
    ]
    text = ["Relative errors, tiles of 64:", "", table(["", *data], rows), ""]

    exact = perplexity(model, tokens, None)
    rows = [["float32", f"{exact:.3f}", "", "32"]]
    for bits in (3, 4):
        for name, gate in (("raw", "never"), ("every tile transformed", "always"), ("range gate", "range")):
            codec = TahCodec(allocation="none", gate=gate, high_bits=bits, low_bits=min(bits, 3))
            found = perplexity(model, tokens, codec)
            size = codec.wire_size((1, WINDOW, 576)) * 8 / WINDOW / 576
            rows.append([f"{bits} bits, {name}", f"{found:.3f}", f"{found / exact - 1:+.2%}", f"{size:.2f}"])
    for name, codec in (
        ("3/4 bits, public options", TahCodec(rounded=False)),
        ("3/4 bits, defaults", TahCodec()),
    ):
        found = perplexity(model, tokens, codec)
        size = codec.wire_size((1, WINDOW, 576)) * 8 / WINDOW / 576
        rows.append([name, f"{found:.3f}", f"{found / exact - 1:+.2%}", f"{size:.2f}"])
    text += [
        f"Perplexity of SmolLM2-135M-Instruct on the GPL 3 ({TOKENS} tokens, windows of {WINDOW}), "
        f"the activations behind layer {LAYER} quantized in tiles of 64:",
        "",
        table(["", "perplexity", "over float32", "bits per element"], rows),
    ]
    result = "\n".join(text) + "\n"
    print(result)
    if out is not None:
        out.write_text(result)


if __name__ == "__main__":
    main()
