"""Command line -> validated config. Hydra composes the groups of `configs/` here, once; nothing else touches Hydra.

Keys and group options are checked before Hydra sees them, so that a slip gets one line naming the nearest right name.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from gpt.commands import COMMANDS, EvaluateConfig
from gpt.config import DeviceName, RunConfig
from gpt.data.config import TEXT_SOURCES, TokenizerConfig
from gpt.errors import UserError
from gpt.runtime.environment import prepare_environment
from gpt.typed import from_dict, key_of, nearest, nearest_and_all, nearest_key, schema_keys, shown

# What each command calls the run or the model that it works on.
_MODEL_KEYS = {
    **dict.fromkeys(("generate", "evaluate", "inspect", "inspect tokens"), "model"),
    "export": "run",
    **dict.fromkeys(("finetune", "parity", "precompile"), "init"),
    "runs": "dir",
}
MOST_RUNS = 1000  # of a sweep: more is a slip
_OF_THE_SWEEP = ("run.id", "run.dir", "resume")  # the same for all its runs, word for word


def config_directory() -> Path:
    """The folder of Hydra groups: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def groups(overlay: Path | None = None) -> dict[str, list[str]]:
    """Group name -> its options, built in and of an overlay folder.

    Raises:
        UserError: there is no such folder, or one of its options has the name of a built-in one.
    """
    found = {folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in config_directory().iterdir() if folder.is_dir()}
    if overlay and not overlay.is_dir():
        raise UserError(f"--config-dir {overlay}: no such folder")
    for group in found if overlay else ():
        own = {file.stem for file in (typing.cast(Path, overlay) / group).glob("*.yaml")}
        if taken := sorted(own & found[group]):
            raise UserError(f"--config-dir {overlay}: {group}/{taken[0]}.yaml has the name of a built-in option; give it another")
        found[group] |= own
    return {group: sorted(options) for group, options in sorted(found.items())}


def compose_run(command: str, arguments: Sequence[str], config_dir: Path | None = None) -> RunConfig:
    """Compose a training run, or what a run would be, from `configs/`, an overlay folder and `key=value` settings.

    Raises:
        UserError: the first thing wrong, with its key and the nearest right name.
    """
    keys, options = schema_keys(RunConfig), groups(config_dir)
    del keys["command"]
    settings = dict(_read(argument, keys, options, command) for argument in arguments)
    chosen = {name: settings.pop(name) for name in list(settings) if name in options}
    resume = settings.get("resume") or "auto"
    if not COMMANDS[command].trains and resume not in ("auto", "never"):
        raise UserError(f"resume={resume}: gpt {command} continues no run; init=<run> takes its weights and their shape")
    run = expanded(resume)
    if os.path.isfile(run / "config.yaml"):  # which takes names that are too long
        config = _resumed(run, chosen, settings, keys)
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
    words = [argument for argument in arguments if COMMANDS[command].words and _is_word(argument)]
    settings = dict(_read(argument, keys, options, command) for argument in arguments if argument not in words)
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


def _is_word(argument: str) -> bool:
    """Whether an argument is a plain word and not `key=value`; a path may hold `=`, a key no `/`."""
    return argument != "" and ("=" not in argument or "/" in argument.partition("=")[0])


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


def expanded(path: str) -> Path:
    """A path with `~` as the home directory, where there is one of that name."""
    return Path(os.path.expanduser(path))


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
    """The config of a run that stands in a file, resolved.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    import yaml

    try:
        return from_dict(RunConfig, yaml.safe_load(file.read_text(encoding="utf-8")))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def _read(argument: str, keys: dict[str, Any], options: dict[str, list[str]], command: str) -> tuple[str, Any]:
    """`key=value` -> the key and its value; `group=option` -> the group and its option, or None for none.

    Raises:
        UserError: no such key, no such option, or not one value.
    """
    name, equals, text = argument.partition("=")
    bare, known = name.lstrip("+~"), [*keys, *(group for group in options if group not in keys)]
    if any("\ud800" <= character <= "\udfff" for character in argument):  # how Python holds bytes that it cannot decode
        raise UserError(f"{argument}: this argument is not valid UTF-8")
    if not bare or not (equals or name.startswith("~")):
        raise UserError(f"{argument or repr('')}: must be {_meant(argument, known, options, command)}")
    if bare not in known:
        raise UserError(f"{argument}: no such key{nearest_key(bare, known) or '; --help lists them'}")
    if name.startswith("~"):
        raise UserError(f"{argument}: nothing can be removed from the config, only set: {bare}=...")
    if name != bare:
        raise UserError(f"{argument}: nothing can be added to the config, only set: {bare}={text}")
    if name in options:
        return name, _option(name, text, options[name], optional=name not in keys)
    return name, _value(name, text, keys[name])


def _meant(word: str, known: list[str], options: dict[str, list[str]], command: str) -> str:
    """What a word without `=` may have been meant to be."""
    if word in known:
        return f"{word}=<{'option' if word in options else 'value'}>, without spaces"
    of = [f"{group}={word}" for group, names in options.items() if word in names] or _meant_path(word, options, command)
    return f"key=value. Did you mean {of[0]}?" if len(of) == 1 else f"key=value{nearest(word, ['--help', '--cfg', '--config-dir', *known])}"


def _meant_path(word: str, options: dict[str, list[str]], command: str) -> list[str]:
    """The setting that a path may have been meant for, if the word is one."""
    path = expanded(word)
    is_model = command in _MODEL_KEYS and not os.path.isfile(path)
    if "=" in word or not (os.path.exists(path) or "/" in word or word.startswith(".")):
        return []
    if is_model or (command == "pretrain" and (path / "config.yaml").is_file()):
        return [f"{_MODEL_KEYS.get(command, 'resume')}={word}"]
    source = path.suffix[1:] if path.suffix[1:] in options.get("data", ()) else "text"
    return [f"data={source} data.paths=[{word}]"] if "data" in options else []


def _option(group: str, text: str, options: list[str], optional: bool) -> str | None:
    if text in options:
        return text
    if optional and text == "null":
        return None
    if "," in text and all(part in options for part in text.split(",")):
        raise UserError(f"{group}={text}: must be one option")
    raise UserError(f"{group}={text}: no such option{nearest_and_all(text, options)}")


def _value(key: str, text: str, hint: Any) -> Any:
    """A value as its key reads it: text word for word as the shell gave it, anything else in Hydra's grammar."""
    if hint is str:
        return text
    if str in get_args(hint) and get_origin(hint) is not list:  # text or null
        return None if text == "null" else text
    is_list = get_origin(hint) is list
    if is_list and not text.startswith("["):
        return [text] if text else []
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except (HydraException, ValueError, RecursionError) as error:
        if not is_list:
            return text  # the check of its type will say what it must be
        sections = dataclasses.is_dataclass(get_args(hint)[0])
        written = "[{name: value, name: value}, {name: value}]" if sections else "['first text', 'second text']"
        raise UserError(f"{key}={text}: cannot be read as a list; it is written {written}") from error
    if override.is_sweep_override():
        raise UserError(f"{key}={text}: must be one value")
    return override.value()


