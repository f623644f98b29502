"""Heads of classes: `transformers`' classifiers compute what ours do, in both directions and on padded batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from stock_models import OURS, STOCK, TOLERANCE, edit, edit_tensors, logits, make_ours, randomise

from gpt import GPT, GPTConfig
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.model.heads import adopt, pooled
from gpt.model.loss import LinearCrossEntropy

CLASSES = ["ham", "spam", "neither"]
FAMILIES = ["gpt2", "gpt2-untied-erf-no-bias", "gpt2-sinusoidal-scaled", "neox-partial", "llama-grouped-tied", "qwen2", "qwen3"]
PAD = 60
AUTO = {"sequence": transformers.AutoModelForSequenceClassification, "tokens": transformers.AutoModelForTokenClassification}
SUFFIX = {"sequence": "ForSequenceClassification", "tokens": "ForTokenClassification"}


def load_classifier(directory: Path, head: str) -> Any:
    loaded: Any = AUTO[head].from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def padded_batch(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 3 lengths, padded on the right, and which of their tokens are none of it."""
    tokens = torch.randint(PAD, (3, length), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(length) < torch.tensor([[length], [length // 2], [1]])
    return tokens.where(mask, PAD), mask


def compare(model: GPT, stock: Any, head: str) -> None:
    tokens, mask = padded_batch(model.config.context_length)
    with torch.no_grad():
        theirs = stock(tokens, attention_mask=mask.long()).logits
    ours = logits(model, tokens)
    assert ours.shape == (3, model.config.context_length, len(model.config.classes))
    ours, theirs = (pooled(ours, tokens, PAD), theirs) if head == "sequence" else (ours[mask], theirs[mask])
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("head", SUFFIX)
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_what_our_classifiers_do(name, head, tmp_path):
    model = make_ours({**OURS[name], "vocab_size": 61, "head": head, "classes": CLASSES}).eval()
    model.save_pretrained(tmp_path)
    edit(tmp_path, pad_token_id=PAD)  # which a tokenizer would have told
    stock = load_classifier(tmp_path, head)
    assert type(stock).__name__ == model.config.stock_architecture() + SUFFIX[head]
    assert stock.config.id2label == dict(enumerate(CLASSES))
    assert stock.config.label2id == {name: number for number, name in enumerate(CLASSES)}
    compare(model, stock, head)
    assert not any("lm_head" in key or "embed_out" in key for key in load_file(tmp_path / "model.safetensors"))

    reloaded = GPT.from_pretrained(tmp_path)
    assert (reloaded.config.head, reloaded.config.classes) == (head, CLASSES)
    tokens, _ = padded_batch(model.config.context_length)
    assert (logits(reloaded, tokens) - logits(model, tokens)).abs().max() <= TOLERANCE
    reloaded.save_pretrained(tmp_path / "again")
    once, twice = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)


@pytest.mark.parametrize("head", SUFFIX)
@pytest.mark.parametrize("name", ["gpt2", "llama-bias-tied", "qwen2-tied", "qwen3", "neox"])
def test_we_compute_what_the_classifiers_of_transformers_do(name, head, tmp_path):
    family, overrides = STOCK[name]
    settings = {"vocab_size": 61, "pad_token_id": PAD, "num_labels": 4, "bos_token_id": None, "eos_token_id": None}
    if family != "GPT2":
        settings |= {"max_position_embeddings": 24, "hidden_size": 32, "num_hidden_layers": 2}
        settings |= {"num_attention_heads": 4, "intermediate_size": 44}
    stock: Any = randomise(AUTO[head].from_config(getattr(transformers, f"{family}Config")(**settings | overrides)))
    stock.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert model.config.classes == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]
    assert not model.config.tie_embeddings
    compare(model, stock, head)

    model.save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_two_classes_without_names_are_those_that_transformers_means(tmp_path):
    stock = AUTO["sequence"].from_config(transformers.GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=1, n_head=4))
    stock.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in ("id2label", "label2id")}))
    assert GPT.from_pretrained(tmp_path).config.classes == ["LABEL_0", "LABEL_1"]


