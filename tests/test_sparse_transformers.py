# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="palmette_nsa" and convert_to_nsa: training, generation, saving."""

from __future__ import annotations

import pickle

import pytest
import torch
import transformers
from palmette.integrations.sparse_transformers import SparseAttention
from palmette.integrations.transformers import register
from palmette.nn import convert_to_nsa
from tiny_models import VOCAB, random_tokens, tiny_llama, tiny_qwen

SMALL = {
    "kernel_size": 4,
    "kernel_stride": 2,
    "block_size": 4,
    "topk": 3,
    "init_blocks": 1,
    "local_blocks": 1,
    "window_size": 6,
}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register()


@pytest.fixture(autouse=True)
def _one_thread(num_threads):
    num_threads(1)


def sparse(make=tiny_llama, **options):
    return convert_to_nsa(make(), **(SMALL | options))


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen])
def test_layers_are_sparse_and_keep_their_projections(make):
    dense = make()
    kept = {name: p.clone() for name, p in dense.named_parameters()}
    model = convert_to_nsa(dense, **SMALL)
    assert model is dense
    for layer in model.model.layers:
        assert isinstance(layer.self_attn, SparseAttention)
    after = dict(model.named_parameters())
    assert kept.keys() < after.keys()
    assert all(torch.equal(after[name], p) for name, p in kept.items())
    ids = torch.tensor([random_tokens(40)])
    model(ids)
    report = model.model.layers[0].self_attn.report
    assert (report.longest, report.selection) == (40, "blocks")


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen])
@torch.no_grad()
def test_generating_with_the_cache_equals_computing_anew(make):
    """A padded batch too, whose rows are what each is alone."""
    model = sparse(make)
    rows = [random_tokens(n, seed) for seed, n in enumerate((30, 17, 5))]
    ids = torch.zeros(3, 30, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, 30 - len(row) :], mask[i, 30 - len(row) :] = torch.tensor(row), 1
    options = {"max_new_tokens": 25, "do_sample": False}
    got = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(got, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    for i, row in enumerate(rows):
        alone = model.generate(
            torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), **options
        )
        assert torch.equal(got[i, 30:], alone[0, len(row) :])


@torch.no_grad()
def test_beams():
    model = sparse()
    ids = torch.tensor([random_tokens(20, 1), random_tokens(20, 2)])
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "num_beams": 3,
        "do_sample": False,
    }
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_all_its_parameters_learn():
    model = sparse().train()
    ids = torch.tensor([random_tokens(40, seed) for seed in (1, 2)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_model_can_be_made_sparse_by_its_configuration():
    config = tiny_llama().config
    config.palmette_nsa = SMALL
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="palmette_nsa")
    assert all(isinstance(layer.self_attn, SparseAttention) for layer in model.model.layers)
    assert model.model.layers[0].self_attn.block_size == SMALL["block_size"]
    assert model(torch.tensor([random_tokens(30)])).logits.isfinite().all()


def test_it_saves_and_loads(tmp_path):
    model = sparse(gate="token").eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.compress_key.normal_()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="palmette_nsa")
    assert loaded.config.palmette_nsa == SMALL | {"gate": "token"}
    ids = torch.tensor([random_tokens(40)])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_dense_checkpoints_load_and_what_they_lack_is_initialised(tmp_path):
    dense = tiny_llama()
    dense.config.palmette_nsa = SMALL
    dense.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="palmette_nsa")
    got = dict(model.named_parameters())
    assert all(torch.equal(got[name], p) for name, p in dense.named_parameters())
    weight = got["model.layers.1.self_attn.compress_key"]
    mean = torch.eye(8).repeat(SMALL["kernel_size"], 1) / SMALL["kernel_size"]
    assert 0 < (weight - mean).abs().max() < 0.2


