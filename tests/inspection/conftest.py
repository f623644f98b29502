"""Small data and a small model with learned positions, for all tests of looking at data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.data.tokenizer_training import byte_tokenizer
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT

EVIL = "</pre><script>alert('x')</script>&amp;<b>{{ 7 * 7 }}"


@pytest.fixture(scope="session")
def examples_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions, one of which would like to run."""
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f" It is {2 * i}.{' Indeed.' * (i % 7)}"} for i in range(120)]
    rows += [{"prompt": f"Mail to bob{i}@example.com: {EVIL}", "completion": f" {EVIL} 中文"} for i in range(20)]
    rows += [{"prompt": "nothing to learn", "completion": ""}]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def labels_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of three classes, one of which would like to run."""
    labels = ("noun", "verb", "<script>x</script>")
    rows = [{"text": f"word number {i}", "label": labels[i % 4 % 3]} for i in range(100)]
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_model(folder: Path, **changes: Any) -> Path:
    """A tiny model with an id a byte."""
    torch.manual_seed(0)
    values: dict = {"vocab_size": 257, "context_length": 20, "n_layer": 1, "n_head": 2, "d_model": 16}
    GPT(GPTConfig(**values | changes)).save_pretrained(folder, byte_tokenizer())
    return folder


@pytest.fixture(scope="session")
def learned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 20 learned positions."""
    return save_model(tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="session")
def rotary_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With rotary positions stretched by Llama 3.1's rule."""
    return save_model(
        tmp_path_factory.mktemp("rotary"), positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, context_length=100,
        rope_theta=500000.0, rope_scaling="llama3", rope_original_context=64, head_dim=32,
    )  # fmt: skip
