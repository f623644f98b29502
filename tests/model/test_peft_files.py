"""Adapters in PEFT's format: `peft` computes with ours what our model computes, and our model with peft's what peft computes, in fp32."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapters import with_adapters
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stock_models import OURS, STOCK, load_stock, logits, make_ours, make_stock, tokens_for

from gpt import GPT
from gpt.model.config import GPTConfig, LoRAConfig
from gpt.model.huggingface import read_config
from gpt.model.lora import adapted, adapter_parameters, base
from gpt.model.peft_files import load_adapter, save_adapter

TOKENS = tokens_for(59, 16)
CLOSE: Any = {"rtol": 1e-5, "atol": 3e-5}
KINDS = {
    "q-and-v": LoRAConfig(rank=3, alpha=5, targets=["q", "v"]),
    "everything": LoRAConfig(rank=2),
    "dora": LoRAConfig(rank=3, alpha=4.5, dora=True),
    "dora-of-k": LoRAConfig(rank=3, targets=["k", "down"], dora=True),
    "not-all-blocks": LoRAConfig(rank=4, targets=["blocks.1.attention.v", "blocks.0.feedforward.up", "out"]),
}
FAMILIES = ["gpt2", "gpt2-odd", "neox-partial", "neox-parallel", "llama", "llama-one-kv-head-bias", "qwen2", "qwen3"]


def saved(model: GPT, folder: Path) -> Path:
    """The base of a model with adapters in stock files, and the adapters; the folder of these."""
    base(model).save_pretrained(folder / "base")
    save_adapter(model, folder / "adapter", str(folder / "base"))
    return folder / "adapter"


def in_peft(folder: Path) -> torch.nn.Module:
    """The adapter in `peft`, over its base in `transformers`; any warning of peft's is an error."""
    stock = load_stock(Path(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # transformers' of what peft asks it
        return peft.PeftModel.from_pretrained(stock, folder).eval()


def peft_adapter(name: str, folder: Path, **settings: Any) -> torch.nn.Module:
    """A model of `stock_models.STOCK` with adapters of peft's that change something, saved with its base."""
    stock = make_stock(name)
    stock.save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(stock, peft.LoraConfig(fan_in_fan_out=name.startswith("gpt2"), **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name or "modules_to_save" in parameter_name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder / "adapter")
    edit_config(folder / "adapter", base_model_name_or_path=str(folder / "base"))
    return model.eval()


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_computes_the_same_with_our_files(name, kind, tmp_path):
    model = with_adapters(name, KINDS[kind])
    folder = saved(model, tmp_path)
    expected = logits(model, TOKENS)
    assert (expected - logits(base(model), TOKENS)).abs().max() > 0.1
    torch.testing.assert_close(logits(in_peft(folder), TOKENS), expected, **CLOSE)
    torch.testing.assert_close(logits(GPT.from_pretrained(folder), TOKENS), expected, **CLOSE)
    back = make_ours(OURS[name])
    load_adapter(back, folder)
    if kind != "dora-of-k":  # where q, k and v are one matrix, all three come back with magnitudes
        assert {n: p.shape for n, p in adapter_parameters(back).items()} == {n: p.shape for n, p in adapter_parameters(model).items()}
    torch.testing.assert_close(logits(back.eval(), TOKENS), expected, **CLOSE)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3", "neox", "neox-no-attention-bias", "llama-mlp-bias-only"])
def test_our_model_computes_the_same_with_files_of_peft(name, dora, tmp_path):
    theirs = peft_adapter(name, tmp_path, use_dora=dora)
    ours = GPT.from_pretrained(tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter")
    expected = logits(theirs, TOKENS)
    torch.testing.assert_close(logits(ours.eval(), TOKENS), expected, **CLOSE)
    torch.testing.assert_close(logits(GPT.from_pretrained(tmp_path / "adapter"), TOKENS), expected, **CLOSE)
    save_adapter(ours, tmp_path / "again", str(tmp_path / "base"))
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "again"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():  # a fused adapter comes back as it was, and not three times as wide
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "r": 2},
        {"rank_pattern": {"c_attn": 5}, "alpha_pattern": {r"h\.1\.attn\.c_attn": 11}},
        {"target_modules": ["mlp.c_proj"], "layers_to_transform": [1]},
        {"init_lora_weights": "gaussian", "target_modules": r".*\.0\.attn\.c_(attn|proj)"},
    ],
    ids=["rslora", "patterns", "layers", "expression"],
)
def test_settings_of_peft_are_understood(settings, tmp_path):
    theirs = peft_adapter("gpt2", tmp_path, **settings)
    torch.testing.assert_close(logits(GPT.from_pretrained(tmp_path / "adapter"), TOKENS), logits(theirs, TOKENS), **CLOSE)


@pytest.mark.parametrize(("name", "modules"), [("llama", ["lm_head", "norm", "embed_tokens"]), ("gpt2", ["ln_f"]), ("neox", ["embed_out"])])
def test_modules_that_an_adapter_brings_whole_are_taken(name, modules, tmp_path):
    if name == "neox" and not any(n.endswith("embed_out") for n, _ in make_stock(name).named_modules()):
        modules = ["lm_head"]  # as transformers 5 calls it once it is loaded
    theirs = peft_adapter(name, tmp_path, modules_to_save=modules, target_modules=None if name == "llama" else "all-linear")
    model = GPT.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(model, TOKENS), logits(theirs, TOKENS), **CLOSE)


