"""Small random models of every family, whose next token depends on all that they have read, and a model that writes what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from gpt.compose import compose_run
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.inference.decode import generate_tokens
from gpt.inference.sampling import Sampling
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT
from gpt.training.checkpoint import TrainingState
from gpt.training.checkpoint_retention import Retention
from gpt.training.checkpoint_writer import CheckpointWriter

VOCAB = 61
GREEDY = Sampling(temperature=0)
RMS = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 2}
FAMILIES = {
    "gpt2": {},
    "llama": RMS,
    "qwen2": {**RMS, "qkv_bias": True},
    "qwen3": {**RMS, "qk_norm": True, "n_kv_head": 1, "head_dim": 24},
    "neox": {"positions": "rotary", "norm": "layernorm", "rope_fraction": 0.25, "parallel_residual": True},
}
SHAPES = {
    **FAMILIES,
    "sinusoidal": {"positions": "sinusoidal", "activation": "gelu", "embedding_scale": 2.0},
    "no positions": {"positions": "none"},
}

CHATML = (
    "{% for message in messages %}{% if message['role'] == 'user' and 'REFUSED' in message['content'] %}{{ raise_exception('No.') }}"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@torch.no_grad()
def random_model(shape: str, *, scale: float = 0.25, seed: int = 0, **changes) -> GPT:
    """At the initial scale every continuation would look alike."""
    torch.manual_seed(seed)
    values = {"vocab_size": VOCAB, "context_length": 24, "n_layer": 2, "n_head": 4, "d_model": 32, "tie_embeddings": False, "dropout": 0.1}
    model = GPT(GPTConfig(**values | SHAPES[shape] | changes))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def alone(model: GPT, prompt: Sequence[int], max_tokens: int, sampling: Sampling = GREEDY, **options) -> list[int]:
    """What one sample of one prompt becomes."""
    return [row[0] for row in generate_tokens(model, [prompt], max_tokens, sampling, **options) if row[0] is not None]


def rows_of(steps: Sequence[Sequence[int | None]]) -> list[list[int | None]]:
    """From one list per step to one per row."""
    return [list(row) for row in zip(*steps, strict=True)]


def prompt_of(length: int, start: int = 3) -> list[int]:
    return [(7 * i + start) % VOCAB for i in range(length)]


def scripted(ids: Sequence[int], vocab_size: int, prompt_length: int = 1) -> GPT:
    """A model that writes `ids` after any prompt of that length: its blocks add nothing, its positions are all different and
    its head knows what comes after each."""
    places = max(1, prompt_length + len(ids))
    model = GPT(GPTConfig(vocab_size, places, n_layer=1, n_head=1, d_model=places + 1, d_ff=1, tie_embeddings=False))
    with torch.no_grad():
        for parameter in [*model.blocks.parameters(), model.embeddings.tokens.weight, model.head.weight]:
            parameter.zero_()
        assert model.embeddings.positions is not None
        model.embeddings.positions.weight.copy_(torch.eye(places, places + 1))
        for place, token in enumerate(ids, start=prompt_length - 1):
            model.head.weight[token, place] = 1
    return model.eval()


def chat_tokenizer() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = Tokenizer(tokenizer.backend)
    tokenizer.chat_template, tokenizer.special_tokens = CHATML, {"eos_token": "<|im_end|>"}
    return tokenizer


def make_run(run: Path, steps: tuple[int, ...] = (3, 7)) -> dict[int, GPT]:
    """A run that has not finished: its checkpoints' models by step."""
    shape = ["model.n_layer=1", "model.n_head=2", "model.d_model=16", "model.context_length=32", "train.batch_tokens=64"]
    config = compose_run("pretrain", [*shape, "tokenizer=byte", "model.vocab_size=257"])
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    byte_tokenizer().save(run / "tokenizer.json")
    models = {}
    writer = CheckpointWriter(run / "checkpoints", Retention(keep_last=9))
    for step in steps:
        torch.manual_seed(step)
        models[step] = GPT(config.model)
        writer.save(models[step], [], TrainingState(step=step))
        writer.wait()
    return models
