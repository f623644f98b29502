"""Trains several configs, one after another, as one of several processes (tests/processes.py), without their reports.

`nan` in a config file's name makes gradients of the last process not a number at step 4.
"""

import math
import os
from pathlib import Path

import torch

from gpt.compose import load_config
from gpt.training import results
from gpt.training.step import Step
from gpt.training.trainer import Trainer

step = Step.__call__


def spoil(module, inputs, output: torch.Tensor) -> None:
    output.register_hook(lambda gradient: gradient * math.nan)


def step_with_nan(self: Step, *arguments, **options) -> bool:
    number = int(self.counts.values["losses"].item() + self.counts.values["skipped_steps"].item())
    is_last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    if number == 3 and is_last:
        block = self.model.blocks[1]
        handle = block.register_forward_hook(spoil)
        try:
            return step(self, *arguments, **options)
        finally:
            handle.remove()
    return step(self, *arguments, **options)


def train_all(folder: Path) -> None:
    """Train the configs of a folder."""
    results.write_report = lambda directory, *_: directory / "report.html"
    for file in sorted(folder.glob("*.yaml")):
        Step.__call__ = step_with_nan if "nan" in file.name else step
        torch._dynamo.reset()  # else a run finds the graphs of the one before, and at last too many of them
        Trainer(load_config(file)).fit()
