# SPDX-License-Identifier: Apache-2.0
"""``python -m palmette <command>``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

USAGE = """usage: python -m palmette <command> [options]

commands:
  demo   decode trees with a real language model and compare with per-sequence attention (demo --help for
  options)
  train-sparse
         train a small language model with native sparse attention beside a dense one (train-sparse --help)
  train-pipeline
         fine-tune SmolLM2 in two stages over a slow link, with and without codecs (train-pipeline --help)
  train-rl
         teach SmolLM2 to add, by GRPO on trees of shared tokens (train-rl --help)
  env    print the versions, the CPU, and the body in use: paste it into bug reports
"""


def _demo(arguments: Sequence[str]) -> int:
    try:
        from palmette.pipelines import demo
    except ImportError as error:
        print(f"palmette demo: {error} (pip install 'palmette[demo]')", file=sys.stderr)
        return 1
    return int(demo.main(list(arguments)) or 0)


def _train_sparse(arguments: Sequence[str]) -> int:
    from palmette.pipelines import train_sparse

    return train_sparse.main(list(arguments))


def _train_pipeline(arguments: Sequence[str]) -> int:
    from palmette.pipelines import train_pipeline

    return train_pipeline.main(list(arguments))


def _train_rl(arguments: Sequence[str]) -> int:
    from palmette.pipelines import train_rl

    return train_rl.main(list(arguments))


def _env(arguments: Sequence[str]) -> int:
    from palmette import collect_env

    return collect_env.main()


COMMANDS = {
    "demo": _demo,
    "train-sparse": _train_sparse,
    "train-pipeline": _train_pipeline,
    "train-rl": _train_rl,
    "env": _env,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command = COMMANDS.get(arguments[0])
    if command is None:
        print(
            f"command must be one of {', '.join(COMMANDS)}, got {arguments[0]!r}\n\n{USAGE}",
            end="",
            file=sys.stderr,
        )
        return 2
    return command(arguments[1:])


if __name__ == "__main__":
    if {*sys.argv[1:2]} & (COMMANDS.keys() - {"env"}):
        with contextlib.suppress(ImportError):  # the command says what is missing
            from palmette.pipelines.long_runs import keep_freed_memory

            keep_freed_memory()
    sys.exit(main())
