# SPDX-License-Identifier: Apache-2.0
"""hadamard_transform: every size against the matrix, gradients, in place, compilation, bad input."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import palmette
import pytest
import torch
from palmette import testing
from palmette.hadamard import is_hadamard_size
from palmette.reference import hadamard as reference
from palmette.testing import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POWERS = [2**k for k in range(13)]
OTHERS = [12, 24, 48, 96, 192, 768, 3072, 20, 40, 80, 160, 320, 2560, 28, 56, 112, 224, 448, 3584]
LONG = [8192, 16384, 32768, 40960, 24576]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", POWERS + OTHERS)
def test_against_the_matrix(backend, size, dtype, transpose):
    x = torch.randn(15 if size < 2000 else 2, size).to(dtype)
    scale = size**-0.5
    got = palmette.hadamard_transform(x, scale, transpose=transpose)
    assert got.dtype == dtype
    want = reference.hadamard_transform(x.double(), scale, transpose=transpose)
    plain = reference.hadamard_transform(x, scale, transpose=transpose)
    assert_accurate(got, want, plain, atol=1e-6, name="out")


@pytest.mark.parametrize("size", LONG)
def test_long_rows(backend, size):
    """The inverse gives the row back, a single 1 gives a column of the matrix."""
    x = torch.randn(2, size)
    there = palmette.hadamard_transform(x, size**-0.5)
    back = palmette.hadamard_transform(there, size**-0.5, transpose=True)
    assert (back - x).abs().max() < 1e-5
    assert abs(there.norm() / x.norm() - 1) < 1e-6
    one = torch.zeros(1, size)
    one[0, size // 3] = 1
    column = palmette.hadamard_transform(one)
    assert torch.equal(column.abs(), torch.ones(1, size))


@pytest.mark.parametrize("size", [12, 20, 28, 40, 64, 96, 112])
def test_the_reference_is_a_hadamard_matrix(size):
    h = reference.hadamard_matrix(size)
    assert torch.equal(h.abs(), torch.ones(size, size).double())
    assert torch.equal(h @ h.T, size * torch.eye(size).double())


@pytest.mark.parametrize("size", [1, 2, 8, 64, 256, 4096, 12, 24, 160, 28, 448])
def test_all_backends_give_the_same_bits(size):
    x = torch.randn(3, size)
    names = [name for name in testing.backends() if name not in ("emulated_check", "cuda")]
    results = []
    for name in names:
        with testing.backend(name):
            results.append(palmette.hadamard_transform(x, 0.3))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [4, 64, 512, 8192, 24, 224])
def test_in_place_and_into_memory(backend, size, dtype):
    x = torch.randn(5, 3, size).to(dtype)
    want = palmette.hadamard_transform(x, 0.5)
    out = torch.empty_like(x)
    assert palmette.hadamard_transform(x, 0.5, out=out) is out
    assert torch.equal(out, want)
    version = x._version
    assert palmette.hadamard_transform(x, 0.5, out=x) is x
    assert torch.equal(x, want)
    assert x._version > version


def test_strides_and_shapes(backend):
    x = torch.randn(64, 6).T
    assert torch.equal(palmette.hadamard_transform(x), palmette.hadamard_transform(x.contiguous()))
    assert palmette.hadamard_transform(torch.randn(64)).shape == (64,)
    assert palmette.hadamard_transform(torch.empty(0, 64)).shape == (0, 64)
    x = torch.randn(4, 2, 128)[:, 1]
    assert torch.equal(palmette.hadamard_transform(x), palmette.hadamard_transform(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads(backend, num_threads, dtype):
    x = torch.randn(300, 512).to(dtype)
    num_threads(1)
    want = palmette.hadamard_transform(x)
    for count in (2, 3, 7):
        num_threads(count)
        assert torch.equal(palmette.hadamard_transform(x), want)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 12, 20, 24, 28])
@pytest.mark.parametrize("transpose", [False, True])
def test_gradients(scalar_backend, size, transpose):
    x = torch.randn(3, size, dtype=torch.float64, requires_grad=True)
    function = lambda x: palmette.hadamard_transform(x, 0.7, transpose=transpose)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


@hypothesis.given(st.sampled_from(POWERS[:9] + OTHERS[:6]), st.integers(0, 9), st.integers(0, 2**31))
def test_linear_and_orthogonal(backend, size, rows, seed):
    torch.manual_seed(seed)
    x, y = torch.randn(2, rows, size)
    scale = size**-0.5
    both = palmette.hadamard_transform(x + 2 * y, scale)
    parts = palmette.hadamard_transform(x, scale) + 2 * palmette.hadamard_transform(y, scale)
    torch.testing.assert_close(both, parts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both.norm(dim=-1), (x + 2 * y).norm(dim=-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_row(backend, value):
    x = torch.randn(3, 64)
    x[1, 5] = value
    got = palmette.hadamard_transform(x)
    assert got[[0, 2]].isfinite().all()
    assert not got[1].isfinite().any()


def test_compiled():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x):
        return (palmette.hadamard_transform(x, 0.5) ** 2).sum()

    x = torch.randn(4, 96, requires_grad=True)
    loss(x).backward()
    torch.testing.assert_close(x.grad, 2 * 0.25 * 96 * x.detach(), atol=1e-4, rtol=1e-4)


def test_which_sizes():
    sizes = [n for n in range(1, 200) if is_hadamard_size(n)]
    powers, rest = [1, 2, 4, 8, 16, 32, 64, 128], [12, 20, 24, 28, 40, 48, 56, 80, 96, 112, 160, 192]
    assert sizes == sorted(powers + rest)
    assert is_hadamard_size(40960)
    assert not is_hadamard_size(65536)
    assert not is_hadamard_size(0)


@pytest.mark.parametrize("size", [0, 3, 6, 14, 36, 44, 137, 65536])
def test_other_sizes_raise(size):
    with pytest.raises(
        ValueError, match=r"x must be \[\.\.\., n\] with n = 2\^k or 12, 20, 28 or 40 times 2\^k"
    ):
        palmette.hadamard_transform(torch.zeros(2, size))


def test_bad_input(raising_backend):
    x = torch.randn(4, 64)
    for call, message in (
        (lambda: palmette.hadamard_transform(torch.zeros(4, 64, dtype=torch.int32)), "x must be float32"),
        (lambda: palmette.hadamard_transform(torch.tensor(1.0)), r"x must be \[\.\.\., n\].*got \[\]"),
        (
            lambda: palmette.hadamard_transform(x, out=x[:2]),
            r"out must be \[\.\.\., n\] = \[4, 64\], got \[2, 64\]",
        ),
        (lambda: palmette.hadamard_transform(x, out=x.half()), "out must be float32, got float16"),
        (lambda: palmette.hadamard_transform(x, out=torch.empty(64, 4).T), "out must be contiguous"),
        (
            lambda: palmette.hadamard_transform(x.requires_grad_(), out=torch.empty(4, 64)),
            "out must be left out",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    memory = torch.randn(5 * 64)
    with pytest.raises(ValueError, match="out must be x itself or other memory"):
        palmette.hadamard_transform(memory[:256].view(4, 64), out=memory[64:].view(4, 64))


OPCHECK_CASES = {
    "hadamard_transform": lambda: [
        (torch.randn(3, 64), 0.5, False),
        (torch.randn(2, 12, requires_grad=True), 1.0, False),
        (torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True), 2.0, True),
    ],
    "hadamard_transform_out": lambda: [(torch.randn(3, 64), 0.5, False, torch.empty(3, 64))],
}
