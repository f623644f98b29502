"""Command line -> validated config. Hydra composes the groups of `configs/` here, once; nothing else touches Hydra.

Keys and group options are checked before Hydra sees them, so that a slip gets one line naming the nearest right name.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from gpt.arguments import config_directory, expanded, groups, is_word, read_arguments
from gpt.commands import COMMANDS, EvaluateConfig
from gpt.config import DeviceName, RunConfig
from gpt.data.config import TEXT_SOURCES, TokenizerConfig
from gpt.errors import UserError
from gpt.runtime.environment import prepare_environment
from gpt.typed import from_dict, key_of, nearest, schema_keys, shown


def compose_run(command: str, arguments: Sequence[str], config_dir: Path | None = None) -> RunConfig:
    """Compose a training run, or what a run would be, from `configs/`, an overlay folder and `key=value` settings.

    Raises:
        UserError: the first thing wrong, with its key and the nearest right name.
    """
    keys, options = schema_keys(RunConfig), groups(config_dir)
    del keys["command"]
    settings = read_arguments(arguments, keys, options, command)
    chosen = {name: settings.pop(name) for name in list(settings) if name in options}
    resume = settings.get("resume") or "auto"
    if not COMMANDS[command].trains and resume not in ("auto", "never"):
        raise UserError(f"resume={resume}: gpt {command} continues no run; init=<run> takes its weights and their shape")
    run = expanded(resume)
    if os.path.isfile(run / "config.yaml"):  # which takes names that are too long
        config = _resumed(run, chosen, settings, keys, config_dir)
    else:
        if resume not in ("auto", "never") and not nearest(resume, ("auto", "never")):
            refuse_no_run("resume", resume, "; give auto, never or a run directory")
        config = from_dict(RunConfig, _hydra_compose(config_dir, chosen, settings, RunConfig, COMMANDS[command].root))
        if COMMANDS[command].trains:
            config.command = typing.cast(Any, command)
        if config.init:
            prepare_environment(config.device, check=False)  # torch comes in with the weights
            _take_shape(config, [*chosen, *settings])
        elif command == "finetune":
            raise UserError(
                "init: finetune starts from weights; give a run, a Hugging Face directory or a hub id, e.g. init=runs/<id> "
                "(gpt pretrain starts from none)"
            )
        elif config.distill.teacher and not any(key.partition(".")[0] == "tokenizer" for key in (*chosen, *settings)):
            refuse_no_run("distill.teacher", config.distill.teacher)
            prepare_environment(config.device, check=False)
            from gpt.inference.loading import tokenizer_of  # imports torch

            teachers = tokenizer_of(config.distill.teacher, config.allow_pickle, "distill.teacher")
            config.tokenizer = TokenizerConfig("pretrained", path=teachers)  # a student with another could not be taught
    if COMMANDS[command].trains and config.command != command:
        raise UserError(f"resume={settings['resume']}: that run was started by gpt {config.command}; continue it so")
    config.validate()
    return config


def _take_shape(config: RunConfig, named: Sequence[str]) -> None:
    """Make the model that of `init`, and the tokenizer too unless `adapt_tokenizer` says otherwise.

    Args:
        config: with `init`.
        named: the groups and keys that the user named.

    Raises:
        UserError: one of them says otherwise, or there are no such weights or no such tokenizer.
    """
    brings, other = f"init={config.init} brings its own shape and tokenizer; leave it out", config.adapt_tokenizer
    free = ["dropout"] if other is None else ["dropout", "vocab_size"]
    makes = "adapt_tokenizer=train, which makes one of the data as tokenizer.* says"
    for key in named:
        section, _, name = key.partition(".")
        if section == "model" and name not in free:
            raise UserError(f"{key}: {brings} ({' and '.join(f'model.{name}' for name in free)} may be set)")
        if section == "tokenizer" and other is None:
            raise UserError(f"{key}: {brings}, or go on with another: adapt_tokenizer=<folder, run or hub id>, or {makes}")
        if section == "tokenizer" and other != "train":
            raise UserError(f"{key}: adapt_tokenizer={other} is a tokenizer that exists; leave it out, or give {makes}")
    if other == "train" and config.tokenizer.name == "pretrained":
        raise UserError("tokenizer=pretrained: adapt_tokenizer=train makes a tokenizer of the data; give adapt_tokenizer its path instead")
    kinds = get_args(typing.get_type_hints(TokenizerConfig)["name"])
    if other is not None and other in kinds and not os.path.exists(other):
        raise UserError(f"adapt_tokenizer={other} is no tokenizer that exists; for a new one give adapt_tokenizer=train tokenizer={other}")
    from gpt.inference.loading import read_shape, read_tokenizer  # imports torch

    of_user = {name: getattr(config.model, name) for name in free if f"model.{name}" in named}
    config.model, tokenizer = read_shape(typing.cast(str, config.init), config.allow_pickle)
    if other is not None:
        config.model.vocab_size = 0
    if other is not None and other != "train":
        tokenizer, config.model.vocab_size = read_tokenizer(other, "adapt_tokenizer", ("train",))
    for name, value in of_user.items():
        setattr(config.model, name, value)
    if other != "train":
        config.tokenizer = TokenizerConfig("pretrained", path=tokenizer)


def compose_use(command: str, arguments: Sequence[str], config_dir: Path | None = None) -> Any:
    """The settings of a command that trains nothing from `key=value` arguments.

    Raises:
        UserError: the first thing wrong.
    """
    schema = COMMANDS[command].config
    keys = schema_keys(schema)
    options = {group: names for group, names in groups(config_dir).items() if dataclasses.is_dataclass(keys.get(group))}
    words = [argument for argument in arguments if COMMANDS[command].words and is_word(argument)]
    settings = read_arguments([argument for argument in arguments if argument not in words], keys, options, command)
    if words:
        if (key := COMMANDS[command].words) in settings:
            raise UserError(f"{words[0]}: give words or {key}=[...], not both")
        settings[key] = words
    chosen = {name: settings.pop(name) for name in list(settings) if name in options}
    values = _hydra_compose(config_dir, chosen, settings, schema, COMMANDS[command].root) if options else settings
    config = from_dict(schema, values)
    if isinstance(config, EvaluateConfig):
        if config.model:
            refuse_no_run("model", config.model)  # before a text or the index of tasks is read, which takes seconds
        config.validate_settings()
        if not any(name.partition(".")[0] == "data" for name in (*chosen, *settings)):
            _take_own_data(config)
        elif config.model and not config.tasks and config.examples == "auto":
            config.examples = _reads_examples(config) or "auto"
    config.validate()
    return config


def _take_own_data(config: EvaluateConfig) -> None:
    """For an evaluation that names no data: what the model's own run trained on; what it held out of that, unless all is asked for."""
    path = expanded(config.model)
    run = next((p for p in (path, path.parent, path.parent.parent) if (p / "config.yaml").is_file()), path)  # its model, a checkpoint
    has_run = (run / "config.yaml").is_file()
    if config.model and not config.tasks and not has_run:
        raise UserError(
            "data: measured on what? Name it, e.g. data=text data.paths=[book.txt] or data=stdlib; "
            f"model={config.model} is {'not of a run' if path.exists() else 'no directory here'}, whose own held-out text would be taken"
        )
    if has_run and not config.tasks:
        own = load_run(run)
        config.data = own.data
        if own.on_examples:
            config.examples = True
            config.loss_on = own.loss_on if config.loss_on == "auto" else config.loss_on
            config.context_length = config.context_length or own.sequence_length
    if config.part == "auto":
        config.part = "held_out"


