# SPDX-License-Identifier: Apache-2.0
"""Every operator of the library keeps the contract: a fake, documentation, and cases for opcheck.

A test module that covers operators has a table ``OPCHECK_CASES``: operator name -> function that returns
argument tuples. This module collects the tables, so that adding an operator without adding its cases fails
here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import palmette
import pytest
import torch
from palmette import testing

TESTS = Path(__file__).parent
OPERATORS = TESTS.parent / "docs" / "operators.md"


def registered() -> list[str]:
    """Names of the operators, without those about the library itself, which begin with an underscore."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("palmette::")]
    return sorted(name.removeprefix("palmette::") for name in names if not name.startswith("palmette::_"))


def collect() -> dict[str, Callable[[], list[tuple[object, ...]]]]:
    cases: dict[str, Callable[[], list[tuple[object, ...]]]] = {}
    for path in sorted(TESTS.glob("test_*.py")):
        if path.stem != Path(__file__).stem and "OPCHECK_CASES" in path.read_text():
            cases |= importlib.import_module(path.stem).OPCHECK_CASES
    return cases


CASES = collect()


@pytest.mark.parametrize("name", palmette.__all__)
def test_public_name_is_documented(name):
    assert getattr(palmette, name).__doc__


def test_dir_lists_the_public_names():
    assert set(palmette.__all__) <= set(dir(palmette))


@pytest.mark.parametrize("name", registered())
def test_has_a_fake(name):
    entry = torch._library.simple_registry.singleton.find(f"palmette::{name}")
    assert entry.fake_impl.kernel is not None, f"torch.library.register_fake is missing for palmette::{name}"


@pytest.mark.parametrize("name", registered())
def test_is_documented(name):
    assert f"`{name}`" in OPERATORS.read_text(), f"docs/operators.md must name `{name}`"


@pytest.mark.parametrize("name", registered())
def test_has_opcheck_cases(name):
    assert name in CASES, f"no OPCHECK_CASES in tests/test_*.py name {name!r}"


def test_no_cases_of_unknown_operators():
    assert sorted(set(CASES) - set(registered())) == []


@pytest.mark.parametrize("name", sorted(CASES))
def test_opcheck(name):
    """Schema, autograd registration, the fake against the real operator, AOT dispatch with dynamic shapes."""
    op = getattr(torch.ops.palmette, name)
    with testing.backend("scalar"):
        for args in CASES[name]():
            torch.library.opcheck(op, args)
