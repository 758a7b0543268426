# SPDX-License-Identifier: Apache-2.0
"""plan.plot: pictures of trees and their plans."""

from __future__ import annotations

import re
import sys

import pytest
from palmette.tree import Tree
from palmette.tree_plan import plan_tree_attention
from plan_coverage import HEADS


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    tree = Tree([-1, 0, 0, 1, 1, -1, 5], [50, 10, 20, 5, 0, 30, 4])
    plan = plan_tree_attention(tree, **HEADS)
    plan.plot(tmp_path / f"tree.{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"tree.{suffix}"]
    head = (tmp_path / f"tree.{suffix}").read_bytes()[:200]
    assert (b"<?xml" in head) if suffix == "svg" else head.startswith(b"\x89PNG")
    tree.append([3], [1])
    with pytest.raises(ValueError, match="plan must be of its tree's version"):
        plan.plot(tmp_path / "stale.svg")


def test_plot_needs_matplotlib_and_a_known_suffix(tmp_path, monkeypatch):
    plan = plan_tree_attention(Tree([-1], [3]), **HEADS)
    with pytest.raises(
        ValueError, match=re.escape("path must be a name that ends in .svg or .png, got 'tree.gif'")
    ):
        plan.plot(tmp_path / "tree.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plan.plot needs matplotlib"):
        plan.plot(tmp_path / "tree.svg")
