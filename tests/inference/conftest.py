"""Tiny model directories of the kinds that can be pointed at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from inference_models import chat_tokenizer, random_model

from gpt.data.tokenizer_training import byte_tokenizer


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory whose tokenizer has an id a byte, and no chat template."""
    folder = tmp_path_factory.mktemp("plain")
    random_model("llama", vocab_size=257, context_length=96).save_pretrained(folder, byte_tokenizer())
    return folder


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a chat template and two ids that end an answer."""
    folder = tmp_path_factory.mktemp("chat")
    random_model("qwen3", vocab_size=259, context_length=200).save_pretrained(folder, chat_tokenizer())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 77]}))
    return folder
