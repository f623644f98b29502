"""The native step computes what torch does: every kind of model, in fp32 to the last digits, and in bf16 and int8 closer to the truth."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_models import FAMILIES, GREEDY, VOCAB, alone, prompt_of, random_model, rows_of
from torch import Tensor, nn

from gpt.inference import native_step
from gpt.inference.decode import generate_tokens
from gpt.inference.native_step import NativeStep, native_obstacle
from gpt.inference.packing import PackedLinear, join_projections, pack_for_inference
from gpt.inference.quantize import Int8Linear, quantize_int8
from gpt.model.attention import KVCache
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    found, why = native_step.load_library(native_step._SOURCE)
    if found is None:
        pytest.skip(why)


# Sizes that no vector divides.
SIZES = {
    "vocab_size": st.integers(1, 70), "context_length": st.just(16), "n_layer": st.integers(1, 2), "d_ff": st.integers(1, 70),
    "norm_eps": st.sampled_from([1e-6, 1e-2]), "bias": st.booleans(), "qkv_bias": st.booleans(), "tie_embeddings": st.booleans(),
    "embedding_scale": st.sampled_from([1.0, 3.0]),
}  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> GPTConfig:
    """All that a GPTConfig can be."""
    given = {name: draw(values) for name, values in SIZES.items()}
    given["n_kv_head"] = draw(st.integers(1, 3))
    given["n_head"] = given["n_kv_head"] * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 9))
    if draw(st.booleans()):
        qk_norm = draw(st.booleans())
        scaling = {"rope_scaling": "llama3", "rope_original_context": 8} if draw(st.booleans()) else {}
        given |= {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "head_dim": head_dim, "qk_norm": qk_norm, **scaling}
        given["bias"] &= not qk_norm
        given["d_model"] = given["n_head"] * draw(st.integers(1, 12))
    else:
        given |= {"n_kv_head": 0, "d_model": given["n_head"] * head_dim, "activation": draw(st.sampled_from(["gelu", "gelu_tanh"]))}
        given["positions"] = draw(st.sampled_from(["learned", "sinusoidal", "rotary", "none"]))
        if given["positions"] == "rotary":
            rotated = 2 * draw(st.integers(1, head_dim // 2))
            given |= {"parallel_residual": draw(st.booleans()), "rope_fraction": rotated / head_dim, "rope_theta": 100.0}
    return GPTConfig(**given)


@torch.no_grad()
def made(config: GPTConfig, seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    join_projections(model)
    return model.eval()


def cache_of(model: GPT, rows: int, padding: Tensor | None) -> KVCache:
    return KVCache(model.config, rows, model.config.context_length, padding=padding)


@torch.no_grad()
def logits_of(model: GPT, tokens: Tensor, padding: Tensor | None, native: bool) -> Tensor:
    """What follows each token but the first three, which are read at once: (B, T - 3, V)."""
    cache = cache_of(model, len(tokens), padding)
    model.hidden_states(tokens[:, :3], cache)
    step = NativeStep(model) if native else lambda token, cache: model(token, cache)[:, -1].float()
    return torch.stack([step(token, cache) for token in tokens[:, 3:].split(1, dim=1)], dim=1)


@given(config=configs(), rows=st.integers(1, 6), padded=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_every_model_in_fp32(config, rows, padded, seed):
    model = made(config, seed)
    assert native_obstacle(model, 1) is None
    tokens = torch.randint(config.vocab_size, (rows, 8))
    padding = torch.randint(3, (rows,)) if padded else None
    expected, got = (logits_of(model, tokens, padding, native) for native in (False, True))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_weights_are_multiplied_more_exactly_than_by_torch(family, kind):
    model = random_model(family, scale=0.1, d_model=64, d_ff=150, tie_embeddings=True).to(torch.bfloat16)
    join_projections(model)
    exact = copy.deepcopy(model).double()
    if kind == "int8":
        pytest.importorskip("torchao")
        quantize_int8(model)
        for name, layer in model.named_modules():
            if isinstance(layer, Int8Linear):
                exact.get_submodule(name).weight = nn.Parameter(layer.weight.double() * layer.scale.double()[:, None])
    tokens = torch.randint(VOCAB, (5, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = exact(tokens)[:, 3:]
    errors = [(logits_of(model, tokens, None, native) - truth).square().mean().sqrt() for native in (False, True)]
    assert errors[1] < 0.8 * errors[0], errors


@torch.no_grad()
def test_sums_of_integers_do_not_overflow():
    """Numbers and weights as large as they can be, all of one sign, in a row of several thousand."""
    model = made(GPTConfig(vocab_size=3, context_length=4, n_layer=1, n_head=1, d_model=4, d_ff=20_000, activation="gelu"), 0)
    for parameter in model.parameters():
        parameter.zero_()
    feedforward = model.blocks[0].feedforward
    feedforward.up.bias.fill_(7.0)  # of which GELU is 7 too
    model.final_norm.bias.fill_(1.0)
    model.head.weight.fill_(0.0)
    quantize_int8(model)
    feedforward.down.weight.fill_(-128)
    feedforward.down.scale.fill_(1.0)
    feedforward.down.scale[1:].zero_()
    model.final_norm.weight[0] = 1.0
    model.head.weight.fill_(1)
    model.head.scale.fill_(1.0)
    # The residual is (-128 x 7 x 20,000, 0, 0, 0), whose layernorm is (-sqrt(3), 1/sqrt(3), ...), of which the first alone has a weight.
    logits = NativeStep(model)(torch.tensor([[1]]), cache_of(model, 1, None))
    torch.testing.assert_close(logits, torch.full((1, 3), 4 - 3**0.5), rtol=1e-4, atol=0)


@torch.no_grad()
def test_what_is_not_a_number_stays_none():
    model = made(GPTConfig(vocab_size=9, context_length=4, n_layer=1, n_head=1, d_model=8), 0)
    model.blocks[0].feedforward.up.bias[3] = float("nan")
    quantize_int8(model)
    assert NativeStep(model)(torch.tensor([[1]]), cache_of(model, 1, None)).isnan().all()


def steps_by_torch(model: GPT) -> list[int]:
    """The lengths of what the first block is given, from now on."""
    lengths: list[int] = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    return lengths


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_reads_by_torch_and_writes_natively(family):
    model = random_model(family, context_length=24)
    other = copy.deepcopy(model)
    assert pack_for_inference(other) == "a native step"
    lengths = steps_by_torch(other)
    assert alone(other, prompt_of(5), 12) == alone(model, prompt_of(5), 12)
    assert lengths == [5]
    assert {type(module) for module in other.modules() if hasattr(module, "weight")} & {nn.Linear, PackedLinear} == {PackedLinear}


def test_the_weights_are_not_held_twice():
    model = random_model("gpt2", tie_embeddings=True)
    where = model.embeddings.tokens.weight.data_ptr(), model.blocks[0].get_submodule("feedforward.down").weight.data_ptr()
    pack_for_inference(model)
    assert (model.head.weight.data_ptr(), model.blocks[0].get_submodule("feedforward.down").weight.data_ptr()) == where


def test_a_full_context_is_read_again_by_torch():
    model = random_model("qwen3", context_length=24)
    other = copy.deepcopy(model)
    pack_for_inference(other)
    lengths = steps_by_torch(other)
    assert alone(other, prompt_of(5), 60, overflow="slide") == alone(model, prompt_of(5), 60, overflow="slide")
    assert lengths == [5, 12, 12, 12, 12]


def test_many_rows_are_torchs_in_fp32_and_native_in_int8():
    pytest.importorskip("torchao")
    model = random_model("llama")
    assert pack_for_inference(copy.deepcopy(model), 2) == "torch: it is faster than a native step for 2 texts at once"
    quantize_int8(model)
    other = copy.deepcopy(model)
    assert pack_for_inference(other, 17) == "torch: it is faster than a native step for 17 texts at once"
    assert pack_for_inference(other, 16) == "a native step"
    prompts = [prompt_of(length) for length in (3, 9, 1)]
    lengths = steps_by_torch(other)
    made = rows_of(list(generate_tokens(other, prompts, 10, GREEDY, n=2)))
    assert lengths == [9]
    assert made[::2] == made[1::2]
    assert [len(row) for row in made] == [10] * 6


def test_compiled_it_is_not_native(monkeypatch):
    monkeypatch.setattr("gpt.inference.decode.compile_decoding", lambda step: step)
    model = random_model("gpt2")
    pack_for_inference(model)
    lengths = steps_by_torch(model)
    assert len(alone(model, prompt_of(4), 3, compiled=True)) == 3
    assert lengths == [4, 1, 1]


def test_a_model_that_nobody_laid_out_is_left_to_torch(monkeypatch):
    monkeypatch.setattr("gpt.inference.native_step.load_library", lambda _: pytest.fail("nothing is built for it"))
    model = random_model("gpt2")
    assert native_obstacle(model, 1) == "the weights are not laid out for a native step"
    join_projections(model)
    down = model.blocks[-1].get_submodule("feedforward.down")
    down.weight.data = down.weight.T.contiguous().T
    assert native_obstacle(model, 1) == "the weights are not laid out for a native step"


def test_a_dtype_that_it_does_not_read(monkeypatch):
    model = random_model("gpt2").half()
    assert pack_for_inference(model) == "torch: no native step reads weights in float16"


@torch.no_grad()
def test_weights_that_lie_transposed_in_their_file_are_turned(tmp_path):
    random_model("gpt2").save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert not model.blocks[0].get_submodule("feedforward.up").weight.is_contiguous()
    expected = alone(model, prompt_of(5), 8)
    assert pack_for_inference(model) == "a native step"
    assert alone(model, prompt_of(5), 8) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_library_the_weights_are_packed(dtype, monkeypatch):
    monkeypatch.setattr("gpt.inference.native_step.load_library", lambda _: (None, "there is no compiler"))
    model = random_model("llama").to(dtype)
    assert pack_for_inference(model) == "torch: there is no compiler"
    assert isinstance(model.head, PackedLinear)
    assert len(alone(model, prompt_of(5), 8)) == 8
