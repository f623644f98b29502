"""A run's adapters as a folder in PEFT's format, with the name of the model that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt.config import RunConfig
from gpt.inference.loading import stock_place
from gpt.model.lora import base
from gpt.model.peft_files import save_adapter
from gpt.model.transformer import GPT


def write_adapter(config: RunConfig, folder: Path, model: GPT, tokenizer: Any, card: str | None) -> None:
    """Write the adapters of a run's model.

    The files name `init` as their base where `transformers` can load that. Where it cannot, because `init` is an adapter or the checkpoint
    of a run that has not finished, or where the run has another tokenizer than it, the base is written beside them.

    Args:
        config: the run.
        folder: made if it is not there.
        model: with adapters, whole.
        tokenizer: of the run.
        card: text of README.md.

    Raises:
        ValueError: PEFT's format cannot hold what has been trained.
    """
    place = stock_place(config.init) if config.init and config.adapt_tokenizer is None else None
    save_adapter(model, folder, place or str((folder / "base").absolute()), tokenizer, card)
    if place is None:
        base(model).save_pretrained(folder / "base", tokenizer=tokenizer)
