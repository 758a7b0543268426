# SPDX-License-Identifier: Apache-2.0
"""``python -m palmette train-sparse``: native sparse attention learns beside dense attention.

Three parts: byte-level models on the standard library's text, with dense attention and with NSA on equal
tokens; associative recall over lengths that a sliding window does not reach; and generation with the sparse
cache. A run that was stopped goes on where it was, with the same losses bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ...integrations._extras import require
from ..long_runs import Budget, bar, run_command, run_parser, use_threads
from . import report
from .run import Run
from .settings import DEFAULT, QUICK, RECALL_KINDS, TEXT_KINDS
from .text import DisagreementError


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = run_parser(
        "train-sparse",
        "Train a byte-level language model with native sparse attention beside the same model with dense "
        "attention, test recall over long sequences, and generate with the sparse cache.",
        quick="small models, a minute or two",
        unit="steps",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: what PyTorch takes)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    parser.add_argument(
        "--text-steps", type=int, help=f"steps on text, per model (default: {DEFAULT.text.steps})"
    )
    parser.add_argument(
        "--recall-steps", type=int, help=f"steps on recall, per model (default: {DEFAULT.recall.steps})"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Run what is left of the training and write the results; returns the exit status.

    Raises:
        ValueError: an option is out of range, or the directory is another run's.
        MissingExtraError: matplotlib or tqdm is not installed.
        StoppedError: ``--stop-after`` was reached.
    """
    for package in ("matplotlib", "tqdm"):
        require(package, report.PURPOSE, install="'palmette[train]'")
    use_threads(options.threads)
    if options.stop_after is not None and options.stop_after < 0:
        raise ValueError(f"--stop-after must be at least 0, got {options.stop_after}")
    if options.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {options.seed}")
    settings = (QUICK if options.quick else DEFAULT).with_steps(options.text_steps, options.recall_steps)
    # Every draw has a generator of its own; this is for what may be overlooked.
    torch.manual_seed(options.seed)
    this = Run(settings, options.seed, options.out, bar, Budget(options.stop_after))
    with bar("one step of each model", len(TEXT_KINDS) + len(RECALL_KINDS), 0) as tick:
        seconds = this.estimate(tick)
    print(f"steps to go: about {seconds / 60:.0f} min; results in {options.out}", file=sys.stderr)
    results = this.all_phases()
    encoding = sys.stdout.encoding or "utf-8"
    print(report.write(results, options.out).encode(encoding, "replace").decode(encoding))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m palmette train-sparse``; returns the exit status."""
    return run_command("train-sparse", parse_arguments, run, arguments, (DisagreementError,))
