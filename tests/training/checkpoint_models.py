"""A tiny GPT with optimizers that have something to remember, for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt.config import OptimizerConfig
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT
from gpt.training.checkpoint import TrainingState
from gpt.training.checkpoint_retention import Retention
from gpt.training.checkpoint_writer import CheckpointWriter
from gpt.training.optimizer import build_optimizers

EVERYTHING = Retention(keep_last=10**6)
VOCAB = 61  # does not divide by 2


def tiny_model(seed: int, tied: bool = True, frozen: bool = False) -> GPT:
    torch.manual_seed(seed)
    config = GPTConfig(VOCAB, 8, n_layer=2, n_head=2, d_model=12, d_ff=20, tie_embeddings=tied)
    model = GPT(config)
    model.blocks[0].requires_grad_(not frozen)
    return model


def optimizers_of(model: nn.Module, name: str = "muon") -> list[torch.optim.Optimizer]:
    return build_optimizers(OptimizerConfig(name=name), model, torch.float32)  # type: ignore[arg-type]


def learn(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], seed: int = 0) -> None:
    """A step on made-up gradients, for which no forward pass is needed."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator)
        if p.requires_grad:
            p.grad = gradient
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def save(
    directory: Path,
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    state: TrainingState | None = None,
    ema: dict[str, Tensor] | None = None,
) -> Path:
    writer = CheckpointWriter(directory, EVERYTHING)
    writer.save(model, optimizers, state or TrainingState(step=1), {"kind": "text"}, ema)
    writer.wait()
    assert writer.saved is not None
    return writer.saved
