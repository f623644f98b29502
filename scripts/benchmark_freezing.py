"""Fine-tuning with frozen layers, and with adapters, against transformers.Trainer and peft: `make bench ARGS=freezing`.

GPT-2's shape, 12 layers, the embeddings (and with them the tied head) and the first 10 blocks frozen. As in `benchmark_training`, every
candidate runs in a process of its own and they take turns.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_training import BATCH, LENGTH, TOKENS, VOCAB, WIDTH, NoMoreSteps, Pace, end, stock_gpt2, take_turns, trainer

LAYERS, FROZEN = 12, 10
RANK = 8
ROWS = 1 << 15  # that there may be; the file is as large as what has been written of it
ROUNDS = 9
MODEL = [
    "model=gpt2-mini", f"model.n_layer={LAYERS}", f"model.context_length={LENGTH}", f"model.vocab_size={VOCAB}", "optimizer=finetune",
    f"train.batch_tokens={TOKENS}",
]  # fmt: skip
FREEZE = ["freeze=first_n", f"freeze.first_n_blocks={FROZEN}"]
LORA = ["lora.targets=[attention.q,attention.k,attention.v]"]


def ours(pace: Pace, settings: list[str], epochs: str = "", rank: int = 0) -> None:
    """This project's step, as its trainer does it.

    Args:
        pace: of the benchmark.
        settings: of the config, besides the model.
        epochs: `first`: what frozen blocks make is kept on disk; `later`: it is there already; empty: there is nothing to keep.
        rank: of adapters.
    """
    from gpt.compose import compose_run
    from gpt.data.batches import Batch
    from gpt.finetuning.freezing import plan_freezing
    from gpt.finetuning.prefix_cache import PrefixCache
    from gpt.finetuning.row_store import RowStore
    from gpt.model.objective import NextTokenLoss
    from gpt.model.transformer import GPT
    from gpt.runtime.allocator import keep_freed_memory
    from gpt.runtime.compiling import native_throughout, should_compile
    from gpt.runtime.cpu import Cpu
    from gpt.runtime.distributed import World
    from gpt.training.checkpoint import TrainingState
    from gpt.training.clock import StepClock
    from gpt.training.layout import lay_out
    from gpt.training.optimizer import set_learning_rate
    from gpt.training.step import Counts, Step
    from gpt.training.unfreezing import Unfreezing

    keep_freed_memory()
    config, device, world = compose_run("pretrain", [*MODEL, *settings]), Cpu("CPU", torch.bfloat16), World()
    config.lora.rank = rank  # here, for a run's config may have adapters only of weights that have been trained
    plan = plan_freezing(config.freeze, config.unfreeze, GPT(config.model, lora=config.lora))
    compiled, _ = should_compile("auto", device, native=not rank and native_throughout(device, config.model))
    layout = lay_out(config, lambda: GPT(config.model, lora=config.lora), compiled, world, device, plan.stages[0].names)
    assert isinstance(layout.objective, NextTokenLoss)
    trains = Unfreezing(config, plan, layout.model, layout.objective, world, device)
    set_learning_rate(trains.optimizers, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        givers = []
        if epochs:
            store = RowStore(Path(folder) / "rows", {}, ROWS, (LENGTH, WIDTH), device.dtype)
            givers = [PrefixCache(layout.objective, {"train": store}, device, world, print).train]
        counts, clock = Counts(TrainingState(), device), StepClock(device)
        step = Step(layout.objective, layout.model, trains.optimizers, None, counts, world, device, BATCH, 1.0, False, clock, givers)
        layout.objective.train()
        made: list[Batch] = []
        first = 0
        while True:
            if epochs != "later" or len(made) < 3:
                tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1))
                numbers = torch.arange(first, first + BATCH)
                batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, numbers)
                if epochs == "later":
                    made.append(batch)
                first += BATCH
            else:
                batch = made[int(counts.values["losses"]) % 3]
            pace.step()
            step(batch)


def peer(pace: Pace, frozen: bool = False, rank: int = 0, **settings: Any) -> None:
    """transformers.Trainer, with the same layers frozen, or with peft's adapters."""
    model = stock_gpt2(LAYERS)
    if frozen:
        for part in (model.transformer.wte, model.transformer.wpe, *model.transformer.h[:FROZEN]):
            part.requires_grad_(False)
    if rank:
        import peft

        adapters = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapters)
    trainer(pace, model, bf16=True, **settings)


CANDIDATES: dict[str, Callable[[Pace], None]] = {
    "ours, nothing frozen": partial(ours, settings=[]),
    "ours, frozen, first epoch": partial(ours, settings=FREEZE, epochs="first"),
    "ours, frozen, from the second epoch on": partial(ours, settings=FREEZE, epochs="later"),
    "Trainer, nothing frozen": peer,
    "Trainer, frozen": partial(peer, frozen=True),
    "Trainer, frozen, torch_compile": partial(peer, frozen=True, torch_compile=True),
    f"ours, LoRA of rank {RANK} on q, k, v": partial(ours, settings=LORA, rank=RANK),
    f"peft + Trainer, LoRA of rank {RANK} on c_attn": partial(peer, rank=RANK),
    f"peft + Trainer, LoRA of rank {RANK} on c_attn, torch_compile": partial(peer, rank=RANK, torch_compile=True),
}


def freezing() -> None:
    """A step of fine-tuning, ours and others', in turn: speed and memory."""
    print(f"\n### A step of fine-tuning, bf16, {LAYERS} layers, {WIDTH} wide, vocabulary {VOCAB:,}, B {BATCH} x T {LENGTH}")
    print(f"Frozen: the embeddings, the head that shares their weights, and the first {FROZEN} blocks.\n")
    seconds, memory = take_turns(list(CANDIDATES), __file__, ROUNDS)
    print("| | tokens/s | of its peer's | of that with torch_compile | peak memory, MB |\n| --- | ---: | ---: | ---: | ---: |")
    for name, s in seconds.items():
        peer_name = next((n for n in seconds if n.startswith("peft" if "LoRA" in name else "Trainer, frozen")), "")
        ratios = [seconds[n] / s if n in seconds and "nothing" not in name else None for n in (peer_name, f"{peer_name}, torch_compile")]
        cells = " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {TOKENS / s:,.0f} | {cells} | {memory[name] or 0:,.0f} |")


if __name__ == "__main__":
    try:
        CANDIDATES[sys.argv[1]](Pace())
    except NoMoreSteps:
        end()
