"""Checkpoints of the default model while it trains: how long a step waits for one, and how much slower the next step is.

python -m scripts.benchmark_checkpoint
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from gpt.compose import compose_run
from gpt.config import DeviceConfig
from gpt.model.loss import LinearCrossEntropy
from gpt.model.transformer import GPT
from gpt.runtime.compiling import compile_model
from gpt.runtime.device import find_device
from gpt.training.checkpoint import TrainingState
from gpt.training.checkpoint_retention import Retention
from gpt.training.checkpoint_writer import CheckpointWriter
from gpt.training.optimizer import build_optimizers

_WARM_UP, _ROUNDS = 3, 20


def checkpoints() -> dict[str, float]:
    """Train the default model, with a checkpoint at every second step, and print a Markdown table of what it took.

    Returns:
        milliseconds by the table's rows.
    """
    device = find_device(DeviceConfig())
    config = compose_run("pretrain", ["model.vocab_size=2048"])
    B, T = config.train.batch_tokens // config.model.context_length, config.model.context_length
    tokens = torch.randint(2048, (B, T + 1)).to(device.type)
    model, loss = GPT(config.model).to(device.type), LinearCrossEntropy(device.dtype)
    model.tie()
    optimizers = build_optimizers(config.optimizer, model, device.dtype)
    compile_model(model, loss, device)

    def step() -> float:
        started = time.perf_counter()
        with device.autocast():
            hidden = model.hidden_states(tokens[:, :-1])
        (loss(hidden, model.head.weight, tokens[:, 1:]) / config.train.batch_tokens).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        device.synchronize()
        return time.perf_counter() - started

    alone, beside, stalls, writes = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(_WARM_UP):
            step()
        writer = CheckpointWriter(Path(folder), Retention())
        for number in range(_ROUNDS + 1):
            alone.append(step())
            writer.save(model, optimizers, TrainingState(step=number))
            stalls.append(writer.stall_seconds)
            beside.append(step())
            writer.wait()
            writes.append(writer.write_seconds)
    size = sum(p.nbytes for p in model.parameters()) + sum(t.nbytes for o in optimizers for s in o.state.values() for t in s.values())
    milliseconds = {
        "a step": statistics.median(alone) * 1e3,
        "first `save`, which allocates": stalls[0] * 1e3,
        "`save`, after that": statistics.median(stalls[1:]) * 1e3,
        "`save`, the slowest": max(stalls[1:]) * 1e3,
        "a step while the checkpoint is written": statistics.median(beside) * 1e3,
        "from `save` to the disk": statistics.median(writes) * 1e3,
    }
    print(f"\n### a checkpoint of {size / 1e6:.1f} MB, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")
    print("\n| | ms | share of a step |\n| --- | ---: | ---: |")
    for name, value in milliseconds.items():
        print(f"| {name} | {value:,.1f} | {value / milliseconds['a step']:.1%} |")
    return milliseconds


if __name__ == "__main__":
    checkpoints()
