# SPDX-License-Identifier: Apache-2.0
"""``python -m palmette train-pipeline``: fine-tuning over a slow link, with and without codecs.

SmolLM2 is cut into two stages, each a process in a network namespace of its own, with a link between them
whose rate is set. Every way to send trains the same number of steps on the same samples; then its steps are
timed at several rates.

Source: the experiments of TAH-Quant (arXiv 2506.01352), section 4, and AQ-SGD (arXiv 2206.01299), section 5,
with GPUs and 100 to 500 Mbit/s; here the ratio of communication to computing is theirs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from ...integrations._extras import require
from ..long_runs import Budget, bar, run_command, run_parser
from . import report
from .link import slow_link
from .run import Run
from .settings import DEFAULT, METHODS, QUICK

PURPOSE = "palmette train-pipeline"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = run_parser(
        "train-pipeline",
        "Fine-tune SmolLM2 in two stages over a slow link, with and without codecs.",
        quick="two layers, few steps",
        unit="steps",
    )
    parser.add_argument(
        "--methods",
        default=",".join(METHODS),
        help="what to compare, fp32 among it (default: %(default)s)",
    )
    parser.add_argument("--model", help="directory of a Llama's checkpoint (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--layers", type=int, help="use only the first and last so many layers together")
    parser.add_argument("--epochs", type=int, help=f"of training (default: {DEFAULT.epochs})")
    parser.add_argument("--microbatches", type=int, help=f"default: {DEFAULT.microbatches}")
    parser.add_argument(
        "--link",
        choices=("auto", "namespaces", "bucket"),
        default="auto",
        help="network namespaces with tc tbf (root, or user namespaces), or a token bucket in the sender",
    )
    parser.add_argument(
        "--timeout", type=float, default=900.0, help="seconds that a stage waits for the other"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Does what is left and writes the results; returns the exit status.

    Raises:
        ValueError: an option is out of range, or the directory is another run's.
        MissingExtraError: a package is not installed.
        StoppedError: ``--stop-after`` was reached.
    """
    for package in ("matplotlib", "tqdm", "transformers"):
        require(package, PURPOSE, install="'palmette[demo]'")
    methods = options.methods.split(",")
    unknown = [method for method in methods if method not in METHODS]
    if unknown or "fp32" not in methods:
        raise ValueError(f"--methods must be fp32 and others of {', '.join(METHODS)}, got {options.methods}")
    methods.sort(key=list(METHODS).index)
    changes = {
        name: value
        for name in ("layers", "epochs", "microbatches")
        if (value := getattr(options, name)) is not None
    }
    for name, value in changes.items():
        if value < 1:
            raise ValueError(f"--{name} must be positive, got {value}")
    settings = dataclasses.replace(QUICK if options.quick else DEFAULT, **changes)
    if settings.batch % settings.microbatches:
        raise ValueError(f"--microbatches must divide {settings.batch}, got {settings.microbatches}")
    with slow_link(options.link) as link:
        print(f"the link: {link.description}", file=sys.stderr)
        budget = Budget(options.stop_after)
        this = Run(settings, options.model, methods, options.out, link, bar, budget, options.timeout)
        this.all_phases()
        print(report.write(this, options.out))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m palmette train-pipeline``; returns the exit status."""
    return run_command("train-pipeline", parse_arguments, run, arguments, (RuntimeError,))
