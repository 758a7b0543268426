# SPDX-License-Identifier: Apache-2.0
"""Native sparse attention: selected attention, all branches, gradients, decoding steps, memory.

Peers are NSA's own order of loops in our kernel, dense causal SDPA, and a public module (sparse_peers.py).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import sparse_peers
from bench.jobs import Job, Row, Settings, SkipJobError, run_job, run_with
from bench.machine import available_memory
from bench.measure import Race
from bench.peers import Contender
from bench.sparse_cases import (
    BACKWARD_FACTOR,
    BLOCK,
    COMPRESSION,
    SELECTION,
    SIZES,
    TOPK,
    Inputs,
    SparseCase,
    check,
    dense_rows,
    make_inputs,
    make_selection,
    mixed_rows,
    rounds,
    sample,
    selected_rows,
    shared_blocks,
    sparse_cases,
)

LONG = 32768  # from here on calls take so long that they are neither warmed up nor repeated to be checked
MEMORY_LENGTHS = {
    "quick": (8192, 16384, 32768),
    "default": (8192, 16384, 32768, 65536, 131072),
    "full": (8192, 16384, 32768, 65536, 131072),
}
PUBLIC_TOKENS, PUBLIC_WIDTH, PUBLIC_HEADS = 2048, 512, (8, 2, 64)


def jobs(settings: Settings) -> list[Job]:
    prepare: dict[str, Callable[[SparseCase, Settings], tuple[Race, Row]]] = {
        "selected": _selected,
        "forward": _forward,
        "training": _training,
        "decode": _decode,
    }
    found = [
        Job(
            "sparse",
            case.name,
            lambda case=case: prepare[case.group](case, settings),
            inference=case.group != "training",
        )
        for case in sparse_cases(settings.suite)
    ]
    for backward in (False, True):
        name = f"sparse public module {'forward+backward' if backward else 'forward'} 2k"
        found.append(Job("sparse", name, lambda b=backward: _public(settings, backward=b), inference=False))
    lengths = MEMORY_LENGTHS[settings.suite]
    found.append(
        Job("sparse", f"sparse memory, up to {lengths[-1] // 1024}k tokens", lambda: _memory(lengths))
    )
    return [job for job in found if settings.wants("sparse", job.name)]


def _describe(case: SparseCase) -> Row:
    return {
        "group": case.group,
        "tokens": case.tokens,
        "heads": f"{case.num_q_heads}/{case.num_kv_heads}",
        "group_size": case.group_size,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "compression": case.compression,
        "batch": case.batch,
    }


class _LongRace(Race):
    """Calls that take a minute: each peer once, no warm-up, and what was timed is what is checked."""

    def __init__(
        self,
        ours: Contender,
        peers: Sequence[Contender],
        checks: Sequence[Callable[[], None]],
        **options: Any,
    ) -> None:
        super().__init__(ours, peers, **options)
        self._checks = checks

    def warm_up(self) -> None:
        self.rounds = self.min_rounds

    def finish(self, own_times: Sequence[float]) -> dict[str, dict[str, Any]]:
        for run_check in self._checks:
            run_check()
        return super().finish(own_times)


def _race(
    case: SparseCase,
    settings: Settings,
    ours: Contender,
    peers: Sequence[Contender],
    checks: dict[str, Callable[[Any], float]],
    row: Row,
) -> Race:
    """Checks the contenders now, or, where calls take a minute, the results that were timed."""
    errors: dict[str, float] = row.setdefault("max_error", {})
    options: dict[str, Any] = {
        "budget_s": 0.0,
        "min_rounds": rounds(settings.suite, case.tokens),
        "drop_hopeless": False,
        "before": settings.before(),
    }
    if case.tokens < LONG:
        for contender in (ours, *peers):
            errors[contender.name] = checks[contender.name](contender.read(contender.run()))
        return Race(ours, peers, **options)

    def kept(contender: Contender) -> tuple[Contender, Callable[[], None]]:
        last: list[Any] = [None]

        def run() -> None:
            last[0] = None  # so that its memory can be had again
            last[0] = contender.run()

        def run_check() -> None:
            errors[contender.name] = checks[contender.name](contender.read(last[0]))

        return replace(contender, run=run), run_check

    errors[ours.name] = checks[ours.name](ours.read(ours.run()))
    pairs = [kept(peer) for peer in peers]
    return _LongRace(ours, [peer for peer, _ in pairs], [run for _, run in pairs], **options)


# ---------------------------------------------------------------------------------------- selected attention


def _selected(case: SparseCase, settings: Settings) -> tuple[Race, Row]:
    from palmette.sparse_attention import selected_attention

    inputs, index = make_inputs(case), make_selection(case)
    q, k, v, _ = inputs
    ends = case.cu_seqlens
    ours = Contender(
        "palmette", lambda: selected_attention(q, k, v, index, ends, block_size=BLOCK), lambda out: out
    )
    orders = sparse_peers.query_outer(case, inputs, index)
    rows = sample(case.tokens)
    want, want_dense = selected_rows(inputs, index, rows), dense_rows(inputs, rows)
    for order in orders:
        _check_rows(case, order.name, rows, want)(order.read(order.run()))
    order, settings_ms = sparse_peers.fastest(orders, 1)
    dense = sparse_peers.dense_causal(case, inputs)
    flops = case.selected_flops(index)
    row: Row = {
        **_describe(case),
        "selection": case.selection,
        "shared_blocks": shared_blocks(index[:, : 2 * 4096]),
        "against": [order.name],
        "dense": dense.name,
        "work": {"palmette": flops, order.name: flops, dense.name: case.dense_flops},
        "settings_ms": settings_ms,
    }
    checks = {
        ours.name: _check_rows(case, ours.name, rows, want),
        order.name: _check_rows(case, order.name, rows, want),
        dense.name: _check_rows(case, dense.name, rows, want_dense),
    }
    return _race(case, settings, ours, [order, dense], checks, row), row


def _check_rows(
    case: SparseCase, name: str, rows: list[int], want: Tensor, where: Tensor | None = None
) -> Callable[[Tensor], float]:
    return lambda out: check(f"{case.name}: {name}", out[rows], want, case.torch_dtype, where)


# ------------------------------------------------------------------------------------------------ all of NSA


def make_branches(case: SparseCase) -> Any:
    """``SparseBranches`` with given gates, which rotates nothing: nor does dense attention."""
    from palmette.nn import SparseBranches

    torch.manual_seed(0)
    branches = SparseBranches(
        3 * case.num_q_heads,
        case.num_q_heads,
        case.num_kv_heads,
        case.head_dim,
        **SIZES,
        compression=case.compression,
        rope=lambda x, positions: x,
    )
    branches.gate = nn.Identity()
    return branches.to(case.torch_dtype).requires_grad_(False)


def compressed_keys(branches: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k_cmp and v_cmp in float64, by the reference."""
    from palmette.reference import sparse_attention as reference

    def compress(x: Tensor, weight: Tensor | None, position: Tensor | None) -> Tensor:
        if weight is None:  # the reference's loop, at once
            size, stride = COMPRESSION["kernel_size"], COMPRESSION["kernel_stride"]
            return x.double().unfold(0, size, stride).mean(-1)
        weight, position = (None if p is None else p.double() for p in (weight, position))
        return reference.compress(x.double(), weight, position, **COMPRESSION)

    return (
        compress(k, branches.compress_key, branches.intra_block_pe),
        compress(v, branches.compress_value, None),
    )