def test_a_tokens_head_without_a_bias_gets_zeros(tmp_path):
    make_ours({**OURS["llama"], "head": "tokens", "classes": CLASSES}).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("score.bias"))
    edit(tmp_path, token_classification_bias=False, pad_token_id=PAD)
    model = GPT.from_pretrained(tmp_path)
    assert not model.head.bias.any()
    compare(model, load_classifier(tmp_path, "tokens"), "tokens")


def test_a_text_is_read_at_its_last_token_that_is_no_padding():
    tokens = torch.tensor([[7, 8, 9], [7, PAD, PAD], [PAD, 7, 8], [7, PAD, 9], [PAD, PAD, PAD]])
    places = torch.arange(3.0)[None, :, None].expand(5, 3, 2)
    assert pooled(places, tokens, PAD)[:, 0].tolist() == [2, 0, 2, 2, 0]
    assert pooled(places, tokens, None)[:, 0].tolist() == [2, 2, 2, 2, 2]


@pytest.mark.parametrize("head", SUFFIX)
def test_the_tokenizer_brings_the_padding_of_batches(head, tmp_path):
    tokenizer = byte_tokenizer()
    model = make_ours({"vocab_size": 257, "head": head, "classes": CLASSES}).eval()
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == tokenizer.end_of_text
    assert not (tmp_path / "generation_config.json").exists()  # it generates nothing
    task = {"sequence": "text-classification", "tokens": "token-classification"}[head]
    pipeline: Any = transformers.pipeline
    found = pipeline(task, model=str(tmp_path), batch_size=2)(["a text", "another text"])
    assert len(found) == 2

    texts = ["a text", "another text"]
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs = load_classifier(tmp_path, head)(**read).logits
    for text, row in zip(texts, theirs, strict=True):
        alone = logits(model, torch.tensor([tokenizer.encode(text)]))[0]
        want = alone[-1] if head == "sequence" else alone
        assert (row[: len(want)] - want if head == "tokens" else row - want).abs().max() <= TOLERANCE


def test_a_transformers_tokenizer_without_padding_pads_with_its_end(tmp_path):
    tokenizer = byte_tokenizer().to_transformers(24)
    tokenizer.pad_token = None
    make_ours({"vocab_size": 257, "head": "sequence", "classes": CLASSES}).save_pretrained(tmp_path, tokenizer=tokenizer)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == tokenizer.eos_token_id
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).pad_token == tokenizer.eos_token
    assert tokenizer.pad_token is None


def test_a_language_model_saved_over_a_classifier_leaves_nothing_of_it(tmp_path):
    make_ours({"head": "tokens", "classes": CLASSES}).save_pretrained(tmp_path)
    make_ours({}).save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == make_ours({}).config
    assert (tmp_path / "generation_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label=.* must name the classes 0, 1 and so on"),
        ({"id2label": ["a", "b"]}, "id2label=.* must name the classes"),
        ({"id2label": {"0": "a"}}, r"classes=\[a\] is one class"),
        ({"id2label": {"0": "a", "1": "a"}}, "classes: a is there twice"),
        ({"problem_type": "multi_label_classification"}, 'problem_type="multi_label_classification" is not supported'),
        ({"id2label": {"0": "a", "1": "b"}}, r"score.weight has shape \(3, 32\) where config.json asks for \(2, 32\)"),
    ],
)
def test_classes_that_cannot_be_are_refused(changes, match, tmp_path):
    make_ours({"head": "sequence", "classes": CLASSES}).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=match):
        GPT.from_pretrained(tmp_path)


# The config


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"classes": ["a", "b"]}, r"classes=\[a, b\] with head=language_model must be \[\]"),
        ({"head": "sequence", "classes": ["a"]}, "is one class"),
        ({"head": "tokens", "classes": ["a", " "]}, "each must be a name"),
        ({"head": "tokens", "classes": ["a", "b", "a"]}, "a is there twice"),
        ({"head": "spans"}, "head=spans must be one of language_model, sequence, tokens"),
    ],
)
def test_heads_that_cannot_be_are_refused_when_the_config_is_built(values, match):
    with pytest.raises(ValueError, match=match):
        GPTConfig(**values)


