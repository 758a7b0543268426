# SPDX-License-Identifier: Apache-2.0
"""Pipelines of real processes: equal to one process where nothing is lost, clear about what goes wrong."""

from __future__ import annotations

import itertools
import pickle
import signal

import pipeline_workers as workers
import pytest
import torch
from palmette.codecs import CastCodec, FixpointCodec, TahCodec
from palmette.pipelines import ActivationStore, DeltaCodec
from palmette.pipelines.pipeline_parallel import Edge, PipelineError, QuantPipelineStage, _chunk
from pipeline_workers import EIGHT, FOUR
from torch.distributed.pipelining import PipelineStage

LOSSLESS = Edge(CastCodec(), CastCodec())


def check_exact(results, expected, scale):
    """Bit for bit: outputs, losses, every gradient after every microbatch, and what the optimizer sees."""
    for number, step in enumerate(expected):
        last = results[-1][number]
        for name in ("outputs", "losses"):
            assert all(torch.equal(a, b) for a, b in zip(last[name], step[name], strict=True))
        for rank, result in enumerate(results):
            got = result[number]["grads"]
            assert len(got) == len(step["grads"][rank])
            for microbatch, grads in enumerate(step["grads"][rank]):
                assert all(torch.equal(a, b) for a, b in zip(got[microbatch], grads, strict=True))
            scaled = [grad / scale for grad in step["grads"][rank][-1]]
            assert all(torch.equal(a, b) for a, b in zip(result[number]["scaled"], scaled, strict=True))


@pytest.mark.parametrize(
    ("name", "size", "edge"),
    [("gpipe", 2, Edge()), ("1f1b", 2, LOSSLESS), ("gpipe", 4, LOSSLESS), ("1f1b", 4, Edge())],
)
def test_lossless_pipeline_equals_one_process(tmp_path, name, size, edge):
    shape, chunks = (8, 5, 7), 4
    results = workers.run(tmp_path, size, workers.exact, name, "layer", shape, chunks, edge)
    expected = workers.one_process(workers.modules(size, shape[-1]), workers.batches(2, shape), chunks)
    check_exact(results, expected, chunks)


@pytest.mark.parametrize(
    "edge", [Edge(), Edge([CastCodec(torch.bfloat16), CastCodec()], [None, CastCodec()])]
)
def test_several_tensors_of_odd_shapes_and_dtypes(tmp_path, edge):
    shape, chunks = (6, 5, 7), 2
    results = workers.run(tmp_path, 2, workers.exact, "1f1b", "several", shape, chunks, edge)
    parts = workers.modules(2, shape[-1], "several")
    expected = workers.one_process(parts, workers.batches(2, shape, shape[:2]), chunks)
    check_exact(results, expected, chunks)


