"""Every family both ways against `transformers` itself: what we write it computes alike, what it writes we compute alike."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from gpt import GPT, GPTConfig
from gpt.data.tokenizer import Tokenizer, train_bpe
from gpt.model import huggingface

TOLERANCE = 1e-5
SMALL = {"vocab_size": 61, "context_length": 24, "n_layer": 2, "n_head": 4, "d_model": 32}
ROTARY = {"positions": "rotary", "norm": "layernorm"}
RMS = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "d_ff": 44}

OURS = {
    "gpt2": {},
    "gpt2-untied-erf-no-bias": {"tie_embeddings": False, "activation": "gelu", "bias": False, "d_ff": 37},
    "gpt2-qkv-bias-only": {"bias": False, "qkv_bias": True, "norm_eps": 1e-3},
    "gpt2-odd": {"vocab_size": 59, "context_length": 17, "n_head": 3, "d_model": 33, "d_ff": 35, "n_layer": 3},
    "gpt2-no-positions": {"positions": "none", "activation": "gelu"},
    "gpt2-learned-scaled": {"embedding_scale": 3.3},
    "gpt2-sinusoidal": {"positions": "sinusoidal"},
    "gpt2-sinusoidal-odd": {"positions": "sinusoidal", "n_head": 3, "d_model": 33, "tie_embeddings": False, "bias": False},
    "gpt2-sinusoidal-scaled": {"positions": "sinusoidal", "embedding_scale": math.sqrt(32), "bias": False},
    "neox-parallel": {**ROTARY, "parallel_residual": True, "tie_embeddings": False, "activation": "gelu"},
    "neox-sequential-tied": {**ROTARY, "rope_theta": 500.0},
    "neox-partial": {**ROTARY, "parallel_residual": True, "rope_fraction": 0.5, "rope_theta": 500.0, "d_ff": 50, "dropout": 0.1},
    "neox-partial-no-bias": {**ROTARY, "rope_fraction": 0.55, "bias": False, "activation": "gelu", "n_head": 2, "norm_eps": 1e-3},
    "neox-qkv-bias-scaled": {**ROTARY, "bias": False, "qkv_bias": True, "embedding_scale": 2.5, "tie_embeddings": False},
    "llama": {**RMS, "tie_embeddings": False, "rope_theta": 2000.0},
    "llama-grouped-tied": {**RMS, "n_kv_head": 2, "rope_theta": 50000.0, "norm_eps": 1e-3},
    "llama-one-kv-head-bias": {**RMS, "n_kv_head": 1, "bias": True},
    "llama-wide-heads": {**RMS, "head_dim": 14, "n_kv_head": 2, "tie_embeddings": False, "dropout": 0.1},
    "llama-scaled": {**RMS, "embedding_scale": math.sqrt(32)},
    "qwen2": {**RMS, "qkv_bias": True, "n_kv_head": 2},
    "qwen2-wide-heads-untied": {**RMS, "qkv_bias": True, "head_dim": 6, "tie_embeddings": False},
    "qwen3": {**RMS, "qk_norm": True, "n_kv_head": 2, "head_dim": 10},
    "qwen3-qkv-bias-untied": {**RMS, "qk_norm": True, "qkv_bias": True, "tie_embeddings": False},
    "qwen3-head-dim-without-quotient": {**RMS, "qk_norm": True, "n_head": 3, "head_dim": 8},
}

STOCK = {
    "gpt2": ("GPT2", {"n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt2-untied-erf": (
        "GPT2",
        {
            "n_positions": 19,
            "n_embd": 33,
            "n_layer": 1,
            "n_head": 3,
            "n_inner": 21,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "llama": ("Llama", {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}, "rms_norm_eps": 1e-3}),
    "llama-bias-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12}),
    "llama-attention-bias-only": ("Llama", {"attention_bias": True}),
    "llama-mlp-bias-only": ("Llama", {"mlp_bias": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "max_window_layers": 1, "sliding_window": 8}),
    "qwen2-tied": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": True}),
    "neox": ("GPTNeoX", {}),
    "neox-sequential": ("GPTNeoX", {"use_parallel_residual": False, "hidden_act": "gelu_fast", "tie_word_embeddings": True}),
    "neox-rotary": (
        "GPTNeoX",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.75}, "layer_norm_eps": 1e-3},
    ),
    "neox-no-attention-bias": ("GPTNeoX", {"attention_bias": False}),
}
# Checkpoints whose biases are on in one half of the block only: ours gets zeros in the other, which it then writes.
ZEROS_ADDED = {"llama-attention-bias-only", "llama-mlp-bias-only", "neox-no-attention-bias"}


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """No parameter at its initial value: a bias or a norm in the wrong place must show."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
            parameter.add_(1.0)
    return model.eval()


