"""`gpt prepare`: tokenizer and token shards ahead of time; or a look into a folder of them."""

from __future__ import annotations

import sys
from typing import Any

from gpt.data.config import DataConfig, LossOn, TokenizerConfig
from gpt.data.prepare import prepare_corpus


def prepare(config: Any) -> int:
    """Run `gpt prepare` (a PrepareConfig) and return the exit code.

    Raises:
        UserError: data that cannot be prepared; a folder that holds no shards, or damaged ones.
    """
    if config.inspect is not None:
        from gpt.data.inspect_shards import inspect_shards

        inspect_shards(config.inspect, config.samples, config.data.cache_dir)
        return 0
    data: DataConfig = config.data
    tokenizer: TokenizerConfig = config.tokenizer
    loss_on: LossOn = config.loss_on
    settings = None
    if config.finetune:
        from gpt.data.examples import ExampleSettings

        settings = ExampleSettings(data.format, loss_on, data.too_long, config.context_length, data.labels)
    prepare_corpus(data, tokenizer, config.context_length, _say, settings)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