def test_what_trains_besides_is_written_whole(tmp_path):
    model = with_adapters("llama", LoRAConfig(rank=2))
    base(model).save_pretrained(tmp_path / "base")
    for parameter in (model.head.weight, model.final_norm.weight, model.blocks[1].attention_norm.weight):
        parameter.requires_grad_(True)
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.2
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    expected = logits(model, TOKENS)
    torch.testing.assert_close(logits(in_peft(tmp_path / "adapter"), TOKENS), expected, **CLOSE)
    torch.testing.assert_close(logits(GPT.from_pretrained(tmp_path / "adapter"), TOKENS), expected, **CLOSE)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("embeddings.tokens.weight", "has been trained, and the head shares it"),
        ("blocks.0.attention.q.bias", "has been trained, and it has an adapter too"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_nothing_written(parameter, message, tmp_path):
    model = with_adapters("gpt2", LoRAConfig(rank=2))
    model.get_parameter(parameter).requires_grad_(True)
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path / "adapter", "base")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(make_ours(OURS["gpt2"]), tmp_path / "adapter", "base")


def test_the_config_is_as_people_write_it(tmp_path):
    found = {}
    for name in ("llama", "gpt2", "neox-partial"):
        folder = saved(with_adapters(name, LoRAConfig(rank=4, alpha=8, targets=["q", "v", "down"])), tmp_path / name)
        found[name] = json.loads((folder / "adapter_config.json").read_text())
    assert found["llama"]["target_modules"] == ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    assert (found["llama"]["r"], found["llama"]["lora_alpha"], found["llama"]["rank_pattern"]) == (4, 8, {})
    assert found["gpt2"]["target_modules"] == ["attn.c_attn", "mlp.c_proj"]
    assert found["gpt2"]["fan_in_fan_out"] is True
    assert found["neox-partial"]["target_modules"] == ["attention.query_key_value", "mlp.dense_4h_to_h"]
    # r of one module and of another that is q and v together; a reader that knows no patterns scales all by alpha / r = 2 still
    sizes = (
        {found["gpt2"]["r"], *found["gpt2"]["rank_pattern"].values()},
        {found["gpt2"]["lora_alpha"], *found["gpt2"]["alpha_pattern"].values()},
    )
    assert sizes == ({4, 8}, {8, 16})