def make_ours(overrides: dict) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **overrides}))
    randomise(model)
    return model


def make_stock(name: str) -> Any:
    family, overrides = STOCK[name]
    settings = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None}
    if family != "GPT2":
        settings |= {
            "max_position_embeddings": 24,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 44,
        }
    config = getattr(transformers, f"{family}Config")(**settings | overrides)
    return randomise(transformers.AutoModelForCausalLM.from_config(config))


def tokens_for(vocab_size: int, length: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def load_stock(directory: Path, **kwargs) -> Any:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **kwargs)
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def edit(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """One small directory of each family, to copy and spoil."""
    directories = {}
    for name in ("gpt2", "llama", "qwen2", "qwen3", "neox-partial"):
        directories[name] = tmp_path_factory.mktemp(name)
        make_ours(OURS[name]).save_pretrained(directories[name])
    return directories


@pytest.fixture
def spoiled(saved, tmp_path):
    """A private copy of one of them."""
    return lambda name: Path(shutil.copytree(saved[name], tmp_path / name))


# What we write


@pytest.mark.parametrize("name", OURS)
def test_transformers_computes_what_we_wrote(name, tmp_path):
    model = make_ours(OURS[name]).eval()
    model.save_pretrained(tmp_path)
    stock = load_stock(tmp_path, dtype=torch.float32, attn_implementation="eager" if len(name) % 2 else "sdpa")
    tokens = tokens_for(model.config.vocab_size, model.config.context_length)
    want = logits(model, tokens)
    assert want.std() > 0.1  # the comparison means something
    assert (logits(stock, tokens) - want).abs().max() <= TOLERANCE

    tied = model.config.tie_embeddings and model.config.embedding_scale == 1
    head = "embed_out.weight" if name.startswith("neox") else "lm_head.weight"
    assert (head in load_file(tmp_path / "model.safetensors")) == (not tied)
    assert stock.config.tie_word_embeddings == tied
    assert (stock.get_input_embeddings().weight is stock.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("name", OURS)
def test_our_own_reload_computes_the_same_bits(name, tmp_path):
    model = make_ours(OURS[name]).eval()
    model.save_pretrained(tmp_path / "once")
    reloaded = GPT.from_pretrained(tmp_path / "once")
    tokens = tokens_for(model.config.vocab_size, model.config.context_length)
    want, got = logits(model, tokens), logits(reloaded, tokens)
    if reloaded.config.bias != model.config.bias:
        assert (want - got).abs().max() <= TOLERANCE  # added zeros may take another kernel
    else:
        assert torch.equal(want, got)
    assert not reloaded.training
    assert reloaded.config.stock_architecture() == model.config.stock_architecture()
    assert reloaded.config.dropout == model.config.dropout

    reloaded.save_pretrained(tmp_path / "twice")
    once, twice = (load_file(tmp_path / n / "model.safetensors") for n in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)
    assert (tmp_path / "once/config.json").read_text() == (tmp_path / "twice/config.json").read_text()


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "neox-partial"])
def test_the_config_comes_back_whole(name, saved):
    config = make_ours(OURS[name]).config
    assert GPT.from_pretrained(saved[name]).config == config


def test_positions_are_not_scaled_with_the_embedding(tmp_path):
    model = make_ours(OURS["gpt2-learned-scaled"])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["transformer.wte.weight"], model.embeddings.tokens.weight * 3.3)
    assert torch.equal(tensors["transformer.wpe.weight"], model.get_parameter("embeddings.positions.weight"))
    assert torch.equal(tensors["lm_head.weight"], model.head.weight)