def test_a_head_of_unknown_classes_waits_for_the_data_but_cannot_be_built():
    config = GPTConfig(vocab_size=61, context_length=8, n_layer=1, n_head=2, d_model=8, head="sequence")
    assert not config.tie_embeddings
    with pytest.raises(ValueError, match="head=sequence needs to know its classes"):
        GPT(config)
    assert GPT(replace(config, classes=["a", "b"])).head.weight.shape == (2, 8)


def test_flops_and_parameters_count_the_head_that_is_there():
    plain, tagger = make_ours({"tie_embeddings": False}), make_ours({"head": "tokens", "classes": CLASSES})
    assert plain.num_parameters() - tagger.num_parameters() == (61 - 3) * 32 - 3
    assert plain.flops_per_token() - tagger.flops_per_token() == 6 * (61 - 3) * 32


# Weights from another model


@pytest.mark.parametrize("head", SUFFIX)
def test_a_language_model_gives_its_body_and_a_fresh_head(head):
    source = make_ours({})
    model = GPT(replace(source.config, head=head, classes=[str(number) for number in range(60)]))
    torch.nn.init.constant_(model.head.weight, 9.0)
    assert not adopt(model, model.config, source, source.config)
    ours, theirs = model.state_dict(), source.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("head."))
    assert 0.01 < model.head.weight.std() < 0.03
    assert model.head.bias is None or not model.head.bias.any()


def test_a_classifier_gives_its_head_to_one_of_the_same_classes_alone():
    source = make_ours({"head": "tokens", "classes": CLASSES})
    model = GPT(source.config)
    assert adopt(model, model.config, source, source.config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    for classes in (CLASSES[::-1], ["x", "y"]):
        other = GPT(replace(source.config, classes=classes))
        with pytest.raises(ValueError, match=r"its head is for the class of each word \(ham, spam, neither\), and this model's is for"):
            adopt(other, other.config, source, source.config)
    with pytest.raises(ValueError, match="this model's is that of a language model"):
        adopt(make_ours({}), make_ours({}).config, source, source.config)


# The loss of a head with a bias


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("classes", [3, 64, 101])
def test_the_loss_and_its_gradients_know_the_bias(dtype, rtol, classes):
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 24).to(dtype).float().requires_grad_(), torch.randn(classes, 24).to(dtype).float().requires_grad_()
    bias = (3 * torch.randn(classes)).to(dtype).float().requires_grad_()
    targets = torch.randint(classes, (40,))
    targets[::5] = -100
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    F.cross_entropy(F.linear(*exact), targets, reduction="sum").backward()
    loss = LinearCrossEntropy(dtype, chunk=7)(hidden, weight, targets, bias=bias)
    loss.backward()
    assert loss.item() == pytest.approx(F.cross_entropy(F.linear(*exact), targets, reduction="sum").item(), rel=rtol)
    for ours, theirs in zip((hidden, weight, bias), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ((ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()).item() < rtol
    with torch.no_grad():
        assert LinearCrossEntropy(dtype, chunk=7)(hidden, weight, targets, bias=bias).item() == pytest.approx(loss.item(), rel=rtol)


def test_a_bias_alone_can_be_learned():
    hidden, weight, bias = torch.randn(9, 4), torch.randn(3, 4), torch.zeros(3, requires_grad=True)
    LinearCrossEntropy()(hidden, weight, torch.randint(3, (9,)), bias=bias).backward()
    assert bias.grad is not None
    assert bias.grad.abs().sum() > 0


def test_a_tokenizer_that_cannot_pad_is_said(tmp_path):
    tokenizer = byte_tokenizer().to_transformers(24)
    tokenizer.pad_token = tokenizer.eos_token = None
    model = make_ours({"vocab_size": 257, "head": "sequence", "classes": CLASSES})
    with pytest.warns(UserWarning, match="no pad_token_id, and GPT2ForSequenceClassification then takes one text at a time"):
        model.save_pretrained(tmp_path, tokenizer=tokenizer)
    assert load_classifier(tmp_path, "sequence")(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3)
