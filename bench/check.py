# SPDX-License-Identifier: Apache-2.0
"""Results are compared with float64 before anything is timed."""

from __future__ import annotations

import numpy as np
import torch

from bench.cases import Case, Inputs

# Largest error against float64 that any contender may show: about ten times what is measured.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
MAX_QUERIES = 12


def sample(case: Case) -> list[int]:
    """Queries to check: first, last, and some in between."""
    count = len(case.geometry.pos)
    return np.unique(np.linspace(0, count - 1, min(count, MAX_QUERIES)).astype(int)).tolist()


def expected(case: Case, inputs: Inputs, queries: list[int]) -> torch.Tensor:
    """float64 [queries, Hq, Dv]."""
    k, v = (x if inputs.slots is None else x[inputs.slots] for x in (inputs.k, inputs.v))
    rows = []
    for query, visible in zip(queries, case.geometry.visible(queries), strict=True):
        keys, values = k[visible].double(), v[visible].double()
        q = inputs.q[query].double().view(case.num_kv_heads, case.group_size, -1)
        scores = torch.einsum("hgd,nhd->hgn", q, keys) * case.head_dim**-0.5
        rows.append(torch.einsum("hgn,nhd->hgd", scores.softmax(-1), values).flatten(0, 1))
    return torch.stack(rows)


def check(name: str, case: Case, out: torch.Tensor, want: torch.Tensor, queries: list[int]) -> float:
    """The largest error of ``out`` on the sampled queries.

    Raises:
        AssertionError: It is too large: what would be timed is not this attention.
    """
    error = (out[queries].double() - want).abs().max().item()
    if not error <= TOLERANCE[case.torch_dtype]:
        raise AssertionError(
            f"{case.name}: {name} is off by {error:.3g}, at most {TOLERANCE[case.torch_dtype]} is right"
        )
    return error
