# SPDX-License-Identifier: Apache-2.0
"""report.md, results.json, curves.png and recall.png."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

from ...integrations._extras import require
from ..long_runs import write_atomically, write_json
from ..reports import machine, smoothed, table
from .run import Results, losses_digest
from .training import History

PURPOSE = "palmette train-sparse"
COLOURS = {"dense": "#5b7db1", "window": "#d98b2b", "nsa": "#1b6e4a"}
NAMES = {"dense": "dense", "window": "window only", "nsa": "NSA"}
WITHIN = 0.02  # how far NSA's loss may be above dense attention's


def _last_part(history: History) -> float:
    """Mean training loss of the last tenth of the steps."""
    return statistics.fmean(history.losses[-max(1, len(history.losses) // 10) :])


def text_rows(results: Results) -> list[dict[str, Any]]:
    """One row per kind of attention: losses in nats per token, and how far above dense attention's."""
    dense = results.text["dense"]
    rows = []
    for kind, history in results.text.items():
        held_out = history.evaluations[-1][2]
        rows.append(
            {
                "attention": kind,
                "held_out": held_out,
                "bits_per_byte": held_out / math.log(2),
                "held_out_over_dense": held_out / dense.evaluations[-1][2] - 1,
                "last_tenth": _last_part(history),
                "last_tenth_over_dense": _last_part(history) / _last_part(dense) - 1,
                "tokens": history.tokens[-1],
                "parameters": results.parameters["text"][kind],
                "seconds_per_step": history.step_seconds,
                "keys_read": results.keys_read["text"][kind],
                "losses_sha256": losses_digest(history),
            }
        )
    return rows


def _text_table(results: Results) -> str:
    header = (
        "attention",
        "held-out nats/byte",
        "bits/byte",
        "over dense",
        "training, last tenth",
        "over dense",
        "parameters",
        "s/step",
        "keys read",
    )
    return table(
        header,
        [
            (
                NAMES[row["attention"]],
                f"{row['held_out']:.4f}",
                f"{row['bits_per_byte']:.4f}",
                f"{row['held_out_over_dense']:+.2%}",
                f"{row['last_tenth']:.4f}",
                f"{row['last_tenth_over_dense']:+.2%}",
                f"{row['parameters']:,}",
                f"{row['seconds_per_step']:.3f}",
                f"{row['keys_read']:,}",
            )
            for row in text_rows(results)
        ],
    )


def _recall_table(results: Results) -> str:
    lengths = results.settings.recall_lengths
    return table(
        ("attention", *(f"{length:,}" for length in lengths), "parameters", f"keys read at {lengths[-1]:,}"),
        [
            (
                NAMES[kind],
                *(f"{by_length[length]:.1%}" for length in lengths),
                f"{results.parameters['recall'][kind]:,}",
                f"{results.keys_read['recall'][kind]:,}",
            )
            for kind, by_length in results.accuracies.items()
        ],
    )


