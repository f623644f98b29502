"""Tokenizers and token ids that go along with a model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from stock_models import OURS, load_stock, make_ours

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
    assert (tmp_path / "chat_template.jinja").read_text() == made.chat_template
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(TEXTS[0], add_special_tokens=False) == tokenizer.encode(TEXTS[0])
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == tokenizer.end_of_text


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tokenizer, tmp_path):
    for candidate in (tokenizer, tokenizer.to_transformers(24)):
        with pytest.raises(ValueError, match="the tokenizer has 400 ids and the model vocab_size=61"):
            make_ours({}).save_pretrained(tmp_path / "model", tokenizer=candidate)
    assert not (tmp_path / "model").exists()


def test_a_tokenizer_of_ours_may_bring_a_chat_template(tokenizer, tmp_path):
    class Chatting:
        vocab_size, end_of_text = tokenizer.vocab_size, tokenizer.end_of_text

        def to_transformers(self, context_length):
            made = tokenizer.to_transformers(context_length)
            made.chat_template = "{{ messages[0]['content'] }}!"
            return made

    model = make_ours({"vocab_size": 400})
    model.save_pretrained(tmp_path, tokenizer=Chatting())
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert loaded.model_max_length == 24

    model.save_pretrained(tmp_path)  # without a tokenizer: the one there stays
    assert (tmp_path / "chat_template.jinja").exists()
    model.save_pretrained(tmp_path, tokenizer=tokenizer)  # one without a template: no other's is left beside it
    assert not (tmp_path / "chat_template.jinja").exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template is None
