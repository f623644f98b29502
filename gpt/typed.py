"""Plain values -> the dataclasses of a schema, every key and type checked, with messages that name the nearest right name.

Knows nothing of what the schema is about. Imports no torch.
"""

from __future__ import annotations

import difflib
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from gpt.errors import UserError

T = TypeVar("T")


def key_of(name: str) -> str:
    """The key of a field: its name, but for the underscore that keeps `except_` from being a word of Python's."""
    return name.removesuffix("_")


def plain(section: Any) -> Any:
    """A dataclass of the schema, as dicts, lists and scalars under their keys; anything else as it is."""
    if is_dataclass(section):
        return {key_of(f.name): plain(getattr(section, f.name)) for f in fields(section)}
    return [plain(item) for item in section] if isinstance(section, list) else section


def schema_keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every settable key below a dataclass, dotted, with its type; sections have the dataclass as theirs."""
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        key = prefix + key_of(f.name)
        keys[key] = hints[f.name]
        if is_dataclass(hints[f.name]):
            keys |= schema_keys(typing.cast(type, hints[f.name]), f"{key}.")
    return keys


def from_dict(cls: type[T], values: Any, prefix: str = "") -> T:
    """Make a dataclass of the schema from plain values, checking every key and type.

    Args:
        cls: the dataclass.
        values: a dict with some or all of its fields; what is missing keeps its default.
        prefix: the dotted key of this section, for messages.

    Raises:
        UserError: an unknown key, a wrong type, or a value that the dataclass itself refuses.
    """
    if not isinstance(values, dict):
        some = ", ".join(f.name for f in fields(typing.cast(Any, cls))[:4])
        raise UserError(f"{prefix.rstrip('.') or 'config'}={shown(values)}: must be a section with keys ({some} ...), not a single value")
    hints = typing.get_type_hints(cls)
    names = {key_of(name): name for name in hints}
    arguments = {}
    for key, value in values.items():
        whole = f"{prefix}{key}"
        if key not in names:
            raise UserError(f"{whole}={shown(value)}: no such key{nearest_key(whole, (prefix + known for known in names))}")
        arguments[names[key]] = _convert(whole, value, hints[names[key]])
    try:
        return cls(**arguments)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error


def _convert(key: str, value: Any, hint: Any) -> Any:
    if is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, f"{key}.")
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        converted = _convert_to(key, value, option)
        if converted is not _WRONG:
            return converted
    guess = nearest(value, _choices(options)) if isinstance(value, str) else ""
    found = shown(repr(value) if isinstance(value, str) and value.lstrip("+-")[:1].isdigit() else value)  # '3' is not 3
    wanted = ("a finite number" if o is float and isinstance(value, float) else _described(o) for o in options)
    raise UserError(f"{key}={found}: must be {' or '.join(wanted)}{guess}")


_WRONG = object()


def _convert_to(key: str, value: Any, hint: Any) -> Any:
    """`value` as the plain type `hint`, or _WRONG."""
    if get_origin(hint) is Literal:
        return next((a for a in get_args(hint) if a == value and type(a) is type(value)), _WRONG)
    if get_origin(hint) is dict:
        items = value.items() if isinstance(value, dict) else None
        return _WRONG if items is None else {str(name): _convert(f"{key}.{name}", item, get_args(hint)[1]) for name, item in items}
    if get_origin(hint) is list:
        items = value if isinstance(value, list) else [value] if isinstance(value, str) else None
        return _WRONG if items is None else [_convert(f"{key}[{i}]", item, get_args(hint)[0]) for i, item in enumerate(items)]
    if hint is bool:
        return value if isinstance(value, bool) else _WRONG
    if isinstance(value, bool):
        return _WRONG
    if hint is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return int(value) if whole else _WRONG
    if hint is float:
        return float(value) if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max else _WRONG  # nan is not
    if hint is str:
        return str(value) if isinstance(value, (str, int, float)) else _WRONG
    return _WRONG


def _choices(options: Iterable[Any]) -> list[str]:
    return [str(a) for o in options if get_origin(o) is Literal for a in get_args(o)]


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(shown(a) for a in get_args(hint)) if len(get_args(hint)) > 1 else shown(get_args(hint)[0])
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        if is_dataclass(item):
            return f"a list of sections, [{{{fields(item)[0].name}: ...}}, ...]"
        return f"a list such as [{'a, b' if item is str else '1, 2'}]"
    if get_origin(hint) is dict:
        return f"names with values, {{name: {'text' if get_args(hint)[1] is str else '1'}, ...}}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[hint]


def shown(value: Any) -> str:
    """A value as one would write it on the command line, cut to a readable length."""
    if isinstance(value, list):
        text = f"[{', '.join(shown(item) for item in value)}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{name}: {shown(item)}' for name, item in value.items())}}}"
    elif value is None or isinstance(value, bool):
        text = {True: "true", False: "false", None: "null"}[value]
    else:
        text = repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


# Common words whose closest spelling is something else.
_MEANT = {"gpu": "cuda", "trainium": "neuron", "trn": "neuron", "trn2": "neuron", "trn3": "neuron"}


def nearest(name: str, known: Iterable[str]) -> str:
    """`. Did you mean X?` for the closest of `known`, or nothing if none is close."""
    known = list(known)
    close = [m for m in (_MEANT.get(name),) if m in known] or difflib.get_close_matches(name, known, 1, 0.6)
    return f". Did you mean {close[0]}?" if close else ""


def nearest_and_all(name: str, known: Iterable[str]) -> str:
    """`nearest`, and then all of `known`, for a short list."""
    return f"{nearest(name, known) or '.'} There are: {', '.join(known)}"


def nearest_key(key: str, known: Iterable[str]) -> str:
    """`nearest` for dotted keys: the same name in another section is close, another name in the same section is not."""
    known = list(known)
    section, _, last = key.rpartition(".")
    uses = Counter(k.rpartition(".")[2] for k in known)
    close = []
    for candidate in known:
        place, _, name = candidate.rpartition(".")
        alike, near = (difflib.SequenceMatcher(None, *pair).ratio() for pair in ((last, name), (section, place)))
        if (alike >= 0.6 and near >= 0.6) or (alike >= 0.75 and uses[name] == 1) or (alike >= 0.4 and section == place != ""):
            close.append((alike == 1, alike + near / 2, candidate))
    return f". Did you mean {max(close)[2]}?" if close else ""
