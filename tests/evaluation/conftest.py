"""Small models with weights large enough that they say something."""

from pathlib import Path

import pytest
import torch

from gpt.data.tokenizer_training import byte_tokenizer
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT

CONTEXT = 24
SHAPES = {
    "gpt2": {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True, "dropout": 0.1},
    "qwen3": {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 1, "qk_norm": True},
}


def make_model(shape: str, vocab_size: int = 257, context_length: int = CONTEXT) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, context_length=context_length, n_layer=2, n_head=2, d_model=32, **SHAPES[shape]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model.eval()


@pytest.fixture(scope="session", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def folder(shape: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a byte tokenizer."""
    directory = tmp_path_factory.mktemp("model") / shape
    make_model(shape).save_pretrained(directory, tokenizer=byte_tokenizer())
    return directory