def _forward(case: SparseCase, settings: Settings) -> tuple[Race, Row]:
    inputs, branches = make_inputs(case), make_branches(case)
    q, k, v, gates = inputs
    ends = case.cu_seqlens
    ours = Contender("palmette", lambda: branches.mix(gates, q, (k,), (v,), ends), lambda out: out)
    dense = sparse_peers.dense_causal(case, inputs)
    rows = sample(case.tokens)
    want, sure = mixed_rows(inputs, *compressed_keys(branches, k, v), rows)
    checks = {
        ours.name: _check_rows(case, ours.name, rows, want, sure),
        dense.name: _check_rows(case, dense.name, rows, dense_rows(inputs, rows)),
    }
    row: Row = {
        **_describe(case),
        "against": [dense.name],
        "work": {"palmette": case.sparse_flops, dense.name: case.dense_flops},
        "rows_checked": int(sure.sum()),
    }
    race = _race(case, settings, ours, [dense], checks, row)
    row["phases_ms"] = phases(case, branches, inputs, settings)
    return race, row


def phases(case: SparseCase, branches: Any, inputs: Inputs, settings: Settings) -> dict[str, float]:
    """Milliseconds of the parts of ``mix``, by the public functions that it calls: medians."""
    from palmette import sparse_attention as nsa

    q, k, v, gates = inputs
    ends = case.cu_seqlens
    made: dict[str, Any] = {}

    def compress() -> tuple[Tensor, Tensor, Tensor]:
        k_cmp, ends_cmp = nsa.compress(k, branches.compress_key, branches.intra_block_pe, ends, **COMPRESSION)
        return k_cmp, nsa.compress(v, branches.compress_value, None, ends, **COMPRESSION)[0], ends_cmp

    def compressed() -> tuple[Tensor, Tensor]:
        k_cmp, v_cmp, ends_cmp = made["compress"]
        return nsa.compressed_attention(q, k_cmp, v_cmp, ends, ends_cmp, **COMPRESSION)

    def select() -> Tensor:
        k_cmp, _, ends_cmp = made["compress"]
        return nsa.select_blocks(q, k_cmp, made["compressed"][1], ends, ends_cmp, **COMPRESSION, **SELECTION)

    def mix() -> Tensor:
        g = gates.unflatten(-1, (3, -1)).unsqueeze(-1)
        parts = made["compressed"][0], made["selected"], made["window"]
        return g[:, 0] * parts[0] + g[:, 1] * parts[1] + g[:, 2] * parts[2]

    def window(keys: int) -> Tensor:
        out: Any = nsa.sliding_window_attention(q, k, v, ends, window=keys)
        return out

    steps: dict[str, Callable[[], Any]] = {"compress": compress, "compressed": compressed}
    if case.tokens > TOPK * BLOCK:
        steps["select"] = select
        steps["selected"] = lambda: nsa.selected_attention(q, k, v, made["select"], ends, block_size=BLOCK)
    else:
        steps["selected"] = lambda: window(case.tokens)
    steps["window"] = lambda: window(SIZES["window_size"])
    steps["gates"] = mix
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 if case.tokens >= LONG else 3):
        settings.before()()
        for name, step in steps.items():
            start = time.perf_counter()
            made[name] = step()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