@settings(max_examples=15)
@given(
    shape=st.fixed_dictionaries({"n_head": st.sampled_from([1, 2, 4]), "n_layer": st.integers(1, 3), "d_ff": st.sampled_from([8, 24])}),
    family=st.sampled_from(["gpt2", "neox-partial", "qwen3"]),
    rank=st.integers(1, 9),
    alpha=st.floats(0.5, 40),
    targets=st.lists(st.sampled_from(["q", "k", "v", "out", "up", "down", "blocks.0"]), min_size=1, unique=True),
    dora=st.booleans(),
)
def test_any_adapter_survives_its_files(shape, family, rank, alpha, targets, dora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    OURS["any"] = {**OURS[family], **shape, "n_kv_head": 0, "head_dim": 0, "rope_fraction": 1.0}
    model = with_adapters("any", LoRAConfig(rank, alpha, targets=targets, dora=dora))
    save_adapter(model, folder, "nowhere")
    back = make_ours(OURS["any"])
    load_adapter(back, folder)
    torch.testing.assert_close(logits(back.eval(), TOKENS), logits(model, TOKENS), **CLOSE)
    if not dora:
        assert {n: layer.rank for n, layer in adapted(back).items()} == {n: layer.rank for n, layer in adapted(model).items()}
        for name, parameter in adapter_parameters(model).items():
            torch.testing.assert_close(back.get_parameter(name), parameter, rtol=0, atol=0)


def test_an_adapter_that_has_learned_nothing_yet_survives_too(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=61, context_length=24, n_layer=2, n_head=4, d_model=32), LoRAConfig(rank=2, targets=["q"]))
    save_adapter(model, tmp_path, "nowhere")
    back = GPT(model.config)
    load_adapter(back, tmp_path)
    assert {n: p.shape for n, p in adapter_parameters(back).items() if ".q." in n} == {
        n: p.shape for n, p in adapter_parameters(model).items()
    }


# What cannot be loaded


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return saved(with_adapters("gpt2", LoRAConfig(rank=2)), tmp_path_factory.mktemp("good"))


@pytest.fixture
def spoilt(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, r'adapter_config\.json: peft_type="PREFIX_TUNING" cannot be loaded, only LORA can'),
        ({"lora_bias": True}, r"lora_bias=true is not supported"),
        ({"target_parameters": ["x"]}, r'target_parameters=\["x"\] is not supported'),
        ({"bias": "all"}, r'bias="all" is not supported, only none is'),
        ({"init_lora_weights": "pissa"}, r'init_lora_weights="pissa" changes the base\'s weights too'),
        ({"lora_alpha": None}, r"lora_alpha=null must be a number greater than 0"),
        ({"use_dora": True}, r"lacks lora_magnitude_vector; its config and its weights must be of one adapter"),
        ({"base_model_name_or_path": None}, r"names no base_model_name_or_path"),
        ({"base_model_name_or_path": "."}, r"names .* as its base, which is an adapter too"),
        ({"base_model_name_or_path": "no/where/at/all"}, r"no such directory: no/where/at/all"),
    ],
)
def test_what_peft_can_do_and_we_cannot_is_refused_by_name(changes, message, spoilt):
    edit_config(spoilt, **changes)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(spoilt)


def _without_b(tensors):
    del tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]


def _elsewhere(tensors):
    tensors["base_model.model.transformer.wte.lora_embedding_A"] = torch.ones(2, 2)


def _narrow(tensors):
    key = "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"
    tensors[key] = tensors[key][:, :5].contiguous()


