"""The schema of how a model is adapted: the sections `freeze`, `unfreeze`, `distill` and `dpo` of a config. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from gpt.errors import UserError
from gpt.typed import key_of, shown


@dataclass
class FreezeConfig:
    """Which parameters do not train: all that any of these keys names."""

    name: Literal[
        "none", "embeddings", "first_n", "last_n_only", "head_only", "norms_and_biases", "gradual", "embeddings_first", "custom", "search",
    ] = "none"  # fmt: skip
    """What the plan is called; the keys below say what it is. search: finetune tries several plans, and says which to take."""
    embeddings: bool = False
    """The embeddings of tokens and positions."""
    head: Literal["tied", True, False] = False
    """The output head; tied: only where it shares the weights of embeddings that are frozen."""
    first_n_blocks: int = 0
    """So many blocks from the first on."""
    only_last_n_blocks: int | None = None
    """All blocks but the last so many, and the embeddings; null: this says nothing."""
    patterns: list[str] = field(default_factory=list)
    """Parameters or modules by name, with * for anything, such as blocks.*.feedforward."""
    except_: list[str] = field(default_factory=list)
    """Patterns of what trains although a key above freezes it, such as *norm*."""
    untie: bool = False
    """Give a head that shares the embedding's weights a copy of its own, so that one can be frozen without the other."""
    cache: Literal["auto", "off"] = "auto"
    """Keep on disk what frozen blocks at the bottom make of each row, and run them no more from the second epoch on, where it is exact."""
    cache_gb: float = 20.0
    """Most room on disk that such a cache may take, older ones of other runs included."""
    cache_dir: str | None = None
    """Folder of such caches; null: the folder `frozen` of data.cache_dir."""
    search_plans: list[str] = field(default_factory=list)
    """search: what is tried, such as [none, 'first_n freeze.first_n_blocks=2', lora.rank=8]; []: a list made for the model."""
    search_budget: str = "0.25"
    """search: how long each try trains: a share of train.budget, or a length such as 200steps."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is frozen."""
        named = self.embeddings or self.head is True or self.first_n_blocks or self.patterns
        return not named and self.only_last_n_blocks is None


@dataclass
class UnfreezeConfig:
    """What begins to train later in the run."""

    at: float = 0.0
    """After so many steps, or after this share of the run if below 1."""
    blocks: str | None = None
    """Blocks by number, `11`, or as a slice, `-2:`, `4:8`."""
    embeddings: bool = False
    """The embeddings."""
    head: bool = False
    """The output head."""
    patterns: list[str] = field(default_factory=list)
    """Parameters or modules by name, with * for anything."""
    all: bool = False
    """Everything."""


@dataclass
class DistillConfig:
    """Learning from the probabilities of a larger model with the same tokenizer (Hinton et al., 2015)."""

    teacher: str | None = None
    """A run, a Hugging Face directory or a hub id; null: no teacher."""
    temperature: float = 1.0
    """By which both models' logits are divided."""
    weight: float = 0.9
    """Share of the teacher in the loss: weight T^2 KL(teacher, student) + (1 - weight) cross-entropy."""
    top_k: int = 0
    """Only the teacher's likeliest so many tokens, all others being one to both models; 0: all. With it, its answers are kept on disk."""
    cache: Literal["auto", "off"] = "auto"
    """Keep the teacher's top_k answers on disk, and ask it no more from the second epoch on."""
    cache_gb: float = 20.0
    """Most room on disk that such answers may take, those of other runs included."""


@dataclass
class DPOConfig:
    """Learning from preferences, rows of prompt, chosen and rejected (Rafailov et al., 2023)."""

    beta: float = 0.1
    """How strongly the model is held to where it started: larger holds more."""
    label_smoothing: float = 0.0
    """Share of the pairs that are taken to be labelled the wrong way round (conservative DPO); below 0.5."""
    cache: Literal["auto", "off"] = "auto"
    """Keep on disk what the first weights find of each completion, two numbers a pair: a run that is resumed asks them no more."""


def block_numbers(key: str, text: str, n_layer: int) -> list[int]:
    """The blocks that `3`, `-1`, `-2:` or `4:8` names.

    Raises:
        UserError: it is none of these, or names a block that is not there.
    """
    match = re.fullmatch(r"\s*(-?\d+)\s*|\s*(-?\d+)?\s*:\s*(-?\d+)?\s*", text)
    there = f"there are {n_layer} blocks, 0 to {n_layer - 1}"
    if not match:
        raise UserError(f"{key}={shown(text)}: must be a block, 3 or -1, or a slice of blocks, -2: or 4:8 ({there})")
    for given in match.groups():
        beyond = match[1] is None and given is match[3] and given is not None and int(given) == n_layer  # the end of a slice
        if given is not None and not (-n_layer <= int(given) < n_layer or beyond):
            near = min(max(int(given), -n_layer), n_layer - 1)
            raise UserError(f"{key}={shown(text)}: there is no block {given}: {there} (nearest: {near})")
    numbers = range(n_layer)
    found = [numbers[int(match[1])]] if match[1] else list(numbers[slice(*(int(g) if g else None for g in match.groups()[1:]))])
    if not found:
        raise UserError(f"{key}={shown(text)} names no block: {there}")
    return found


