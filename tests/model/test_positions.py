"""Rotary tables against those of `transformers`, to the last bit; what Llama 3.1's scaling does to a wavelength."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gpt import GPT, GPTConfig
from gpt.model.positions import rotary_tables


def theirs(length: int, dim: int, parameters: dict) -> tuple[torch.Tensor, torch.Tensor]:
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1, head_dim=dim, rope_parameters=parameters)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    return cos[0], sin[0]


def stock_parameters(theta: float, factor: float, low: float, high: float, context: int) -> dict:
    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": context}
    return {"rope_type": "llama3", "rope_theta": theta, **scaling}


@settings(max_examples=80, derandomize=True)
@given(
    length=st.integers(1, 300),
    pairs=st.integers(1, 64),
    theta=st.floats(2.0, 1e6),
    factor=st.floats(1.0, 40.0),
    low=st.floats(0.1, 8.0),
    above=st.floats(0.01, 8.0),
    context=st.integers(1, 20_000),
)
def test_tables_are_those_of_transformers(length, pairs, theta, factor, low, above, context):
    for ours, stock in zip(rotary_tables(length, 2 * pairs, theta), theirs(length, 2 * pairs, {"rope_theta": theta}), strict=True):
        assert torch.equal(ours, stock)
    scaling = (factor, low, low + above, context)
    tables = rotary_tables(length, 2 * pairs, theta, scaling)
    for ours, stock in zip(tables, theirs(length, 2 * pairs, stock_parameters(theta, *scaling)), strict=True):
        assert torch.equal(ours, stock)


@pytest.mark.parametrize(("factor", "low", "high", "context"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (2.5, 0.5, 3.0, 300)])
def test_long_wavelengths_are_stretched_and_short_ones_kept(factor, low, high, context):
    dim, theta = 128, 500_000.0
    cos, sin = rotary_tables(2, dim, theta, (factor, low, high, context))
    angle = torch.atan2(sin[1], cos[1])[: dim // 2].double()  # of the first step: the frequency
    kept = divided = between = 0
    for i, got in enumerate(angle.tolist()):
        plain = theta ** (-2 * i / dim)
        wavelength = 2 * math.pi / plain
        if wavelength < context / high:
            want, kept = plain, kept + 1
        elif wavelength > context / low:
            want, divided = plain / factor, divided + 1
        else:
            share = (context / wavelength - low) / (high - low)
            want, between = (1 - share) * plain / factor + share * plain, between + 1
        assert got == pytest.approx(want, rel=1e-5)
    assert min(kept, divided, between) > 0


def test_a_scaled_model_has_scaled_tables():
    shape = {"vocab_size": 5, "context_length": 40, "n_layer": 1, "n_head": 2, "d_model": 32, "positions": "rotary"}
    scaled = GPT(GPTConfig(**shape, rope_scaling="llama3", rope_original_context=16, rope_scaling_factor=3.0))
    cos, sin = rotary_tables(40, 16, 10_000.0, (3.0, 1.0, 4.0, 16))
    assert torch.equal(scaled.get_buffer("rotary_cos"), cos)
    assert torch.equal(scaled.get_buffer("rotary_sin"), sin)
    assert not torch.equal(GPT(GPTConfig(**shape)).get_buffer("rotary_cos"), cos)
