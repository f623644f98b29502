"""What a run minimises, and what it is given for it: the objective and its givers, as the config says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt.config import RunConfig
from gpt.data.batches import Batch
from gpt.finetuning.prefix_cache import PrefixCache, PrefixData, open_prefix_cache
from gpt.model.loss import LinearCrossEntropy
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT
from gpt.runtime.device import Device
from gpt.runtime.distributed import World
from gpt.runtime.parallel import unwrapped
from gpt.training.checkpoint import TrainingState
from gpt.training.data import TrainingData

Giver = Callable[[Batch], dict[str, Any]]
"""A part of a batch on the device, its `numbers` on the host -> arguments for the objective."""


@dataclass
class Givers:
    """What is asked before every pass for more that the objective takes, as arguments by name; without gradients."""

    train: list[Giver] = field(default_factory=list)
    held_out: list[Giver] = field(default_factory=list)
    prefix: PrefixCache | None = None

    def close(self) -> None:
        """Let go of files, before others take their place."""
        if self.prefix is not None:
            self.prefix.close()


@torch.no_grad()
def given(givers: list[Giver], part: Batch) -> dict[str, Any]:
    """What the givers add to a pass."""
    return {name: value for giver in givers for name, value in giver(part).items()}


def objective_for(config: RunConfig, model: GPT, loss: LinearCrossEntropy) -> NextTokenLoss:
    """The objective of a run."""
    return NextTokenLoss(model, loss)


def givers_for(
    config: RunConfig,
    objective: nn.Module,
    data: TrainingData,
    state: TrainingState,
    epochs: float | None,
    device: Device,
    world: World,
    say: Callable[[str], None],
) -> Givers:
    """The givers of a run, with what trains now.

    Args:
        config, data, state: of the run.
        objective: as it is called.
        epochs: how often the run sees each row; None: not known.
        device, world: where.
        say: takes lines for people.

    Raises:
        UserError: what one needs is not to be had.
    """
    givers, inner = Givers(), unwrapped(objective)
    assert isinstance(inner, NextTokenLoss)
    if not config.freeze.is_empty or config.lora.rank:
        rows = PrefixData(data.rows, config.sequence_length, [data.fingerprint, config.data.packing], epochs)
        folder = Path(config.freeze.cache_dir or Path(config.data.cache_dir, "frozen")).expanduser()
        givers.prefix = open_prefix_cache(
            config.freeze.cache, config.freeze.cache_gb, folder, inner, rows, state.frozen, device, world, say
        )
    if givers.prefix is not None:
        givers.train.append(givers.prefix.train)
        givers.held_out.append(givers.prefix.held_out)
    return givers
