# SPDX-License-Identifier: Apache-2.0
"""``python -m palmette train-rl`` on a tiny model: rewards, rollouts, updates, stops."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from palmette.pipelines import train_rl
from palmette.pipelines.long_runs import INTERRUPTED
from palmette.pipelines.models import cut_layers
from palmette.pipelines.train_rl import report
from palmette.pipelines.train_rl.rollouts import Rollouts, roll_out
from palmette.pipelines.train_rl.run import History, Policy, load_history
from palmette.pipelines.train_rl.settings import Settings
from palmette.pipelines.train_rl.task import Problem, Task
from tiny_models import tiny_llama

runs = sys.modules["palmette.pipelines.train_rl.run"]  # the package's own `run` is a function
ALPHABET = "\n0123456789+:ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz ,."


class Characters:
    """A tokenizer of single characters."""

    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ALPHABET.index(c) for c in text]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(ALPHABET[t] for t in tokens)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"vocab_size": len(ALPHABET), "initializer_range": 0.05, "num_hidden_layers": 2}
    monkeypatch.setattr(runs, "load_model", lambda path: (tiny_llama(**model), Characters()))
    tiny = Settings(
        prompts=2, group=3, updates=5, pool=20, held_out=6, evaluate_every=2, save_every=2, max_tokens=4
    )
    monkeypatch.setattr(train_rl, "QUICK", tiny)
    # this model never finds a sum, and without rewards nothing would move
    monkeypatch.setattr(Task, "reward", lambda self, problem, tokens: float(sum(tokens) % 2))


def task(**sizes: int) -> Task:
    return Task(Characters(), sizes.get("pool", 20), sizes.get("held_out", 6))


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("47", 1.0),
        (" 47 ", 1.0),
        ("47\n3", 1.0),
        ("47x", 0.0),
        ("x47", 0.0),
        ("", 0.0),
        ("4 7", 0.0),
        ("48", 0.0),
    ],
)
def test_rewards(answer, reward):
    assert Problem(12, 35).reward(answer) == reward


def test_an_answer_must_end():
    t = task()
    right = Characters()("47\n")["input_ids"]
    assert t.reward(Problem(12, 35), right) == 1.0
    assert t.reward(Problem(12, 35), right[:-1]) == 0.0
    assert t.reward(Problem(12, 35), []) == 0.0


def test_problems():
    t = task(pool=4000, held_out=300)
    pairs = [{(p.a, p.b) for p in some} for some in (t.train, t.held_out)]
    assert [len(some) for some in pairs] == [4000, 300]
    assert not pairs[0] & pairs[1]
    assert task(pool=4000, held_out=300).train == t.train  # for every run
    with pytest.raises(ValueError, match="pool and held_out must be at most 8100 together, got 8000 and 101"):
        task(pool=8000, held_out=101)


def test_rollouts_are_a_tree_of_what_was_drawn():
    model = tiny_llama(vocab_size=len(ALPHABET))
    t = task()
    problems = t.train[:2]
    got = roll_out(model, t, problems, 3, max_tokens=4, generator=torch.Generator().manual_seed(0))
    assert got.answers.shape == (2, 3, 2)
    assert got.rewards.shape == (2, 3)
    assert got.tree.num_tokens == len(got.token_ids) == len(got.logprobs)
    ids = got.token_ids.tolist()
    assert ids[: len(t.instructions)] == t.instructions
    for i, problem in enumerate(problems):
        for j in range(3):
            node = 1 + i * 4 + 1 + j
            begin, length = got.answers[i, j].tolist()
            assert int(got.tree.node_start[node]) == begin
            assert got.tree.length(node) == length
            assert got.tree.parent(node) == 1 + i * 4
            answer = ids[begin : begin + length]
            assert t.end_tokens[0] not in answer[:-1]
            # what the model itself says of them
            path = [*t.instructions, *t.question(problem), *answer]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([path]), use_cache=False).logits[0]
            logprobs = logits.log_softmax(-1)[-length - 1 : -1].gather(-1, torch.tensor(answer)[:, None])[
                :, 0
            ]
            torch.testing.assert_close(got.logprobs[begin : begin + length], logprobs, rtol=1e-4, atol=1e-4)
            assert float(got.rewards[i, j]) == t.reward(problem, answer)
    values = got.of_tokens(torch.arange(6.0).view(2, 3) + 1)
    assert int((values > 0).sum()) == got.num_answer_tokens
    assert not got.logprobs[values == 0].any()


def update(policy: Policy, rollouts: Rollouts) -> None:
    policy.gradients(rollouts)
    policy.step()


def test_an_update_is_that_of_dense_grpo():
    """The same rollouts, every answer as a sequence of its own."""
    from palmette import group_advantages

    t = task()
    settings = Settings(prompts=2, group=3, learning_rate=1e-3, warmup=1)
    models = [tiny_llama(vocab_size=len(ALPHABET)) for _ in range(2)]
    rollouts = roll_out(
        models[0], t, t.train[:2], 3, max_tokens=4, generator=torch.Generator().manual_seed(0)
    )
    rollouts.rewards = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    update(Policy(models[0], settings), rollouts)

    model = models[1]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    advantages = group_advantages(rollouts.rewards)
    ids = rollouts.token_ids.tolist()
    total = torch.zeros(())
    for i, problem in enumerate(t.train[:2]):
        for j in range(3):
            begin, length = rollouts.answers[i, j].tolist()
            path = [*t.instructions, *t.question(problem), *ids[begin : begin + length]]
            logits = model(input_ids=torch.tensor([path]), use_cache=False).logits[0]
            answer = torch.tensor(path[-length:])[:, None]
            logprobs = logits.log_softmax(-1)[-length - 1 : -1].gather(-1, answer)[:, 0]
            total = total - (advantages[i, j] * (logprobs - logprobs.detach()).exp()).sum()
    (total / rollouts.num_answer_tokens).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for a, b in zip(models[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_older_rollouts_use_the_decoupled_loss(monkeypatch):
    """The proximal policy is the one that the update starts from; the behaviour's ratio only weighs."""
    t = task()
    model = tiny_llama(vocab_size=len(ALPHABET))
    rollouts = roll_out(model, t, t.train[:2], 3, max_tokens=4, generator=torch.Generator().manual_seed(0))
    rollouts.rewards = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    policy = Policy(model, Settings(warmup=1, learning_rate=1e-2))
    policy.version, rollouts.version = 3, 1
    seen = []
    real = runs.policy_loss

    def watch(logprobs, advantages, **options):
        seen.append(options)
        return real(logprobs, advantages, **options)

    monkeypatch.setattr(runs, "policy_loss", watch)
    update(policy, rollouts)
    assert seen[0]["correction"] == "clamp"
    old, behaviour = seen[0]["old_logprobs"], seen[0]["behavior_logprobs"]
    torch.testing.assert_close(old, behaviour, rtol=1e-3, atol=1e-4)  # the weights have not moved yet
    update(policy, rollouts)
    assert not torch.allclose(seen[-1]["old_logprobs"], behaviour, atol=1e-3)


