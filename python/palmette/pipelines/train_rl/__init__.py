# SPDX-License-Identifier: Apache-2.0
"""``python -m palmette train-rl``: GRPO on SmolLM2 with a reward that is computed here, 2-digit addition.

Rollouts of a problem share its question, and all problems share their instructions: a tree of tokens, which
``TreeDecoder`` decodes and ``SharedPrefixSchedule`` trains, each token once.

Source: GRPO (arXiv 2402.03300); AReaL (arXiv 2505.24298) for rollouts that are older than the policy; VADE
for the choice of problems.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence

import torch

from ...integrations._extras import require
from ..long_runs import Budget, bar, run_command, run_parser, use_threads
from ..shared_prefix import MODES
from . import report
from .run import Run
from .settings import DEFAULT, QUICK

PURPOSE = "palmette train-rl"
SAMPLERS = ("uniform", "vade")
NUMBERS = ("layers", "updates", "prompts", "group", "held_out", "microbatch_tokens")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = run_parser(
        "train-rl",
        "Teach SmolLM2 to add, by GRPO: rollouts and updates on trees of shared tokens.",
        quick="few layers and updates",
        unit="updates",
    )
    parser.add_argument("--model", help="directory of a Llama's checkpoint (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--layers", type=int, help="an even number: half from each end (default: all layers)")
    parser.add_argument(
        "--updates",
        type=int,
        help=f"of the policy; more than before: the run goes on (default: {DEFAULT.updates})",
    )
    parser.add_argument("--prompts", type=int, help=f"problems of an update (default: {DEFAULT.prompts})")
    parser.add_argument("--group", type=int, help=f"rollouts of a problem (default: {DEFAULT.group})")
    parser.add_argument("--held-out", type=int, help=f"problems to evaluate (default: {DEFAULT.held_out})")
    parser.add_argument("--learning-rate", type=float, help=f"default: {DEFAULT.learning_rate}")
    parser.add_argument("--microbatch-tokens", type=int, help=f"default: {DEFAULT.microbatch_tokens}")
    parser.add_argument("--mode", choices=MODES, help=f"of the schedule (default: {DEFAULT.mode})")
    parser.add_argument(
        "--eta",
        type=int,
        help="updates that a rollout may be behind its policy; above 0, rollouts run beside updates "
        f"(default: {DEFAULT.eta})",
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help=f"of problems (default: {DEFAULT.sampler})")
    parser.add_argument("--seed", type=int, help=f"of what is drawn (default: {DEFAULT.seed})")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what PyTorch takes)")
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
    names = [field.name for field in dataclasses.fields(DEFAULT)]
    changes = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    for name in NUMBERS:
        if changes.get(name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {changes[name]}")
    if changes.get("group", 2) < 2:
        raise ValueError(
            f"--group must be at least 2, else there is nothing to compare, got {changes['group']}"
        )
    for name in ("eta", "seed"):
        if not 0 <= changes.get(name, 0) < 2**31:
            raise ValueError(f"--{name} must be in [0, 2^31), got {changes[name]}")
    if not 0 < changes.get("learning_rate", 1.0) < math.inf:
        raise ValueError(f"--learning-rate must be positive, got {changes['learning_rate']}")
    if options.stop_after is not None and options.stop_after < 0:
        raise ValueError(f"--stop-after must be at least 0, got {options.stop_after}")
    use_threads(options.threads)
    settings = dataclasses.replace(QUICK if options.quick else DEFAULT, **changes)
    torch.manual_seed(settings.seed)  # every draw has a generator of its own; this is for what is overlooked
    this = Run(settings, options.model, options.out, bar, Budget(options.stop_after))
    history = this.all_phases()
    print(f"results in {options.out}", file=sys.stderr)
    print(report.write(settings, history, options.out))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m palmette train-rl``; returns the exit status."""
    return run_command("train-rl", parse_arguments, run, arguments)
