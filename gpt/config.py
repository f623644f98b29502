"""The one schema: everything that can be set, its type, its default and what it means.

`configs/` holds values, this file holds types. A run's config is composed once (`gpt.compose`), made into these dataclasses
(`from_dict`) and validated; nothing after that sees an untyped config. Imports no torch.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from gpt.errors import UserError
from gpt.model.config import GPTConfig


@dataclass
class RunSection:
    """Where a run's files go: `<dir>/<id>`."""

    id: str = ""
    """Name of the run. Empty: `<command>-<time>-<4 letters>`."""
    dir: str = "runs"
    """Folder that holds run directories."""


@dataclass
class TokenizerConfig:
    """How text becomes ids."""

    name: Literal["bpe", "byte", "pretrained"] = "bpe"
    """Byte-level BPE trained on the corpus, one id a byte, or one that exists."""
    vocab_size: int = 2048
    """Ids to train (bpe)."""
    path: str | None = None
    """Folder, tokenizer.json or hub id of a pretrained tokenizer."""


@dataclass
class DataConfig:
    """What to train on."""

    source: Literal["stdlib", "text"] = "stdlib"
    """The running Python's own standard library, or text files."""
    paths: list[str] = field(default_factory=list)
    """Files, folders (every file below) and globs, for source=text."""
    holdout: float = 0.05
    """Share of the text that is held out for validation."""
    on_error: Literal["raise", "skip"] = "skip"
    """A binary file or invalid UTF-8: stop, or leave the file out (binary) and replace the bytes (UTF-8), counted."""
    cache_dir: str = "~/.cache/gpt"
    """Where tokenised text is kept between runs."""


@dataclass
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["muon", "adamw"] = "muon"
    """Muon for the blocks' matrices with AdamW for the rest, or AdamW for everything."""
    lr: float = 0.01
    """Peak learning rate; under muon, of the blocks' matrices."""
    adam_lr: float = 0.005
    """Under muon: peak learning rate of everything else."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    momentum: float = 0.95
    """Of muon."""
    beta1: float = 0.9
    """Of adamw: decay of the gradient average."""
    beta2: float = 0.95
    """Of adamw: decay of the squared-gradient average."""
    eps: float = 1e-8
    """Of adamw: added to the denominator."""


@dataclass
class ScheduleConfig:
    """The learning rate over the run, as a share of its peak."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    """Linear warm-up, then: a half cosine; flat and a linear decay at the end; or flat."""
    warmup: float = 0.02
    """Steps of warm-up, or their share of the run if below 1."""
    decay: float = 0.5
    """wsd: share of the run, at its end, over which the rate decays."""
    final: float = 0.0
    """cosine and wsd: the rate at the end, as a share of the peak."""


@dataclass
class TrainConfig:
    """The loop."""

    budget: str = "1Mtokens"
    """How long to train: `500steps`, `10Mtokens`, `2epochs` or wall time, `90s`, `3min`, `2h`."""
    batch_tokens: int = 4096
    """Tokens per optimizer step, whatever the machine."""
    micro_batch: Literal["auto"] | int = "auto"
    """Sequences per forward pass; gradients are accumulated up to batch_tokens."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 200
    """Steps between validations; 0: only at the end."""
    eval_tokens: int = 65536
    """Held-out tokens used for the validations within the run."""
    final_eval_tokens: int = 1_000_000
    """Held-out tokens that the best weights are measured on at the end."""
    max_skipped_steps: int = 10
    """Stop after this many steps in a row with a loss or gradient that is not finite."""
    overfit: bool = False
    """Train on the first batch only, again and again: the loss must go to 0, or something is broken."""
    sample_prompts: list[str] = field(default_factory=lambda: ["import ", "def ", "class "])
    """At the end the model continues each of these."""
    sample_tokens: int = 120
    """Tokens per sample."""


@dataclass
class CheckpointConfig:
    """When to save, and how many to keep."""

    every: str = "1min"
    """Steps (`500`, `500steps`) or wall time (`90s`, `10min`) between checkpoints; one is always made at the end."""
    keep_last: int = 2
    """Newest checkpoints kept; the best one by validation loss is kept besides."""