def validate_finetuning(
    freeze: FreezeConfig, unfreeze: Sequence[UnfreezeConfig], layerwise_lr_decay: float, distill: DistillConfig, dpo: DPOConfig
) -> None:
    """Raises UserError for values that cannot be, whatever the model."""
    if freeze.name == "search":
        _validate_search(freeze, unfreeze)
    if freeze.first_n_blocks < 0:
        raise UserError(f"freeze.first_n_blocks={freeze.first_n_blocks} must be at least 0")
    if freeze.only_last_n_blocks is not None and freeze.only_last_n_blocks < 0:
        raise UserError(f"freeze.only_last_n_blocks={freeze.only_last_n_blocks} must be at least 0, or null")
    if not freeze.cache_gb > 0:
        raise UserError(f"freeze.cache_gb={shown(freeze.cache_gb)} must be greater than 0; freeze.cache=off keeps nothing")
    if freeze.except_ and freeze.is_empty:
        raise UserError(
            f"freeze.except={shown(freeze.except_)}: nothing is frozen that these could be taken out of; set freeze.patterns=[*]"
        )
    if not 0 < layerwise_lr_decay <= 1:
        raise UserError(f"layerwise_lr_decay={shown(layerwise_lr_decay)} must be greater than 0 and at most 1, which changes nothing")
    for number, stage in enumerate(unfreeze):
        key = f"unfreeze[{number}]"
        if freeze.is_empty:
            raise UserError(f"{key}: nothing is frozen that could begin to train later; choose a plan, such as freeze=head_only")
        if not stage.at > 0 or (stage.at >= 1 and stage.at % 1):
            raise UserError(f"{key}.at={shown(stage.at)} must be a share of the run, above 0 and below 1, or whole steps")
        if number and stage.at < unfreeze[number - 1].at and (stage.at < 1) == (unfreeze[number - 1].at < 1):
            raise UserError(f"{key}.at={shown(stage.at)} comes before that of unfreeze[{number - 1}]; list them in their order")
        if not (stage.blocks is not None or stage.embeddings or stage.head or stage.patterns or stage.all):
            raise UserError(f"{key} names nothing to train; add blocks, embeddings, head, patterns or all: {{at: 0.5, all: true}}")
    if not distill.temperature > 0:
        raise UserError(f"distill.temperature={shown(distill.temperature)} must be greater than 0")
    if not 0 < distill.weight <= 1:
        raise UserError(f"distill.weight={shown(distill.weight)} must be greater than 0 and at most 1")
    if distill.top_k < 0:
        raise UserError(f"distill.top_k={distill.top_k} must be at least 0, which is all tokens")
    if not distill.cache_gb > 0:
        raise UserError(f"distill.cache_gb={shown(distill.cache_gb)} must be greater than 0; distill.cache=off keeps nothing")
    if distill.teacher is None and distill != DistillConfig():
        key, value = next((f.name, value) for f in fields(distill) if (value := getattr(distill, f.name)) != f.default)
        raise UserError(
            f"distill.{key}={shown(value)}: nothing is learned from without a teacher; add distill.teacher=<run, folder or hub id>"
        )
    if not dpo.beta > 0:
        raise UserError(f"dpo.beta={shown(dpo.beta)} must be greater than 0")
    if not 0 <= dpo.label_smoothing < 0.5:
        raise UserError(f"dpo.label_smoothing={shown(dpo.label_smoothing)} must be at least 0 and below 0.5")


def _validate_search(freeze: FreezeConfig, unfreeze: Sequence[UnfreezeConfig]) -> None:
    """What is frozen, and when it begins to train, is for each plan of a search to say."""
    elsewhere = ("name", "cache", "cache_gb", "cache_dir", "search_plans", "search_budget")
    own = FreezeConfig()
    said = [f.name for f in fields(freeze) if f.name not in elsewhere and getattr(freeze, f.name) != getattr(own, f.name)]
    for key in [f"freeze.{key_of(name)}" for name in said] + (["unfreeze"] if unfreeze else []):
        raise UserError(f"{key}: with freeze=search each plan says what trains and when; write it into one of freeze.search_plans")
