# SPDX-License-Identifier: Apache-2.0
"""``python -m palmette``: the report, its behaviour on broken installations, and PALMETTE_ISA."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import GPUS
from palmette import __main__, collect_env, testing


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_report_is_complete(capsys):
    assert collect_env.main() == 0
    printed = capsys.readouterr().out
    for name in ("palmette", "library", "build", "body", "torch", "threads", "cpu"):
        assert f"{name}:" in printed
    assert "unavailable" not in printed


@pytest.mark.parametrize("body", [b for b in testing.backends() if b not in GPUS])
def test_environment_chooses_the_body(body):
    result = run("-m", "palmette", "env", PALMETTE_ISA=body)
    assert result.returncode == 0
    assert f"body:      {body} (PALMETTE_ISA={body})" in result.stdout


def test_unknown_body_is_reported_and_raises_at_first_use():
    result = run("-m", "palmette", "env", PALMETTE_ISA="sse9")
    assert result.returncode == 0
    assert (
        "unavailable (RuntimeError: PALMETTE_ISA must be one of the bodies that this CPU runs"
        in result.stdout
    )
    use = "import palmette, torch; palmette.merge_states(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))"
    result = run("-c", use, PALMETTE_ISA="sse9")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: PALMETTE_ISA must be one of the bodies that this CPU runs (")
    assert last.endswith("got sse9")


def test_missing_library_is_reported_and_raises_on_use(tmp_path):
    missing = str(tmp_path / "libpalmette.so")
    result = run("-m", "palmette", "env", PALMETTE_LIBRARY=missing)
    assert result.returncode == 0
    assert "library:   unavailable (ImportError: palmette's compiled library is missing" in result.stdout
    result = run("-c", "import palmette; palmette.merge_states", PALMETTE_LIBRARY=missing)
    assert "pip install --no-build-isolation ." in result.stderr.strip().splitlines()[-1]


def test_public_names_survive_any_order_of_imports():
    """palmette.tree_attention is a function although a module has the same name."""
    for first in ("palmette.tree_attention", "palmette.testing", "palmette.cascade"):
        result = run(
            "-c",
            f"import {first}, palmette; assert all(map(callable, (palmette.tree_attention, palmette.Tree)))",
        )
        assert result.returncode == 0, result.stderr


def test_unknown_command(capsys):
    assert __main__.main(["dance"]) == 2
    assert (
        "command must be one of demo, train-sparse, train-pipeline, train-rl, env, got 'dance'"
        in capsys.readouterr().err
    )


def test_usage(capsys):
    assert __main__.main(["--help"]) == 0
    assert __main__.main([]) == 2
    assert capsys.readouterr().out.count("usage: python -m palmette") == 2