@dataclass
class DeviceConfig:
    """The machine to compute on."""

    name: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes the accelerator that torch finds, else the CPU."""
    threads: int = 0
    """CPU threads; 0: as many as torch takes by itself."""


@dataclass
class ParallelConfig:
    """How a model is spread over devices."""

    name: Literal["none"] = "none"
    """One process, one device."""


@dataclass
class FreezeConfig:
    """Which parameters do not train."""

    name: Literal["none"] = "none"
    """Everything trains."""


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    name: Literal["none"] = "none"
    """Nowhere."""


@dataclass
class LaunchConfig:
    """Where the run runs."""

    name: Literal["local"] = "local"
    """Here, in this process."""


@dataclass
class RunConfig:
    """A training run, whole."""

    command: Literal["pretrain"] = "pretrain"
    """What the run does."""
    seed: int = 1337
    """Of the initial weights, the order of the data and dropout."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the matrix products; weights and sums are fp32. auto: bf16 where the chip multiplies it."""
    compile: Literal["auto", True, False] = "auto"
    """torch.compile block by block; auto: where it pays within the run."""
    resume: str = "auto"
    """auto: continue the newest whole checkpoint of this run.id; never: refuse an existing run; or a run directory."""
    run: RunSection = field(default_factory=RunSection)
    model: GPTConfig = field(default_factory=GPTConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def validate(self) -> None:
        """Check what types cannot.

        Raises:
            UserError: the first impossible value or combination, with its key.
        """
        _validate(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as they stand in config.yaml."""
        return asdict(self)


@dataclass
class GenerateConfig:
    """One call of `gpt generate`."""

    model: str = ""
    """A run directory, its model/ folder, or a Hugging Face directory or hub id of a supported architecture."""
    prompt: str = ""
    """What to continue. Empty: from the start of a document."""
    max_tokens: int = 200
    """Most tokens to write."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities reach p together."""
    stop: list[str] = field(default_factory=list)
    """Stop before any of these texts."""
    seed: int | None = None
    """Of the sampling; none: another text each time."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the weights and caches."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        if not self.model:
            raise UserError("model: which model? Give a run directory or a Hugging Face directory, e.g. model=runs/<id>")
        for name, low in (("max_tokens", 1), ("temperature", 0), ("top_k", 0)):
            if getattr(self, name) < low:
                raise UserError(f"{name}={getattr(self, name)} must be at least {low}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be greater than 0 and at most 1")


@dataclass(frozen=True)
class Span:
    """A length of training: so many steps, tokens, epochs or seconds."""

    unit: Literal["steps", "tokens", "epochs", "seconds"]
    amount: float


_SPAN = re.compile(r"\s*([0-9][0-9_]*\.?[0-9]*(?:e[0-9]+)?)\s*([kKMGBT]?)\s*(steps?|tokens?|epochs?|s|sec|min|h|)\s*$")
_SCALE = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600}


def parse_span(key: str, text: str) -> Span:
    """Read `500steps`, `10Mtokens`, `2epochs`, `90s`, `3min`, `2h`; a bare number counts steps.

    Raises:
        UserError: anything else, or nothing at all.
    """
    match = _SPAN.match(text)
    if not match or float(match[1].replace("_", "")) <= 0:
        raise UserError(f"{key}={text}: must be a positive length such as 500steps, 10Mtokens, 2epochs, 90s or 3min")
    amount, unit = float(match[1].replace("_", "")) * _SCALE[match[2]], match[3]
    if unit in _SECONDS:
        return Span("seconds", amount * _SECONDS[unit])
    name: Any = (unit or "step").rstrip("s") + "s"
    return Span(name, amount)


def _validate(c: RunConfig) -> None:
    def at_least(key: str, value: float, low: float) -> None:
        if value < low:
            raise UserError(f"{key}={value} must be at least {low}")

    def share(key: str, value: float, inclusive: bool = True) -> None:
        if not (0 <= value <= 1 if inclusive else 0 < value < 1):
            raise UserError(f"{key}={value} must be {'from 0 to 1' if inclusive else 'between 0 and 1'}")

    length = c.model.context_length
    at_least("seed", c.seed, 0)
    at_least("train.batch_tokens", c.train.batch_tokens, 1)
    if c.train.batch_tokens % length:
        below = c.train.batch_tokens // length * length
        near = f"{below} or {below + length}" if below else f"{length}"
        raise UserError(f"train.batch_tokens={c.train.batch_tokens} is not a multiple of model.context_length={length} (nearest: {near})")
    sequences = c.train.batch_tokens // length
    if isinstance(c.train.micro_batch, int):
        at_least("train.micro_batch", c.train.micro_batch, 1)
        if sequences % c.train.micro_batch:
            divisors = [d for d in range(1, sequences + 1) if sequences % d == 0]
            near = min(divisors, key=lambda d: abs(d - int(c.train.micro_batch)))
            raise UserError(
                f"train.micro_batch={c.train.micro_batch} does not divide the {sequences} sequences of a batch (nearest: {near})"
            )
    for key, value, low in (
        ("train.grad_clip", c.train.grad_clip, 0), ("train.log_every", c.train.log_every, 1),
        ("train.eval_every", c.train.eval_every, 0), ("train.eval_tokens", c.train.eval_tokens, length),
        ("train.final_eval_tokens", c.train.final_eval_tokens, length),
        ("train.max_skipped_steps", c.train.max_skipped_steps, 1), ("train.sample_tokens", c.train.sample_tokens, 1),
        ("checkpoint.keep_last", c.checkpoint.keep_last, 1), ("device.threads", c.device.threads, 0),
        ("optimizer.weight_decay", c.optimizer.weight_decay, 0), ("schedule.warmup", c.schedule.warmup, 0),
    ):  # fmt: skip
        at_least(key, value, low)
    for key in ("lr", "adam_lr", "eps"):
        if not getattr(c.optimizer, key) > 0:
            raise UserError(f"optimizer.{key}={getattr(c.optimizer, key)} must be greater than 0")
    for key in ("momentum", "beta1", "beta2"):
        share(f"optimizer.{key}", getattr(c.optimizer, key))
    share("schedule.decay", c.schedule.decay)
    share("schedule.final", c.schedule.final)
    share("data.holdout", c.data.holdout, inclusive=False)
    if c.tokenizer.name == "pretrained" and not c.tokenizer.path:
        raise UserError("tokenizer.path: tokenizer=pretrained needs a folder, a tokenizer.json or a hub id")
    if c.tokenizer.name == "bpe":
        at_least("tokenizer.vocab_size", c.tokenizer.vocab_size, 257)
        if c.model.vocab_size and c.model.vocab_size < c.tokenizer.vocab_size:
            raise UserError(
                f"model.vocab_size={c.model.vocab_size} is smaller than tokenizer.vocab_size={c.tokenizer.vocab_size} "
                "(0 takes the tokenizer's)"
            )
    if c.data.source == "text" and not c.data.paths:
        raise UserError("data.paths: data=text needs files, folders or globs, e.g. data.paths=[book.txt]")
    if c.data.source == "stdlib" and c.data.paths:
        raise UserError(f"data.paths={c.data.paths} is not read by data=stdlib; say data=text")
    if parse_span("checkpoint.every", c.checkpoint.every).unit not in ("steps", "seconds"):
        raise UserError(f"checkpoint.every={c.checkpoint.every}: must be steps or a time, such as 500steps or 5min")
    budget = parse_span("train.budget", c.train.budget)
    steps = {"steps": budget.amount, "tokens": budget.amount / c.train.batch_tokens}.get(budget.unit)
    if steps is not None and c.schedule.warmup >= 1 and c.schedule.warmup > steps:
        raise UserError(
            f"schedule.warmup={c.schedule.warmup:g} steps is longer than the run: train.budget={c.train.budget} is {steps:.0f} steps"
        )
    if c.resume not in ("auto", "never") and not Path(c.resume).is_dir():
        guess = nearest(c.resume, ("auto", "never"))
        raise UserError(f"resume={c.resume}: must be auto, never or a run directory, and there is no such directory{guess}")
    if c.run.id and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", c.run.id):
        raise UserError(f"run.id={c.run.id}: letters, digits, '.', '_' and '-' only")


def nearest(name: str, known: Iterable[str]) -> str:
    """`. Did you mean X?` for the closest of `known`, or nothing if none is close."""
    known = list(known)
    last = name.rpartition(".")[2]  # the right name in the wrong section, or in none
    close = [k for k in known if k.rpartition(".")[2] == last][:1] or difflib.get_close_matches(name, known, 1, 0.5)
    return f". Did you mean {close[0]}?" if close else ""


def schema_keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every settable key below a dataclass, dotted, with its type; sections have the dataclass as theirs."""
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        keys[prefix + f.name] = hints[f.name]
        if is_dataclass(hints[f.name]):
            keys |= schema_keys(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")
    return keys


T = TypeVar("T")


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
        raise UserError(f"{prefix.rstrip('.')}={values}: must be a section with keys, not a single value")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            guess = nearest(key, (prefix + known for known in hints))
            raise UserError(f"{key}={value}: no such key{guess}")
        arguments[name] = _convert(key, value, hints[name])
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
    guess = nearest(str(value), _choices(options)) if isinstance(value, str) else ""
    raise UserError(f"{key}={_shown(value)}: must be {' or '.join(_described(o) for o in options)}{guess}")


_WRONG = object()


def _convert_to(key: str, value: Any, hint: Any) -> Any:
    """`value` as the plain type `hint`, or _WRONG."""
    if get_origin(hint) is Literal:
        return next((a for a in get_args(hint) if a == value and type(a) is type(value)), _WRONG)
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
        return float(value) if isinstance(value, (int, float)) and value == value else _WRONG
    if hint is str:
        return str(value) if isinstance(value, (str, int, float)) else _WRONG
    return _WRONG


def _choices(options: Iterable[Any]) -> list[str]:
    return [str(a) for o in options if get_origin(o) is Literal for a in get_args(o)]


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(_shown(a) for a in get_args(hint)) if len(get_args(hint)) > 1 else _shown(get_args(hint)[0])
    if get_origin(hint) is list:
        return f"a list such as [{'a, b' if get_args(hint)[0] is str else '1, 2'}]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[hint]


def _shown(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)