def _reads_examples(config: EvaluateConfig) -> bool:
    """Whether rows of files, which may be either, are examples for the model: for a classifier they are."""
    if config.data.source in TEXT_SOURCES:
        return False
    prepare_environment(config.device_config, check=False)
    from gpt.inference.loading import read_shape  # imports torch

    return read_shape(config.model, config.allow_pickle, "model")[0].head != "language_model"


def refuse_no_run(key: str, path: str, remedy: str = "") -> None:
    """Raises UserError for a path with no run or model: nothing is there, or a folder of runs. An id of the hub is no path.

    Args:
        key: what the user calls `path`.
        path: where a run or a model should be.
        remedy: what to say where nothing is near; with one, `path` is never an id of the hub.
    """
    directory = expanded(path)
    if not os.path.exists(directory):
        if remedy or path.startswith(("/", ".", "~", "runs/")) or path.endswith("/") or path.count("/") > 1:
            raise UserError(f"{key}={shown(path)}: there is no such directory{_near_directories(directory) or remedy}")
    elif not any((directory / name).is_file() for name in ("config.json", "config.yaml")) and (runs := _newest_runs(directory)):
        raise UserError(f"{key}={shown(path)}: this folder holds runs; name one of them, the newest first: {_some(runs)}")


def _near_directories(directory: Path) -> str:
    """What to say of the directories beside one that is not there: the nearest name, or else the newest runs."""
    folders = [directory.parent, *([Path("runs")] if directory.parent == Path() else [])]  # a run's id alone
    beside = {other.name: other for folder in folders for other in folder.glob("*/")}  # of a folder that cannot be read: none
    if close := difflib.get_close_matches(directory.name, beside, 1, 0.6):
        return f". Did you mean {beside[close[0]]}?"
    runs = _newest_runs(*folders)
    return f". There are, the newest first: {_some(runs)}" if runs else ""


def _newest_runs(*folders: Path) -> list[Path]:
    """The run directories in some folders, the one that was started last first."""
    configs = [config for folder in folders for config in folder.glob("*/config.yaml")]
    return [config.parent for config in sorted(configs, key=lambda config: config.stat().st_mtime, reverse=True)]


