"""Weights and tokenizer from whatever a user points at: a run, one of its checkpoints, a Hugging Face folder or a hub id, an adapter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt.arguments import expanded
from gpt.compose import load_run, refuse_no_run
from gpt.data.tokenizer import Tokenizer, load_tokenizer
from gpt.errors import UserError
from gpt.model.config import GPTConfig
from gpt.model.huggingface import read_config
from gpt.model.lora import merge
from gpt.model.peft_files import base_of, is_adapter_folder, load_merged, shape_of
from gpt.model.transformer import GPT
from gpt.model.weight_files import find_checkpoint, read_json
from gpt.typed import nearest, shown


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and what belongs to it."""

    model: GPT
    tokenizer: Tokenizer
    end_ids: frozenset[int]
    """Ids after which nothing follows: the tokenizer's end of text and what generation_config.json names."""
    directory: Path
    """Where the weights were read."""
    run: Path | None
    """The run directory that it comes from, if it comes from one."""


def load_model(
    path: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, allow_pickle: bool = False, key: str = "model"
) -> Loaded:
    """Load a model for use.

    Args:
        path: a run directory, its model/ folder, one of its checkpoints, or a Hugging Face directory or hub id; or an adapter in PEFT's
            format, which is merged into its base.
        device, dtype: of the parameters; dtype None: as they are stored.
        allow_pickle: also read a checkpoint that there is only as a pickle.
        key: what the user calls `path`, for messages.

    Raises:
        UserError: there is no model there, or it is of a kind we cannot hold exactly.
    """
    directory, run = locate(path, allow_pickle, key)
    if is_adapter_folder(directory):
        return _from_adapter(directory, run, device, dtype, allow_pickle, f"{key}={path}")
    if run and not (directory / "config.json").is_file():
        return _from_checkpoint(run, directory, device, dtype, key)
    try:
        model = GPT.from_pretrained(directory, device, dtype, allow_pickle)
    except ValueError as error:
        raise UserError(f"{key}={path}: {error}") from error
    tokenizer = load_tokenizer(directory)
    return Loaded(model, tokenizer, frozenset(_end_ids(directory, tokenizer)), directory, run)


def read_shape(path: str, allow_pickle: bool = False, key: str = "init") -> tuple[GPTConfig, str]:
    """The shape of a model, and where its tokenizer is, without its weights.

    Args and raises: as `load_model`; also if the tokenizer beside the weights is of another model.
    """
    directory, run = locate(path, allow_pickle, key)
    if is_adapter_folder(directory):
        try:
            shape, tokenizer = read_shape(base_of(directory), allow_pickle, f"{key}={path}: its base")
            shape = shape_of(directory, shape)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{key}={path}: {error}") from error
        if not _has_tokenizer(directory):
            return shape, tokenizer
        check_rows(shape.vocab_size, load_tokenizer(directory), f"{key}={path}")
        return shape, str(directory.resolve())
    if run and not (directory / "config.json").is_file():
        config, tokenizer = load_run(run).model, run / "tokenizer.json"
    else:
        try:
            config, tokenizer = read_config(directory), directory
        except ValueError as error:
            raise UserError(f"{key}={path}: {error}") from error
    check_rows(config.vocab_size, load_tokenizer(tokenizer), f"{key}={path}")
    return config, str(tokenizer.resolve())


def check_rows(rows: int, tokenizer: Tokenizer, key: str) -> None:
    """Raises UserError where weights have fewer rows of tokens than the tokenizer beside them has ids."""
    if rows < tokenizer.vocab_size:
        raise UserError(
            f"{key}: its weights know {rows:,} tokens and the tokenizer beside them has {tokenizer.vocab_size:,}, so they are not of one "
            "model; put the weights' own tokenizer.json there, and give the other one as adapt_tokenizer if it is to take its place"
        )


def read_tokenizer(path: str, key: str, words: Sequence[str] = ()) -> tuple[str, int]:
    """Where a tokenizer is, and how many ids it has.

    Args:
        path: a folder, a run, a tokenizer.json or a hub id.
        key: what the user calls `path`, for messages.
        words: what else the key can be, for messages.

    Raises:
        UserError: there is none.
    """
    try:
        count = load_tokenizer(path).vocab_size
    except UserError as error:
        why = str(error).removeprefix(f"tokenizer.path={path}: ")
        raise UserError(f"{key}={shown(path)}: {why}{nearest(path, words)}") from error
    file = expanded(path)
    return str(file.resolve()) if file.exists() else path, count


def stock_place(path: str) -> str | None:
    """Where `transformers` finds the model that `load_model` finds at `path`: a folder's whole path, or a hub id; None: nowhere."""
    here = expanded(path).exists()
    directory, _ = locate(path, False, "init")
    if not (directory / "config.json").is_file():
        return None
    return str(directory.absolute()) if here else path


