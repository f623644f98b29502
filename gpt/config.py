"""The schema of a training run: everything that can be set, its type, its default and what it means.

`configs/` holds values, this file holds types. A run's config is composed once (`gpt.compose`), made into these dataclasses
(`from_dict`) and validated; nothing after that sees an untyped config. Imports no torch.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpt.data.config import (
    DataConfig,
    LossOn,
    TokenizerConfig,
    holds_examples,
    validate_data,
    validate_examples,
    validate_text,
    validate_tokenizer,
)
from gpt.errors import UserError
from gpt.model.config import GPTConfig
from gpt.typed import nearest, shown

DeviceName = Literal["auto", "cpu", "cuda", "mps", "neuron", "neuron_sim"]
Precision = Literal["auto", "bf16", "fp32"]


@dataclass
class RunSection:
    """Where a run's files go: `<dir>/<id>`."""

    id: str = ""
    """Name of the run. Empty: `<command>-<time>-<4 letters>`."""
    dir: str = "runs"
    """Folder that holds run directories."""


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
    """Decoupled weight decay, on matrices only; under muon, on those of the blocks."""
    adam_weight_decay: float = 0.1
    """Under muon: weight decay of the matrices that AdamW updates, the embeddings and the head."""
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
    sequence_length: int = 0
    """Tokens of a row of the batch; 0: as many as the model reads, model.context_length, but at most 1024 in finetune."""
    micro_batch: Literal["auto"] | int = "auto"
    """Sequences per forward pass; gradients are accumulated up to batch_tokens."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999, which is then what is validated and exported; 0: none."""
    activation_checkpointing: Literal["none", "full", "every_n", "selective"] = "none"
    """Compute activations again in the backward pass instead of keeping them: all, of each n-th block, or all but matrix products."""
    activation_checkpointing_n: int = 2
    """every_n: which blocks."""
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
    spike: Literal["none", "skip", "rewind"] = "none"
    """What to do about a loss far above the latest ones: nothing, leave the step out, or go back to a checkpoint and past the data."""
    overfit: bool = False
    """Train on the first batch only, again and again: the loss must go to 0, or something is broken."""
    sample_prompts: list[str] = field(default_factory=lambda: ["import ", "def read(", "class Error("])
    """At the end the model continues each of these; [] takes beginnings of held-out texts, or prompts of held-out examples."""
    sample_tokens: int = 120
    """Tokens per sample."""


@dataclass
class CheckpointConfig:
    """When to save, and how many to keep."""

    every: str = "1min"
    """Steps (`500`, `500steps`) or wall time (`90s`, `10min`) between checkpoints; one is always made at the end."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Best checkpoints by validation loss kept besides."""
    keep_every: int = 0
    """Checkpoints at multiples of so many steps are kept for good; 0: none."""


@dataclass
class DeviceConfig:
    """The machine to compute on."""

    name: DeviceName = "auto"
    """auto takes the accelerator that torch finds, else the CPU."""
    threads: int = 0
    """CPU threads; 0: one for each physical core that the process may use, or what OMP_NUM_THREADS says."""
    cache_dir: str = "~/.cache/gpt"
    """neuron: compiled graphs are kept in its folder `neuron`, unless TORCH_NEURONX_NEFF_CACHE_DIR names another."""
    strict: bool = True
    """neuron: an operation that the device lacks ends the run, instead of running on the CPU unnoticed."""
    unsupported: list[str] = field(default_factory=list)
    """neuron_sim: operations that the rehearsed device is to lack, such as aten::topk."""
    chip: Literal["trn2", "trn3"] = "trn2"
    """neuron_sim: which chip is rehearsed."""
    ranks: int = 0
    """neuron_sim: of how many cores memory and time are told; 0: as many as there are processes."""
    mfu: float = 0.3
    """neuron_sim: the share of the chip's peak at which its time is estimated."""


@dataclass
class ParallelConfig:
    """How a model is spread over devices."""

    name: Literal["none", "ddp", "fsdp"] = "none"
    """One device; a copy of the model on each, gradients summed (ddp); or its parameters shared out among them (fsdp)."""
    tensor: int = 1
    """Devices that each matrix is split over (tensor parallelism); the others divide the batch."""
    replicate: int = 1
    """fsdp: groups of devices that each hold the whole model between them (hybrid sharding), such as one per node."""


@dataclass
class FreezeConfig:
    """Which parameters do not train."""

    name: Literal["none"] = "none"
    """Everything trains."""


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    name: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """A tracker; one that fails is named and left out, and training goes on."""
    project: str = "gpt"
    """What the tracker files runs under."""