def _some(runs: Sequence[Path]) -> str:
    return ", ".join(map(str, runs[:3])) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")


def load_run(directory: Path) -> RunConfig:
    """The config that a run directory was started with.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    return load_config(directory / "config.yaml")


def load_config(file: Path) -> RunConfig:
    """The config of a run that stands in a file of YAML or, by its name, of JSON, resolved.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    import yaml

    # To YAML 1.1 the number 1e-08 is a text, and so is half of a character that JSON writes as two escapes.
    read = json.loads if file.suffix == ".json" else yaml.safe_load
    try:
        return from_dict(RunConfig, read(file.read_text(encoding="utf-8")))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def _hydra_compose(overlay: Path | None, chosen: dict[str, Any], settings: dict[str, Any], schema: type, root: str) -> dict[str, Any]:
    """The groups that the file `root` lists, composed by Hydra, with single keys set on top."""
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store("schema", _defaults(schema))
    overrides = [f"{group}={_quoted(option)}" for group, option in chosen.items() if option is not None]
    overrides += [f"hydra.searchpath=[{_quoted(f'file://{overlay.resolve()}')}]"] if overlay else []
    try:
        with initialize_config_dir(str(config_directory().resolve()), version_base="1.3"):
            composed = compose(root, overrides)
        for key, value in settings.items():
            OmegaConf.update(composed, key, _escaped(value), merge=isinstance(value, dict), force_add=isinstance(value, dict))
        values = typing.cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))
    except RecursionError as error:
        raise UserError(f"--config-dir {overlay}: the defaults list of a file leads back to that file") from error
    except (HydraException, OmegaConfBaseException, UnicodeDecodeError, yaml.YAMLError) as error:
        message = re.sub(r"\s+full_key: (\S*)\s+object_type=\w+", r" (\1)", str(error).partition("Config search path:")[0]).replace(
            " ()", ""
        )
        raise UserError(f"{f'--config-dir {overlay}: ' if overlay else ''}{' '.join(message.split())}") from error
    for group in chosen.keys() & values.keys() - {key_of(f.name) for f in dataclasses.fields(schema)}:
        raise UserError(f"{group}={chosen[group]}: the first line of its file must be `# @package _global_`")
    return values


def _quoted(text: str) -> str:
    """The name of a file as a string of Hydra's grammar."""
    return "'" + text.replace("'", "\\'") + "'"


def _escaped(value: Any) -> Any:
    """A value that OmegaConf reads back as it is, `${` and all."""
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _defaults(cls: type) -> dict[str, Any]:
    """A dataclass's defaults as nested plain values, without making one (GPTConfig derives sizes when made)."""
    hints, values = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        key = key_of(f.name)
        if dataclasses.is_dataclass(hints[f.name]):
            values[key] = _defaults(typing.cast(type, hints[f.name]))
        else:
            values[key] = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    return values


def _values_of(group: str, option: str | None, config_dir: Path | None) -> dict[str, Any]:
    """The keys that an option of a group sets by itself."""
    import yaml

    files = [folder / group / f"{option}.yaml" for folder in (config_directory(), config_dir) if folder is not None]
    values = next((yaml.safe_load(file.read_text(encoding="utf-8")) for file in files if file.is_file()), None) or {}
    if "defaults" in values:
        raise UserError(f"{group}={option}: a run is continued by an option that stands for itself, and this one has a list of defaults")
    return values


def _resumed(directory: Path, chosen: dict[str, Any], settings: dict[str, Any], keys: dict[str, Any], config_dir: Path | None) -> RunConfig:
    """The config of an existing run with single keys changed, or the machine that it goes on on: the usual reason to go on elsewhere."""
    if chosen.get("device") in get_args(DeviceName):
        settings = {"device.name": chosen["device"], **settings}
        chosen = {group: option for group, option in chosen.items() if group != "device"}
    for group in [group for group in chosen if group.partition("/")[0] == "launch"]:
        settings = {**{f"launch.{key}": value for key, value in _values_of(group, chosen.pop(group), config_dir).items()}, **settings}
    if chosen:
        group, option = next(iter(chosen.items()))
        single = next((key for key in keys if key.startswith(f"{group}.")), "train.budget")
        raise UserError(f"{group}={option}: a run is continued with the groups it has; change single keys, such as {single}=...")
    values = load_run(directory).to_dict()
    if directory.name != directory.resolve().name:  # `.`, or a link
        directory = directory.resolve()
    values["run"] = {"id": directory.name, "dir": str(directory.parent)}
    for key, value in settings.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section[part]
        value = {**section[last], **value} if isinstance(value, dict) else value
        if path == ["run"] and value != section[last]:
            raise UserError(f"{key}={value}: resume={settings['resume']} continues that run in its own directory, {directory}")
        section[last] = value
    return from_dict(RunConfig, values)