def test_same_as_torchs_own_stage(tmp_path):
    arguments = "gpipe", "layer", (4, 3, 8), 2
    own = workers.run(tmp_path, 2, workers.exact, *arguments, Edge())
    torchs = workers.run(tmp_path, 2, workers.exact, *arguments, None)
    for a, b in zip(own, torchs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert all(torch.equal(g, h) for g, h in zip(x["scaled"], y["scaled"], strict=True))


@pytest.mark.parametrize("codec", [FOUR, TahCodec(tile_size=16)])
def test_quantized_training_learns_and_counts_its_bytes(tmp_path, codec):
    steps, chunks, edge = 12, 2, Edge(codec, EIGHT)
    first, last = workers.run(tmp_path, 2, workers.training, [edge] * 2, steps, chunks)
    assert sum(last["losses"][-1]) < 0.5 * sum(last["losses"][0])
    shape = (4 // chunks, 3, 16)
    assert (first["bytes"].forward, first["bytes"].backward) == (
        steps * chunks * codec.wire_size(shape),
        0,
    )
    assert (last["bytes"].forward, last["bytes"].backward) == (
        0,
        steps * chunks * EIGHT.wire_size(shape),
    )
    assert 0 < first["bytes"].setup < 4096


def test_ends_with_different_codecs_are_told(tmp_path):
    edges = [Edge(FOUR), Edge(FixpointCodec(5))]
    results = workers.run(tmp_path, 2, workers.training, edges, 1)
    for rank, result in enumerate(results):
        text = result["error"]["text"]
        assert f"stage {rank}: its edge with stage {1 - rank} must have the same codecs at both ends" in text
        assert "bits=4" in text
        assert "bits=5" in text


def test_corrupt_wire_is_named(tmp_path):
    edge = Edge(FOUR, workers.Damaging(8, at=1))
    first, last = workers.run(tmp_path, 2, workers.training, [edge] * 2, 2)
    assert first["error"]["where"] == ("backward", 1, 1)
    assert (
        "stage 0: decoding gradients of microbatch 1 from stage 1 (rank 1): wire must be"
        in first["error"]["text"]
    )
    assert "connection is lost" in last["error"]["text"]


def test_options_of_a_codec_that_do_not_fit_are_named(tmp_path):
    edge = Edge([None, None, None])
    results = workers.run(tmp_path, 2, workers.training, [edge] * 2, 1, 2, 5)
    assert "must have a codec for each of 1 tensors, got 3" in results[0]["error"]["text"]


def test_unequal_microbatches_are_refused(tmp_path):
    first, last = workers.run(tmp_path, 2, workers.training, [Edge()] * 2, 1, 3)
    assert "is the batch split evenly?" in first["error"]["text"]
    assert "connection is lost" in last["error"]["text"]


# ---- processes that end or stop


def test_killed_process_ends_the_others(tmp_path):
    results = workers.run(tmp_path, 4, workers.failing, 2, signal.SIGKILL, 1, "1f1b", 5.0)
    assert results[2] is None
    for rank in (0, 1, 3):
        assert results[rank]["step"] == 1
        assert results[rank]["seconds"] < 10
        assert f"stage {rank}: " in results[rank]["text"]
        assert abs(results[rank]["peer"] - rank) == 1
    assert results[3]["peer"] == 2
    assert "connection is lost" in results[3]["text"]


@pytest.mark.parametrize(("name", "step"), [("gpipe", 1), ("1f1b", -1)])
def test_stalled_process_ends_the_others(tmp_path, name, step):
    stalled, other = workers.run(tmp_path, 2, workers.failing, 0, signal.SIGSTOP, step, name, 2.0)
    assert stalled is None
    assert other["step"] == max(step, 0)
    assert 1.9 < other["seconds"] < 8
    assert "stage 1: receiving" in other["text"]
    assert "from stage 0 (rank 0): nothing within the timeout of 2 s" in other["text"]


def test_killed_run_resumes_with_the_same_losses(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    steps = 7
    undisturbed = workers.run(tmp_path, 2, workers.resuming, whole, steps, None)
    first, killed = workers.run(tmp_path, 2, workers.resuming, broken, steps, 5)
    assert killed is None
    assert "stage 1 (rank 1): the connection is lost" in first["error"]
    resumed = workers.run(tmp_path, 2, workers.resuming, broken, steps, None)
    assert resumed[1]["first"] == 4
    assert resumed[1]["losses"] == undisturbed[1]["losses"][4:]
    assert [r["digest"] for r in resumed] == [r["digest"] for r in undisturbed]


# ---- stores on edges


def check_equal_stores(results):
    """Both ends of every edge; digests hold the order of use too."""
    for before, after in itertools.pairwise(results):
        assert torch.equal(before["tables"][-1], after["tables"][0])
        rows = before["rows"][-1], after["rows"][0]
        assert all(torch.equal(rows[0][sample], rows[1][sample]) for sample in rows[0])
        assert before["digests"][-1] == after["digests"][0]


def test_known_samples_cost_less_and_both_ends_stay_equal(tmp_path):
    results = workers.run(tmp_path, 3, workers.remembering, "plain")
    check_equal_stores(results)
    for rank in (0, 1):
        cost = results[rank]["bytes"]
        full = 2 * (16 + 2 * 6 * 16 * 2)
        assert cost[:2] == [full, full]
        assert max(cost[2:]) < full
    assert results[2]["bytes"] == [0] * 6
    assert all(result["repaired"] == 0 and not result["warnings"] for result in results)


def test_evaluation_changes_no_store(tmp_path):
    first, last = workers.run(tmp_path, 2, workers.remembering, "evaluate")
    check_equal_stores([first, last])
    torch.manual_seed(3)
    samples = torch.randn(8, 6, 16)
    parts = workers.modules(2, 16)
    steps = [ids for epoch in workers.EPOCHS for ids in epoch]
    for ids, (_, before), (output, after) in zip(steps, first["evaluated"], last["evaluated"], strict=True):
        for part, values in zip(parts, (before, after), strict=True):
            for parameter, value in zip(part.parameters(), values, strict=True):
                parameter.data.copy_(value)
        expected = torch.cat([parts[1](parts[0](x)) for x in samples[ids].tensor_split(2)])
        assert torch.equal(output, expected)  # nothing is lost on the way
    plain = workers.run(tmp_path, 2, workers.remembering, "plain")
    assert last["losses"] == plain[1]["losses"]


def test_diverged_stores_are_detected_and_repaired(tmp_path):
    results = workers.run(tmp_path, 2, workers.remembering, "diverge")
    check_equal_stores(results)
    for rank, result in enumerate(results):
        assert result["error"] is None
        assert result["repaired"] == 3  # 4 was altered, 2 was lost, and its room kept 5 from being dropped
        (warning,) = result["warnings"]
        assert warning == (
            f"stages {rank} and {1 - rank} have stored different activations of 3 samples, [2, 4, 5]; "
            "they are sent in full next time"
        )


def test_different_samples_at_both_ends_are_told(tmp_path):
    first, last = workers.run(tmp_path, 2, workers.remembering, "confused")
    assert (
        "stage 1: decoding activations of microbatch 0 from stage 0 (rank 0): wire must be" in last["error"]
    )
    assert "connection is lost" in first["error"]


@pytest.mark.parametrize("where", [0, 1])
def test_sample_that_one_end_has_lost_is_told(tmp_path, where):
    """Wires are then shorter or longer than the receiver thinks; gloo would end it for a longer one."""
    first, last = workers.run(tmp_path, 2, workers.remembering, f"lost at {where}")
    assert "decoding activations of microbatch 0 from stage 0 (rank 0): wire must be" in last["error"]
    assert "connection is lost" in first["error"]


def test_delta_for_one_of_several_tensors(tmp_path):
    results = workers.run(tmp_path, 2, workers.remembering, "pair")
    check_equal_stores(results)
    assert results[0]["error"] is None
    cost = results[0]["bytes"]
    assert max(cost[2:]) < min(cost[:2])
    first, _ = workers.run(tmp_path, 2, workers.remembering, "unnamed")
    assert "forward must name the tensor that a DeltaCodec is for" in first["error"]


def test_a_store_for_every_edge(tmp_path):
    (result,) = workers.run(tmp_path, 1, workers.sharing)
    assert "must have a store of its own, got a shared one" in result["error"]


def test_missing_sample_ids_are_told(tmp_path):
    first, _ = workers.run(tmp_path, 2, workers.remembering, "forgotten")
    assert "set_sample_ids must be called before each training step" in first["error"]


# ---- arguments


def test_other_versions_of_torch_are_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu130")
    with pytest.raises(RuntimeError, match=r"must run with PyTorch 2\.13, .* got 2\.12\.1\+cu130"):
        QuantPipelineStage(torch.nn.Identity(), 0, 1, torch.device("cpu"))


def test_missing_hooks_are_told(monkeypatch):
    monkeypatch.delattr(PipelineStage, "_recv_meta")
    with pytest.raises(RuntimeError, match="got none of \\['_recv_meta'\\]"):
        QuantPipelineStage(torch.nn.Identity(), 0, 1, torch.device("cpu"))


def test_errors_travel_between_processes():
    error = PipelineError("lost", stage=1, peer=0, direction="forward", microbatch=3)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), vars(copy)) == ("lost", vars(error))


def test_edges_are_checked():
    store = ActivationStore(capacity=2, slot_shape=(2, 4))
    with pytest.raises(ValueError, match="backward must be a Codec or None, got DeltaCodec"):
        Edge(backward=DeltaCodec(store))
    with pytest.raises(ValueError, match="forward must be a Codec or DeltaCodec or None, got 4"):
        Edge(forward=[None, 4])


def test_options_are_checked():
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, got 0"):
        QuantPipelineStage(torch.nn.Identity(), 0, 1, torch.device("cpu"), timeout=0)
    with pytest.raises(ValueError, match="check_every must be an integer of at least 1, got 0"):
        QuantPipelineStage(torch.nn.Identity(), 0, 1, torch.device("cpu"), check_every=0)
    with pytest.raises(ValueError, match="input_edge must be an Edge, got CastCodec"):
        QuantPipelineStage(torch.nn.Identity(), 0, 1, torch.device("cpu"), input_edge=CastCodec())


@pytest.mark.parametrize("total", [1, 4, 5, 7])
def test_ids_are_split_like_batches(total):
    parts = torch.arange(total).tensor_split(3)
    assert [list(range(*_chunk(total, 3, i))) for i in range(3)] == [part.tolist() for part in parts]