def test_cutting_layers():
    model = tiny_llama(num_hidden_layers=6)
    layers = list(model.model.layers)
    assert cut_layers(model, None) is model
    cut = cut_layers(model, 4)
    assert list(cut.model.layers) == [*layers[:2], *layers[-2:]]
    assert [layer.self_attn.layer_idx for layer in cut.model.layers] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"layers must be even and in \[2, 4\], got 3"):
        cut_layers(model, 3)


# ---- the command


def command(out: Path, *options: str) -> list[str]:
    return ["--quick", "--out", str(out), "--threads", "1", *options]


def content(history: History) -> dict[str, object]:
    """What does not depend on the clock."""
    return {k: v for k, v in vars(history).items() if not k.endswith("seconds")}


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("sampler", ["uniform", "vade"])
def test_a_run_that_was_stopped_goes_on_with_the_same_losses(tmp_path, capsys, sampler):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_rl.main(command(whole, "--sampler", sampler)) == 0
    assert {path.name for path in whole.iterdir()} == {
        "options.json",
        "checkpoint.pt",
        "history.json",
        "results.json",
        "report.md",
        "curves.png",
    }
    out = capsys.readouterr().out
    assert "held-out accuracy before" in out
    for _ in range(4):  # what a checkpoint of every second update would not have is kept too
        assert train_rl.main(command(parts, "--sampler", sampler, "--stop-after", "1")) == INTERRUPTED
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("palmette train-rl: stopped; to go on: python -m palmette train-rl --quick")
    assert train_rl.main(command(parts, "--sampler", sampler)) == 0
    histories = [load_history(directory) for directory in (whole, parts)]
    assert content(histories[0]) == content(histories[1])
    assert len(histories[0].rewards) == 5
    assert [updates for updates, _ in histories[0].accuracy] == [0, 2, 4, 5]
    assert histories[0].staleness == [0] * 5
    assert all(a < b for a, b in zip(histories[0].tokens, histories[0].dense_tokens, strict=True))
    states = [torch.load(d / "checkpoint.pt", weights_only=True)["model"] for d in (whole, parts)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    model, _ = runs.load_model(None)
    moved = [float((value - model.state_dict()[name]).abs().max()) for name, value in states[0].items()]
    assert min(moved) > 1e-6
    assert len(set(histories[0].losses)) == 5


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("where", ["rollout", "gradients", "step", "evaluation"])
def test_a_run_that_was_interrupted_goes_on_with_the_same_losses(tmp_path, monkeypatch, capsys, where):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_rl.main(command(whole)) == 0
    owner, name = {
        "rollout": (runs.Run, "roll_out"),
        "gradients": (Policy, "gradients"),
        "step": (Policy, "step"),
        "evaluation": (runs.Run, "_evaluate"),
    }[where]
    real, calls = getattr(owner, name), 0

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert train_rl.main(command(parts)) == INTERRUPTED
    assert "interrupted; to go on" in capsys.readouterr().err
    done = torch.load(parts / "checkpoint.pt", weights_only=True)["version"]
    assert done == (4 if where == "evaluation" else 2)  # the step that was cut off began with the third
    assert train_rl.main(command(parts)) == 0
    histories = [load_history(directory) for directory in (whole, parts)]
    assert content(histories[0]) == content(histories[1])
    states = [torch.load(d / "checkpoint.pt", weights_only=True)["model"] for d in (whole, parts)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("sampler", ["uniform", "vade"])
def test_rollouts_beside_updates(tmp_path, sampler):
    options = ("--eta", "2", "--updates", "6", "--sampler", sampler)
    assert train_rl.main(command(tmp_path, *options, "--stop-after", "3")) == INTERRUPTED
    assert train_rl.main(command(tmp_path, *options)) == 0
    history = load_history(tmp_path)
    assert len(history.rewards) == 6
    assert 1 <= max(history.staleness) <= 2
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["eta"] == 2


@pytest.mark.usefixtures("_tiny")
def test_what_fails_in_the_rollouts_thread_is_told(tmp_path, monkeypatch, capsys):
    def fails(*_: object) -> None:
        raise ValueError("no rollout today")

    monkeypatch.setattr(runs.Run, "roll_out", fails)
    assert train_rl.main(command(tmp_path, "--eta", "1")) == 1
    assert "no rollout today" in capsys.readouterr().err


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--updates", "0"], "--updates must be positive, got 0"),
        (["--eta", "-1"], "--eta must be in [0, 2^31), got -1"),
        (["--seed", "99999999999"], "--seed must be in [0, 2^31), got 99999999999"),
        (["--group", "1"], "--group must be at least 2, else there is nothing to compare, got 1"),
        (["--stop-after", "-1"], "--stop-after must be at least 0, got -1"),
        (["--learning-rate", "inf"], "--learning-rate must be positive, got inf"),
        (["--learning-rate", "0"], "--learning-rate must be positive, got 0.0"),
        (["--threads", "0"], "--threads must be positive, got 0"),
        (["--layers", "3"], "layers must be even and in [2, 2], got 3"),
        (["--held-out", "8081"], "pool and held_out must be at most 8100 together, got 20 and 8081"),
        (["--prompts", "21"], "prompts must be at most the 20 there are, got 21"),
    ],
)
def test_bad_options(tmp_path, capsys, options, message):
    assert train_rl.main(command(tmp_path / "out", *options)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_tiny")
def test_a_directory_of_another_run(tmp_path, capsys):
    assert train_rl.main(command(tmp_path, "--updates", "1")) == 0
    assert train_rl.main(command(tmp_path, "--updates", "1", "--group", "2")) == 1
    assert "group: 3 there, 2 now" in capsys.readouterr().err


@pytest.mark.usefixtures("_tiny")
def test_a_finished_run_goes_on_for_more_updates(tmp_path):
    assert train_rl.main(command(tmp_path / "a", "--updates", "2")) == 0
    assert train_rl.main(command(tmp_path / "a")) == 0
    assert train_rl.main(command(tmp_path / "b")) == 0
    assert content(load_history(tmp_path / "a")) == content(load_history(tmp_path / "b"))


@pytest.mark.usefixtures("_tiny")
def test_comparing_runs(tmp_path, capsys):
    directories = [tmp_path / seed for seed in "01"]
    for directory in directories:
        directory.mkdir()
        (directory / ".options.json.partial").touch()  # of a process that was killed
        assert train_rl.main(command(directory, "--seed", directory.name, "--updates", "2")) == 0
    capsys.readouterr()
    assert report.main([*map(str, directories), "--out", str(tmp_path / "both")]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "both" / "comparison.md").read_text() + "\n"
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:4]] == ["seed 0", "seed 1"]
    assert "mean ± standard deviation" in text
    assert (tmp_path / "both" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert report.main([str(tmp_path / "none"), "--out", str(tmp_path / "both")]) == 1
    assert "runs must be directories of train-rl, got" in capsys.readouterr().err