def _torn(tensors):
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"
    tensors[key] = tensors[key][:-1].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_b, r"transformer\.h\.0\.attn\.c_attn lacks lora_B"),
        (_elsewhere, r"wte\.lora_embedding_A changes no matrix inside a block of a gpt2 model"),
        (_narrow, r"blocks\.0\.feedforward\.up\.lora_a has shape \(2, 5\) where the model's is \(2, 32\)"),
        (_torn, r"c_attn\.weight has a B of shape \(95, 6\), which does not divide into q, k and v"),
        (dict.clear, r"holds no adapter"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, spoilt):
    tensors = load_file(spoilt / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, spoilt / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(spoilt)


def test_a_broken_or_missing_file_is_told(spoilt):
    (spoilt / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        GPT.from_pretrained(spoilt)
    (spoilt / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has adapter_config\.json but no adapter_model\.safetensors"):
        GPT.from_pretrained(spoilt)


def test_pickled_weights_are_read_only_if_allowed(good, spoilt):
    torch.save(load_file(spoilt / "adapter_model.safetensors"), spoilt / "adapter_model.bin")
    (spoilt / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"only as adapter_model\.bin, and pickled files can hold code; allow_pickle=true"):
        GPT.from_pretrained(spoilt)
    expected = logits(GPT.from_pretrained(good), TOKENS)
    assert torch.equal(logits(GPT.from_pretrained(spoilt, allow_pickle=True), TOKENS), expected)


def test_a_base_beside_its_adapter_moves_with_it(good, tmp_path):
    shutil.copytree(good, tmp_path / "adapter")
    shutil.copytree(good.parent / "base", tmp_path / "adapter" / "base")
    edit_config(tmp_path / "adapter", base_model_name_or_path="base")
    expected = logits(GPT.from_pretrained(good), TOKENS)
    assert torch.equal(logits(GPT.from_pretrained(tmp_path / "adapter"), TOKENS), expected)
    assert read_config(tmp_path / "adapter") == read_config(good.parent / "base")


def test_every_family_is_tried():
    assert {GPTConfig(**{"vocab_size": 61, "n_head": 4, "d_model": 32, **OURS[name]}).stock_architecture() for name in FAMILIES} == {
        family for family, _ in STOCK.values()
    }


def classifier_with_adapters(name: str, head: Any, folder: Path) -> GPT:
    """A model with a new head and adapters that change something, saved with its base, a language model, as people start from."""
    made = base(with_adapters(name, LoRAConfig(rank=2)))
    made.save_pretrained(folder / "base")
    config = replace(made.config, head=head, classes=["no", "maybe", "yes"], tie_embeddings=False)
    model = GPT(config, LoRAConfig(rank=2))
    weights = {n: p for n, p in made.state_dict().items() if not n.startswith("head.")}
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.normal_(std=0.2)
    save_adapter(model, folder / "adapter", str(folder / "base"))
    return model.eval()


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "neox-partial"])
@pytest.mark.parametrize("head", ["sequence", "tokens"])
def test_a_head_of_classes_goes_with_the_adapters(name, head, tmp_path):
    model = classifier_with_adapters(name, head, tmp_path)
    kind = {"sequence": "SequenceClassification", "tokens": "TokenClassification"}[head]
    stock: Any = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    expected = logits(model, TOKENS)
    found = logits(theirs, TOKENS)
    torch.testing.assert_close(found, expected[:, -1] if head == "sequence" else expected, **CLOSE)
    back = GPT.from_pretrained(tmp_path / "adapter")
    assert back.config == read_config(tmp_path / "adapter") == model.config
    assert all(p.requires_grad for p in back.parameters())
    torch.testing.assert_close(logits(back, TOKENS), expected, **CLOSE)


def test_an_adapter_says_its_classes_or_its_base_does(tmp_path):
    model = classifier_with_adapters("gpt2", "sequence", tmp_path)
    names = tmp_path / "adapter" / "id2label.json"
    assert json.loads(names.read_text()) == {"0": "no", "1": "maybe", "2": "yes"}
    for written, message in (
        ({"1": "a", "2": "b"}, r"id2label\.json: id2label=.* must name the classes 0, 1 and so on"),
        ({"0": "a", "1": "a"}, r"id2label\.json: classes: a is there twice"),
        ({"0": "a", "1": "b"}, r"head\.weight has shape \(3, 32\) where the model's is \(2, 32\)"),
    ):
        names.write_text(json.dumps(written))
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path / "adapter")
    names.unlink()
    with pytest.raises(ValueError, match=r"task_type=SEQ_CLS is of a head for classes, .*; write them into id2label\.json beside it"):
        GPT.from_pretrained(tmp_path / "adapter")
    base(model).save_pretrained(tmp_path / "base")
    assert GPT.from_pretrained(tmp_path / "adapter").config == model.config
    names.write_text('{"0": "of what was here before"}')
    save_adapter(with_adapters("gpt2", LoRAConfig(rank=2)), tmp_path / "adapter", str(tmp_path / "base"))
    assert not names.exists()
