"""A checkpoint that says something our model does not compute is refused by name; so is one that is broken."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from stock_models import HF_LLAMA3, OURS, edit, edit_tensors, make_ours

from gpt import GPT


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "use_sliding_window=true"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("llama", {"sliding_window": 8}, "sliding_window=8"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*linear"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_parameters has low_freq_factor=null",
        ),
        ("llama", {"rope_parameters": {**HF_LLAMA3, "attention_factor": 2.0}}, "rope_parameters=.*attention_factor"),
        ("llama", {"rope_parameters": {**HF_LLAMA3, "factor": "8"}}, 'rope_parameters has factor="8", which must be a number'),
        ("llama", {"rope_scaling": {**HF_LLAMA3, "factor": 0.5}}, "config.json: rope_scaling_factor=0.5 must be at least 1"),
        (
            "llama",
            {"rope_scaling": {**HF_LLAMA3, "high_freq_factor": 1}},
            "rope_high_frequency_factor=1.0 must be greater than rope_lo",
        ),
        ("llama", {"rope_scaling": {**HF_LLAMA3, "low_freq_factor": 0}}, "rope_low_frequency_factor=0.0 must be greater than 0"),
        ("llama", {"original_max_position_embeddings": 9.5, "rope_scaling": HF_LLAMA3}, "embeddings=9.5 must be a whole number"),
        ("llama", {"rope_parameters": {"rope_theta": "1e4"}}, 'rope_parameters has rope_theta="1e4", which must be a number'),
        ("llama", {"rope_scaling": "linear"}, 'rope_scaling="linear" is not supported'),
        *(
            (name, {"rope_parameters": None, "rope_scaling": {"type": kind, "factor": 2.0}}, f"rope_scaling=.*{kind}")
            for name, kind in itertools.product(("llama", "qwen2", "qwen3", "neox-partial"), ("linear", "dynamic", "yarn", "longrope"))
        ),
        *(
            ("llama", {"rope_parameters": {"rope_type": kind, "factor": 2.0}}, f"rope_parameters=.*{kind}")
            for kind in ("linear", "dynamic", "yarn", "longrope", "proportional", "mrope")
        ),
        ("neox-partial", {"head_dim": 4}, "head_dim=4 is not supported"),
        ("qwen3", {"is_causal": False}, "is_causal=false is not supported"),
        ("llama", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
        ("llama", {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config="),
        ("llama", {"compression_config": {"format": "x"}}, "compression_config="),
        ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ("gpt2", {"is_encoder_decoder": True}, "is_encoder_decoder=true"),
        (
            "gpt2",
            {"architectures": ["GPT2ForQuestionAnswering"]},
            "GPT2ForQuestionAnswering.* cannot be loaded as a language model or a cl",
        ),
        ("qwen2", {"architectures": ["Qwen2ForRewardModel"]}, "architectures=.*Qwen2ForRewardModel.*; Qwen2ForCausalLM, .* can"),
        ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "lacks score.weight"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "lacks score.bias, score.weight"),
        ("gpt2", {"tie_word_embeddings": "false"}, 'tie_word_embeddings="false" must be a bool, such as true'),
        ("llama", {"attention_bias": 1}, "attention_bias=1 must be a bool"),
        ("llama", {"rms_norm_eps": "1e-6"}, 'rms_norm_eps="1e-6" must be a float'),
        ("gpt2", {"hidden_size": 36}, r"has shape \(.*\) where config.json asks for \(.*36.*\)"),
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


def test_a_tensor_that_is_there_twice_is_named(tmp_path):
    make_ours(OURS["neox-parallel"]).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["embed_out.weight"] + 1}))
    with pytest.raises(ValueError, match=r"embed_out\.weight is there twice, in model\.safetensors and model\.safetensors"):
        GPT.from_pretrained(tmp_path)


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
