"""Trains several configs, one after another, in the processes that torchrun has started: `process_runs.py <folder of config files>`.

A config file's name may ask for more: `frozen` in it freezes the embeddings and the first block; `nan` makes gradients of the last
process not a number at step 4.
"""

import math
import os
import sys
from pathlib import Path

import torch

from gpt.compose import load_config
from gpt.model.transformer import GPT
from gpt.training.step import Step
from gpt.training.trainer import Trainer

torch.set_num_threads(1)
build, step = GPT.__init__, Step.__call__


def build_frozen(model: GPT, config) -> None:
    build(model, config)
    for part in (model.embeddings, model.blocks[0]):
        part.requires_grad_(False)


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


def main() -> None:
    for file in sorted(Path(sys.argv[1]).glob("*.yaml")):
        GPT.__init__ = build_frozen if "frozen" in file.name else build
        Step.__call__ = step_with_nan if "nan" in file.name else step
        torch._dynamo.reset()  # else a run finds the graphs of the one before, and at last too many of them
        Trainer(load_config(file)).fit()


if __name__ == "__main__":
    main()
