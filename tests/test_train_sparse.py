# SPDX-License-Identifier: Apache-2.0
"""``python -m palmette train-sparse`` on tiny models: its data, its models, resuming, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import palmette
import pytest
import torch
from palmette.__main__ import main as palmette_main
from palmette.pipelines import train_sparse
from palmette.pipelines.long_runs import INTERRUPTED, Budget, StoppedError, bar
from palmette.pipelines.train_sparse import data, report
from palmette.pipelines.train_sparse.draws import generator_for
from palmette.pipelines.train_sparse.model import ATTENTIONS, LanguageModel, ModelSizes
from palmette.pipelines.train_sparse.recall import RecallTask, RecallTraining, Stage, accuracy, answers
from palmette.pipelines.train_sparse.settings import DEFAULT, QUICK, RECALL_KINDS, Settings
from palmette.pipelines.train_sparse.text import DisagreementError, TextTask, generate
from palmette.pipelines.train_sparse.training import Schedule, train

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

SIZES = ModelSizes(
    layers=2,
    hidden_size=16,
    mlp_size=24,
    head_dim=8,
    rotary=4,
    window=8,
    kernel_size=4,
    kernel_stride=2,
    block_size=4,
    topk=4,
)
TASK = RecallTask(keys=8, values=8, noise=8, pairs=3)
TINY = Settings(
    text_model=SIZES,
    recall_model=dataclasses.replace(SIZES, vocab_size=TASK.vocab_size, token_shift=True),
    text=Schedule(12, 3e-3, 3, 0.1, 5, 4),
    recall=Schedule(8, 3e-3, 3, 0.0, 4, 3),
    context=48,
    batch=2,
    windows=3,
    corpus_limit=100_000,
    task=TASK,
    stages=(Stage(0.5, 24, 0), Stage(1.0, 48, 16)),
    recall_tokens=96,
    recall_lengths=(48, 96),
    recall_sequences=4,
    prompt=60,
    generated=6,
    recomputed=2,
)
FILES = {"report.md", "results.json", "curves.png", "recall.png", "options.json", "generation.json"}


@pytest.fixture(autouse=True)
def _one_thread(num_threads: Any) -> None:
    num_threads(1)  # nothing here is large enough for two


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_sparse, "QUICK", TINY)


def command(out: Path, *more: str) -> list[str]:
    return ["--quick", "--threads", "1", "--out", str(out), *more]


def digests(out: Path) -> list[str]:
    results = json.loads((out / "results.json").read_text())
    rows = [*results["text"], *results["recall"].values()]
    return [row["losses_sha256"] for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sparse, "QUICK", TINY)
        assert train_sparse.main(command(out)) == 0
    torch.set_num_threads(threads)
    return out


# ---- text


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.load_corpus(200_000)


def test_text_is_the_same_every_time(corpus: data.Corpus) -> None:
    again = data.load_corpus(200_000)
    assert again.digest == corpus.digest
    assert torch.equal(again.train, corpus.train)
    assert torch.equal(again.held_out, corpus.held_out)
    for part, count in zip((corpus.train, corpus.held_out), corpus.documents, strict=True):
        assert part[0] == data.SEPARATOR
        assert (part == data.SEPARATOR).sum() == count
        assert int(part.min()) >= 0
        assert int(part.max()) < data.VOCAB_SIZE
    names = [name for name, _ in data.documents()]
    assert len(set(names)) == len(names) > 100
    assert not any("site-packages" in name for name in names)
    assert "import" in data.as_text(corpus.train[:20000])


def test_batches_depend_on_the_step_alone(corpus: data.Corpus) -> None:
    batch = corpus.batch(7, 3, 50, seed=1)
    assert batch.shape == (3, 51)
    assert batch.dtype == torch.int64
    corpus.batch(8, 3, 50, seed=1)
    assert torch.equal(corpus.batch(7, 3, 50, seed=1), batch)
    assert not torch.equal(corpus.batch(8, 3, 50, seed=1), batch)
    assert not torch.equal(corpus.batch(7, 3, 50, seed=2), batch)
    windows = corpus.held_out_windows(4, 50)
    assert torch.equal(windows[0], corpus.held_out[:51].long())
    assert torch.equal(windows[-1], corpus.held_out[-51:].long())
    with pytest.raises(ValueError, match="context must be less than"):
        corpus.held_out_windows(1, corpus.held_out.numel())


def test_text_can_be_shown() -> None:
    tokens = torch.tensor([data.SEPARATOR, *b"a\n\tb\x1b[31m\r", 0xFF, *"\u00e9".encode()])
    assert data.as_text(tokens) == "\u241ea\n\tb\ufffd[31m\ufffd\ufffd\u00e9"


def test_a_python_without_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "documents", lambda: iter([]))
    with pytest.raises(ValueError, match="standard library"):
        data.load_corpus()


def test_draws_depend_on_all_of_their_purpose() -> None:
    purposes = [("a", 0), ("a", 1), ("a", 2**32), ("a", 2**32 + 1), ("b", 0), ("a", 0, 0), ("a",)]
    drawn = [torch.rand(2, generator=generator_for(*purpose)).tolist() for purpose in purposes]
    assert len({tuple(values) for values in drawn}) == len(purposes)
    assert torch.rand(2, generator=generator_for("a", 0)).tolist() == drawn[0]


# ---- models


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("token_shift", [False, True])
def test_every_kind_is_causal_and_learns(kind: str, token_shift: bool) -> None:
    model = LanguageModel(kind, dataclasses.replace(SIZES, token_shift=token_shift))
    tokens = torch.randint(256, (2, 40))
    later = tokens.clone()
    later[:, 30] += 1
    with torch.no_grad():
        torch.testing.assert_close(model(later)[:, :30], model(tokens)[:, :30])
        assert not torch.equal(model(later)[:, 30:], model(tokens)[:, 30:])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        logits = model(tokens[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_kinds_begin_with_the_same_weights() -> None:
    dense, window, nsa = (dict(LanguageModel(kind, SIZES, seed=3).named_parameters()) for kind in ATTENTIONS)
    assert dense.keys() == window.keys() < nsa.keys()
    assert all(torch.equal(dense[name], other[name]) for other in (window, nsa) for name in dense)
    other = dict(LanguageModel("dense", SIZES, seed=4).named_parameters())
    assert not torch.equal(other["embedding.weight"], dense["embedding.weight"])


def test_keys_read_is_what_the_module_reports() -> None:
    model = LanguageModel("nsa", SIZES)
    for length in (3, 10, 40):
        model(torch.randint(256, (1, length)))
        assert model.keys_read(length) == model.blocks[0].attention.report.keys_read
    assert LanguageModel("dense", SIZES).keys_read(40) == 40
    assert LanguageModel("window", SIZES).keys_read(40) == 8


def test_model_errors() -> None:
    with pytest.raises(ValueError, match="attention must be one of dense, window, nsa"):
        LanguageModel("linear", SIZES)
    with pytest.raises(ValueError, match="rotary must be at most"):
        LanguageModel("dense", dataclasses.replace(SIZES, rotary=10))
    model = LanguageModel("nsa", dataclasses.replace(SIZES, token_shift=True))
    with pytest.raises(ValueError, match="caches must be None"):
        model(torch.zeros(1, 4, dtype=torch.int64), [palmette.nn.SparseKVCache()] * 2)


def test_default_sizes_are_sparse() -> None:
    for settings in (DEFAULT, QUICK):
        sizes = settings.text_model
        assert sizes.topk * sizes.block_size < settings.context / 2
        assert LanguageModel("nsa", sizes).keys_read(settings.context) < settings.context
        for stage in settings.stages[1:]:
            model = settings.recall_model
            assert stage.gap > model.layers * (model.window - 1) + 1
    assert 2 <= DEFAULT.text_model.layers <= 4
    assert 1024 <= DEFAULT.context <= 2048


# ---- recall


def test_recall_sequences() -> None:
    tokens, targets = TASK.sample(50, 40, 12, torch.Generator().manual_seed(0))
    again, _ = TASK.sample(50, 40, 12, torch.Generator().manual_seed(0))
    assert torch.equal(tokens, again)
    for sequence, answer in zip(tokens.tolist(), targets.tolist(), strict=True):
        head, questions = sequence[:-3], sequence[-3:]
        assert len(set(questions)) == 3
        for key, value in zip(questions, answer, strict=True):
            assert head.count(key) == 1
            place = head.index(key)
            assert head[place + 1] == value
            assert place + 1 + 12 < len(head)
        assert sum(token < TASK.keys + TASK.values for token in head) == 6
    assert len({tuple(t) for t in targets.tolist()}) > 30
    with pytest.raises(ValueError, match="length must be at least 21"):
        TASK.sample(1, 20, 12, torch.Generator())


def test_a_window_cannot_reach_the_pairs() -> None:
    tokens, _ = TASK.sample(4, 96, 16, torch.Generator().manual_seed(0))
    other = tokens.clone()
    pairs = other[:, :-3]
    pairs[(pairs >= TASK.keys) & (pairs < TASK.keys + TASK.values)] = TASK.keys  # other answers
    for kind, reaches in (("window", False), ("nsa", True), ("dense", True)):
        model = LanguageModel(kind, TINY.recall_model)
        with torch.no_grad():
            assert torch.equal(answers(model, tokens, 3), answers(model, other, 3)) != reaches, kind


def test_recall_training_uses_new_sequences() -> None:
    training = RecallTraining(TASK, TINY.stages, steps=8, tokens=96, seed=0)
    model = LanguageModel("dense", TINY.recall_model)
    lengths = [training.loss(model, step)[1] for step in range(8)]
    assert lengths == [96] * 8
    seen: list[torch.Tensor] = []
    model.hidden = lambda tokens: seen.append(tokens) or torch.zeros(*tokens.shape, 16)  # type: ignore
    for step in (0, 1, 4, 5):
        training.loss(model, step)
    training.evaluate(model)
    training.final(model, 48, 20, lambda steps, note: None)
    RecallTraining(TASK, TINY.stages, steps=8, tokens=96, seed=1).final(
        model, 48, 20, lambda steps, note: None
    )
    assert [tuple(t.shape) for t in seen[:4]] == [(4, 24), (4, 24), (2, 48), (2, 48)]
    rows = {tuple(row.tolist()) for batch in seen for row in batch}
    assert len(rows) == sum(len(batch) for batch in seen)


def test_accuracy_counts() -> None:
    model = LanguageModel("dense", TINY.recall_model)

    def cheat(tokens: torch.Tensor) -> torch.Tensor:
        (row,) = tokens.tolist()
        values = [row[row.index(key) + 1] for key in row[-3:]]
        values[0] = 0  # a wrong one
        hidden = torch.zeros(1, len(row), 16)
        with torch.no_grad():
            model.embedding.weight.copy_(torch.eye(TASK.vocab_size, 16))
        hidden[0, -3:] = torch.nn.functional.one_hot(torch.tensor(values), 16).float()
        return hidden

    model.hidden = cheat  # type: ignore
    generator = torch.Generator().manual_seed(0)
    assert accuracy(model, TASK, 5, 40, 8, generator) == pytest.approx(2 / 3)


# ---- generation


def test_wrong_caches_are_found() -> None:
    class Wrong(LanguageModel):
        def forward(self, tokens: torch.Tensor, caches: Any = None) -> torch.Tensor:
            logits = super().forward(tokens, caches)
            return logits if caches is None else -logits

    prompt = torch.randint(256, (30,))
    with pytest.raises(DisagreementError, match="must choose what recomputation does"):
        generate(Wrong("nsa", SIZES), prompt, 3, 1, lambda steps, note: None)


# ---- whole runs


def test_all_files_are_written(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.iterdir()}
    checkpoints = {"text-dense.pt", "text-nsa.pt", *(f"recall-{kind}.pt" for kind in RECALL_KINDS)}
    assert names == FILES | checkpoints | {f"recall-{kind}.json" for kind in RECALL_KINDS}
    assert all((uninterrupted / name).stat().st_size > 20 for name in names)
    results = json.loads((uninterrupted / "results.json").read_text())
    dense, nsa = results["text"]
    assert (dense["attention"], nsa["attention"]) == ("dense", "nsa")
    assert dense["tokens"] == nsa["tokens"] == 12 * 2 * 48
    assert nsa["parameters"] > dense["parameters"]
    assert nsa["held_out_over_dense"] == pytest.approx(nsa["held_out"] / dense["held_out"] - 1)
    assert nsa["keys_read"] == 23 + 16 + 8
    assert set(results["recall"]) == set(RECALL_KINDS)
    assert all([*row["accuracy"]] == ["48", "96"] for row in results["recall"].values())
    generation = results["generation"]
    assert generation["identical_tokens"] == generation["generated_tokens"] == 6
    assert generation["cache_bytes"] > generation["plain_kv_bytes"] > 0
    assert [e[0] for e in results["histories"]["text"]["nsa"]["evaluations"]] == [5, 10, 12]
    text = (uninterrupted / "report.md").read_text()
    assert text.count("\n| ") == 6 + len(RECALL_KINDS)
    assert "![loss over tokens](curves.png)" in text
    assert "same tokens" in text


@pytest.mark.usefixtures("tiny")
def test_a_finished_run_is_only_reported_again(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(uninterrupted)
    assert train_sparse.main(command(uninterrupted, "--stop-after", "0")) == 0
    assert digests(uninterrupted) == before
    assert capsys.readouterr().out.startswith("# A sparse model and a dense one")


@pytest.mark.usefixtures("tiny")
def test_stopped_runs_go_on_to_the_same_losses(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for _ in range(3):  # 48 steps in all
        assert train_sparse.main(command(out, "--stop-after", "13")) == INTERRUPTED
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("palmette train-sparse: stopped; to go on: python -m palmette train-sparse")
        assert "stop-after" not in error
    assert train_sparse.main(command(out)) == 0
    assert digests(out) == digests(uninterrupted)


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_at_any_point(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    evaluate, optimize = TextTask.evaluate, torch.optim.AdamW.step
    calls = 0

    def interrupted_evaluate(self: TextTask, model: LanguageModel) -> float:
        raise KeyboardInterrupt  # weights are a step further than the history

    def interrupted_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = optimize(self, *args, **kwargs)
        if calls == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(TextTask, "evaluate", interrupted_evaluate)
    assert train_sparse.main(command(out)) == INTERRUPTED
    monkeypatch.setattr(TextTask, "evaluate", evaluate)
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted_step)
    assert train_sparse.main(command(out)) == INTERRUPTED
    monkeypatch.undo()
    monkeypatch.setattr(train_sparse, "QUICK", TINY)
    assert "interrupted; to go on:" in capsys.readouterr().err
    assert train_sparse.main(command(out)) == 0
    assert digests(out) == digests(uninterrupted)


@pytest.mark.usefixtures("tiny")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_goes_on_to_the_same_losses(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import sys; import test_train_sparse as tests; from palmette.pipelines import train_sparse; "
        "train_sparse.QUICK = tests.TINY; sys.exit(train_sparse.main(sys.argv[1:]))"
    )
    paths = [str(Path(palmette.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command(out)], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (out / "text-nsa.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "report.md").exists()
    assert train_sparse.main(command(out)) == 0
    assert digests(out) == digests(uninterrupted)


def test_budget_and_schedule(tmp_path: Path) -> None:
    schedule = Schedule(10, 1.0, 2, 0.0, 5, 5)
    assert [round(schedule.rate(step), 3) for step in (0, 1, 5)] == [0.5, 0.978, 0.55]
    assert schedule.rate(10) == pytest.approx(0.1)
    training = RecallTraining(TASK, TINY.stages, steps=10, tokens=48, seed=0)
    model = LanguageModel("window", TINY.recall_model)
    with pytest.raises(StoppedError):
        train(
            model,
            training,
            schedule,
            tmp_path / "c.pt",
            title="",
            progress=bar,
            budget=Budget(0),
        )
    assert not (tmp_path / "c.pt").exists()


# ---- what it says when something is wrong


@pytest.mark.usefixtures("tiny")
def test_errors_of_the_command_line(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for arguments, message in (
        (command(uninterrupted, "--seed", "1"), "seed: 0 there, 1 now"),
        (
            command(uninterrupted, "--text-steps", "9"),
            "--out must be a directory of a run with the same options",
        ),
        (command(full), "--out must be a new or empty directory"),
        (command(tmp_path / "x", "--text-steps", "0"), "--text-steps must be positive, got 0"),
        (command(tmp_path / "x", "--recall-steps", "-1"), "--recall-steps must be positive, got -1"),
        (command(tmp_path / "x", "--threads", "0"), "--threads must be positive, got 0"),
        (command(tmp_path / "x", "--stop-after", "-1"), "--stop-after must be at least 0, got -1"),
        (command(tmp_path / "x", "--seed", "-1"), "--seed must be at least 0, got -1"),
    ):
        assert train_sparse.main(arguments) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    with pytest.raises(SystemExit):
        train_sparse.main(["--fast"])
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


def test_missing_packages_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert palmette_main(["train-sparse", "--quick", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        "palmette train-sparse: palmette train-sparse needs the package tqdm, which is not installed: "
        "pip install 'palmette[train]'\n"
    )


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert palmette_main([]) == 2
    assert "train-sparse" in capsys.readouterr().out


def test_smoothing_and_tables() -> None:
    assert report.smoothed([4.0, 2.0, 0.0, 4.0], 2) == [4.0, 3.0, 1.0, 2.0]
    assert report.table(("a", "b"), [("x", "1.5")]).splitlines() == [
        "| a   |   b |",
        "| --- | --: |",
        "| x   | 1.5 |",
    ]