def test_of_a_checkpoint_that_lacks_a_part_the_rest_is_kept(tmp_path):
    model = sparse()
    state = {name: p.clone() for name, p in model.state_dict().items() if "intra_block_pe" not in name}
    model.save_pretrained(tmp_path, state_dict=dict(state))  # it takes them out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="palmette_nsa")
    got = loaded.state_dict()
    assert all(torch.equal(got[name], p) for name, p in state.items())
    embedding = got["model.layers.0.self_attn.intra_block_pe"]
    assert 0 < embedding.abs().max() < 0.2


def test_the_name_alone_converts_nothing():
    model = tiny_llama()
    model.set_attn_implementation("palmette_nsa")
    message = r"^attn_implementation must be palmette_nsa when a model is made .* got a LlamaAttention"
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[1, 2, 3]]))


@torch.no_grad()
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_embeddings_that_look_at_the_largest_position(rope_type):
    rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10000.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 128}
    model = sparse(lambda: tiny_llama(rope_parameters=rope))
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()  # too short for a compressed key
    ids = torch.tensor([random_tokens(20)])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_models_can_be_pickled():
    model = sparse()
    ids = torch.tensor([random_tokens(20)])
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits)


def test_the_scale_is_the_model_s():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    convert_to_nsa(model, **SMALL)
    assert all(layer.self_attn.scale == 0.5 for layer in model.model.layers)
    with pytest.raises(ValueError, match=r"^sliding_window of the model's layers must be None, got 5$"):
        convert_to_nsa(tiny_qwen(sliding_window=5), **SMALL)
    with pytest.raises(ValueError, match=r"^attention_dropout of the model's layers must be 0, got 0.1$"):
        convert_to_nsa(tiny_qwen(attention_dropout=0.1), **SMALL)


def test_bad_models():
    with pytest.raises(ValueError, match=r"^model must have layers with self_attn .* got Linear$"):
        convert_to_nsa(torch.nn.Linear(2, 2))
    model = sparse()
    with pytest.raises(ValueError, match=r"^model must have dense attention, got one that is converted$"):
        convert_to_nsa(model)
    with pytest.raises(ValueError, match=r"^separate_kv, v_head_dim and rope must be left as they are"):
        sparse(separate_kv=True)
    with pytest.raises(ValueError, match=r"^topk must be at least init_blocks \+ local_blocks = 2, got 1$"):
        sparse(topk=1)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"^attention_mask must be \[batch, tokens\] with palmette_nsa"):
        model(ids, attention_mask=torch.zeros(1, 1, 3, 3))
    assert model.config.vocab_size == VOCAB


# ---- packed documents


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen])
@torch.no_grad()
def test_documents_packed_into_a_row_do_not_see_each_other(make):
    model = sparse(make).eval()
    a, b = torch.tensor([random_tokens(40)]), torch.tensor([random_tokens(33, seed=1)])
    positions = torch.cat([torch.arange(40), torch.arange(33)])[None]
    packed = model(torch.cat([a, b], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :40], model(a).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 40:], model(b).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_positions_that_jump_are_refused():
    model, ids = sparse().eval(), torch.tensor([random_tokens(9)])
    positions = torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9, 10]])
    with pytest.raises(ValueError, match=r"^position_ids must go up by 1, or begin again .* got 5 after 2$"):
        model(ids, position_ids=positions)
    model(ids, position_ids=positions[:, :1] + torch.arange(100, 109))  # somewhere else is fine


@torch.no_grad()
def test_tokens_cannot_be_taken_back():
    model, ids = sparse().eval(), torch.tensor([random_tokens(20)])
    with pytest.raises(ValueError, match=r"^past_key_values of palmette_nsa must keep its tokens"):
        model.generate(ids.repeat(1, 2), max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"compression": (torch.nn.Identity(), torch.nn.Identity())},
            r"^compression must be mean, weighted or",
        ),
        ({"head_dim": 8}, r"^options must be of .*, got head_dim$"),
        ({"blocksize": 3}, r"^options must be of .*block_size.*, got blocksize$"),
    ],
    ids=str,
)
def test_options_of_a_converted_model(options, message):
    with pytest.raises(ValueError, match=message):
        convert_to_nsa(tiny_llama(), **options)
