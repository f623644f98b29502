"""The words of a command line -> keys with values, and groups with options, each checked, so that a slip gets one line naming the nearest
right name. What they make together is `gpt.compose`'s to say. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.typed import nearest, nearest_and_all, nearest_key, schema_keys

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
    """Group name -> its options, built in and of an overlay folder; a group within a group is `launch/instance`.

    Raises:
        UserError: there is no such folder, or one of its options has the name of a built-in one.
    """
    root = config_directory()
    folders = {folder.relative_to(root).as_posix(): folder for folder in root.rglob("*") if folder.is_dir()}
    found = {group: {file.stem for file in folder.glob("*.yaml")} for group, folder in folders.items()}
    if overlay and not overlay.is_dir():
        raise UserError(f"--config-dir {overlay}: no such folder")
    for group in found if overlay else ():
        own = {file.stem for file in (typing.cast(Path, overlay) / group).glob("*.yaml")}
        if taken := sorted(own & found[group]):
            raise UserError(f"--config-dir {overlay}: {group}/{taken[0]}.yaml has the name of a built-in option; give it another")
        found[group] |= own
    return {group: sorted(options) for group, options in sorted(found.items())}


def is_word(argument: str) -> bool:
    """Whether an argument is a plain word and not `key=value`; a path may hold `=`, a key no `/`."""
    return argument != "" and ("=" not in argument or "/" in argument.partition("=")[0])


def expanded(path: str) -> Path:
    """A path with `~` as the home directory, where there is one of that name."""
    return Path(os.path.expanduser(path))


def read_arguments(arguments: Sequence[str], keys: dict[str, Any], options: dict[str, list[str]], command: str) -> dict[str, Any]:
    """`_read` of each; the last of a key counts, but names with values, as `launch.tags.team=nlp`, come together."""
    settings: dict[str, Any] = {}
    for key, value in (_read(argument, keys, options, command) for argument in arguments):
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    return settings


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
    for key in (key for key, hint in keys.items() if get_origin(hint) is dict and name.startswith(f"{key}.")):
        return key, {name[len(key) + 1 :]: _value(name, text, get_args(keys[key])[1])}
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
    if get_origin(hint) is dict:
        return _names_with_values(key, text)
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
        override = OverridesParser.create().parse_override(f"value={text}")
    except (HydraException, ValueError, RecursionError) as error:
        if not is_list:
            return text  # the check of its type will say what it must be
        sections = dataclasses.is_dataclass(get_args(hint)[0])
        written = "[{name: value, name: value}, {name: value}]" if sections else "['first text', 'second text']"
        raise UserError(f"{key}={text}: cannot be read as a list; it is written {written}") from error
    if override.is_sweep_override():
        raise UserError(f"{key}={text}: must be one value")
    return override.value()


def _names_with_values(key: str, text: str) -> dict[str, Any]:
    """`{team: nlp, train.books: s3://bucket/books}`, as YAML writes it: Hydra's grammar has neither names with dots nor uris."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict) or None in value.values():
        raise UserError(f"{key}={text}: must be names with values, {{name: value, name: value}}, or one of them: {key}.<name>=<value>")
    return value


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
