"""8-bit weights: how far they are from the originals, whichever kernel multiplies them."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from inference_models import FAMILIES, GREEDY, VOCAB, prompt_of, random_model

from gpt.errors import UserError
from gpt.inference.decode import generate_tokens
from gpt.inference.packing import join_projections
from gpt.inference.quantize import Int8Linear, quantize_int8
from gpt.model.native_products import is_plain
from gpt.model.transformer import GPT

pytest.importorskip("torchao")


def quantized(model: GPT) -> GPT:
    model = copy.deepcopy(model)
    quantize_int8(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_weight_is_within_half_a_step_of_the_original(family, dtype):
    model = random_model(family, tie_embeddings=True).to(dtype)
    other = quantized(model)
    join_projections(model)
    linear = {name: module for name, module in model.named_modules() if is_plain(module)}
    found = {name: module for name, module in other.named_modules() if isinstance(module, Int8Linear)}
    assert found.keys() == linear.keys()
    assert not any(map(is_plain, other.modules()))
    for name, module in found.items():
        weight = linear[name].weight.float()
        assert module.weight.dtype == torch.int8
        assert module.scale.shape == weight.shape[:1]
        scale = module.scale.float()[:, None]
        slack = 1e-4 if dtype == torch.float32 else 127 * 2**-8  # the scale itself is rounded
        assert ((module.weight.float() * scale - weight).abs() <= scale * (0.5 + slack)).all(), name
        assert ((module.weight.amax(-1) >= 126) | (module.weight.amin(-1) <= -127)).all(), "all of the range is used"
        assert (module.bias is None) == (linear[name].bias is None)
        if module.bias is not None:
            assert torch.equal(module.bias, linear[name].bias)


@torch.no_grad()
def test_weights_that_are_views_of_their_file(tmp_path):
    random_model("gpt2", d_model=64, d_ff=128).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert not model.blocks[0].feedforward.up.weight.is_contiguous(), "GPT-2's matrices lie transposed"
    tokens = torch.arange(5)[None]
    expected = model(tokens)
    quantize_int8(model)
    torch.testing.assert_close(model(tokens), expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_the_head_is_untied_and_the_embedding_stays():
    model = random_model("gpt2", tie_embeddings=True)
    before = model.embeddings.tokens.weight.detach().clone()
    other = quantized(model)
    assert torch.equal(other.embeddings.tokens.weight, before)
    assert isinstance(other.head, Int8Linear)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_loss_hardly_changes(family, dtype):
    model = random_model(family, scale=0.1).to(dtype)
    tokens = torch.randint(VOCAB, (4, 24), generator=torch.Generator().manual_seed(1))
    losses = [F.cross_entropy(m(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).item() for m in (model, quantized(model))]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 32), (7, 5), (33, 130), (5, 24), (4, 36), (1, 1)])
@torch.no_grad()
def test_few_rows_and_many_agree(shape, bias):
    out, width = shape
    torch.manual_seed(0)
    layer = Int8Linear(
        torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(out).bfloat16() * 0.01, torch.randn(out).bfloat16() if bias else None
    )
    x = torch.randn(40, width).bfloat16()
    exact = F.linear(x.double(), layer.weight.double() * layer.scale.double()[:, None], None if layer.bias is None else layer.bias.double())
    close = {"atol": 2**-6, "rtol": 2**-6}
    many = layer(x)
    assert many.dtype == torch.bfloat16
    torch.testing.assert_close(many.double(), exact, **close)
    for rows in (1, 2, 16, 17):
        torch.testing.assert_close(layer(x[:rows]), many[:rows], **close)
    torch.testing.assert_close(layer(x[:6].view(2, 3, width)).flatten(0, 1), many[:6], **close)
    torch.testing.assert_close(layer(x.view(4, 10, width)[:, -1]), many[9::10], **close)  # rows that do not lie together in memory
    torch.testing.assert_close(layer.float()(x.float()).double(), exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(x[:3].float()).double(), exact[:3], **close)  # in bf16, as is the kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantised_model_writes_batches(dtype):
    model = quantized(random_model("llama").to(dtype))
    steps = list(generate_tokens(model, [prompt_of(5), prompt_of(9), prompt_of(1)], 6, GREEDY, n=2))
    assert len(steps) == 6
    assert all(0 <= token < VOCAB for step in steps for token in step)


def test_without_torchao_there_is_one_sentence(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"^quantize=int8 needs torchao: pip install '[\w-]+\[quantize\]'$"):
        quantize_int8(random_model("gpt2"))