def load_unmerged(path: str, key: str = "run") -> Loaded:
    """A checkpoint of a run, or the newest of one that has not finished, with its adapters as they train.

    Args:
        path: a run directory or one of its checkpoints.
        key: what the user calls `path`, for messages.

    Raises:
        UserError: it is no such thing, or its run has no adapters.
    """
    directory, run = locate(path, False, key)
    if run is None or not load_run(run).lora.rank:
        raise UserError(
            f"{key}={path} has no adapters to write in PEFT's format; name a run that was trained with lora.rank, or leave format out"
        )
    return _from_checkpoint(run, directory, "cpu", None, key, merged=False)


def tokenizer_of(path: str, allow_pickle: bool = False, key: str = "model") -> str:
    """Where the tokenizer of a model is.

    Args and raises: as `load_model`, but the model may be of any kind.
    """
    directory, run = locate(path, allow_pickle, key)
    if is_adapter_folder(directory) and not _has_tokenizer(directory):
        return read_shape(path, allow_pickle, key)[1]
    in_run = run and not any((directory / name).is_file() for name in ("config.json", "adapter_config.json"))
    return str((run / "tokenizer.json" if run and in_run else directory).resolve())


def locate(path: str, allow_pickle: bool, key: str) -> tuple[Path, Path | None]:
    """The directory of the weights, which has a config.json or is a run's, and the run that it belongs to, if any.

    Args and raises: as `load_model`.
    """
    refuse_no_run(key, path)
    directory = expanded(path)
    full = directory.absolute()  # of "." the name and the parents too
    if (directory / "config.json").is_file() or is_adapter_folder(directory):
        return directory, full.parent if full.name in ("model", "adapter") and (full.parent / "config.yaml").is_file() else None
    for run in (directory, full.parent.parent) if directory.exists() else ():
        if (run / "config.yaml").is_file():
            return (run / "model" if directory == run and (run / "model" / "config.json").is_file() else directory), run
    try:
        return find_checkpoint(path, allow_pickle), None
    except ValueError as error:
        run = Path("runs") / path  # its id alone
        raise UserError(f"{key}={path}: {error}{f'. Did you mean {run}?' if (run / 'config.yaml').is_file() else ''}") from error


def _from_adapter(
    directory: Path, run: Path | None, device: torch.device | str, dtype: torch.dtype | None, allow_pickle: bool, what: str
) -> Loaded:
    """An adapter in PEFT's format, merged into its base."""
    try:
        base = load_model(base_of(directory), device, dtype, allow_pickle, f"{what}: its base")
        model = load_merged(base.model, directory, allow_pickle)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
    tokenizer = load_tokenizer(directory) if _has_tokenizer(directory) else base.tokenizer
    ends = base.end_ids if tokenizer is base.tokenizer else base.end_ids | _end_ids(directory, tokenizer)
    return Loaded(model, tokenizer, frozenset(ends), directory, run)


def _has_tokenizer(directory: Path) -> bool:
    return (directory / "tokenizer.json").is_file()


def _from_checkpoint(
    run: Path, directory: Path, device: torch.device | str, dtype: torch.dtype | None, key: str, merged: bool = True
) -> Loaded:
    """One checkpoint of a run, or the newest whole one; adapters merged, or as they are."""
    from gpt.training.checkpoint import find_damage, load_weights, newest_whole

    def say(text: str) -> None:
        print(f"gpt: {text}", file=sys.stderr)

    if directory == run:
        checkpoint = newest_whole(run / "checkpoints", say)
        if checkpoint is None:
            raise UserError(f"{key}={run}: the run has neither a model/ folder nor a whole checkpoint yet")
        say(f"the run has not finished; using {checkpoint}")
    elif damage := find_damage(directory):
        raise UserError(f"{key}={directory}: {damage}")
    else:
        checkpoint = directory
    config = load_run(run)
    model = GPT.materialise(config.model, device, dtype or torch.float32, config.lora)
    load_weights(checkpoint, model)
    if merged:
        merge(model)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    return Loaded(model.eval(), tokenizer, frozenset(_end_ids(run, tokenizer)), checkpoint, run)


def _end_ids(directory: Path, tokenizer: Tokenizer) -> set[int]:
    found: set[Any] = set() if tokenizer.end_of_text is None else {tokenizer.end_of_text}
    if (token := tokenizer.special_tokens.get("eos_token")) is not None:
        found |= {tokenizer.backend.token_to_id(token)}
    for name in ("config.json", "generation_config.json"):
        if not (directory / name).is_file():
            continue
        try:
            ids = read_json(directory / name).get("eos_token_id")
        except ValueError as error:
            raise UserError(str(error)) from error
        found |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
    return found