def sweep_values(argument: str, config_dir: Path | None = None) -> list[str]:
    """What a `key=a,b` stands for in a sweep of training runs, as one `key=value` each; all but a sweep stands for itself.

    Hydra's grammar says what is a sweep: `a,b`, `range(1,4)`, `choice(a,b)`, and `glob(gpt*)` for the options of a group. Characters
    outside of it, as in `~/a,~/b`, are taken as they are. A text with a comma of its own is put in quotes.

    Raises:
        UserError: it stands for nothing, for too much, or a value is missing beside a comma.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob, QuotedString, Transformer
    from hydra.errors import HydraException

    key, _, text = argument.partition("=")
    keys, options = schema_keys(RunConfig), groups(config_dir)
    if key in _OF_THE_SWEEP or key not in (*keys, *options) or not any(character in text for character in ",("):
        return [argument]
    hint = keys.get(key)
    verbatim = key in options or hint is str or str in get_args(hint)  # a list reads a text without brackets so, too

    def written(element: Any) -> str:
        if isinstance(element, bool):
            return str(element).lower()
        if verbatim and isinstance(element, (str, QuotedString)):
            return element.text if isinstance(element, QuotedString) else element
        return Transformer.str(element)

    try:
        override = OverridesParser.create().parse_override(argument)
    except (HydraException, ValueError, RecursionError) as error:
        if "," not in text or any(character in text for character in "[](){}'\"\\"):
            return [argument]  # which is refused, with its reason, where it cannot be read
        values = [part.strip() for part in text.split(",")]
        if "" in values:
            raise UserError(f"{argument}: a value is missing beside a comma") from error
        return [f"{key}={value}" for value in values]
    value = override.value()
    if override.is_interval_sweep():
        raise UserError(f"{argument}: an interval has no end of values; write range(start,stop,step), or the values with commas")
    if isinstance(value, Glob):
        values = value.filter(options.get(key, []))
    elif override.is_sweep_override():
        try:
            values = [written(element) for element in itertools.islice(override.sweep_iterator(), MOST_RUNS + 1)]
        except (HydraException, ValueError) as error:
            raise UserError(f"{argument}: cannot be counted; it is written range(start,stop,step), with a step that is not 0") from error
    elif verbatim and get_origin(hint) is not list and isinstance(value, str) and text[:1] in ("'", '"'):
        values = [value]
    else:
        return [argument]
    if not values:
        raise UserError(f"{argument}: stands for no value{'. There are: ' + ', '.join(options[key]) if key in options else ''}")
    return [f"{key}={value}" for value in values]


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
            OmegaConf.update(composed, key, _escaped(value), merge=False)
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


def _resumed(directory: Path, chosen: dict[str, Any], settings: dict[str, Any], keys: dict[str, Any]) -> RunConfig:
    """The config of an existing run with single keys changed."""
    if chosen.get("device") in get_args(DeviceName):
        settings = {"device.name": chosen["device"], **settings}  # another machine is the usual reason to go on elsewhere
        chosen = {group: option for group, option in chosen.items() if group != "device"}
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
        if path == ["run"] and value != section[last]:
            raise UserError(f"{key}={value}: resume={settings['resume']} continues that run in its own directory, {directory}")
        section[last] = value
    return from_dict(RunConfig, values)
