"""Small checkpoints of every stock family."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from stock_models import OURS, make_ours

from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_training import train_bpe
from gpt.model import huggingface


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """One small directory of each family, to copy and spoil."""
    directories = {}
    for name in ("gpt2", "llama", "qwen2", "qwen3", "neox-partial"):
        directories[name] = tmp_path_factory.mktemp(name)
        make_ours(OURS[name]).save_pretrained(directories[name])
    return directories


@pytest.fixture
def spoiled(saved, tmp_path):
    """A private copy of one of them."""
    return lambda name: Path(shutil.copytree(saved[name], tmp_path / name))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([file.read_text() for file in sorted(Path(huggingface.__file__).parent.glob("*.py"))], vocab_size=400)