# ---------------------------------------------------------------------------------------- forward + backward

_LAST = 12  # the last tokens, whose keys only they see: their gradients are known without all other rows


def _training(case: SparseCase, settings: Settings) -> tuple[Race, Row]:
    inputs, branches = make_inputs(case), make_branches(case)
    dout = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(2)).to(case.torch_dtype)
    q, k, v = leaves = tuple(x.clone().requires_grad_() for x in inputs[:3])
    ends = case.cu_seqlens

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(branches.mix(inputs.gates, q, (k,), (v,), ends), leaves, dout)

    ours = Contender("palmette", run, lambda gradients: gradients)
    # which of the two is faster is tried in the forward only: the backward of expanding is a small sum
    expanded = "expanded" in sparse_peers.dense_causal(replace(case, tokens=BLOCK), inputs).name
    dense = sparse_peers.dense_training(case, inputs, dout, expanded=expanded)

    rows = sample(case.tokens, _LAST)
    checks = {
        ours.name: _check_gradients(case, ours.name, rows, *_sparse_gradients(branches, inputs, dout, rows)),
        dense.name: _check_gradients(case, dense.name, rows, *_dense_gradients(inputs, dout, rows)),
    }
    row: Row = {
        **_describe(case),
        "against": [dense.name],
        "work": {
            "palmette": int(BACKWARD_FACTOR * case.sparse_flops),
            dense.name: int(BACKWARD_FACTOR * case.dense_flops),
        },
    }
    return _race(case, settings, ours, [dense], checks, row), row


