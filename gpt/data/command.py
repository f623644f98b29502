"""`gpt prepare`: tokenizer and token shards ahead of time; or a look into a folder of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from gpt.data.config import holds_examples, validate_examples, validate_text
from gpt.data.prepare import prepare_corpus
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.commands import PrepareConfig


def prepare(config: PrepareConfig) -> int:
    """Run `gpt prepare` and return the exit code.

    Raises:
        UserError: data that cannot be prepared; a folder that holds no shards, or damaged ones.
    """
    if config.inspect is not None:
        from gpt.data.inspect_shards import inspect_shards

        inspect_shards(config.inspect, config.samples, config.data.cache_dir)
        return 0
    data, settings = config.data, None
    if config.finetune and holds_examples(data, finetuning=True):
        validate_examples(data)
        from gpt.data.examples import ExampleSettings

        settings = ExampleSettings(data.format, config.loss_on, data.too_long, config.context_length, data.labels)
    else:
        validate_text(data)
        if config.loss_on not in ("auto", "all"):
            raise UserError(
                f"loss_on={config.loss_on} is of examples to fine-tune on, and this is text; add finetune=true, or leave it out"
            )
    prepare_corpus(data, config.tokenizer, config.context_length, _say, settings)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