def markdown(results: Results, where: dict[str, str], seconds: float) -> str:
    """The whole report."""
    settings, generation = results.settings, results.generation
    rows = {row["attention"]: row for row in text_rows(results)}
    task, text_model, recall_model = settings.task, settings.text_model, settings.recall_model
    reach = recall_model.layers * (recall_model.window - 1) + recall_model.token_shift
    longest = max(stage.length for stage in settings.stages)
    held = rows["nsa"]["held_out_over_dense"] <= WITHIN
    same = generation["identical_tokens"] == generation["generated_tokens"]
    parts = [
        "# A sparse model and a dense one, trained alike",
        f"On {where['cpu']}, {where['threads']} threads ({where['body']}), torch {where['torch']}, palmette "
        f"{where['palmette']}; float32; {seconds / 60:.1f} minutes of steps in all.",
        "## Text",
        f"Byte-level models of {text_model.layers} layers, width {text_model.hidden_size}, on the standard "
        "library's sources and the topics of its documentation "
        f"({results.corpus.train.numel() / 1e6:.1f} MB; "
        f"{results.corpus.documents[1]} of {sum(results.corpus.documents)} documents held out). Same initial "
        f"weights where they share them, same batches: {settings.text.steps} steps of {settings.batch} x "
        f"{settings.context:,} tokens.",
        _text_table(results),
        f"NSA's held-out loss is {rows['nsa']['held_out_over_dense']:+.2%} against dense attention's "
        f"(goal: at most {WITHIN:+.0%}; {'reached' if held else 'MISSED'}). Keys read: by the last query of "
        "a sequence, in one layer.",
        "![loss over tokens](curves.png)",
        "## Associative recall",
        f"{task.pairs} pairs of a key and a value stand anywhere in noise; at the end all keys are asked "
        f"for. At least {settings.stages[-1].gap} tokens are between a value and a question, more than the "
        f"{reach} that {recall_model.layers} windows of {recall_model.window} tokens reach together. "
        f"Training sequences have up to {longest:,} tokens. Accuracy on "
        f"{settings.recall_sequences} new sequences of each length; a guess among the values gives "
        f"{task.chance:.1%}, one among those of the sequence about {1 / task.pairs:.1%}.",
        _recall_table(results),
        "![accuracy over length](recall.png)",
        "## Generation with the sparse cache",
        f"A prompt of {generation['prompt_tokens']:,} held-out bytes, {generation['generated_tokens']} "
        f"greedy steps with `SparseKVCache`: {generation['tokens_per_second']:.1f} tokens/s; without a "
        f"cache, {generation['tokens_per_second_recomputed']:.2f} tokens/s "
        f"({generation['recomputed_steps']} steps). Recomputation chooses "
        + (
            "the same tokens."
            if same
            else f"the same tokens but {generation['near_ties']}, each at a near tie."
        )
        + f" The caches take {generation['cache_bytes'] / 1e6:.2f} MB with room to grow; a layer reads "
        f"{generation['keys_read']:,} keys per step.",
        "The end of the prompt, then what the model goes on with:",
        _fenced(generation["prompt_end"]),
        _fenced(generation["text"]),
    ]
    return "\n\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    fence = "`" * 3
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def write(results: Results, directory: Path) -> str:
    """Write report.md, results.json, curves.png and recall.png; returns the report."""
    where = machine()
    histories = {"text": results.text, "recall": results.recall}
    seconds = math.fsum(s for some in histories.values() for h in some.values() for s in h.seconds)
    text = markdown(results, where, seconds)
    write_atomically(directory / "curves.png", lambda file: _curves(results, file))
    write_atomically(directory / "recall.png", lambda file: _recall_picture(results, file))
    write_atomically(directory / "report.md", lambda file: file.write_text(text, encoding="utf-8"))
    write_json(
        directory / "results.json",
        {
            "machine": where,
            "seconds": seconds,
            "text": text_rows(results),
            "recall": {
                kind: {
                    "accuracy": {str(length): value for length, value in by_length.items()},
                    "parameters": results.parameters["recall"][kind],
                    "keys_read": results.keys_read["recall"][kind],
                    "seconds_per_step": results.recall[kind].step_seconds,
                    "losses_sha256": losses_digest(results.recall[kind]),
                }
                for kind, by_length in results.accuracies.items()
            },
            "generation": results.generation,
            "histories": {
                name: {kind: dataclasses.asdict(history) for kind, history in some.items()}
                for name, some in histories.items()
            },
        },
    )
    return text


def _figure(panels: int) -> tuple[Any, Any]:
    require("matplotlib", PURPOSE, install="'palmette[train]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * panels, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curves(results: Results, path: Path) -> None:
    figure, (text, recall) = _figure(2)
    for panel, histories in ((text, results.text), (recall, results.recall)):
        for kind, history in histories.items():
            millions = [tokens / 1e6 for tokens in history.tokens]
            width = max(1, len(millions) // 50)
            panel.plot(
                millions, smoothed(history.losses, width), color=COLOURS[kind], label=NAMES[kind], lw=1.2
            )
        panel.set_xlabel("million tokens")
        panel.set_ylim(bottom=0)
    for kind, history in results.text.items():
        points = [(tokens / 1e6, value) for _, tokens, value in history.evaluations]
        text.plot(
            *zip(*points, strict=True), "o", color=COLOURS[kind], ms=3, label=f"{NAMES[kind]}, held out"
        )
    text.set_title("text, nats per byte", fontsize=10)
    recall.set_title("recall, nats per answer (curriculum)", fontsize=10)
    # the first steps would hide the rest
    ends = [losses[len(losses) // 10 :] for losses in (h.losses for h in results.text.values())]
    text.set_ylim(0.9 * min(map(min, ends)), 1.05 * max(map(max, ends)))
    for panel in (text, recall):
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def _recall_picture(results: Results, path: Path) -> None:
    figure, (panel,) = _figure(1)
    for kind, by_length in results.accuracies.items():
        percent = [100 * value for value in by_length.values()]
        panel.plot([*by_length], percent, "o-", color=COLOURS[kind], label=NAMES[kind])
    panel.axhline(100 / results.settings.task.pairs, color="#888888", lw=0.8, ls="--")
    trained = max(stage.length for stage in results.settings.stages)
    panel.axvline(trained, color="#bbbbbb", lw=0.8)
    panel.annotate("longest in training", (trained, 50), fontsize=7, color="#888888", rotation=90, ha="right")
    panel.set_xscale("log", base=2)
    panel.set_xticks([*results.settings.recall_lengths], [f"{n:,}" for n in results.settings.recall_lengths])
    panel.set_ylim(0, 103)
    panel.set_xlabel("tokens of the sequence")
    panel.set_ylabel("answers that are right, %")
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, format="png")
