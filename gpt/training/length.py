"""How long a run is: in steps, in seconds, and, as far as the config alone tells, in floating-point operations."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from gpt.config import RunConfig, parse_span
from gpt.data.batches import Batches
from gpt.errors import UserError
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT


def run_length(config: RunConfig, batches: Batches, sequences: int) -> tuple[int | None, float | None]:
    """The run's length in steps, or in seconds.

    Args:
        config: the run.
        batches: what it draws from.
        sequences: of a batch.

    Raises:
        UserError: epochs of a stream, or a warm-up longer than the run.
    """
    budget = parse_span("train.budget", config.train.budget)
    if budget.unit == "seconds":
        return None, budget.amount
    if budget.unit == "epochs" and not batches.windows:
        raise UserError(f"train.budget={config.train.budget}: how long a stream is is not known; give steps, tokens or a time")
    steps = {
        "steps": budget.amount,
        "tokens": budget.amount / config.train.batch_tokens,
        "epochs": budget.amount * batches.windows / sequences,
    }[budget.unit]
    total = max(1, math.ceil(steps))
    if config.schedule.warmup >= 1 and config.schedule.warmup > total:
        raise UserError(f"schedule.warmup={config.schedule.warmup:g} steps is longer than the run of {total} steps")
    return total, None


def expected_length(config: RunConfig) -> tuple[float | None, float | None]:
    """The run's length in floating-point operations and in seconds, as far as the config alone tells."""
    budget = parse_span("train.budget", config.train.budget)
    tokens = {"steps": budget.amount * config.train.batch_tokens, "tokens": budget.amount}.get(budget.unit)
    if tokens is None:
        return None, budget.amount if budget.unit == "seconds" else None
    with torch.device("meta"):
        model = GPT(expected_model(config), config.lora)
    return model.flops_per_token() * tokens, None


def expected_model(config: RunConfig) -> GPTConfig:
    """The model's config before there is a tokenizer to tell the size of its vocabulary."""
    return replace(config.model, vocab_size=config.model.vocab_size or config.tokenizer.vocab_size)