def test_older_readers_find_their_keys(saved):
    config = {name: json.loads((directory / "config.json").read_text()) for name, directory in saved.items()}
    assert config["gpt2"]["n_ctx"] == 24
    assert config["gpt2"]["n_inner"] == 128
    assert config["gpt2"]["activation_function"] == "gelu_new"
    for name in ("llama", "qwen2", "qwen3"):
        theta = OURS[name].get("rope_theta", 10000.0)
        assert config[name]["rope_theta"] == config[name]["rope_parameters"]["rope_theta"] == theta
    assert config["neox-partial"]["rotary_pct"] == config["neox-partial"]["rope_parameters"]["partial_rotary_factor"] == 0.5
    for values in config.values():
        assert values["dtype"] == values["torch_dtype"] == "float32"
        assert values["eos_token_id"] is None  # else the stock class would stop at an id of its own


def test_older_keys_alone_are_read_alike(spoiled):
    for name, drop in (("llama", ()), ("neox-partial", ("rope_theta",))):
        directory = spoiled(name)
        want = logits(GPT.from_pretrained(directory), tokens_for(61, 24))
        file = directory / "config.json"
        values = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("rope_parameters", *drop)}
        file.write_text(json.dumps(values))
        assert torch.equal(logits(GPT.from_pretrained(directory), tokens_for(61, 24)), want)
        assert (logits(load_stock(directory), tokens_for(61, 24)) - want).abs().max() <= TOLERANCE


def test_bfloat16_is_written_and_read_as_such(tmp_path):
    model = make_ours(OURS["llama-grouped-tied"])
    model.save_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "bf16/model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    half = GPT.from_pretrained(tmp_path / "bf16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.get_buffer("rotary_cos").dtype == torch.float32
    assert half.head.weight is half.embeddings.tokens.weight
    assert torch.get_default_dtype() == torch.float32
    stock = load_stock(tmp_path / "bf16")
    assert stock.dtype == torch.bfloat16
    tokens = tokens_for(61, 24)
    assert (logits(stock, tokens) - logits(half, tokens)).abs().mean() <= 0.05  # logits reach 5, where bf16 steps by 0.03

    full = GPT.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    assert torch.equal(full.get_parameter("blocks.0.attention.q.weight"), half.get_parameter("blocks.0.attention.q.weight").float())
    assert torch.equal(full.get_buffer("rotary_cos"), model.get_buffer("rotary_cos"))
    assert (logits(load_stock(tmp_path / "bf16", dtype=torch.float32), tokens) - logits(full, tokens)).abs().max() <= TOLERANCE

    half.save_pretrained(tmp_path / "again")
    assert all(torch.equal(t, tensors[key]) for key, t in load_file(tmp_path / "again/model.safetensors").items())


@pytest.mark.parametrize("name", ["gpt2-sinusoidal-scaled", "gpt2-no-positions", "neox-partial", "qwen3"])
def test_a_bfloat16_model_is_written_as_it_is(name, tmp_path):
    model = make_ours(OURS[name]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert (logits(load_stock(tmp_path), tokens_for(61, 24)) - logits(model, tokens_for(61, 24))).abs().mean() <= 0.05


def test_shards_are_written_and_read(tmp_path, monkeypatch):
    model = make_ours(OURS["gpt2-untied-erf-no-bias"])
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 20_000)
    model.save_pretrained(tmp_path)

    assert not (tmp_path / "model.safetensors").exists()  # a left-over would be loaded in place of the shards
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    pieces = [load_file(file) for file in files]
    assert all(sum(t.nbytes for t in piece.values()) <= 20_000 for piece in pieces)
    joined = {key: t for piece in pieces for key, t in piece.items()}
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[key], whole[key]) for key in whole)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())

    tokens = tokens_for(61, 24)
    assert (logits(load_stock(tmp_path), tokens) - logits(model, tokens)).abs().max() <= TOLERANCE
    assert torch.equal(
        GPT.from_pretrained(tmp_path).get_parameter("blocks.1.feedforward.down.weight"),
        model.get_parameter("blocks.1.feedforward.down.weight"),
    )

    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_model_can_be_saved_over_the_directory_it_came_from(spoiled):
    directory = spoiled("gpt2")
    model = GPT.from_pretrained(directory)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.get_parameter("blocks.0.attention.q.weight").zero_()
    model.save_pretrained(directory)
    again = dict(GPT.from_pretrained(directory).named_parameters())
    assert not again.pop("blocks.0.attention.q.weight").any()
    assert all(torch.equal(p, before[name]) for name, p in again.items())