Expected = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _leaves(inputs: Inputs) -> Inputs:
    return Inputs(*(x.detach().double().requires_grad_() for x in inputs[:3]), inputs.gates.double())


def _sparse_gradients(branches: Any, inputs: Inputs, dout: Tensor, rows: list[int]) -> Expected:
    """dq of the rows, dk and dv of the last tokens in float64, and for which rows dq is sure."""
    wide = _leaves(inputs)
    out, sure = mixed_rows(wide, *compressed_keys(branches, wide.k, wide.v), rows)
    tail = sure[-_LAST:].all(1).flip(0).cumprod(0).sum()  # last rows without one that is not sure
    dq, dk, dv = _gradients(wide, out, dout, rows)
    return dq, dk[_LAST - tail :], dv[_LAST - tail :], sure


def _dense_gradients(inputs: Inputs, dout: Tensor, rows: list[int]) -> Expected:
    wide = _leaves(inputs)
    return *_gradients(wide, dense_rows(wide, rows), dout, rows), None


def _gradients(wide: Inputs, out: Tensor, dout: Tensor, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.autograd.grad(out, wide[:3], dout[rows].double())
    return dq[rows], dk[-_LAST:], dv[-_LAST:]


def _check_gradients(
    case: SparseCase, name: str, rows: list[int], dq: Tensor, dk: Tensor, dv: Tensor, sure: Tensor | None
) -> Callable[[tuple[Tensor, ...]], float]:
    def run(got: tuple[Tensor, ...]) -> float:
        label = f"{case.name}: {name}"
        return max(
            check(f"{label}: dq", got[0][rows], dq, case.torch_dtype, sure),
            check(f"{label}: dk", got[1][case.tokens - len(dk) :], dk, case.torch_dtype),
            check(f"{label}: dv", got[2][case.tokens - len(dv) :], dv, case.torch_dtype),
        )

    return run


# -------------------------------------------------------------------------------------------------- decoding


def _decode(case: SparseCase, settings: Settings) -> tuple[Race, Row]:
    """A step of ``batch`` sequences whose last token is number ``tokens``; all before is in the cache."""
    row_bytes = case.num_kv_heads * 2 * case.head_dim * case.torch_dtype.itemsize
    needed = 4 * case.batch * case.tokens * row_bytes
    if needed > available_memory():
        raise SkipJobError(f"needs {needed / 2**30:.0f} GiB of memory")
    from palmette import sparse_attention as nsa
    from palmette.nn import SparseKVCache

    inputs, branches = make_inputs(case), make_branches(case)
    last = torch.arange(1, case.batch + 1) * case.tokens - 1
    q, k_new, v_new, gates = (x[last].contiguous() for x in inputs)
    ends = torch.arange(case.batch + 1, dtype=torch.int32)
    cache = SparseKVCache(case.tokens + 4096)
    k, v, k_cmp, v_cmp = _fill(cache, case, inputs)

    ours = Contender(
        "palmette", lambda: branches.mix(gates, q, (k_new,), (v_new,), ends, cache), lambda out: out
    )
    tokens, ends_cmp = (
        ends * case.tokens,
        ends * ((case.tokens - COMPRESSION["kernel_size"]) // COMPRESSION["kernel_stride"] + 1),
    )
    sizes: dict[str, Any] = {**COMPRESSION, "cu_seqlens_k": tokens, "cmp_starts": cache.starts("k_cmp")}
    where: dict[str, Any] = {"cu_seqlens_k": tokens, "k_starts": cache.starts("k_tok")}

    def attention() -> Tensor:
        """What dense attention has too: no cache to bring up to date."""
        compressed, lse = nsa.compressed_attention(q, k_cmp, v_cmp, ends, ends_cmp, **sizes)
        index = nsa.select_blocks(q, k_cmp, lse, ends, ends_cmp, **sizes, **SELECTION)
        selected = nsa.selected_attention(q, k, v, index, ends, block_size=BLOCK, **where)
        window = nsa.sliding_window_attention(q, k, v, ends, window=SIZES["window_size"], **where)
        g = gates.unflatten(-1, (3, -1)).unsqueeze(-1)
        out: Tensor = g[:, 0] * compressed + g[:, 1] * selected + g[:, 2] * window
        return out

    parts = Contender("palmette, attention only", attention, lambda out: out)
    heads_first = [
        x.view(case.batch, case.tokens, case.num_kv_heads, -1).transpose(1, 2).contiguous()
        for x in (inputs.k, inputs.v)
    ]
    dense = sparse_peers.dense_decode(case, q, *heads_first)

    # A KV head of the last sequence in float64. Ours comes first: it puts the last token in place.
    first_step = ours.run()
    end, at = case.batch * case.tokens, [case.tokens - 1]
    own = Inputs(q[-1:], *(x[end - case.tokens : end] for x in (inputs.k, inputs.v)), gates[-1:])
    for head in range(case.num_kv_heads):
        want_sparse, sure = mixed_rows(own, *_last_compressed(case, k_cmp, v_cmp), at, head)
        if sure.all():
            break
    else:
        raise SkipJobError("which blocks are chosen is a matter of rounding")
    group = slice(head * case.group_size, (head + 1) * case.group_size)
    want_dense = dense_rows(own, at, head)
    results = {ours.name: (first_step, want_sparse), parts.name: (parts.run(), want_sparse)}
    results |= {c.name: (c.read(c.run()), want_dense) for c in dense}
    errors = {
        name: check(f"{case.name}: {name}", out[-1:, group], want, case.torch_dtype)
        for name, (out, want) in results.items()
    }
    keys = {
        # selecting reads the compressed keys again, without values
        "palmette": int(ends_cmp[1]) * 1.5 + TOPK * BLOCK + SIZES["window_size"],
        "dense": case.tokens,
    }
    row: Row = {
        **_describe(case),
        "against": [c.name for c in dense],
        "work": {},
        "bytes": {name: int(count * row_bytes * case.batch) for name, count in keys.items()},
        "max_error": errors,
    }
    race = Race(ours, [parts, *dense], budget_s=settings.budget_s, before=settings.before())
    return race, row


def _fill(cache: Any, case: SparseCase, inputs: Inputs) -> tuple[Tensor, ...]:
    """All tokens but the last go into the cache, as a prefill by ``SparseBranches.mix`` puts them there.

    Returns k, v, k_cmp and v_cmp: the memory of the cache itself.
    """
    from palmette.sparse_attention import compress

    counts = [case.tokens - 1] * case.batch
    past = [0] * case.batch
    before = [
        x.view(case.batch, case.tokens, *x.shape[1:])[:, :-1].flatten(0, 1) for x in (inputs.k, inputs.v)
    ]
    cache.begin(case.batch)
    found = [
        cache.append(name, x, past, counts, cache.max_length)
        for name, x in zip(("k_tok", "v_tok"), before, strict=True)
    ]
    stride = COMPRESSION["kernel_stride"]
    made: list[int] = []
    for name, x in zip(("key", "value"), before, strict=True):
        y, made = cache.compress(
            name,
            x,
            counts,
            COMPRESSION["kernel_size"],
            stride,
            lambda raw, ends: compress(raw, None, None, ends, **COMPRESSION),
        )
        found.append(cache.append(f"{name[0]}_cmp", y, past, made, cache.max_length // stride))
    cache.advance(counts, made)
    return tuple(found)


def _last_compressed(case: SparseCase, k_cmp: Tensor, v_cmp: Tensor) -> list[Tensor]:
    """The compressed rows of the last sequence."""
    return [x.view(case.batch, -1, *x.shape[1:])[-1] for x in (k_cmp, v_cmp)]


# ------------------------------------------------------------------------------------------- a public module


def _public(settings: Settings, *, backward: bool) -> tuple[Race, Row]:
    """NativeSparseAttention against native-sparse-attention-pytorch, of the same widths."""
    from palmette.nn import NativeSparseAttention

    torch.manual_seed(0)
    try:
        public = sparse_peers.public_module(PUBLIC_WIDTH, *PUBLIC_HEADS)
    except ImportError as error:
        raise SkipJobError(f"native-sparse-attention-pytorch is not installed ({error})") from None
    own = NativeSparseAttention(PUBLIC_WIDTH, *PUBLIC_HEADS, **SIZES)
    x = torch.randn(1, PUBLIC_TOKENS, PUBLIC_WIDTH)
    dout = torch.randn(x.shape)

    def contender(name: str, module: nn.Module) -> Contender:
        def forward() -> Tensor:
            with torch.no_grad():
                return module(x)  # type: ignore[no-any-return]

        def both() -> Tensor:
            module.zero_grad()
            out: Tensor = module(x)
            out.backward(dout)
            return out.detach()

        return Contender(name, both if backward else forward, lambda out: out[0])

    case = SparseCase("public", PUBLIC_TOKENS, *PUBLIC_HEADS)
    ours, peer = contender("palmette", own), contender("native-sparse-attention-pytorch", public)
    rows = sample(PUBLIC_TOKENS)
    with torch.no_grad():
        want, sure = _module_rows(own, x[0], rows)
        # there is no second implementation of its function: it in float64
        wide = public.double()
        want_public = wide(x.double())[0]
        public.float()
    row: Row = {
        **_describe(case),
        "against": [peer.name],
        "work": {},
        "max_error": {
            ours.name: check(ours.name, ours.read(ours.run())[rows], want, torch.float32, sure),
            peer.name: _mostly_equal(peer.read(peer.run()), want_public),
        },
    }
    if backward:
        row["group"] = "public training"
    options = {"budget_s": 0.0, "min_rounds": {"quick": 1, "default": 3, "full": 7}[settings.suite]}
    return Race(ours, [peer], **options, before=settings.before()), row


def _module_rows(module: Any, x: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
    """float64 rows of a ``NativeSparseAttention`` (linear compression), and bool [rows]: which are sure."""
    x = x.double()
    weight = {name: p.double() for name, p in module.named_parameters()}
    positions = torch.arange(len(x))
    q, k, v = (
        (x @ weight[f"proj_{name}.weight"].T).unflatten(-1, (-1, module.head_dim)) for name in ("q", "k", "v")
    )
    k_cmp, v_cmp = compressed_keys(module, k, v)
    k_cmp = module.rope(k_cmp, COMPRESSION["kernel_stride"] * torch.arange(len(k_cmp)))
    gates = torch.sigmoid(x @ weight["gate.0.weight"].T)
    inputs = Inputs(module.rope(q, positions), module.rope(k, positions), v, gates)
    out, sure = mixed_rows(inputs, k_cmp, v_cmp, rows)
    return out.flatten(1) @ weight["proj_o.weight"].T, sure.all(1)


def _mostly_equal(got: Tensor, want: Tensor) -> float:
    """The largest error of nine rows in ten: a choice of blocks may be a matter of rounding."""
    error = (got.double() - want).abs().amax(1).quantile(0.9).item()
    if not error <= 1e-4:
        raise AssertionError(f"the public module is off by {error:.3g} from itself in float64")
    return error


# ---------------------------------------------------------------------------------------------------- memory


def _memory(lengths: Sequence[int]) -> tuple[Race, Row]:
    if not Path("/proc/self/clear_refs").exists():
        raise SkipJobError("needs /proc/self/clear_refs")
    table = []
    for tokens in lengths:
        command = [sys.executable, "-m", "bench.sparse_memory", str(tokens), str(torch.get_num_threads())]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-1]}")
        table.append({"tokens": tokens, **json.loads(done.stdout)})
    nothing = Contender(
        "nothing", lambda: None, lambda result: result
    )  # measured already, in those processes
    row: Row = {"group": "memory", "table": table}
    return Race(nothing, [], budget_s=0.0, min_rounds=1, max_rounds=1), row


def test_sparse(benchmark: Any, job: Job, report: Any) -> None:
    benchmark.group = "sparse"
    benchmark.extra_info.update(report(run_job(job, run_with(benchmark))))
