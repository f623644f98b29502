"""Command line -> validated config. Hydra composes the groups of `configs/` here, once; nothing else touches Hydra.

Keys and group options are checked before Hydra sees them, so that a slip gets one line naming the nearest right name.
Imports no torch.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from gpt.config import GenerateConfig, RunConfig, from_dict, nearest, schema_keys
from gpt.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

T = typing.TypeVar("T")


def config_directory() -> Path:
    """The folder of Hydra groups: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def groups(directories: Sequence[Path]) -> dict[str, list[str]]:
    """Group name -> its options, over all directories."""
    found: dict[str, set[str]] = {}
    for directory in directories:
        for file in directory.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(options) for group, options in sorted(found.items())}


def compose_run(command: str, arguments: Sequence[str], config_dir: Path | None = None) -> RunConfig:
    """Compose a training run from `configs/`, an overlay folder and `key=value` overrides.

    Raises:
        UserError: the first thing wrong, with its key and the nearest right name.
    """
    directories = [config_directory()] + ([config_dir] if config_dir else [])
    if config_dir and not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir}: no such folder")
    keys = schema_keys(RunConfig)
    options = groups(directories)
    overrides = [_parse(argument, keys, options) for argument in arguments]
    for override in overrides:
        _check_override(override, keys, options)
    resume = next((o.value() for o in overrides if o.key_or_group == "resume"), "auto")
    if isinstance(resume, str) and (Path(resume) / "config.yaml").is_file():
        config = _resumed(Path(resume), overrides, keys)
    else:
        config = from_dict(RunConfig, _hydra_compose(directories, [o.input_line or "" for o in overrides]))
    config.command = typing.cast(Any, command)
    config.validate()
    return config


def compose_generate(arguments: Sequence[str]) -> GenerateConfig:
    """The settings of `gpt generate` from `key=value` arguments.

    Raises:
        UserError: the first thing wrong.
    """
    keys = schema_keys(GenerateConfig)
    values: dict[str, Any] = {}
    for argument in arguments:
        override = _parse(argument, keys, {})
        _check_override(override, keys, {})
        values[override.key_or_group] = override.value()
    config = from_dict(GenerateConfig, values)
    config.validate()
    return config


def load_run(directory: Path) -> RunConfig:
    """The config that a run directory was started with.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    import yaml

    file = directory / "config.yaml"
    try:
        return from_dict(RunConfig, yaml.safe_load(file.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error


def _parse(argument: str, keys: dict[str, Any], options: dict[str, list[str]]) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = argument.partition("=")
    if not equals and not argument.startswith("~"):
        raise UserError(f"{argument}: expected key=value{nearest(argument, ['--help', '--cfg', '--config-dir', *keys])}")
    if equals and key not in options and _is_text(keys.get(key)) and value[:1] not in ("'", '"', "[") and value != "null":
        argument = f"{key}={_quote(value)}"  # what the shell gave is the text: spaces, quotes, brackets and all
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise UserError(f"{argument}: cannot be read as key=value ({str(error).splitlines()[0]}); put the value in quotes") from error


def _is_text(hint: Any) -> bool:
    """Whether a key holds free text or a list of it."""
    return hint is str or (str in get_args(hint) and (get_origin(hint) is list or type(None) in get_args(hint)))


def _quote(text: str) -> str:
    """A string literal of Hydra's grammar: a backslash escapes only a quote, or backslashes that stand before one."""
    parts = text.replace("\\'", "\\\\'") if "\\'" in text else text
    parts = parts.replace("'", "\\'")
    trailing = len(parts) - len(parts.rstrip("\\"))
    return f"'{parts}{chr(92) * trailing}'"


def _check_override(override: Override, keys: dict[str, Any], options: dict[str, list[str]]) -> None:
    name, value = override.key_or_group, override.value() if not override.is_delete() else None
    if override.is_delete():
        raise UserError(f"~{name}: keys cannot be removed; set {name}=null or another value")
    if override.is_sweep_override():
        raise UserError(f"{override.input_line}: one run takes one value; start a run for each")
    if name in options and not isinstance(value, dict):
        if str(value) not in options[name] and not (value is None and name not in keys):  # experiment=null is none
            guess = nearest(str(value), options[name]) or "."
            raise UserError(f"{name}={value}: no such option{guess} There are: {', '.join(options[name])}")
        return
    if name not in keys or name == "command":
        raise UserError(f"{name}={value}: no such key{nearest(name, [*keys, *options])}")


def _hydra_compose(directories: list[Path], overrides: list[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store("schema", _defaults(RunConfig))
    overlay = [f"hydra.searchpath=[file://{d.resolve()}]" for d in directories[1:]]
    try:
        with initialize_config_dir(str(directories[0].resolve()), version_base="1.3"):
            composed = compose("config", overrides + overlay)
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())) from error
    return typing.cast("dict[str, Any]", values)


def _defaults(cls: type) -> dict[str, Any]:
    """A dataclass's defaults as nested plain values, without making one (GPTConfig derives sizes when made)."""
    import dataclasses

    hints, values = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        if is_dataclass(hints[f.name]):
            values[f.name] = _defaults(typing.cast(type, hints[f.name]))
        else:
            values[f.name] = f.default_factory() if f.default is dataclasses.MISSING else f.default  # type: ignore[misc]
    return values


def _resumed(directory: Path, overrides: list[Override], keys: dict[str, Any]) -> RunConfig:
    """The config of an existing run with single keys changed."""
    values = load_run(directory).to_dict()
    for override in overrides:
        name = override.key_or_group
        if is_dataclass(keys.get(name)) or name not in keys:
            raise UserError(
                f"{name}={override.value()}: a run is continued with the groups it has; change single keys, e.g. {name}.<key>=..."
            )
        section = values
        *path, last = name.split(".")
        for part in path:
            section = section[part]
        section[last] = override.value()
    values["run"] = {"id": directory.resolve().name, "dir": str(directory.parent)}
    return from_dict(RunConfig, values)
