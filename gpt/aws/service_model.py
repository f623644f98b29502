"""What botocore's own model of SageMaker says of a CreateTrainingJob request. No client, region, credentials or network is needed.

botocore checks names, types and what is missing; the walk here checks what it leaves to the service: choices, patterns, and the least
and largest lengths, counts and numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from gpt.errors import UserError

_SPACES = r" \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Java's classes, within brackets, as the model has them. Where it has \p{L} it has \p{N} and _ too, and together they are \w.
_CLASSES = {r"\p{Alnum}": "a-zA-Z0-9", r"\p{L}": r"\w", r"\p{N}": r"\w", r"\p{Z}": _SPACES}


@dataclass(frozen=True)
class Violation:
    """One thing that the model forbids."""

    path: tuple[str | int, ...]
    """Members, numbers in lists and names in maps, from the request down."""
    kind: Literal["missing", "unknown", "type", "choice", "pattern", "short", "long", "few", "many", "low", "high"]
    """short, long: characters; few, many: entries; low, high: numbers."""
    value: Any = None
    """What is there."""
    limit: Any = None
    """The choices, the pattern, the number that it must keep to, or the types that are allowed."""
    of_name: bool = False
    """Whether it is of a map's name rather than of its value."""


def violations(request: dict[str, Any]) -> list[Violation]:
    """Everything in a request that the service's model forbids.

    Raises:
        UserError: botocore is not installed.
    """
    shape = _operation().input_shape
    return [*_as_botocore_finds(request, shape), *_walk(request, shape, ())]


def version() -> str:
    """Of botocore, whose model this is."""
    _operation()
    import botocore  # pyright: ignore[reportMissingImports]  # of the extra aws

    return str(botocore.__version__)


@cache
def regions() -> frozenset[str]:
    """Where SageMaker is, as far as botocore knows."""
    _operation()
    from botocore.session import Session  # pyright: ignore[reportMissingImports]

    session = Session()
    return frozenset(region for part in session.get_available_partitions() for region in session.get_available_regions("sagemaker", part))


@cache
def _operation() -> Any:
    try:
        from botocore.loaders import create_loader  # pyright: ignore[reportMissingImports]  # of the extra aws
        from botocore.model import ServiceModel  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("launch=sagemaker: boto3 is not installed; pip install 'gpt-trainer[aws]'") from error
    return ServiceModel(create_loader().load_service_model("sagemaker", "service-2"), "sagemaker").operation_model("CreateTrainingJob")


_AT = r"(?P<at>.+?)"
_FOUND: tuple[tuple[Literal["missing", "unknown", "type"], re.Pattern[str]], ...] = (
    ("missing", re.compile(rf'Missing required parameter in {_AT}: "(?P<name>[^"]*)"', re.DOTALL)),
    ("unknown", re.compile(rf'Unknown parameter in {_AT}: "(?P<name>.*)", must be one of: (?P<limit>.*)', re.DOTALL)),
    ("type", re.compile(
        rf"Invalid type for parameter {_AT}, value: (?P<value>.*), type: <class .*>, valid types: (?P<limit>.*)", re.DOTALL
    )),
)  # fmt: skip


def _as_botocore_finds(request: dict[str, Any], shape: Any) -> Iterator[Violation]:
    """What botocore finds, out of the text that is its only public report; ranges apart, which the walk tells with their path."""
    from botocore.validate import ParamValidator  # pyright: ignore[reportMissingImports]

    for line in ParamValidator().validate(request, shape).generate_report().splitlines():
        if line.startswith(("Invalid length", "Invalid value")):
            continue
        for kind, pattern in _FOUND:
            if match := pattern.fullmatch(line):
                path = (*_path(match["at"]), *([match["name"]] if kind != "type" else []))
                groups = match.groupdict()
                yield Violation(path, kind, groups.get("value"), groups.get("limit"))
                break
        else:
            yield Violation((), "type", line)


def _path(text: str) -> tuple[str | int, ...]:
    """`InputDataConfig[0].ChannelName`, as botocore writes it, in parts."""
    if text == "input":
        return ()
    parts = re.findall(r"\[(\d+)\]|([^.\[\]]+)", text)
    return tuple(int(number) if number else name for number, name in parts)


def _walk(value: Any, shape: Any, path: tuple[str | int, ...], of_name: bool = False) -> Iterator[Violation]:
    """What botocore leaves out. Values of a wrong type it has told already."""
    kind = shape.type_name
    if kind == "structure" and isinstance(value, dict):
        for name in [name for name in value if name in shape.members]:
            yield from _walk(value[name], shape.members[name], (*path, name))
    elif kind == "list" and isinstance(value, (list, tuple)):
        yield from _outside(len(value), shape, path, "few", "many")
        for number, item in enumerate(value):
            yield from _walk(item, shape.member, (*path, number))
    elif kind == "map" and isinstance(value, dict):
        yield from _outside(len(value), shape, path, "few", "many")
        for name, item in value.items():
            yield from _walk(name, shape.key, (*path, str(name)), of_name=True)
            yield from _walk(item, shape.value, (*path, str(name)))
    elif kind in ("integer", "long") and isinstance(value, int):
        yield from _outside(value, shape, path, "low", "high")
    elif kind == "string" and isinstance(value, str):
        yield from _text(value, shape, path, of_name)


def _text(value: str, shape: Any, path: tuple[str | int, ...], of_name: bool) -> Iterator[Violation]:
    if shape.enum and value not in shape.enum:
        yield Violation(path, "choice", value, tuple(shape.enum), of_name)
    if wrong := list(_outside(len(value), shape, path, "short", "long", value, of_name)):
        yield from wrong
    elif (pattern := shape.metadata.get("pattern")) and (compiled := python_pattern(pattern)) and not compiled.fullmatch(value):
        yield Violation(path, "pattern", value, pattern, of_name)


def _outside(
    number: int, shape: Any, path: tuple[str | int, ...], below: Any, above: Any, value: Any = None, of_name: bool = False
) -> Iterator[Violation]:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    if low is not None and number < low:
        yield Violation(path, below, number if value is None else value, low, of_name)
    if high is not None and number > high:
        yield Violation(path, above, number if value is None else value, high, of_name)


@cache
def python_pattern(pattern: str) -> re.Pattern[str] | None:
    """A pattern of the model, which is Java's, for Python; None where it has a class that is not known here."""
    for java, python in _CLASSES.items():
        pattern = pattern.replace(java, python)
    return None if r"\p" in pattern else re.compile(pattern)
