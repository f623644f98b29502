"""The help texts, made from the schema's docstrings and the folders of `configs/`, so that they cannot lag behind."""

from __future__ import annotations

import ast
import dataclasses
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from gpt import config as schema
from gpt.compose import config_directory, groups
from gpt.model import config as model_schema

WIDTH = 118

EXAMPLES = {
    "pretrain": [
        ("gpt pretrain", "a small model on the standard library"),
        ("gpt pretrain data=text data.paths=[book.txt]", "on your own text"),
        ("gpt pretrain model.n_layer=8 train.budget=10Mtokens", "a deeper model, for longer"),
        ("gpt pretrain experiment=quick device=cpu", "half a minute, to see every part work"),
        ("gpt pretrain resume=runs/<id>", "continue a run that was stopped"),
    ],
    "generate": [('gpt generate model=runs/<id> prompt="import " max_tokens=200 temperature=0.8 top_k=50', "continue a prompt")],
}


def overview(commands: dict[str, str]) -> str:
    """`gpt --help`."""
    rows = "\n".join(f"  {name:<10} {what}" for name, what in commands.items())
    return (
        "gpt: train GPT models and write with them.\n\nusage: gpt <command> [key=value ...]\n\n"
        f"commands:\n{rows}\n\n"
        "flags:\n  --help             what a command can be told\n  --cfg              print the composed config and exit\n"
        "  --config-dir DIR   a folder of your own with more options for the config groups\n  --version"
    )


def command(name: str, what: str, config_dir: Path | None = None) -> str:
    """`gpt <command> --help`."""
    lines = [f"gpt {name}: {what}", "", f"usage: gpt {name} [key=value ...]"]
    lines += ["A text is taken word for word as the shell gives it; a list is written [a.txt, 'b c.txt'].", "", "examples:"]
    lines += [f"  {example}   # {why}" for example, why in EXAMPLES[name]]
    if name == "generate":
        return "\n".join([*lines, "", "keys (key=default):", *_section(schema.GenerateConfig, "", {})])
    lines += ["", "groups (group=option):"]
    for group, options in groups(config_dir).items():
        lines += textwrap.wrap(", ".join(options), WIDTH, initial_indent=f"  {group:<12} ", subsequent_indent=" " * 15)
    lines += ["", "keys (key=default):", *_section(schema.RunConfig, "", _composed_defaults())]
    return "\n".join(lines)


def _composed_defaults() -> dict[str, Any]:
    """The values of the default groups, read without Hydra, whose import alone would cost half the time there is."""
    import yaml

    directory = config_directory()
    root = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    values = {k: v for k, v in root.items() if k != "defaults"}
    for entry in root["defaults"]:
        for group, option in entry.items() if isinstance(entry, dict) else ():
            if option is not None:
                values[group] = yaml.safe_load((directory / group / f"{option}.yaml").read_text(encoding="utf-8"))
    return values


def _section(cls: type, prefix: str, values: dict[str, Any]) -> Iterator[str]:
    """The keys of one dataclass with the defaults in `values`, or else its own."""
    docs = _field_docs()[cls.__name__]
    hints = typing.get_type_hints(cls)
    sections = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            sections.append((field.name, hint))
            continue
        if field.name == "command":
            continue
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        default = values.get(field.name, default)
        choices = [str(a).lower() for option in (hint, *get_args(hint)) if get_origin(option) is Literal for a in get_args(option)]
        known = f" ({'|'.join(choices)})" if len(choices) > 1 else ""
        shown = "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        yield from textwrap.wrap(
            f"{docs.get(field.name, '')}{known}",
            WIDTH,
            initial_indent=f"  {f'{prefix}{field.name}={shown}':<32} ",
            subsequent_indent=" " * 35,
        )
    for name, section in sections:
        yield ""
        yield from _section(typing.cast(type, section), f"{name}.", values.get(name, {}))


def _field_docs() -> dict[str, dict[str, str]]:
    """Class -> field -> the docstring below it."""
    found: dict[str, dict[str, str]] = {}
    for module in (schema, model_schema):
        tree = ast.parse(Path(typing.cast(Any, module).__file__).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                docs = found.setdefault(node.name, {})
                for field, text in zip(node.body, node.body[1:], strict=False):
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                        docs[field.target.id] = ast.literal_eval(text.value)
    return found
