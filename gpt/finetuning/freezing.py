"""Which parameters train, and from when on: a plan made of the config and the names of a model's parameters, and its table for people.

A parameter that does not train has no gradient, no optimizer state and no decay, and what is frozen as a whole runs in eval mode. What
begins to train later joins the optimizer as a group of its own, with a warm-up of its own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from gpt.errors import UserError
from gpt.finetuning.config import FreezeConfig, UnfreezeConfig, block_numbers
from gpt.finetuning.trainable import TableRow
from gpt.model.lora import ADAPTERS
from gpt.model.transformer import GPT
from gpt.typed import shown

_TOKENS = "embeddings.tokens.weight"
# What other projects call the parts of a model, for whoever writes a pattern from memory.
_ELSEWHERE = {
    "transformer.": "", "model.": "", "gpt_neox.": "", "wte": "embeddings.tokens", "embed_tokens": "embeddings.tokens",
    "embed_in": "embeddings.tokens", "wpe": "embeddings.positions", "ln_f": "final_norm", "lm_head": "head", "embed_out": "head",
    "layers.": "blocks.", "h.": "blocks.", "ln_1": "attention_norm", "input_layernorm": "attention_norm", "ln_2": "feedforward_norm",
    "post_attention_layernorm": "feedforward_norm", "self_attn": "attention", "attn": "attention", "mlp": "feedforward",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "c_proj": "*", "c_fc": "up", "up_proj": "up", "gate_proj": "gate",
    "down_proj": "down",
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """What begins to train, and when."""

    at: float
    """0: from the beginning; else after so many steps, or after this share of the run if below 1."""
    names: frozenset[str]
    """Of parameters."""

    def is_due(self, step: int, progress: float) -> bool:
        """Whether it begins with the next step, after `step` steps and this share of the run."""
        return step >= self.at if self.at >= 1 else progress >= self.at


@dataclass(frozen=True)
class Plan:
    """Which parameters train from when on.

    Attributes:
        names: of all parameters, in the model's order.
        stages: the first from the beginning; each in addition to those before.
        depths: of each parameter, for `layerwise_lr_decay`: 0 for what is above the blocks, then blocks from above, the embeddings last.
    """

    names: tuple[str, ...]
    stages: tuple[Stage, ...]
    depths: dict[str, int]

    @property
    def freezes(self) -> bool:
        """Whether anything is frozen at the beginning."""
        return len(self.stages[0].names) < len(self.names)

    def trainable(self, begun: int) -> frozenset[str]:
        """The names of what trains when so many stages have begun, the first included."""
        return frozenset().union(*(stage.names for stage in self.stages[:begun]))


def plan_freezing(freeze: FreezeConfig, unfreeze: Sequence[UnfreezeConfig], model: GPT, new_head: bool = False) -> Plan:
    """Make the plan of a run.

    Args:
        freeze, unfreeze: the config's sections.
        model: whose parameters it is about; on meta will do.
        new_head: whether the head has been made anew, which then trains beside adapters.

    Raises:
        UserError: a pattern or a block that names nothing, a tied head frozen through its embedding, a stage that begins nothing, or a
            plan that leaves nothing to train.
    """
    if freeze.name == "search":
        raise UserError("freeze.name=search is no plan of one run: gpt finetune freeze=search tries several; choose one for this run")
    config = model.config
    names = tuple(name for name, _ in model.named_parameters())
    tied = config.tie_embeddings
    frozen = _named_by(freeze, names, config.n_layer, tied)
    if any(name.endswith(ADAPTERS) for name in names):
        frozen |= {name for name in names if not name.endswith(ADAPTERS) and not (new_head and name.startswith("head."))}
    if len(frozen) == len(names):
        raise UserError(
            "freeze: this plan leaves nothing to train; take something out of it, e.g. freeze.except=[final_norm] or "
            f"freeze.first_n_blocks={max(0, config.n_layer - 1)}"
        )
    stages, still = [Stage(0, frozenset(names) - frozen)], set(frozen)
    for number, section in enumerate(unfreeze):
        key = f"unfreeze[{number}]"
        begins = _begins(key, section, names, config.n_layer, tied) & still
        if not begins:
            raise UserError(f"{key}: all that it names trains already; take it out, or freeze more")
        stages.append(Stage(section.at, frozenset(begins)))
        still -= begins
    return Plan(names, tuple(stages), {name: _depth(name, config.n_layer) for name in names})


def _named_by(freeze: FreezeConfig, names: Sequence[str], n_layer: int, tied: bool) -> set[str]:
    """What the config freezes by its own words."""
    frozen: set[str] = set()
    if freeze.embeddings:
        frozen |= _below("embeddings", names)
    if freeze.head is True:
        frozen |= {_TOKENS} if tied else _below("head", names)
    for key, count in (("first_n_blocks", freeze.first_n_blocks), ("only_last_n_blocks", freeze.only_last_n_blocks)):
        if count is not None and count > n_layer:
            raise UserError(f"freeze.{key}={count}: there are {n_layer} blocks, 0 to {n_layer - 1} (nearest: {n_layer})")
    for block in range(freeze.first_n_blocks):
        frozen |= _below(f"blocks.{block}", names)
    if freeze.only_last_n_blocks is not None:
        frozen |= _below("embeddings", names)
        for block in range(n_layer - freeze.only_last_n_blocks):
            frozen |= _below(f"blocks.{block}", names)
    for pattern in freeze.patterns:
        frozen |= _matched("freeze.patterns", pattern, names, tied)
    for pattern in freeze.except_:
        if pattern.endswith("bias") and not any(name.endswith("bias") for name in names):
            continue  # that a model has no biases is no slip in a plan that is for all models
        frozen -= _matched("freeze.except", pattern, names, tied)
    if tied and _TOKENS in frozen and not freeze.head and not any(name.endswith(ADAPTERS) for name in names):
        raise UserError(
            "freeze: the embedding of the tokens is frozen, and with it the head, which shares its weights (model.tie_embeddings). "
            "freeze.untie=true gives the head weights of its own, which train; freeze.head=tied says that both are to be frozen"
        )
    return frozen


def _begins(key: str, section: UnfreezeConfig, names: Sequence[str], n_layer: int, tied: bool) -> set[str]:
    """What a stage names."""
    found: set[str] = set(names) if section.all else set()
    if section.blocks is not None:
        for block in block_numbers(f"{key}.blocks", section.blocks, n_layer):
            found |= _below(f"blocks.{block}", names)
    if section.embeddings:
        found |= _below("embeddings", names)
    if section.head:
        found |= {_TOKENS} if tied else _below("head", names)
    for pattern in section.patterns:
        found |= _matched(f"{key}.patterns", pattern, names, tied)
    return found


def _below(module: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith(f"{module}.")}


def _matched(key: str, pattern: str, names: Sequence[str], tied: bool) -> set[str]:
    """The parameters that a pattern names, themselves or by their module."""
    found = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
    if found:
        return found
    if tied and fnmatchcase("head.weight", pattern):
        raise UserError(
            f"{key}={shown(pattern)} matches nothing of its own: the head shares the weights of embeddings.tokens (model.tie_embeddings). "
            "Name embeddings.tokens, or add freeze.untie=true"
        )
    raise UserError(f"{key}={shown(pattern)} matches no parameter{_guess(pattern, names)}")


def _guess(pattern: str, names: Sequence[str]) -> str:
    """`. Did you mean X?`, with the names that other projects use understood."""
    translated = pattern
    for theirs, ours in _ELSEWHERE.items():
        word = re.escape(theirs) + ("" if theirs.endswith(".") else r"(?!\w)")
        translated = re.sub(rf"(?<!\w){word}", ours, translated)
    if any(fnmatchcase(name, translated) or fnmatchcase(name, f"{translated}.*") for name in names):
        return f". Did you mean {translated}?"
    general = {re.sub(r"^blocks\.\d+", "blocks.*", name) for name in names}
    known = {part for name in (*names, *general) for part in _modules(name)}
    known |= {f"{name}.*" for name in known}
    close = difflib.get_close_matches(pattern, sorted(known), 1, 0.5)
    return (
        f". Did you mean {close[0]}?"
        if close
        else "; there are such as embeddings.tokens, blocks.3.attention.q, blocks.*.feedforward, head"
    )


def _modules(name: str) -> list[str]:
    """A parameter's name and those of the modules that hold it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _depth(name: str, n_layer: int) -> int:
    if name.startswith("embeddings."):
        return n_layer + 1
    block = re.match(r"blocks\.(\d+)\.", name)
    return n_layer - int(block[1]) if block else 0


