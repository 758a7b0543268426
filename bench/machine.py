# SPDX-License-Identifier: Apache-2.0
"""What a result says about where it was measured: processor and versions, no host names."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def describe() -> dict[str, object]:
    import palmette
    from palmette.collect_env import cpu_name
    from palmette.testing import current_backend

    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "palmette": palmette.__version__,
        "palmette_isa": current_backend(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def headline(machine: dict[str, object]) -> str:
    """One line for tables and plots."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; "
        f"torch {machine['torch']}, palmette {machine['palmette']} ({machine['palmette_isa']})"
    )


def available_memory() -> int:
    """Bytes that can be had without swapping; a guess of 4 GiB where the system does not tell."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return 4 << 30