@dataclass
class LaunchConfig:
    """Where the run runs."""

    name: Literal["local"] = "local"
    """Here."""
    nproc: Literal["auto"] | int = "auto"
    """Processes on this machine, one per device; auto: as many as there are accelerators, or 1; with parallel=none always 1."""
    nnodes: int = 1
    """Machines; the same command is started on each."""
    node_rank: int = 0
    """Which of them this is."""
    endpoint: str = ""
    """host:port of the machine with node_rank=0, where they meet."""
    max_restarts: int = 0
    """How often processes are started again, from the last checkpoint, when one has died."""
    timeout: str | None = None
    """How long a process waits for the others before the run ends with an error; null: 10min, and 2h on neuron, which compiles long."""

    def patience(self, usual: float) -> float:
        """Seconds of `timeout`; where it is null, the usual ones."""
        return usual if self.timeout is None else parse_span("launch.timeout", self.timeout, ("seconds",)).amount


@dataclass
class RunConfig:
    """A training run, whole."""

    command: Literal["pretrain", "finetune"] = "pretrain"
    """What the run does."""
    seed: int = 1337
    """Of the initial weights, the order of the data and dropout."""
    precision: Precision = "auto"
    """Of the matrix products; weights and sums are fp32. auto: bf16 where the chip multiplies it."""
    compile: Literal["auto", True, False] = "auto"
    """torch.compile block by block; auto: where it pays within the run."""
    precompile: bool = False
    """Only fill the device's cache of compiled graphs: two steps and a validation, of which nothing else is kept (`gpt precompile`)."""
    profile: bool = False
    """Record some steps with torch.profiler: a trace in the run directory, and the ten dearest operations printed."""
    init: str | None = None
    """Start from these weights, in their shape and with their tokenizer: a run directory, a Hugging Face directory or hub id."""
    allow_pickle: bool = False
    """Read an init that is only there as pytorch_model.bin; nothing in it is run."""
    loss_on: LossOn = "auto"
    """finetune: what of an example is learned; auto: the completion, the assistant's turns, or all of a text."""
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

    @property
    def sequence_length(self) -> int:
        """Tokens of a row of the batch, T."""
        longest = self.model.context_length
        return self.train.sequence_length or (min(longest, 1024) if self.command == "finetune" else longest)

    @property
    def on_examples(self) -> bool:
        """Whether it trains on examples rather than on text."""
        return holds_examples(self.data, self.command == "finetune")

    def validate(self) -> None:
        """Check what types cannot.

        Raises:
            UserError: the first impossible value or combination, with its key.
        """
        _validate(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as they stand in config.yaml."""
        return asdict(self)


@dataclass(frozen=True)
class Span:
    """A length of training: so many steps, tokens, epochs or seconds."""

    unit: Literal["steps", "tokens", "epochs", "seconds"]
    """What is counted."""
    amount: float
    """How many; greater than 0, not always whole."""


_SECONDS: dict[str, int] = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
}
_AMOUNT = r"\s*([0-9][0-9_]*\.?[0-9]*(?:e[0-9]+)?)\s*"
_SPAN = re.compile(rf"{_AMOUNT}([kKMGBT]?)\s*((?i:steps?|tokens?|epochs?|{'|'.join(_SECONDS)}|))\s*$")
_SCALE = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def parse_span(key: str, text: str, units: Sequence[str] = ("steps", "tokens", "epochs", "seconds")) -> Span:
    """Read `500steps`, `10Mtokens`, `2epochs`, `90s`, `3min`, `2 hours`; a bare number counts steps.

    Raises:
        UserError: anything else, nothing at all, or a unit that is not among `units`.
    """
    if match := _SPAN.match(text):
        amount, unit = float(match[1].replace("_", "")) * _SCALE[match[2]], match[3].lower()
        if unit in _SECONDS:
            name, amount = "seconds", amount * _SECONDS[unit]
        else:
            name = (unit or "step").rstrip("s") + "s"
        if name in units and 0 < amount < math.inf and not (name == "steps" and amount < 1):
            return Span(typing.cast(Any, name), amount)
    examples = {"steps": "500steps", "tokens": "10Mtokens", "epochs": "2epochs", "seconds": "90s or 3min"}
    such = f"must be a length such as {', '.join(examples[unit] for unit in units)}"
    raise UserError(f"{key}={shown(text)}: {such}{_nearest_unit(text, units)}")


def _nearest_unit(text: str, units: Sequence[str]) -> str:
    """`. Did you mean 5steps?` for a number with a unit that is none, if one is close."""
    match = re.match(rf"{_AMOUNT}([A-Za-z]+)\s*$", text)
    if not match or _SPAN.match(text):
        return ""
    known = {scale + unit: unit for unit in ("steps", "tokens", "epochs") for scale in _SCALE} | dict.fromkeys(_SECONDS, "seconds")
    close = difflib.get_close_matches(match[2], known, 1, 0.5)  # m is min
    return f". Did you mean {match[1]}{close[0]}?" if close and known[close[0]] in units else ""


def at_least(key: str, value: float, low: float, why: str = "") -> None:
    """Raises UserError naming the key if a value is below `low`."""
    if value < low:
        raise UserError(f"{key}={shown(value)} must be at least {low}{why}")


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that is not 32 bits."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={shown(seed)} must be from 0 to {2**32 - 1}")


def _validate(c: RunConfig) -> None:
    check_seed(c.seed)
    for key, value, low in (
        ("train.grad_clip", c.train.grad_clip, 0), ("train.log_every", c.train.log_every, 1),
        ("train.eval_every", c.train.eval_every, 0),
        ("train.max_skipped_steps", c.train.max_skipped_steps, 1), ("train.sample_tokens", c.train.sample_tokens, 1),
        ("checkpoint.keep_last", c.checkpoint.keep_last, 1), ("device.threads", c.device.threads, 0),
        ("checkpoint.keep_best", c.checkpoint.keep_best, 1), ("checkpoint.keep_every", c.checkpoint.keep_every, 0),
        ("train.activation_checkpointing_n", c.train.activation_checkpointing_n, 1),
        ("optimizer.weight_decay", c.optimizer.weight_decay, 0), ("optimizer.adam_weight_decay", c.optimizer.adam_weight_decay, 0),
        ("schedule.warmup", c.schedule.warmup, 0),
    ):  # fmt: skip
        at_least(key, value, low)
    at_least("train.sequence_length", c.train.sequence_length, 0)
    if c.train.sequence_length > c.model.context_length:
        raise UserError(
            f"train.sequence_length={c.train.sequence_length} is more than the model reads: model.context_length={c.model.context_length}"
        )
    for name in ("eval_tokens", "final_eval_tokens"):
        at_least(f"train.{name}", getattr(c.train, name), c.sequence_length, f", one {_length_key(c)}")
    for name in ("lr", "adam_lr", "eps"):
        if not getattr(c.optimizer, name) > 0:
            raise UserError(f"optimizer.{name}={shown(getattr(c.optimizer, name))} must be greater than 0")
    for name in ("momentum", "beta1", "beta2"):
        if not 0 <= getattr(c.optimizer, name) < 1:
            raise UserError(f"optimizer.{name}={shown(getattr(c.optimizer, name))} must be at least 0 and less than 1")
    if not 0 <= c.train.ema < 1:
        raise UserError(f"train.ema={shown(c.train.ema)} must be at least 0 and less than 1, such as 0.999")
    for name in ("decay", "final"):
        if not 0 <= getattr(c.schedule, name) <= 1:
            raise UserError(f"schedule.{name}={shown(getattr(c.schedule, name))} must be from 0 to 1")
    _validate_text(c)
    _validate_batch(c)
    _validate_length(c)
    _validate_devices(c)
    if c.run.id and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", c.run.id):
        raise UserError(f"run.id={shown(c.run.id)}: must be letters, digits, '.', '_' and '-', and start with a letter or digit")
    if c.resume not in ("auto", "never"):
        directory = Path(c.resume).expanduser()
        if not c.resume or not directory.is_dir():
            raise UserError(
                f"resume={shown(c.resume)}: there is no such directory; give auto, never or a run directory"
                f"{nearest(c.resume, ('auto', 'never'))}"
            )
        if not (directory / "config.yaml").is_file():
            raise UserError(f"resume={shown(c.resume)} is not a run directory: it has no config.yaml; give one such as runs/<id>")


def _validate_text(c: RunConfig) -> None:
    """What is read, and how it becomes ids."""
    validate_data(c.data)
    if c.on_examples and c.command == "finetune":
        validate_examples(c.data)
    else:
        validate_text(c.data)
        if c.loss_on not in ("auto", "all"):
            raise UserError(f"loss_on={c.loss_on} is of examples to fine-tune on, and this is text; leave it out")
    validate_tokenizer(c.tokenizer)
    ids, whose = {
        "bpe": (c.tokenizer.vocab_size, f"tokenizer.vocab_size={c.tokenizer.vocab_size}"),
        "char": (257, "the 257 ids that tokenizer=char has at least"),
        "byte": (257, "the 257 ids of tokenizer=byte"),
        "pretrained": (0, ""),
    }[c.tokenizer.name]
    if 0 < c.model.vocab_size < ids:
        raise UserError(f"model.vocab_size={c.model.vocab_size} is smaller than {whose} (0 takes the tokenizer's)")


def _validate_batch(c: RunConfig) -> None:
    """Batches are whole sequences, passes whole parts of a batch."""
    at_least("train.batch_tokens", c.train.batch_tokens, 1)
    length = c.sequence_length
    sequences, rest = divmod(c.train.batch_tokens, length)
    if rest:
        near = " or ".join(str(n * length) for n in (sequences, sequences + 1) if n)
        raise UserError(f"train.batch_tokens={c.train.batch_tokens} is not a multiple of {_length_key(c)}={length} (nearest: {near})")
    micro = c.train.micro_batch
    if micro != "auto":
        at_least("train.micro_batch", micro, 1)
        if sequences % micro:
            near = min((d for d in range(1, min(sequences, 4096) + 1) if sequences % d == 0), key=lambda d: abs(d - micro))
            raise UserError(
                f"train.micro_batch={micro} does not divide the {sequences} sequences of a batch "
                f"(train.batch_tokens / {_length_key(c)}; nearest: {near})"
            )


def _length_key(c: RunConfig) -> str:
    """The key that sets the length of a row."""
    return "model.context_length" if c.sequence_length == c.model.context_length else "train.sequence_length"


def _validate_devices(c: RunConfig) -> None:
    """How many devices, and what each has of the batch and the model."""
    for key, value, low in (
        ("parallel.tensor", c.parallel.tensor, 1), ("parallel.replicate", c.parallel.replicate, 1),
        ("launch.nnodes", c.launch.nnodes, 1), ("launch.node_rank", c.launch.node_rank, 0),
        ("launch.max_restarts", c.launch.max_restarts, 0),
    ):  # fmt: skip
        at_least(key, value, low)
    c.launch.patience(0)
    at_least("device.ranks", c.device.ranks, 0)
    if not 0 < c.device.mfu <= 1:
        raise UserError(f"device.mfu={shown(c.device.mfu)} must be greater than 0 and at most 1: a share of the chip's peak")
    if c.launch.nproc != "auto":
        at_least("launch.nproc", c.launch.nproc, 1)
    if c.parallel.name == "none":
        for key, value in (("launch.nproc", c.launch.nproc), ("launch.nnodes", c.launch.nnodes)):
            if value not in ("auto", 1):
                raise UserError(f"{key}={value}: parallel=none is one process; add parallel=ddp or parallel=fsdp")
        if c.parallel.tensor > 1:
            raise UserError(f"parallel.tensor={c.parallel.tensor}: parallel=none is one device; add parallel=ddp or parallel=fsdp")
    if c.parallel.replicate > 1 and c.parallel.name != "fsdp":
        raise UserError(
            f"parallel.replicate={c.parallel.replicate} is of parallel=fsdp, and this is parallel={c.parallel.name}; leave it out"
        )
    for name in ("n_head", "n_kv_head", "d_ff"):
        if getattr(c.model, name) % c.parallel.tensor:
            raise UserError(f"parallel.tensor={c.parallel.tensor} does not divide model.{name}={getattr(c.model, name)}")
    if c.launch.node_rank >= c.launch.nnodes:
        raise UserError(f"launch.node_rank={c.launch.node_rank} must be less than launch.nnodes={c.launch.nnodes}")
    if c.launch.nnodes > 1 and not re.fullmatch(r"[^:\s]+:\d{1,5}", c.launch.endpoint):
        raise UserError(
            f"launch.endpoint={shown(c.launch.endpoint)}: several machines meet at one of them; give host:port of that with node_rank=0"
        )


def _validate_length(c: RunConfig) -> None:
    """How long the run is, and what the schedule does within it."""
    parse_span("checkpoint.every", c.checkpoint.every, ("steps", "seconds"))
    budget = parse_span("train.budget", c.train.budget)
    steps = {"steps": budget.amount, "tokens": budget.amount / c.train.batch_tokens}.get(budget.unit)
    warmup = c.schedule.warmup
    if warmup >= 1:
        if steps is not None and warmup > math.ceil(steps):
            raise UserError(
                f"schedule.warmup={shown(warmup)} steps is longer than the run: train.budget={c.train.budget} is {math.ceil(steps)} steps"
            )
        warmup = warmup / steps if steps else 0.0
    if c.schedule.name == "wsd" and warmup + c.schedule.decay > 1 + 1e-9:
        raise UserError(
            f"schedule.decay={shown(c.schedule.decay)} must be at most {1 - warmup:.3g} of the run, "
            f"since schedule.warmup={shown(c.schedule.warmup)} comes before it"
        )
