"""Small models of every stock family, ours and those of `transformers`, and what compares them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from gpt import GPT, GPTConfig

TOLERANCE = 1e-5
SMALL = {"vocab_size": 61, "context_length": 24, "n_layer": 2, "n_head": 4, "d_model": 32}
ROTARY = {"positions": "rotary", "norm": "layernorm"}
RMS = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "d_ff": 44}

# Wavelengths of about 6, 30, 140 and 660 tokens: kept, kept, in the passage, divided.
LLAMA3 = {"rope_scaling": "llama3", "rope_theta": 500.0, "rope_original_context": 256, "rope_scaling_factor": 4.0}
HF_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
HF_LLAMA3 |= {"original_max_position_embeddings": 256}

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
    "llama-3.1": {**RMS, **LLAMA3, "n_kv_head": 2},
    "llama-3.1-odd": {**RMS, **LLAMA3, "rope_low_frequency_factor": 1.5, "rope_high_frequency_factor": 2.25, "rope_scaling_factor": 1.7},
    "qwen2-scaled-rotation": {**RMS, **LLAMA3, "qkv_bias": True},
    "qwen3-scaled-rotation": {**RMS, **LLAMA3, "qk_norm": True, "head_dim": 10},
    "neox-scaled-rotation": {**ROTARY, **LLAMA3, "rope_fraction": 0.5, "n_head": 2},
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
    "llama-3.1": ("Llama", {"rope_parameters": {**HF_LLAMA3, "rope_theta": 500.0}}),
    "qwen2-scaled-rotation": ("Qwen2", {"num_key_value_heads": 4, "rope_parameters": {**HF_LLAMA3, "rope_theta": 500.0}}),
    "qwen3-scaled-rotation": ("Qwen3", {"num_key_value_heads": 1, "rope_parameters": {**HF_LLAMA3, "rope_theta": 500.0}}),
    "neox-scaled-rotation": ("GPTNeoX", {"rope_parameters": {**HF_LLAMA3, "rope_theta": 500.0, "partial_rotary_factor": 1.0}}),
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
