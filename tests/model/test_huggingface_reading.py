"""What `transformers` writes, and what old and odd checkpoints hold: we compute it alike and write it back as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_models import (
    HF_LLAMA3,
    OURS,
    STOCK,
    TOLERANCE,
    ZEROS_ADDED,
    edit,
    edit_tensors,
    load_stock,
    logits,
    make_ours,
    make_stock,
    tokens_for,
)

from gpt import GPT


@pytest.mark.parametrize("name", STOCK)
def test_we_compute_what_transformers_wrote(name, tmp_path):
    stock = make_stock(name)
    stock.save_pretrained(tmp_path / "stock")
    model = GPT.from_pretrained(tmp_path / "stock")
    tokens = tokens_for(61, model.config.context_length)
    want = logits(stock, tokens)
    assert want.std() > 0.1
    assert (logits(model, tokens) - want).abs().max() <= TOLERANCE

    model.save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / n / "model.safetensors") for n in ("stock", "ours"))
    added = ours.keys() - theirs.keys()
    assert bool(added) == (name in ZEROS_ADDED)
    assert theirs.keys() <= ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert all(key.endswith(".bias") and not ours[key].any() for key in added)
    assert (logits(load_stock(tmp_path / "ours"), tokens) - want).abs().max() <= TOLERANCE


def test_sharded_checkpoints_of_transformers_are_read(tmp_path):
    stock = make_stock("qwen2")
    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (logits(GPT.from_pretrained(tmp_path), tokens_for(61, 24)) - logits(stock, tokens_for(61, 24))).abs().max() <= TOLERANCE


def test_several_dtypes_become_the_one_that_holds_them_all(spoiled):
    directory = spoiled("llama")
    edit_tensors(directory, lambda t: t.update({k: v.bfloat16() if "proj" in k else v.half() for k, v in t.items()}))
    model = GPT.from_pretrained(directory)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(
        model.get_parameter("blocks.0.attention.q.weight"),
        load_file(directory / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].float(),
    )


def test_old_gpt2_checkpoints_without_prefix_and_with_masks(spoiled):
    directory = spoiled("gpt2")
    want = GPT.from_pretrained(directory)

    def age(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(directory, age)
    assert torch.equal(logits(GPT.from_pretrained(directory), tokens_for(61, 24)), logits(want, tokens_for(61, 24)))


def test_the_head_of_neox_has_two_names(tmp_path):
    model = make_ours(OURS["neox-parallel"])
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("embed_out.weight")}))
    assert torch.equal(GPT.from_pretrained(tmp_path).head.weight, model.head.weight)


def test_rotary_frequencies_in_a_checkpoint_are_left_aside(spoiled):
    directory = spoiled("llama")
    edit_tensors(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    GPT.from_pretrained(directory)


def test_a_tied_head_in_the_file_must_be_the_embedding(spoiled):
    directory = spoiled("gpt2")
    want = logits(GPT.from_pretrained(directory), tokens_for(61, 24))
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    assert torch.equal(logits(GPT.from_pretrained(directory), tokens_for(61, 24)), want)
    edit_tensors(directory, lambda t: t.pop("transformer.wte.weight"))
    assert torch.equal(logits(GPT.from_pretrained(directory), tokens_for(61, 24)), want)
    edit_tensors(directory, lambda t: t.update({"transformer.wte.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs.*tie_word_embeddings"):
        GPT.from_pretrained(directory)


def test_unequal_dropouts_are_dropped_aloud(spoiled):
    directory = spoiled("gpt2")
    edit(directory, attn_pdrop=0.3)
    with pytest.warns(UserWarning, match="attn_pdrop differ"):
        assert GPT.from_pretrained(directory).config.dropout == 0


def test_loading_needs_no_transformers(saved):
    script = (
        "import sys; from gpt import GPT; GPT.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1]); "
        "assert not {'transformers', 'huggingface_hub', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(saved["qwen2"])], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "neox-partial"])
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling", "type", "beside", "without-original-context"])
def test_scaled_rotations_are_read_from_wherever_they_stand(name, place, spoiled):
    directory = spoiled(name)
    tokens = tokens_for(61, 24)
    plain = logits(GPT.from_pretrained(directory), tokens)
    scaling = {**HF_LLAMA3, "original_max_position_embeddings": 20}
    if place == "type":  # as transformers 4.43 wrote it
        scaling["type"] = scaling.pop("rope_type")
    elif place == "beside":
        scaling["original_max_position_embeddings"] = 7  # what stands beside counts
        edit(directory, original_max_position_embeddings=20)
    elif place == "without-original-context":
        del scaling["original_max_position_embeddings"]  # then it is max_position_embeddings
    if place == "rope_parameters":
        neox = {"partial_rotary_factor": 0.5} if name == "neox-partial" else {}
        edit(directory, rope_parameters={**scaling, "rope_theta": 300.0, **neox}, rope_theta=77.0, rotary_emb_base=77.0)
    else:
        edit(directory, rope_parameters=None, rope_scaling=scaling, rope_theta=300.0, rotary_emb_base=300.0)
    model = GPT.from_pretrained(directory)
    assert model.config.llama3_scaling == (4.0, 1.0, 4.0, 24 if place == "without-original-context" else 20)
    assert model.config.rope_theta == 300.0
    want = logits(load_stock(directory), tokens)
    assert (logits(model, tokens) - want).abs().max() <= TOLERANCE
    assert (want - plain).abs().max() > 0.01


def test_second_names_of_gpt2s_keys_count_as_in_transformers(spoiled):
    directory = spoiled("gpt2")
    want = logits(GPT.from_pretrained(directory), tokens_for(61, 24))
    edit(directory, n_embd=99, hidden_size=32, n_head=3, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=24)
    assert torch.equal(logits(GPT.from_pretrained(directory), tokens_for(61, 24)), want)
    assert (logits(load_stock(directory), tokens_for(61, 24)) - want).abs().max() <= TOLERANCE
