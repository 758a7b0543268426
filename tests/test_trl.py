# SPDX-License-Identifier: Apache-2.0
"""TRL's GRPO with shared prompts against TRL's GRPO."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from palmette.integrations.trl import SharedPrefixGRPOTrainer, share_prompts  # noqa: E402
from tiny_models import VOCAB, tiny_llama  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_prompts_become_roots():
    #             prompt  | completion; 0 pads
    ids = torch.tensor(
        [[0, 5, 6, 7, 8, 0], [0, 5, 6, 9, 0, 0], [3, 4, 5, 7, 8, 9], [0, 5, 6, 1, 2, 3], [0, 5, 6, 0, 0, 0]]
    )
    mask = torch.tensor(
        [[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]]
    )
    tree, token_ids, places = share_prompts(ids, mask, 3)
    assert [tree.parent(n) for n in range(tree.num_nodes)] == [-1, 0, 0, 0, 0, -1, 5]
    assert [tree.length(n) for n in range(tree.num_nodes)] == [2, 2, 1, 3, 0, 3, 3]
    assert token_ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 3, 4, 5, 7, 8, 9]
    assert places.tolist() == [[2, 3, -1], [4, -1, -1], [11, 12, 13], [5, 6, 7], [-1, -1, -1]]
    kept = places >= 0
    assert torch.equal(token_ids[places[kept]], ids[:, 3:][kept])


def trained(trainer_class: type, folder: Path, tokenizer: Any, **changes: Any) -> tuple[Any, list[float]]:
    from trl import GRPOConfig

    torch.manual_seed(0)
    tiny_llama(eos_token_id=1).save_pretrained(folder / "model")  # where TRL finds the reference model too
    config = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-3,
        seed=0,
        model_init_kwargs={"dtype": "float32"},
        **{"bf16": False, "max_steps": 2} | changes,
    )
    prompts = datasets.Dataset.from_dict({"prompt": ["a b c d e", "f g h"] * 8})

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(ord(c) for c in text) % 7) for text in completions]

    trainer = trainer_class(
        model=str(folder / "model"),
        reward_funcs=reward,
        args=config,
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, losses


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words of one letter."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"<pad>": 0, "<eos>": 1} | {chr(ord("a") + i): 2 + i for i in range(26)}
    words |= {f"w{i}": i for i in range(len(words), VOCAB)}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


@pytest.mark.parametrize("changes", [{}, {"beta": 0.1}, {"loss_type": "dr_grpo", "num_iterations": 2}])
def test_training_is_that_of_trl(tmp_path, tokenizer, changes):
    from trl import GRPOTrainer

    want, want_losses = trained(GRPOTrainer, tmp_path / "a", copy.deepcopy(tokenizer), **changes)
    got, losses = trained(SharedPrefixGRPOTrainer, tmp_path / "b", copy.deepcopy(tokenizer), **changes)
    assert losses == pytest.approx(want_losses, abs=1e-4)
    for a, b, c in zip(got.parameters(), want.parameters(), tiny_llama().parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)
        assert float((a - c).abs().max()) > 1e-3  # so it has moved by more


def test_mixed_precision_is_that_of_trl(tmp_path, tokenizer):
    """TRL's default, bf16=True, is autocast; the first update, before rollouts part."""
    from trl import GRPOTrainer

    changes = {"bf16": True, "max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd"}
    moved = []
    for trainer_class in (GRPOTrainer, SharedPrefixGRPOTrainer):
        model, _ = trained(
            trainer_class, tmp_path / trainer_class.__name__, copy.deepcopy(tokenizer), **changes
        )
        start = tiny_llama()
        moved.append(
            torch.cat(
                [(a - b).flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)]
            )
        )
    assert (moved[0] - moved[1]).norm() < 0.05 * moved[0].norm()


def test_several_processes_are_refused(tmp_path, tokenizer, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", property(lambda _: 2))
    with pytest.raises(ValueError, match="processes must be one with shared prefixes, got 2"):
        trained(SharedPrefixGRPOTrainer, tmp_path, copy.deepcopy(tokenizer))
