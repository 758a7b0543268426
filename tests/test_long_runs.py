# SPDX-License-Identifier: Apache-2.0
"""What the long-running commands share."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
from palmette.pipelines.long_runs import claim, write_atomically

FAULTS = """
import resource, sys
import torch
from palmette.pipelines.long_runs import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for i in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(64 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not (sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")), reason="glibc's malloc"
)
def test_freed_memory_is_used_again():
    """Page faults of the eighth tensor of 64 MB.

    posix_memalign does not fit into what a tensor of its size has left until that lies at the heap's end, as
    it does from the third or fourth on.
    """
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("keep", "return")
    }
    assert faults["keep"] < 100 < faults["return"]


def test_a_file_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write_text("old"))

    def fails(file: Path) -> None:
        file.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fails)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_directory_belongs_to_one_run(tmp_path):
    run = tmp_path / "run"
    claim(run, {"seed": 1, "sizes": (2, 3)})
    assert json.loads((run / "options.json").read_text()) == {"seed": 1, "sizes": [2, 3]}
    claim(run, {"seed": 1, "sizes": (2, 3)})
    with pytest.raises(ValueError, match="seed: 1 there, 2 now"):
        claim(run, {"seed": 2, "sizes": (2, 3)})
    other = tmp_path / "other"
    other.mkdir()
    (other / ".options.json.partial").touch()  # of a process that was killed
    claim(other, {"seed": 1})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(ValueError, match="--out must be a new or empty directory"):
        claim(foreign, {"seed": 1})
