# SPDX-License-Identifier: Apache-2.0
"""What a pipeline's report says of the machine."""

from __future__ import annotations

import torch

from palmette import __version__
from palmette.collect_env import collect


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    report = collect()
    return {
        "cpu": report["cpu"],
        "threads": str(torch.get_num_threads()),
        "body": report["body"],
        "torch": str(torch.__version__),
        "palmette": __version__,
    }
