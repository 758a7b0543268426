# SPDX-License-Identifier: Apache-2.0
"""``python -m palmette train-pipeline`` end to end on a tiny model, stopped and resumed; the link."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from palmette import FixpointCodec, TahCodec
from palmette.pipelines import ActivationStore, DeltaCodec
from palmette.pipelines.train_pipeline import link as links
from palmette.pipelines.train_pipeline import main, parse_arguments
from palmette.pipelines.train_pipeline.link import TokenBucket, slow_link
from palmette.pipelines.train_pipeline.settings import DEFAULT, METHODS, QUICK
from test_demo import tiny_tokenizer
from tiny_models import tiny_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_llama(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        num_hidden_layers=4,
    ).save_pretrained(directory)
    tiny_tokenizer(directory)
    return directory


def arguments(checkpoint: Path, out: Path, *more: str) -> list[str]:
    return ["--quick", "--model", str(checkpoint), "--out", str(out), "--timeout", "60", *more]


def test_end_to_end_and_going_on(checkpoint, tmp_path, capsys):
    """A run that is stopped twice ends with the same parameters and losses as one that is not."""
    methods = ("--methods", "fp32,tah-delta", "--epochs", "2")
    assert main(arguments(checkpoint, tmp_path / "a", *methods)) == 0
    text = (tmp_path / "a" / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "TAH of deltas" in text
    for name in ("curves.png", "speed.png"):
        assert (tmp_path / "a" / name).read_bytes()[:4] == b"\x89PNG"

    stopped = arguments(checkpoint, tmp_path / "b", *methods)
    assert main([*stopped, "--stop-after", "3"]) == 130
    assert "to go on: python -m palmette train-pipeline --quick" in capsys.readouterr().err
    assert main([*stopped, "--stop-after", "12"]) == 130
    assert main(stopped) == 0
    for method in ("fp32", "tah-delta"):
        a, b = (json.loads((tmp_path / run / f"{method}.json").read_text()) for run in "ab")
        assert a["losses"] == b["losses"]
        assert a["digests"] == b["digests"]
        assert a["held_out"] == b["held_out"]
        assert a["bytes"] == b["bytes"]
        assert len(a["losses"]) == 4
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert {row["method"] for row in results["speeds"]} == {"fp32", "tah-delta"}
    fewer = {row["method"]: row["fewer_bytes"] for row in results["speeds"]}
    assert fewer["fp32"] == 1
    assert fewer["tah-delta"] > 3
    assert main([*stopped, "--epochs", "3"]) == 1
    assert "--out must be a directory of a run with the same options" in capsys.readouterr().err


def test_a_token_bucket_in_the_sender(checkpoint, tmp_path, capsys):
    out = tmp_path / "c"
    assert main(arguments(checkpoint, out, "--link", "bucket", "--methods", "fp32,tah", "--epochs", "1")) == 0
    assert "a token bucket in the sending process" in capsys.readouterr().out
    rows = json.loads((out / "results.json").read_text())["speeds"]
    slow = {row["method"]: row["seconds"] for row in rows if row["ratio"] == 8.0}
    assert slow["tah"] < 0.7 * slow["fp32"]


def test_a_stage_that_dies(checkpoint, tmp_path, capsys, monkeypatch):
    from palmette.pipelines.train_pipeline.run import Pipeline

    step = Pipeline.step

    def killing(self):
        self.workers[1].kill()
        return step(self)

    monkeypatch.setattr(Pipeline, "step", killing)
    assert main(arguments(checkpoint, tmp_path / "d", "--methods", "fp32")) == 1
    error = capsys.readouterr().err
    assert "stage 0: PipelineError: stage 0: " in error
    assert "the connection is lost; the peer has ended or cannot be reached" in error


def test_bad_options(tmp_path, capsys):
    for options, message in (
        (["--methods", "fp32,zip"], "--methods must be fp32 and others of"),
        (["--methods", "tah"], "--methods must be fp32 and others of"),
        (["--epochs", "0"], "--epochs must be positive, got 0"),
        (["--microbatches", "3"], "--microbatches must divide 2, got 3"),
    ):
        assert main([*options, "--out", str(tmp_path / "e")]) == 1
        assert message in capsys.readouterr().err
    assert parse_arguments([]).out == Path("train-pipeline-out")


def test_settings():
    assert DEFAULT.steps == DEFAULT.steps_per_epoch * DEFAULT.epochs == 64
    for settings in (DEFAULT, QUICK):
        assert settings.samples % settings.batch == settings.held_out % settings.batch == 0
    store = lambda: ActivationStore(capacity=2, slot_shape=(3, 64))  # noqa: E731
    assert isinstance(METHODS["aq-sgd"].forward(store), DeltaCodec)
    assert METHODS["tah"].forward(store) == TahCodec()
    assert METHODS["tah"].backward == FixpointCodec(6)


# ---- the link


def namespaces():
    try:
        return slow_link("namespaces")
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")


RECEIVER = """
import socket, sys, time
server = socket.create_server(("10.213.0.2", 5000))
print("ready", flush=True)
connection, _ = server.accept()
count = 0
while data := connection.recv(1 << 16):
    count += len(data)
print(count, time.monotonic(), flush=True)
"""
SENDER = """
import socket, time
connection = socket.create_connection(("10.213.0.2", 5000))
print(time.monotonic(), flush=True)
connection.sendall(bytes(250_000))
"""


def test_the_rate_of_the_link():
    """2 Mbit in 0.5 s at 4 Mbit/s, and much faster without a limit."""
    with namespaces() as link:
        for rate, least, most in ((4e6, 0.4, 1.0), (None, 0.0, 0.25), (16e6, 0.1, 0.4)):
            link.set_rate(rate)
            receiver = subprocess.Popen(
                link.command(1, [sys.executable, "-c", RECEIVER]), stdout=subprocess.PIPE, text=True
            )
            assert receiver.stdout.readline() == "ready\n"
            sender = subprocess.run(
                link.command(0, [sys.executable, "-c", SENDER]), capture_output=True, text=True, check=True
            )
            count, end = receiver.communicate(timeout=20)[0].split()
            assert int(count) == 250_000
            assert least < float(end) - float(sender.stdout) < most


def test_namespaces_are_gone_with_the_link():
    with namespaces() as link:
        pids = [holder.pid for holder in link._holders]
        assert all(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_without_tools(monkeypatch):
    monkeypatch.setattr(links.shutil, "which", lambda tool: None)
    assert slow_link().shaped is False
    with pytest.raises(OSError, match="unshare is not installed"):
        slow_link("namespaces")
    link = slow_link("bucket")
    assert link.command(0, ["a"]) == ["a"]
    assert link.address() == "127.0.0.1"


def test_token_bucket():
    class Work:
        def wait(self, timeout=None):
            return True

    sent = []

    def op(tensor, **options):
        sent.append((time.monotonic(), options))
        return Work()

    bucket, message = TokenBucket(), torch.zeros(1000, dtype=torch.uint8)
    begin = time.monotonic()
    bucket.send(op, message, group=None)
    bucket.rate = 80_000  # 0.1 s for a message
    works = [bucket.send(op, message, tag=i) for i in range(3)]
    assert all(work.wait() for work in works)
    times = [when - begin for when, _ in sent]
    assert times[0] < 0.05
    assert [round(t, 1) for t in times[1:]] == pytest.approx([0.1, 0.2, 0.3], abs=0.06)
    assert [options for _, options in sent] == [{"group": None}, {"tag": 0}, {"tag": 1}, {"tag": 2}]

    def fails(tensor, **options):
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        bucket.send(fails, message).wait()
