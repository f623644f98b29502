"""What a run minimises, and what it is given for it: the objective and its givers, as the config says."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt.config import RunConfig
from gpt.data.batches import Batch
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.evaluation.classification import observing
from gpt.evaluation.perplexity import HeldOutLoss, score_batches
from gpt.finetuning.auxiliary import AuxiliaryLanguageLoss
from gpt.finetuning.config import DPOConfig
from gpt.finetuning.distillation import TeacherGiver, TeacherRows, open_teacher
from gpt.finetuning.freezing import plan_freezing
from gpt.finetuning.preference import PreferenceLoss, Reference
from gpt.finetuning.prefix_cache import PrefixCache, PrefixData, open_prefix_cache
from gpt.finetuning.row_store import store_name
from gpt.model.config import LoRAConfig
from gpt.model.distillation import DistillationLoss
from gpt.model.loss import LinearCrossEntropy
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT
from gpt.runtime.device import Device
from gpt.runtime.distributed import World
from gpt.runtime.parallel import unwrapped
from gpt.runtime.sharding import reshard
from gpt.training.checkpoint import TrainingState, digest
from gpt.training.data import TrainingData
from gpt.typed import plain, shown

Giver = Callable[[Batch], dict[str, Any]]
"""A part of a batch on the device, its `numbers` on the host -> arguments for the objective."""


@dataclass
class Givers:
    """What is asked before every pass for more that the objective takes, as arguments by name; without gradients."""

    train: list[Giver] = field(default_factory=list)
    held_out: list[Giver] = field(default_factory=list)
    prefix: PrefixCache | None = None
    reference: Reference | None = None
    """Of DPO; it stays the same when others take the places of the rest."""
    teacher: TeacherGiver | None = None
    """Of distillation; it stays, too."""

    def close(self) -> None:
        """Let go of files, before others take their place. A teacher stays."""
        if self.prefix is not None:
            self.prefix.close()


@torch.no_grad()
def given(givers: list[Giver], part: Batch) -> dict[str, Any]:
    """What the givers add to a pass."""
    return {name: value for giver in givers for name, value in giver(part).items()}


def objective_for(config: RunConfig, model: GPT, loss: LinearCrossEntropy, paired: bool = False) -> NextTokenLoss:
    """The objective of a run; `paired`: on rows of preference.

    Raises:
        UserError: the config has settings for another, or a teacher that could not teach it.
    """
    if config.lm_weight and (paired or config.model.head == "language_model"):
        rows = "pairs of completions" if paired else "texts to continue"
        raise UserError(
            f"lm_weight={shown(config.lm_weight)} is of rows with classes (text and label, or tokens and tags), and these are {rows}; "
            "leave it out"
        )
    if paired:
        if config.distill.teacher is not None:
            raise UserError(
                f"distill.teacher={shown(config.distill.teacher)}: rows of preference have no tokens to take from a teacher; leave it out, "
                "or give rows of prompt and completion"
            )
        return PreferenceLoss(model, loss, config.dpo.beta, config.dpo.label_smoothing)
    usual = DPOConfig()
    for name, value in vars(config.dpo).items():
        if value != getattr(usual, name):
            raise UserError(
                f"dpo.{name}={shown(value)} is of rows of preference (prompt, chosen, rejected), and these are others; leave it out"
            )
    if config.distill.teacher is not None:
        if config.model.head != "language_model":
            raise UserError(
                f"distill.teacher={config.distill.teacher}: it teaches probabilities of tokens, and these rows have classes; leave it out"
            )
        loss = DistillationLoss(config.distill.temperature, config.distill.weight, loss.dtype, loss.chunk)
    if config.lm_weight:
        return AuxiliaryLanguageLoss(model, loss, config.lm_weight)
    return NextTokenLoss(model, loss)


def frozen_folder(config: RunConfig) -> Path:
    """Where what frozen blocks make is kept, and their weights while they are not read."""
    return Path(config.freeze.cache_dir or f"{config.data.cache_dir}/frozen").expanduser()


def whole_pairs(size: int, sizes: list[int], config: RunConfig, sequences: int, ranks: int) -> tuple[int, list[int]]:
    """Sequences of a pass that are pairs of rows.

    Args:
        size: of a pass, were there no pairs.
        sizes: to choose from, the largest first.
        config: the run.
        sequences: of a batch.
        ranks: that share it.

    Returns:
        The largest that is not above `size`, and all.

    Raises:
        UserError: there is none, or it is not the one that is set.
    """
    even, set_to = [one for one in sizes if one % 2 == 0], config.train.micro_batch
    if even and set_to in ("auto", even[0]):
        return next((one for one in even if one <= size), even[-1]), even
    least = 2 * ranks
    near = max(least, round(sequences / least) * least) * config.sequence_length
    named = f"train.micro_batch={set_to}" if even or set_to == 1 else f"train.batch_tokens={config.train.batch_tokens}"
    raise UserError(
        f"{named}: rows of preference come in pairs, a chosen completion and a rejected one, so that every pass of every process takes an "
        f"even number of rows, as with train.batch_tokens={near} and train.micro_batch={even[0] if even else 2}"
    )


def score_held_out(
    objective: nn.Module,
    nll: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    byte_lengths: np.ndarray,
    device: Device,
    stopped: Callable[[], bool],
    world: World,
) -> HeldOutLoss | None:
    """`score_batches`, and what the objective tells besides the loss: how often a classifier is right, how far apart pairs are."""
    inner = unwrapped(objective)
    assert isinstance(inner, NextTokenLoss)
    pairs = inner.counting() if isinstance(inner, PreferenceLoss) else contextlib.nullcontext()
    with observing(inner) as classes, pairs as sums:
        told = nll if classes is None else classes.beside(nll)
        result = score_batches(objective, told, batches, byte_lengths, device, stopped, world=world)
        reshard(objective)
    if result is not None and classes is not None:
        return replace(result, scores=classes.scores(world))
    if result is not None and sums is not None:
        count, right, margins = world.total(sums.tolist())
        return replace(result, pairs=round(count), more={"reward_accuracy": right / count, "reward_margin": margins / count})
    return result


def givers_for(
    config: RunConfig,
    objective: nn.Module,
    data: TrainingData,
    state: TrainingState,
    steps: int | None,
    compiled: bool,
    before: Givers,
    device: Device,
    world: World,
    say: Callable[[str], None],
) -> Givers:
    """The givers of a run, with what trains now.

    Args:
        config, data, state: of the run.
        objective: as it is called.
        steps: of the run; None: not known.
        compiled: whether what is run for them is compiled, too.
        before: those of the stage of the plan before.
        device, world: where.
        say: takes lines for people.

    Raises:
        UserError: what one needs is not to be had.
    """
    givers, inner = Givers(reference=before.reference, teacher=before.teacher), unwrapped(objective)
    assert isinstance(inner, NextTokenLoss)
    rows = data.rows["train"]
    epochs = steps * config.train.batch_tokens / config.sequence_length / rows if steps and rows else None
    fingerprint, cache = [data.fingerprint, config.data.packing], Path(config.data.cache_dir).expanduser()
    if config.distill.teacher is not None:
        if givers.teacher is None:
            asked = TeacherRows(rows, config.sequence_length, fingerprint, epochs)
            givers.teacher = open_teacher(
                config.distill, cache / "teachers", data.tokenizer, asked, compiled, device, world, say, config.allow_pickle
            )
        givers.train.append(givers.teacher)
    if not config.freeze.is_empty or config.lora.rank:
        prefix = PrefixData(data.rows, config.sequence_length, fingerprint, epochs)
        folder = frozen_folder(config)
        givers.prefix = open_prefix_cache(
            config.freeze.cache, config.freeze.cache_gb, folder, inner, prefix, state.frozen, device, world, say
        )
    if givers.prefix is not None:
        givers.train.append(givers.prefix.train)
        givers.held_out.append(givers.prefix.held_out)
    if isinstance(inner, PreferenceLoss):
        givers.reference = givers.reference or _reference(config, inner.model, data, device, world, say)
        givers.train.append(givers.reference.train)
        givers.held_out.append(givers.reference.held_out)
    return givers


def _reference(config: RunConfig, model: GPT, data: TrainingData, device: Device, world: World, say: Callable[[str], None]) -> Reference:
    """What DPO holds the model to: the weights that the run began with."""
    digests: dict[str, str] = {}
    load = partial(_first_objective, config, model, data.tokenizer, device, world, digests)
    reference = Reference(load, data.rows, data.pairs, device, world, say)
    where = ""
    if config.dpo.cache == "auto":
        key = {
            "weights": world.share(lambda: hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()),
            "shape": plain(model.config), "data": [data.fingerprint, config.data.packing], "length": config.sequence_length,
            "device": device.type, "dtype": str(device.dtype),
        }  # fmt: skip
        folder = Path(config.data.cache_dir).expanduser() / "reference"
        there = reference.keep_in(folder, key)
        where = f"; {there:,} of {data.rows['train']:,} rows are known, in {folder / store_name(key)}"
    say(f"DPO: held to the weights of {config.init}, beta {config.dpo.beta:g}{where}")
    return reference


def _first_objective(
    config: RunConfig, model: GPT, tokenizer: Tokenizer, device: Device, world: World, digests: dict[str, str]
) -> PreferenceLoss:
    """The objective of the weights that a run begins with, not to be trained; their SHA-256 are put into `digests`, in the main process.

    In one piece, it shares with the model those parameters that never train, and has the matrices of its blocks in the dtype that they are
    multiplied in: so of full fine-tuning it takes half the weights' memory in bf16, and of LoRA hardly any.
    """
    from gpt.training.layout import first_weights, lay_out  # which asks here for its objective

    plan = plan_freezing(config.freeze, config.unfreeze, model)
    trains = plan.trainable(len(plan.stages))
    config = replace(config, lora=LoRAConfig())  # which adds nothing yet
    with torch.random.fork_rng():  # what a step draws does not depend on when this is loaded
        start = partial(first_weights, config, True, lambda text: None, tokenizer)
        if world.is_divided:
            layout = lay_out(config, start, False, world, device, (), paired=True)
            digests |= layout.frozen
            found = layout.objective
        else:
            first = start()
            digests |= {name: digest(p) for name, p in first.named_parameters()} if world.is_main else {}
            found = objective_for(config, _lightened(first, model, trains, device), LinearCrossEntropy(device.dtype), paired=True)
    assert isinstance(found, PreferenceLoss)
    return found.requires_grad_(requires_grad=False).eval() if world.is_divided else found.eval()


def _lightened(first: GPT, model: GPT, trains: Collection[str], device: Device) -> GPT:
    """The first weights on the device, with what never trains shared with the model, and the matrices of blocks in the products' dtype."""
    own = dict(model.named_parameters())
    for name, p in list(first.named_parameters()):
        module, _, leaf = name.rpartition(".")
        is_matrix = p.dim() == 2 and name.startswith("blocks.") and leaf == "weight"
        if name in trains or name not in own:
            shared = nn.Parameter(p.detach().to(device.type, device.dtype if is_matrix else p.dtype), requires_grad=False)
        else:
            shared = own[name]
        setattr(first.get_submodule(module), leaf, shared)
    first.to(device.type)
    first.tie()
    return first
