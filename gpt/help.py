"""The help texts, made from the schema's docstrings and the folders of `configs/`, so that they cannot lag behind."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from gpt.arguments import config_directory, groups
from gpt.commands import COMMANDS
from gpt.config import RunConfig
from gpt.typed import key_of

WIDTH = 118

EXAMPLES = {
    "pretrain": [
        ("gpt pretrain", "a small model on the standard library"),
        ("gpt pretrain data=text data.paths=[book.txt]", "on your own text"),
        ("gpt pretrain model.n_layer=8 train.budget=10Mtokens", "a deeper model, for longer"),
        ("gpt pretrain experiment=quick device=cpu", "half a minute, to see every part work"),
        ("gpt pretrain resume=runs/<id>", "continue a run that was stopped"),
        ("gpt pretrain parallel=ddp", "on every GPU of this machine; launch.nproc=2: in two processes, on a CPU too"),
        ("gpt pretrain -m optimizer.lr=0.003,0.01 model=nano,gpt2-mini", "every combination, one table"),
    ],
    "finetune": [
        ("gpt finetune init=runs/<id>", "teach it to write the first line of docstrings"),
        ("gpt finetune init=<folder> data=jsonl data.paths=[chats.jsonl]", "rows of {prompt, completion}, {messages} or {text}"),
        ("gpt finetune init=<folder> data=jsonl data.paths=[qa.jsonl] data.fields.prompt=question", "with fields of other names"),
        ("gpt finetune init=runs/<id> data=stdlib_topics", "on plain text of another kind"),
        ("gpt finetune init=<folder> lora.rank=8 optimizer.lr=1e-3", "adapters alone: model/ is merged, adapter/ is for PEFT"),
        ("gpt finetune init=runs/<id> experiment=finetune_language", "English prose, with a tokenizer of its own"),
        ("gpt finetune init=runs/<id> freeze=first_n freeze.first_n_blocks=4", "only the upper blocks train"),
        ("gpt finetune init=runs/<id> freeze=search", "several plans for a while each: loss against time and memory"),
        ("gpt finetune -m init=runs/<id> seed=1,2,3 optimizer.lr=1e-4,3e-4", "every combination, one table"),
    ],
    "generate": [
        ('gpt generate model=runs/<id> prompt="import " max_tokens=200 temperature=0.8 top_k=50', "continue a prompt"),
        ("gpt generate model=runs/<id> \"prompts=['import ', 'class ']\" n=3", "three continuations of each"),
        ("gpt generate model=<folder> interactive=true", "chat in the terminal"),
        ("gpt generate model=<folder> quantize=int8 verbose=true", "8-bit weights; print the speeds"),
    ],
    "evaluate": [
        ("gpt evaluate model=runs/<id>", "on what the run held out"),
        ("gpt evaluate model=<folder> data=text data.paths=[book.txt]", "on your own text, all of it"),
        ("gpt evaluate model=runs/<id> metrics=[rouge,chrf]", "answers to held-out prompts, compared with what is right"),
        ("gpt evaluate model=<folder> tasks=[hellaswag] limit=100", "tasks of lm-evaluation-harness"),
    ],
    "precompile": [
        ("gpt precompile model=gpt2 device=neuron", "before the run of the same settings, which then starts at once"),
        ("gpt precompile device=neuron parallel=fsdp", "with as many processes as the run will have"),
        ("gpt finetune precompile=true init=runs/<id>", "the same for a fine-tuning run"),
    ],
    "parity": [
        ("gpt parity", "the default run's model and data, on the device found"),
        ("gpt parity model=gpt2-mini device=cuda precision=bf16", "the settings of gpt pretrain"),
        ("gpt parity init=runs/<id> train.micro_batch=4", "with the weights of a run; on four sequences"),
    ],
    "export": [
        ("gpt export run=runs/<id>", "the best weights, into runs/<id>/export"),
        ("gpt export run=runs/<id>/checkpoints/step-00001000 dtype=bfloat16 output=my-model", "one checkpoint, in bfloat16"),
    ],
    "prepare": [
        ("gpt prepare data=text data.paths=[corpus/] tokenizer.vocab_size=8192", "a tokenizer and token shards, for later runs"),
        ("gpt prepare data=jsonl data.paths=[web.jsonl.zst] data.deduplicate=exact data.redact=[email,ip]", "cleaned on the way"),
        ("gpt prepare inspect=<folder>", "check prepared tokens and look into them"),
    ],
    "inspect": [
        ("gpt inspect data=stdlib_docstrings n=3", "what is learned, what is masked, where examples end"),
        ("gpt inspect data=jsonl data.paths=[chats.jsonl] model=<folder>", "with the tokenizer of a model"),
        ('gpt inspect tokens text="Hello, world"', "how a text is cut"),
    ],
    "inspect tokens": [
        ('gpt inspect tokens text="Hello, world"', "with a tokenizer trained on the standard library"),
        ('gpt inspect tokens text="Hello, world" model=<folder>', "with the tokenizer and the positions of a model"),
    ],
    "runs": [
        ("gpt runs", "all runs, the newest last"),
        ("gpt runs dir=sweeps/lr sort=val_loss", "those of another folder, the best first"),
    ],
    "runs compare": [
        ("gpt runs compare pretrain-20261120-101112-kmqz pretrain-20261121-141516-abcd", "two runs, by their ids"),
        ("gpt runs compare kmqz abcd elsewhere/my-run output=three.html", "by the ends of their ids; by a path"),
        ("gpt runs compare runs=[kmqz,abcd]", "the same as a setting"),
    ],
    "jobs": [
        ("gpt jobs", "the newest jobs, of this machine and of others"),
        ("gpt jobs status kmqz", "where one stands, by the end of its run's id"),
    ],
    "jobs list": [
        ("gpt jobs list", "the newest jobs, of this machine and of others"),
        ("gpt jobs list region=eu-west-1 n=50", "those of another region, more of them"),
    ],
    "jobs status": [
        ("gpt jobs status pretrain-20261120-101112-kmqz", "by the run's id"),
        ("gpt jobs status kmqz abcd", "two runs, by the ends of their ids"),
    ],
    "jobs logs": [
        ("gpt jobs logs kmqz", "from the first line on, until the job ends; Ctrl-C leaves it running"),
        ("gpt jobs logs kmqz lines=20", "from the last lines on"),
    ],
    "jobs wait": [
        ("gpt jobs wait kmqz && gpt jobs fetch kmqz", "in a script"),
    ],
    "jobs stop": [
        ("gpt jobs stop kmqz", "gpt pretrain resume=runs/<id> goes on with it later"),
    ],
    "jobs fetch": [
        ("gpt jobs fetch kmqz", "then: gpt generate model=runs/<id>"),
        ("gpt jobs fetch kmqz checkpoints=true", "to go on with it here: gpt pretrain resume=runs/<id> launch=local"),
    ],
    "doctor": [
        ("gpt doctor", "every check, in some 15 seconds; most of it is torch.compile"),
        ("gpt doctor device=neuron run_dir=~/runs", "for a machine that is meant for Trainium, with the runs elsewhere"),
        ("gpt doctor aws=true role=<name>", "AWS's credentials, region and role too"),
        ("gpt doctor --json", "one JSON object, for scripts"),
    ],
}


def overview() -> str:
    """`gpt --help`."""
    rows = "\n".join(f"  {name:<14} {command.what}" for name, command in COMMANDS.items())
    return (
        "gpt: train GPT models and write with them.\n\nusage: gpt <command> [key=value ...]\n\n"
        f"commands:\n{rows}\n\n"
        "flags:\n  --help             what a command can be told\n  --cfg              print the composed config and exit\n"
        "  --config-dir DIR   a folder of your own with more options for the config groups\n"
        "  -m, --multirun     pretrain, finetune: a run for each combination of key=a,b,c\n  --version"
    )


def command(name: str, config_dir: Path | None = None) -> str:
    """`gpt <command> --help`."""
    schema, words = COMMANDS[name].config, COMMANDS[name].words
    lines = [
        f"gpt {name}: {COMMANDS[name].what}",
        "",
        f"usage: gpt {name} {f'<{words}> ... ' if words else ''}{''.join(f'[--{key}] ' for key in COMMANDS[name].flags)}[key=value ...]",
    ]
    lines += ["A text is taken word for word as the shell gives it; a list is written [a.txt, 'b c.txt'].", ""]
    lines += [f"exit code: {COMMANDS[name].exit_codes}", ""] if COMMANDS[name].exit_codes else []
    lines += ["examples:"]
    lines += [f"  {example}   # {why}" for example, why in EXAMPLES[name]]
    fields, defaults = typing.get_type_hints(schema), _composed_defaults(COMMANDS[name].root)
    used = {
        group: options
        for group, options in groups(config_dir).items()
        if schema is RunConfig or dataclasses.is_dataclass(fields.get(group))
    }
    lines += ["", "groups (group=option):"] if used else []
    for group, options in used.items():
        lines += textwrap.wrap(", ".join(options), WIDTH, initial_indent=f"  {group:<12} ", subsequent_indent=" " * 15)
    lines += ["", "keys (key=default):", *_section(schema, "", defaults)]
    return "\n".join(lines)


def _composed_defaults(root_name: str) -> dict[str, Any]:
    """The values of a root file's default groups, read without Hydra, whose import alone would cost half the time there is."""
    import yaml

    directory = config_directory()
    if not (directory / f"{root_name}.yaml").is_file():
        return {}
    root = yaml.safe_load((directory / f"{root_name}.yaml").read_text(encoding="utf-8"))
    values = {k: v for k, v in root.items() if k != "defaults"}
    for entry in root["defaults"]:
        for group, option in entry.items() if isinstance(entry, dict) else ():
            if option is not None:
                values[group] = yaml.safe_load((directory / group / f"{option}.yaml").read_text(encoding="utf-8"))
    return values


def _section(cls: type, prefix: str, values: dict[str, Any]) -> Iterator[str]:
    """The keys of one dataclass with the defaults in `values`, or else its own."""
    docs = {field: text for part in reversed(cls.__mro__[:-1]) for field, text in _field_docs(part.__module__)[part.__name__].items()}
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
        default = values.get(key := key_of(field.name), default)
        choices = [str(a).lower() for option in (hint, *get_args(hint)) if get_origin(option) is Literal for a in get_args(option)]
        known = f" ({' | '.join(choices)})" if len(choices) > 1 else ""
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        yield from textwrap.wrap(
            f"{docs.get(field.name, '')}{known}",
            WIDTH,
            initial_indent=f"  {f'{prefix}{key}={shown}':<32} ",
            subsequent_indent=" " * 35,
        )
    for name, section in sections:
        yield ""
        yield from _section(typing.cast(type, section), f"{prefix}{name}.", values.get(name, {}))


@functools.cache
def _field_docs(module: str) -> dict[str, dict[str, str]]:
    """Class of the module -> field -> the docstring below it."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            docs = found.setdefault(node.name, {})
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                    docs[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found
