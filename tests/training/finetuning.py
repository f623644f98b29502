"""A small model to fine-tune, rows to fine-tune it on, and what they cost when they are scored one by one."""

import json
import os
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gpt.compose import compose_run
from gpt.config import RunConfig
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT
from gpt.training.trainer import Result, Trainer

CONTEXT = 64
SUMS = [{"prompt": f"{a} plus {b} is ", "completion": f"{a + b:02d}."} for a in range(10) for b in range(12)]
"""Every completion has three bytes: with the end of the text four tokens are learned of each row."""
CHATS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word.upper()}]}
    for word in (f"{first}{last}" for first in "abcdefgh" for last in "klmnop")
]
SMALL = ["debug=golden", "train.sample_tokens=4", "train.eval_every=0", "train.batch_tokens=256", "train.budget=3steps"]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_small_model(folder: Path) -> Path:
    """A Hugging Face directory with a byte tokenizer and weights large enough to say something."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, context_length=CONTEXT, n_layer=2, n_head=2, d_model=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    model.save_pretrained(folder, tokenizer=byte_tokenizer())
    return folder


def finetune_config(folder: Path, init: Path, rows: Path | str, *overrides: str) -> RunConfig:
    """A small fine-tuning run in `folder` on a JSONL file, or on the option `rows` of the group data."""
    source = [f"data={rows}"] if isinstance(rows, str) else ["data=jsonl", f"data.paths=[{rows}]"]
    places = [f"data.cache_dir={folder / 'cache'}", f"run.dir={folder / 'runs'}"]
    return compose_run("finetune", [*SMALL, f"init={init}", *source, *places, *overrides])


def nats(model: GPT, rows: Sequence[dict[str, str]]) -> tuple[float, int]:
    """What the completions of rows cost, each row by itself, and how many tokens they are."""
    tokenizer, total, count = byte_tokenizer(), 0.0, 0
    for row in rows:
        prompt, completion = tokenizer.encode(row["prompt"]), tokenizer.encode(row["completion"])
        ids = torch.tensor([[*prompt, *completion, tokenizer.end_of_text]])
        with torch.no_grad():
            logits = model(ids[:, :-1])[0, len(prompt) - 1 :].double()
        total += F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += len(completion) + 1
    return total, count


def stop_in_the_middle(trainer: Trainer, step: int) -> Result:
    """Run until a signal comes between two micro-batches of a step."""
    set_up = trainer._set_up

    def set_up_and_wait() -> None:
        set_up()
        part = trainer.step._part

        def interrupt(batch, first):
            if trainer.state.step == step and first > 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return part(batch, first)

        trainer.step._part = interrupt

    trainer._set_up = set_up_and_wait
    return trainer.fit()
