# SPDX-License-Identifier: Apache-2.0
"""tests/mutants.toml fits the sources, and has every kernel. ci/mutants.py shows what tests notice."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

spec = importlib.util.spec_from_file_location("mutants", ROOT / "ci" / "mutants.py")
tool = importlib.util.module_from_spec(spec)
sys.modules["mutants"] = tool  # dataclasses look there
spec.loader.exec_module(tool)
MUTANTS, EDITS = tool.read_list()

# What each has that can be wrong.
WANTED = {
    "attend": {"index", "mask", "barrier", "scale"},
    "attend_merge": {"index", "mask", "scale"},
    "attend_merge_blocks": {"index", "mask", "scale"},
    "merge_states": {"index", "mask", "scale"},
    "merge_states_backward": {"index", "mask", "scale"},
    "attend_delta": {"index", "mask", "scale"},
    "attend_dsinks": {"index", "mask", "scale"},
    "attend_dq": {"index", "mask", "barrier", "scale"},
    "attend_dq_add": {"index", "mask"},
    "attend_dkv": {"index", "mask", "barrier", "scale"},
    "attend_dkv_add": {"index", "mask"},
    "attend_index": {"index", "mask", "barrier"},
    "verify_greedy": {"index", "mask", "barrier", "scale"},
    "verify_sample": {"index", "mask", "barrier", "scale"},
    "compact_kv_": {"index", "mask", "scale"},
    "select_blocks": {"index", "mask", "barrier", "scale"},
    "list_tasks": {"index", "barrier"},
    "keys": {"index", "mask"},
    "tiles": {"index", "mask", "barrier", "scale"},
    "swizzle": {"index"},
    "copy_rows": {"index", "mask"},
    "multiply_rows": {"index"},
    "accumulate_rows": {"index", "mask"},
    "wire_sum": {"index", "mask", "barrier"},
    "tah_select": {"index", "mask", "barrier"},
    "tah_encode": {"index", "mask", "scale"},
    "tah_decode": {"index"},
    "store_codes": {"index"},
    "fixpoint": {"index", "mask", "scale"},
    "hadamard": {"index", "barrier", "scale"},
    "tah_entropy (CPU)": {"mask", "scale"},
    "tah_encode (CPU)": {"index", "mask", "scale"},
    "tah_decode (CPU)": {"index", "mask"},
    "fixpoint_scales (CPU)": {"index", "mask", "scale"},
    "fixpoint_encode (CPU)": {"index", "scale"},
    "delta_encode_ (CPU)": {"mask"},
    "delta_decode_ (CPU)": {"scale"},
    "hadamard_transform (CPU)": {"index", "scale"},
    "crc32c (CPU)": {"index"},
    "wire (CPU)": {"mask"},
    "attend_backward_accumulate_": {"scale"},
    "attend_backward_accumulate_ (CPU)": {"scale"},
    "gather_logprobs": {"index", "mask", "barrier", "scale"},
    "gather_logprobs_backward": {"mask", "scale"},
    "gather_logprobs (CPU)": {"mask", "scale"},
    "gather_logprobs_backward (CPU)": {"scale"},
}


def test_every_text_is_in_its_file_once():
    assert list(tool.faults(MUTANTS, EDITS)) == []


def test_every_kernel_and_kind_is_there():
    found: dict[str, set[str]] = {}
    for mutant in MUTANTS:
        found.setdefault(mutant.kernel, set()).add(mutant.kind)
    assert found == WANTED


def test_no_kernel_is_forgotten():
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/kernel*_gpu.cu")}
    sources |= {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/attend/*_gpu.cuh")}
    assert sources <= {mutant.file for mutant in MUTANTS}


def test_every_test_exists():
    for test in {test for mutant in MUTANTS for test in mutant.tests}:
        file, *classes, name = re.fullmatch(r"(tests/\w+\.py(?:::\w+)+)(?:\[.*\])?", test)[1].split("::")
        text = (ROOT / file).read_text()
        assert f"{'    ' * len(classes)}def {name}(" in text or f"\nclass {name}:" in text, test
        assert all(f"\nclass {name}:" in text for name in classes), test


def test_the_table_has_every_mutant():
    """Lines move as sources change; what is said of a mutant stays."""
    page = (ROOT / "docs" / "dev" / "mutants.md").read_text()
    rows = [
        [cell.strip() for cell in line.split(" | ")] for line in page.splitlines() if line.startswith("| ")
    ]
    listed = [(row[0].removeprefix("| "), *row[1:2], row[3]) for row in rows[2:]]
    assert listed == [(m.kernel, m.kind, m.change) for m in MUTANTS]
    assert "**nothing**" not in page
