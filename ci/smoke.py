# SPDX-License-Identifier: Apache-2.0
"""Uses an installed palmette on every body that this machine runs: what a wheel must be able to do."""

from pathlib import Path

import palmette
import torch
from palmette import testing

assert Path(__file__).parent.joinpath("python") not in Path(palmette.__file__).parents
tree = palmette.Tree([-1, 0, 0], [100, 7, 9])
q, k, v = torch.randn(2, 8, 64), torch.randn(116, 2, 64), torch.randn(116, 2, 64)
paths = [list(range(107)), [*range(100), *range(107, 116)]]
for body in testing.backends():
    with testing.backend(body):
        plan = palmette.plan_tree_attention(tree, num_q_heads=8, num_kv_heads=2, head_dim=64)
        out = palmette.tree_attention(q, k, v, plan)
    for leaf, path in enumerate(paths):
        keys, values = (t[path].transpose(0, 1)[None] for t in (k, v))
        want = torch.nn.functional.scaled_dot_product_attention(
            q[leaf, :, None][None], keys, values, enable_gqa=True
        )
        torch.testing.assert_close(out[leaf], want[0, :, 0], atol=2e-5, rtol=1e-4)
print(f"palmette {palmette.__version__} works: {', '.join(testing.backends())}")