def set_trainable(model: GPT, names: frozenset[str]) -> None:
    """Have just these parameters train; those that cease to have no gradient left."""
    lowest = model.config.n_layer
    embeddings = False
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
        if name not in names:
            p.grad = None
            continue
        embeddings |= name.startswith("embeddings.")
        if block := re.match(r"blocks\.(\d+)\.", name):
            lowest = min(lowest, int(block[1]))
    model.train(model.training)  # what is frozen as a whole is in eval mode from now on, the rest no longer
    # A tied embedding that trains does so at both ends, so then nothing below the head is out of its gradient's way.
    model.frozen_depth = None if embeddings else lowest


def table(plan: Plan, model: nn.Module, peak_lr: Callable[[str], float]) -> list[TableRow]:
    """What trains, module by module: the embeddings, each block, the final norm, the head.

    Args:
        plan: of the run.
        model: whose parameters it names.
        peak_lr: of a parameter by name.
    """
    rows: dict[str, TableRow] = {}
    for name, p in model.named_parameters():
        module = ".".join(name.split(".")[:2]) if name.startswith(("embeddings.", "blocks.")) else name.partition(".")[0]
        stage = next((s for s in plan.stages if name in s.names), None)
        before = rows.get(module, TableRow(module, 0, 0, None, 0.0, 0))
        lr, since = before.lr, before.since
        if stage is not None:
            lr = max(lr or 0.0, peak_lr(name))
            since = stage.at if before.lr is None else max(since, stage.at, key=lambda at: [s.at for s in plan.stages].index(at))
        rows[module] = TableRow(
            module,
            before.parameters + p.numel(),
            before.trains + (p.numel() if stage else 0),
            lr,
            since,
            before.first + (p.numel() if stage is plan.stages[0] else 0),
        )
    return list(rows.values())
