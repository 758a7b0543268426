# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from palmette import testing

ALL_BODIES = ("scalar", "avx2", "avx2x16", "avx512", "emulated", "cuda")
GPUS = (*testing.EMULATORS, "cuda")
BODIES = tuple(body for body in ALL_BODIES if body in testing.backends())

# Drawn examples are the same in every run, so a failure on CI is a failure here; nightly runs may ask for
# random ones. All examples of a test share its fixtures: a backend is chosen once for all of them.
SHARED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture]}
hypothesis.settings.register_profile("palmette", derandomize=True, max_examples=50, **SHARED)
hypothesis.settings.register_profile("random", max_examples=500, **SHARED)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "palmette"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backends",
        default=",".join(BODIES),
        help="comma-separated: what tests of kernels run on; all: also emulated_check. Default: %(default)s",
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    missing = [body for body in ALL_BODIES if body not in BODIES]
    return [f"palmette: backends {', '.join(_backends(config))}; missing: {', '.join(missing) or 'none'}"]


def _backends(config: pytest.Config) -> list[str]:
    names = str(config.getoption("--backends"))
    if names != "all":
        return names.split(",")
    return [*BODIES, *(name for name in testing.EMULATORS if name in set(testing.backends()) - set(BODIES))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = _backends(metafunc.config)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", names, indirect=True)
    if "raising_backend" in metafunc.fixturenames:
        raising = [name for name in names if name != "cuda"]
        metafunc.parametrize("raising_backend", raising, indirect=True)
    cpu = [name for name in names if name not in GPUS]
    if "cpu_backend" in metafunc.fixturenames:
        metafunc.parametrize("cpu_backend", cpu, indirect=True)
    if "machine" in metafunc.fixturenames:
        metafunc.parametrize("machine", cpu[:1] + [name for name in names if name not in cpu], indirect=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on every ISA body that this CPU has, on the emulator, and on a GPU where there is one."""
    if request.param == "cuda":  # an operator of the CPU's, where GPU kernels are to be tested
        monkeypatch.setattr("palmette.nn.sparse_attention.FEW_QUERIES", 0)
    with testing.backend(request.param):
        yield request.param


@pytest.fixture
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, of the CPU only: for what no GPU kernel does."""
    with testing.backend(request.param):
        yield request.param


@pytest.fixture
def raising_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, but for a real GPU: for errors in values, which no operator waits there to see."""
    with testing.backend(request.param):
        yield request.param


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, for operators whose code is the same on every ISA body."""
    with testing.backend(request.param):
        yield request.param


@pytest.fixture
def scalar_backend() -> Iterator[str]:
    """The scalar body: the only one that has float64 kernels."""
    with testing.backend("scalar"):
        yield "scalar"


@pytest.fixture
def num_threads(request: pytest.FixtureRequest) -> Iterator[object]:
    """torch.set_num_threads, undone after the test."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "emulated_check":
        pytest.skip("the check build runs on one thread")
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