# What transformers writes


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


# What is refused


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "use_sliding_window=true"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("llama", {"sliding_window": 8}, "sliding_window=8"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*linear"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope_parameters=.*llama3"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters=.*full_attention"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("neox-partial", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "rotates 3 dimensions"),
        ("neox-partial", {"rope_parameters": None, "rotary_pct": 0.4}, "rotates 3 dimensions"),
        ("llama", {"num_local_experts": 8}, "num_local_experts=8"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ("gpt2", {"activation_function": "relu"}, 'activation_function="relu"'),
        ("neox-partial", {"hidden_act": "silu"}, 'hidden_act="silu"'),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=false"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true"),
        ("gpt2", {"model_type": "mamba"}, "model_type='mamba'.*gpt2, llama, qwen2, qwen3, gpt_neox"),
        ("gpt2", {"n_embd": None}, "n_embd=None must be a whole number"),
        ("gpt2", {"n_embd": 30}, "config.json: d_model=30 is not divisible by n_head=4"),
        ("gpt2", {"layer_norm_epsilon": "small"}, "config.json: "),
        ("gpt2", {"n_inner": 96}, r"mlp.c_fc.weight has shape \(32, 128\) where config.json asks for \(32, 96\)"),
        ("llama", {"num_key_value_heads": 2}, r"k_proj.weight has shape \(32, 32\) where config.json asks for \(16, 32\)"),
        ("gpt2", {"n_layer": 3}, r"lacks transformer.h.2.attn.c_attn.bias.* and \d+ more"),
        ("gpt2", {"n_layer": 1}, r"has, beyond what config.json describes, transformer.h.1.attn.c_attn.bias.* and \d+ more"),
        ("gpt2", {"tie_word_embeddings": False}, "lacks lm_head.weight;"),
        ("llama", {"attention_bias": True}, "lacks model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(name, changes, match, spoiled):
    directory = spoiled(name)
    edit(directory, **changes)
    with pytest.raises(ValueError, match=match) as caught:
        GPT.from_pretrained(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unused_sliding_windows_are_no_reason_to_refuse(spoiled):
    directory = spoiled("qwen3")
    edit(directory, use_sliding_window=True, sliding_window=8, max_window_layers=2, layer_types=["full_attention"] * 2)
    GPT.from_pretrained(directory)


def test_missing_and_surplus_tensors_are_named(spoiled):
    directory = spoiled("gpt2")
    edit_tensors(directory, lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"))
    with pytest.raises(ValueError, match=r"lacks transformer\.h\.1\.mlp\.c_fc\.bias;"):
        GPT.from_pretrained(directory)
    edit_tensors(directory, lambda t: t.update({"transformer.h.1.mlp.c_fc.bias": torch.zeros(128), "score.weight": torch.ones(2, 32)}))
    with pytest.raises(ValueError, match=r"has, beyond what config.json describes, score\.weight;"):
        GPT.from_pretrained(directory)


def test_a_bias_that_ours_has_no_place_for_must_be_zero(tmp_path):
    make_ours(OURS["qwen3-qkv-bias-untied"]).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t["model.layers.1.self_attn.o_proj.bias"].fill_(0.1))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.bias is not zero"):
        GPT.from_pretrained(tmp_path)


def test_integer_weights_are_refused(spoiled):
    directory = spoiled("gpt2")
    edit_tensors(directory, lambda t: t.update({"transformer.wpe.weight": torch.zeros(24, 32, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight is I8"):
        GPT.from_pretrained(directory)


def test_pickles_are_refused(spoiled):
    directory = spoiled("gpt2")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds pickled code and is not read: convert it"):
        GPT.from_pretrained(directory)


def test_broken_directories_are_refused(spoiled, tmp_path, monkeypatch):
    directory = spoiled("gpt2")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        GPT.from_pretrained(directory)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor"):
        GPT.from_pretrained(directory)
    assert (spoiled("llama") / "model.safetensors").exists()
    for name in ("model-00001-of-00001.safetensors", "../llama/model.safetensors"):
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
        with pytest.raises(ValueError, match=f"names the file {name}, which is not there"):
            GPT.from_pretrained(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        GPT.from_pretrained(directory)
    (directory / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json is not a JSON object"):
        GPT.from_pretrained(directory)
    with pytest.raises(ValueError, match=r"config.json is a file"):
        GPT.from_pretrained(directory / "config.json")
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json"):
        GPT.from_pretrained(directory)
    with pytest.raises(ValueError, match=r"no such directory: .*nowhere"):
        GPT.from_pretrained(tmp_path / "nowhere")


def test_what_is_neither_here_nor_at_the_hub(monkeypatch):
    import huggingface_hub

    def unreachable(repo, allow_patterns):
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"no directory 'someone/something' in .* hub: no connection$"):
        GPT.from_pretrained("someone/something")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        GPT.from_pretrained("someone/something")


def test_a_hub_id_is_downloaded(saved, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(saved["llama"]))
    assert GPT.from_pretrained("someone/llama").config.stock_architecture() == "Llama"


def test_parameters_that_no_stock_class_holds_are_not_dropped_in_silence(tmp_path):
    model = make_ours({})
    model.get_submodule("blocks.0.attention.q").register_parameter("lora_a", nn.Parameter(torch.ones(2, 32)))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel cannot hold the parameter blocks\.0\.attention\.q\.lora_a"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(ValueError, match="model is a file; give a directory"):
        make_ours({}).save_pretrained(tmp_path / "model")


# Tokenizers


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([file.read_text() for file in sorted(Path(huggingface.__file__).parent.glob("*.py"))], vocab_size=400)


TEXTS = ["def f(x):\n    return x  # 1234567\n\n", "  Größe, naïve 日本 \t<|endoftext|>!", "", "from __future__ import annotations\r\n"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3", "neox-partial"])
def test_the_tokenizer_goes_along(name, tokenizer, tmp_path):
    model = make_ours({**OURS[name], "vocab_size": tokenizer.vocab_size + 3})
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert loaded.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
        assert loaded.decode(ids) == text
    assert loaded("a b")["input_ids"] == tokenizer.encode("a b")
    assert loaded.eos_token_id == tokenizer.end_of_text
    assert loaded.model_max_length == 24
    assert len(loaded) == tokenizer.vocab_size

    stock = load_stock(tmp_path)
    assert stock.config.eos_token_id == stock.config.bos_token_id == tokenizer.end_of_text
    assert stock.generation_config.eos_token_id == stock.generation_config.pad_token_id == tokenizer.end_of_text
    assert getattr(stock.config, "pad_token_id", None) is None
    prompt = torch.tensor([tokenizer.encode("def f(")])
    with torch.no_grad():
        made = stock.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)[0].tolist()
        ours = prompt
        for _ in range(len(made) - prompt.shape[1]):
            ours = torch.cat((ours, model(ours)[:, -1:].argmax(-1)), dim=1)
    assert made == ours[0].tolist()


def test_a_transformers_tokenizer_goes_along(tokenizer, tmp_path):
    made = tokenizer.to_transformers(24)
    made.chat_template = "{{ messages[0]['content'] }}"
    make_ours({"vocab_size": 400}).save_pretrained(tmp_path, tokenizer=made)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(TEXTS[0], add_special_tokens=False) == tokenizer.encode(TEXTS[0])
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == tokenizer.end_of_text


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tokenizer, tmp_path):
    for candidate in (tokenizer, tokenizer.to_transformers(24)):
        with pytest.raises(ValueError, match="the tokenizer has 400 ids and the model vocab_size=61"):
            make_ours({}).save_pretrained(tmp_path / "model", tokenizer=candidate)
    assert not (tmp_path / "model").exists()
