"""The schema of a training run: everything that can be set, its type, its default and what it means.

`configs/` holds values, this file holds types. A run's config is composed once (`gpt.compose`), made into these dataclasses
(`from_dict`) and validated (`gpt.validation`); nothing after that sees an untyped config. Imports no torch.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gpt.aws.config import TrainingJobConfig
from gpt.data.config import DataConfig, LossOn, Metric, TokenizerConfig, holds_examples
from gpt.errors import UserError
from gpt.finetuning.config import DistillConfig, DPOConfig, FreezeConfig, UnfreezeConfig
from gpt.model.config import GPTConfig, LoRAConfig
from gpt.typed import plain, shown

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
    metrics: list[Metric] = field(default_factory=list)
    """finetune: at validations the model answers held-out prompts too, and is compared: exact_match and token_f1 (question answering),
    rouge (summarisation), chrf and bleu (translation)."""
    metrics_examples: int = 64
    """Of metrics: how many prompts it answers."""
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
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    name: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """A tracker; one that fails is named and left out, and training goes on."""
    project: str = "gpt"
    """What the tracker files runs under."""


@dataclass
class LaunchConfig(TrainingJobConfig):
    """Where the run runs."""

    name: Literal["local", "emulated", "sagemaker"] = "local"
    """Here; here, as a SageMaker job would run (a rehearsal without AWS); or as a SageMaker training job."""
    nproc: Literal["auto"] | int = "auto"
    """Processes on each machine, one per device; auto: as many as there are accelerators, or 1; with parallel=none always 1."""
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

    def unused(self) -> list[str]:
        """Keys of a training job that are set for a run on this machine, which reads none of them."""
        usual = TrainingJobConfig()
        return [f"launch.{key}" for key in vars(usual) if self.name == "local" and getattr(self, key) != getattr(usual, key)]


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
    """finetune: what of an example is learned; auto: the completion, the assistant's turns, all of a text, or of a text with a class
    the class, at the text's last token; all: everything, and the class at every token, from what stands up to there."""
    lm_weight: float = 0.0
    """finetune, of rows with classes: the loss of the next tokens is learned beside that of the classes, times this (Radford et al., 2018,
    took 0.5); 0: the classes alone."""
    unfreeze: list[UnfreezeConfig] = field(default_factory=list)
    """What of the frozen begins to train later: [{at: 500, blocks: "-2:"}, {at: 0.5, all: true}]."""
    layerwise_lr_decay: float = 1.0
    """Each block learns at this share of the rate of the one above it, the embeddings slowest (Howard & Ruder, 2018); 1: all alike."""
    adapt_tokenizer: str | None = None
    """Have the weights of init go on with another tokenizer: a folder, run, tokenizer.json or hub id, or `train`: one made of the data,
    as tokenizer.* says. Tokens that both have keep their embeddings, others start from the mean of their old pieces' (a new language)."""
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
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
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
        from gpt.validation import validate_run

        validate_run(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as they stand in config.yaml."""
        return plain(self)


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
