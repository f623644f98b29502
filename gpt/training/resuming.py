"""Whether a run directory holds a run that this config may continue."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from gpt.compose import load_run
from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.runtime.distributed import World
from gpt.training.checkpoint import list_checkpoints, newest_whole
from gpt.typed import key_of, plain, shown

# Of the data, what a run that goes on may have another value of: where things lie and how they are prepared, not what they are.
_MAY_CHANGE = (
    "data.paths", "data.parts", "data.cache_dir", "data.workers", "data.memory_mb", "data.licence",
    "data.fields.answers", "data.fields.test",
)  # fmt: skip
_MUST_STAY = (
    "seed", "init", "loss_on", "lm_weight", "train.batch_tokens", "train.sequence_length", "train.overfit", "train.ema", "optimizer.name",
    "unfreeze", "layerwise_lr_decay", "adapt_tokenizer",
)  # fmt: skip
# Of the plan of what trains, what changes nothing in it.
_OF_THE_MACHINE = (
    "freeze.name", "freeze.cache", "freeze.cache_gb", "freeze.cache_dir", "freeze.search_plans", "freeze.search_budget",
    "distill.cache", "distill.cache_gb", "dpo.cache",
)  # fmt: skip
_SECTIONS = ("model", "tokenizer", "freeze", "lora", "distill", "dpo")


def run_to_continue(config: RunConfig, directory: Path) -> RunConfig | None:
    """The config that the run in `directory` was started with, if there is one.

    How the run is spread over devices may differ: a checkpoint fits every layout.

    Raises:
        UserError: there is one that may not be continued, or not with this config.
    """
    if not (directory / "config.yaml").is_file():
        if checkpoints := list_checkpoints(directory / "checkpoints"):  # which a run from the beginning would replace
            raise UserError(
                f"run.id={config.run.id}: {directory} has no config.yaml, but {checkpoints[-1][1].name} of an earlier run; "
                "put its config.yaml back, or choose another run.id"
            )
        return None
    if config.resume == "never":
        raise UserError(f"run.id={config.run.id}: {directory} exists, and resume=never; choose another run.id")
    try:
        before = load_run(directory)
    except UserError as error:
        raise UserError(f"run.id={config.run.id}: the run cannot go on, for its config is damaged: {error}") from error
    keys = [*_MUST_STAY, *(key for key in _leaves("data", config.data) if key not in _MAY_CHANGE)]
    keys += [key for section in _SECTIONS for key in _leaves(section, getattr(config, section)) if key not in _OF_THE_MACHINE]
    for key in keys:
        now, then = _value(config, key), _value(before, key)
        if now != then and not _follows_from_the_data(key, config, before):
            key = key_of(key)
            started = f"the run in {directory} was started with {key}={shown(plain(then))}; set it so, or choose another run.id"
            raise UserError(f"{key}={shown(plain(now))}: {started}")
    return before


def _follows_from_the_data(key: str, config: RunConfig, before: RunConfig) -> bool:
    """Whether a key of a run that is composed anew says nothing yet, and the run's own has been completed by the data."""
    if key == "model.vocab_size":
        return not config.model.vocab_size
    given = config.model.head != "language_model" or before.model.head == "language_model"
    return key in ("model.head", "model.classes", "model.tie_embeddings") and not given


def checkpoint_to_continue(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from; None: from the beginning, said aloud."""
    checkpoint = newest_whole(directory, say)
    if checkpoint is None:
        say(f"no checkpoint in {directory} yet: starting at step 0")
    return checkpoint


def refuse_other_data(now: str, then: str, directory: Path) -> None:
    """Raises UserError if the fingerprint of the data, or of its tokens, is another than when the run in `directory` was started."""
    if now != then:
        raise UserError(
            f"data: the text or its tokens are not those that {directory} was started with "
            f"(fingerprint {now}, then {then}); restore it, or choose another run.id"
        )


def refuse_unlike_machines(fingerprint: str, world: World) -> None:
    """Raises UserError if this process has other data than the main one, on whose machine it may have been prepared by itself."""
    if fingerprint != (of_main := world.share(lambda: fingerprint)):
        raise UserError(
            f"data: the text or its tokens on {socket.gethostname()} are not those of the first machine (fingerprint {fingerprint}, there "
            f"{of_main}); give every machine the same files, and the same versions of gpt and tokenizers"
        )


def with_own_tokenizer(config: RunConfig, directory: Path) -> RunConfig:
    """The config of a run that goes on, with the run's own copy of a pretrained tokenizer where that has gone."""
    tokenizer, own = config.tokenizer, directory / "tokenizer.json"
    if tokenizer.path is None or os.path.exists(tokenizer.path) or not own.is_file():
        return config
    return replace(config, tokenizer=replace(tokenizer, path=str(own)))


def _leaves(prefix: str, section: Any) -> list[str]:
    """The dotted keys of a section."""
    found = []
    for f in fields(section):
        key = f"{prefix}.{f.name}"
        found += _leaves(key, getattr(section, f.name)) if is_dataclass(getattr(section, f.name)) else [key]
    return found


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
