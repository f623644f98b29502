"""GPTConfig: the presets are faithful, and every shape is held by a stock architecture or refused with the field that is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.compose import compose_run
from gpt.model.config import Architecture, GPTConfig


def preset(name: str) -> GPTConfig:
    return compose_run("pretrain", [f"model={name}"]).model


# Presets

# name: (n_layer, n_head, d_model, d_ff, parameters with the embedding counted once)
GPT2 = {
    "gpt2": (12, 12, 768, 3072, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 4096, 354_823_168),
    "gpt2-large": (36, 20, 1280, 5120, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 6400, 1_557_611_200),
}


@pytest.mark.parametrize("name", GPT2)
def test_the_gpt2_presets_are_those_that_openai_released(name):
    model = preset(name)
    layers, heads, width, inner, parameters = GPT2[name]
    assert (model.n_layer, model.n_head, model.d_model, model.d_ff) == (layers, heads, width, inner)
    assert (model.vocab_size, model.context_length, model.head_dim, model.n_kv_head) == (50257, 1024, 64, heads)
    assert (model.positions, model.norm, model.norm_eps, model.activation) == ("learned", "layernorm", 1e-5, "gelu_tanh")
    assert (model.bias, model.tie_embeddings, model.embedding_scale, model.parallel_residual) == (True, True, 1.0, False)
    assert model.stock_architecture() == "GPT2"
    embeddings = (model.vocab_size + model.context_length) * width
    block = 4 * width * width + 4 * width + 2 * width * model.d_ff + width + model.d_ff + 4 * width
    assert embeddings + layers * block + 2 * width == parameters


def test_the_2017_transformer_has_its_base_size():
    model = preset("transformer-2017")
    assert (model.n_layer, model.n_head, model.d_model, model.d_ff, model.head_dim) == (6, 8, 512, 2048, 64)
    assert (model.positions, model.dropout, model.tie_embeddings) == ("sinusoidal", 0.1, True)
    assert model.embedding_scale == pytest.approx(math.sqrt(512), rel=1e-15)
    assert model.stock_architecture() == "GPT2"


def test_nano_has_the_shape_of_qwen3():
    model = preset("nano")
    assert (model.positions, model.norm, model.qk_norm, model.activation, model.bias) == ("rotary", "rmsnorm", True, "swiglu", False)
    assert model.stock_architecture() == "Qwen3"


# GPTConfig


def test_sizes_are_derived():
    config = GPTConfig(n_head=12, d_model=768)
    assert (config.n_kv_head, config.head_dim, config.d_ff) == (12, 64, 3072)
    swiglu = GPTConfig(n_head=12, d_model=768, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False)
    assert swiglu.d_ff == 2048
    assert dataclasses.replace(config) == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"d_model": 770}, "d_model=770 is not divisible by n_head=12 (nearest: 768 or 780)"),
        ({"d_model": 770, "head_dim": 64}, "d_model=770 is not divisible by n_head=12 (nearest: 768 or 780)"),
        ({"d_model": 5}, "d_model=5 is not divisible by n_head=12 (nearest: 12)"),
        ({"head_dim": 32}, "head_dim=32 with norm=layernorm must be 64: no stock architecture (GPT-2, GPT-NeoX) can hold another"),
        ({"n_kv_head": 5}, "n_kv_head=5 does not divide n_head=12"),
        ({"n_kv_head": 4}, "n_kv_head=4 with norm=layernorm must be 12: no stock architecture (GPT-2, GPT-NeoX) can hold another"),
        ({"positions": "rotray"}, "positions=rotray must be one of learned, sinusoidal, rotary, none"),
        ({"norm": "batchnorm"}, "norm=batchnorm must be one of layernorm, rmsnorm"),
        ({"activation": "relu"}, "activation=relu must be one of gelu, gelu_tanh, swiglu"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and less than 1"),
        ({"dropout": math.nan}, "dropout=nan must be at least 0 and less than 1"),
        ({"norm_eps": math.inf}, "norm_eps=inf must be greater than 0 and finite"),
        ({"norm_eps": math.nan}, "norm_eps=nan must be greater than 0 and finite"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be greater than 0 and finite"),
        ({"rope_fraction": 1.5}, "rope_fraction=1.5 must be greater than 0 and at most 1"),
        ({"vocab_size": -1}, "vocab_size=-1 must not be negative (0 means: derived)"),
        ({"context_length": 0}, "context_length=0 must be at least 1"),
        (
            {"positions": "rotary", "rope_fraction": 0.01},
            "rope_fraction=0.01 of head_dim=64 rotates 0 dimensions; it must be an even number of at least 2",
        ),
        (
            {"positions": "rotary", "d_model": 36},
            "head_dim=3 (d_model / n_head unless set) must be even: rotary positions turn pairs",
        ),
        (
            {"qk_norm": True},
            "qk_norm=true with norm=layernorm must be false: no stock architecture (GPT-2, GPT-NeoX) can hold another",
        ),
        (
            {"parallel_residual": True},
            "parallel_residual=true with positions=learned must be false: no stock architecture (GPT-2, GPT-NeoX) can hold another",
        ),
        (
            {"activation": "swiglu"},
            "activation=swiglu with norm=layernorm must be gelu or gelu_tanh: no stock architecture (GPT-2, GPT-NeoX) is gated",
        ),
        (
            {"norm": "rmsnorm", "positions": "none"},
            "positions=none with norm=rmsnorm must be rotary: no stock architecture (Llama, Qwen2, Qwen3) can hold another",
        ),
        (
            {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "qk_norm": True},
            "bias=true with qk_norm=true must be false: no stock architecture (Llama, Qwen2, Qwen3) can hold another",
        ),
    ],
)
def test_shapes_that_are_refused(values, said):
    with pytest.raises(ValueError) as caught:
        GPTConfig(**values)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("values", "architecture"),
    [
        ({}, "GPT2"),
        ({"positions": "sinusoidal"}, "GPT2"),
        ({"positions": "none", "activation": "gelu", "bias": False}, "GPT2"),
        ({"positions": "rotary", "rope_fraction": 0.25, "parallel_residual": True}, "GPTNeoX"),
        ({"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": True}, "Llama"),
        ({"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 4, "head_dim": 128}, "Llama"),
        ({"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "qkv_bias": True}, "Qwen2"),
        ({"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "qk_norm": True}, "Qwen3"),
    ],
)
def test_shapes_and_their_stock_architecture(values, architecture):
    assert GPTConfig(**values).stock_architecture() == architecture


CHOICES = {
    name: [*typing.get_args(hint)] if typing.get_origin(hint) is typing.Literal else [False, True]
    for name, hint in typing.get_type_hints(GPTConfig).items()
    if typing.get_origin(hint) is typing.Literal or hint is bool
}


def test_every_combination_of_choices_has_an_architecture_or_names_the_field():
    accepted = set()
    for values in itertools.product(*CHOICES.values()):
        accepted.add(architecture_or_field(dict(zip(CHOICES, values, strict=True))))
    assert set(typing.get_args(Architecture)) <= accepted


@settings(max_examples=500, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            **{name: st.sampled_from(options) for name, options in CHOICES.items()},
            **{n: st.integers(-1, 5) for n in ("n_layer", "context_length", "n_kv_head")},
            **{n: st.integers(-1, 16) for n in ("n_head", "head_dim", "d_model", "d_ff", "vocab_size")},
            **{n: st.floats() for n in ("rope_theta", "norm_eps", "embedding_scale")},
            **{n: st.floats(-0.5, 1.5) for n in ("rope_fraction", "dropout")},
        },
    )
)
def test_any_values_have_an_architecture_or_name_the_field(values):
    architecture_or_field(values)


def built(values: dict) -> GPTConfig | str:
    """The config, or what is said of the values."""
    try:
        return GPTConfig(**values)
    except ValueError as problem:
        return str(problem)


def architecture_or_field(values: dict) -> str:
    config = built(values)
    if isinstance(config, str):
        name = config.partition("=")[0]
        assert name in typing.get_type_hints(GPTConfig), config
        assert "\n" not in config
        return name
    architecture = config.stock_architecture()
    assert architecture in typing.get_args(Architecture)
    assert config.n_head % config.n_kv_head == 0
    assert min(config.head_dim, config.d_ff, config.n_kv_head) > 0
    assert dataclasses.replace(config) == config, "building it again from its own values changes nothing"
    assert architecture not in ("GPT2", "GPTNeoX") or config.head_dim * config.n_head == config.d_model
    return architecture


# Rotary frequencies

ROTARY: dict[str, typing.Any] = {"positions": "rotary"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rope_scaling": "llama3"}, "rope_scaling=llama3 with positions=learned must be none: nothing is rotated there"),
        ({**ROTARY, "rope_scaling": "yarn"}, "rope_scaling=yarn must be one of none, llama3"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor=0.5 must be at least 1 and finite"),
        ({"rope_scaling_factor": math.inf}, "rope_scaling_factor=inf must be at least 1 and finite"),
        ({"rope_scaling_factor": math.nan}, "rope_scaling_factor=nan must be at least 1 and finite"),
        ({"rope_low_frequency_factor": 0.0}, "rope_low_frequency_factor=0.0 must be greater than 0 and finite"),
        (
            {"rope_low_frequency_factor": 4.0},
            "rope_high_frequency_factor=4.0 must be greater than rope_low_frequency_factor=4.0 and finite",
        ),
        (
            {"rope_high_frequency_factor": math.nan},
            "rope_high_frequency_factor=nan must be greater than rope_low_frequency_factor=1.0 and finite",
        ),
        ({"rope_original_context": 0}, "rope_original_context=0 must be at least 1"),
    ],
)
def test_rope_values_that_are_refused(values, said):
    with pytest.raises(ValueError) as caught:
        GPTConfig(**values)
    assert str(caught.value) == said


def test_rope_scaling_as_the_tables_take_it():
    assert GPTConfig(**ROTARY).llama3_scaling is None
    config = GPTConfig(**ROTARY, rope_scaling="llama3", rope_scaling_factor=2.0, rope_original_context=64)
    assert config.llama3_scaling == (2.0, 1.0, 4.0, 64)
