"""Packed weights compute what the others do."""

from __future__ import annotations

import copy

import pytest
import torch
from inference_models import SHAPES, VOCAB, random_model
from torch import nn

from gpt.inference.packing import PackedLinear, pack_for_inference
from gpt.model.attention import KVCache
from gpt.model.config import LoRAConfig
from gpt.model.lora import adapter_parameters, attach_as
from gpt.model.native_products import is_plain
from gpt.model.transformer import GPT


def packed(model: GPT, rows: int = 2) -> GPT:
    model = copy.deepcopy(model)
    pack_for_inference(model, rows)
    return model


@pytest.mark.parametrize("rows_written", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_logits_are_those_of_the_model(shape, dtype, rows_written):
    model = random_model(shape, tie_embeddings=shape in ("gpt2", "llama"), scale=0.1, d_model=64, d_ff=67).to(dtype)
    other = packed(model, rows_written)
    kinds = [type(module) for module in other.modules()]
    assert not any(map(is_plain, other.modules()))
    joined = 2 * model.config.n_layer  # q, k and v are one
    assert kinds.count(PackedLinear) == sum(map(is_plain, model.modules())) - joined
    assert not any(isinstance(module, (nn.Dropout, nn.GELU)) for module in other.modules())
    for rows, length in ((1, 1), (1, 20), (3, 1), (2, 7)):
        tokens = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows))
        expected, got = model(tokens).float(), other(tokens).float()
        assert got.shape == expected.shape
        size = expected.abs().max()
        assert (got - expected).abs().max() <= size * (1e-5 if dtype == torch.float32 else 2**-5)  # bf16 has 8 bits, here rounded ~20 times
    if dtype == torch.bfloat16:  # on average the two err alike
        exact = copy.deepcopy(model).float()(tokens)
        errors = [(logits(tokens).float() - exact).square().mean().sqrt() for logits in (model, other)]
        assert errors[1] < 1.5 * errors[0]


@torch.no_grad()
def test_with_a_cache_too():
    model = random_model("llama")
    other = packed(model)
    tokens = torch.randint(VOCAB, (2, 12))
    cache = KVCache(model.config, 2, 12)
    steps = [other(part, cache) for part in tokens.split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens), atol=1e-4, rtol=1e-4)


def test_adapters_are_merged_first():
    model = random_model("no positions")
    attach_as(model, LoRAConfig(rank=2))
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.arange(12).reshape(2, 6) % VOCAB
    with torch.no_grad():
        expected = model.eval()(tokens)
        torch.testing.assert_close(packed(model)(tokens), expected, rtol=1e-4, atol=1e-4)


def test_dtypes_without_a_packed_layout_stay_as_they_are():
    model = random_model("llama").half()
    assert not any(isinstance(module, PackedLinear) for module in packed(model).modules())


def test_the_embedding_that_the_head_shares_stays():
    model = packed(random_model("gpt2", tie_embeddings=True))
    assert isinstance(model.head, PackedLinear)
    assert model.embeddings.tokens.weight.shape == (VOCAB, 32)
