"""What a run needs of each device in bytes, by formulas, from the model's shape and how it trains and is laid out.

docs/scaling.md explains the formulas; `scripts/scaling_check.py` holds them against what small runs keep. They count tensors: what a
device's runtime, its libraries and memory in pieces take besides is not in them, for which `ROOM` leaves a tenth."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, fields
from typing import cast

from gpt.runtime.activations import activations, block_activations, kept_of_block, loss_bytes, loss_in_forward
from gpt.runtime.case import FLOAT, Case

ROOM = 0.9  # share of a device's memory that is ours; the rest is the runtime's, the collectives' and what lies in pieces


# What lasts, and the moments of a step


def states(case: Case) -> dict[str, float]:
    """Bytes on rank 0 that last from step to step, by what they are for."""
    learning = case.elements(learning=True)
    averaged_once = case.elements(matrices=True, learning=True) if case.optimizer == "muon" else 0
    optimizer = FLOAT * (averaged_once + 2 * (learning - averaged_once))
    return {
        "parameters": FLOAT * case.elements(), "optimizer": optimizer, "average": FLOAT * learning if case.ema else 0,
        "packed": packed_weights(case), "beside": case.beside,
    }  # fmt: skip


def accumulated(case: Case) -> float:
    """Bytes of gradients on rank 0 while passes add them up: divided under FSDP; DDP's own, besides its buckets, which always are."""
    size = FLOAT * case.elements(learning=True)
    return (0 if case.is_divided or case.replicas == 1 else size) + (size if case.passes > 1 else 0)


def cast_weights(case: Case) -> float:
    """Bytes of the copies of the blocks' matrices that backward needs, or forward to its end: autocast's, and sums with adapters.

    FSDP gathers matrices in bf16, and makes sums again. Blocks that run without gradients keep none, and native products cast as they read.
    """
    if case.is_divided:
        return 0
    matrices = [p for p in case.chosen(matrices=True) if cast(int, p.block) >= case.depth]
    if case.width == FLOAT or case.native_products:
        adapted = frozenset(case.lora.modules(case.model))
        matrices = [p for p in matrices if p.name.removesuffix(".weight") in adapted]
    return case.width * sum(p.local(case.tensor) for p in matrices)


def packed_weights(case: Case) -> int:
    """Bytes of the frozen blocks at the bottom as `PackedPrefix` keeps them."""
    if not case.native_rows or case.is_divided:
        return 0
    return case.width * sum(p.local() for p in case.chosen(root=False) if cast(int, p.block) < case.depth and not p.is_norm)


def _sum_made_again(case: Case) -> int:
    """Bytes of a matrix and its sum with an adapter, in fp32, the largest: FSDP does not keep it for backward."""
    adapted = frozenset(case.lora.modules(case.model)) if case.is_divided else frozenset()
    return 2 * FLOAT * max((p.local(case.tensor) for p in case.parameters if p.name.removesuffix(".weight") in adapted), default=0)


def passes(case: Case) -> dict[str, float]:
    """Bytes on rank 0 besides the states at the fullest moment of the passes, by what they are for."""
    c, M, layers = case.model, case.tokens, case.layers
    head = c.outputs * c.d_model
    dw_head = head * case.head_learns
    again = block_activations(case) if case.computed_again else 0
    root = FLOAT * case.gathered(blocks=False) if case.is_divided else 0
    block = case.gathered(blocks=True) / c.n_layer if case.is_divided else 0
    learning = case.gathered(blocks=True, learning=True) / max(1, layers) if case.is_divided else 0
    gradients, casts = accumulated(case), cast_weights(case)
    casts_after = casts / max(1, layers) * (layers - case.computed_again + (1 if again else 0)) + _sum_made_again(case)
    loss = loss_bytes(case) + loss_in_forward(case)
    forward = {"activations": activations(case) - again, "loss": loss, "casts": casts_after if case.compiled else casts}
    forward["gathered"] = root + case.width * block  # FSDP2 keeps what the last block was gathered in until it gathers again
    # Backward begins: dW and dW scaled; of FSDP this block, the next one and the gradient.
    dw = case.width * M * c.d_model + 2 * FLOAT * dw_head
    kept = activations(case)
    keeps_top = case.checkpointing == "every_n" and (c.n_layer - 1) % case.every != 0  # the top block is not computed again
    first = {
        "casts": casts_after,
        "activations": kept - (again if keeps_top else 0),
        "loss": dw,
        "gathered": root + case.width * (2 * block + learning),
    }
    # It goes on: what the block before sends is there still, in fp32; or this block's too, with what comes of it.
    e, rest = case.width, 2 * FLOAT + FLOAT / max(1, case.shards)
    sending = max(2 * e * block + (e + FLOAT) * learning, e * block + rest * learning)
    of_a_block = 0 if layers < 2 else block_activations(case) if keeps_top else kept_of_block(case)
    second = {"casts": casts_after, "activations": kept - of_a_block, "loss": dw - FLOAT * dw_head, "gathered": root + sending}
    # And ends: all gradients, the embedding's and the head's before they are added up; what FSDP is sending is not divided yet.
    of_blocks = case.elements(root=False, learning=True)
    all_of_them = max(gradients, FLOAT * (case.elements(learning=True) - (of_blocks // max(1, layers) if case.is_divided else 0)))
    last = block_activations(case) if layers else 0
    end = {"gradients": all_of_them, "activations": last, "loss": 2 * FLOAT * dw_head, "gathered": root + sending}
    moments = (*({"gradients": gradients, **moment} for moment in (forward, first, second)), end)
    return max(moments, key=lambda parts: sum(parts.values()))


def update(case: Case) -> dict[str, float]:
    """Bytes on rank 0 besides the states at the fullest moment of an update that is measured, for which the weights are copied."""
    size = FLOAT * case.elements(learning=True)
    # Its norm is that of what is put where the gradients were, one by one; DDP's buckets stay.
    largest = FLOAT * max((p.local(case.tensor, max(1, case.shards)) for p in case.chosen(learning=True)), default=0)
    parts: dict[str, float] = {
        "gradients": size,
        "weights_before": size,
        "update": largest if case.is_divided or case.replicas == 1 else size,
    }
    if not case.fused_adamw:  # the gradients scaled, the divisors, the updates, those that apply; of all matrices at once
        own = [p for p in case.chosen(learning=True) if len(p.shape) == 2 and not (p.is_matrix and case.optimizer == "muon")]
        parts["update"] = max(parts["update"], 4 * FLOAT * sum(p.local(case.tensor, max(1, case.shards)) for p in own))
    if case.optimizer != "muon":
        return parts
    sets: dict[tuple[int | None, ...], list[int]] = defaultdict(lambda: [0, 0])  # of the same shape and layout: made orthogonal together
    for p in case.chosen(matrices=True, learning=True):
        found = sets[(*p.shape, p.split if case.tensor > 1 else None)]
        found[0] += p.local(case.tensor, max(1, case.shards))
        found[1] += math.prod(p.shape)
    for (rows, columns, _), (here, total) in sets.items():
        assert rows is not None
        assert columns is not None
        mine, gram = total / case.ranks, min(rows, columns) / max(rows, columns)
        copies = 3 if case.is_divided else 2  # the whole matrices, x and what follows it; then x xT and the polynomial
        orthogonal = case.width * (here + mine * (copies + 2 * gram))
        applied = here * max(3 * case.width, 2 * case.width + FLOAT)  # gradients cast, updates, those that apply, in fp32
        parts["update"] = max(parts["update"], orthogonal, applied)
    return parts


def peak(case: Case) -> float:
    """Bytes on rank 0, the most at any time."""
    return needs(case).total


# For a run


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the fullest moment of a step, by what they are for.

    Attributes:
        parameters: the fp32 weights.
        optimizer: its state.
        average: of the weights.
        gradients: whole or divided, and DDP's buckets.
        casts: autocast's copies of weights.
        activations: what forward keeps for backward.
        loss: the head's product and its gradients, a chunk at a time.
        gathered: parameters of other devices, under FSDP.
        weights_before: copied to measure the update.
        update: what the optimizer makes besides, such as matrices that are made orthogonal.
        packed: frozen blocks in the layout that a CPU multiplies fastest.
        beside: a teacher, or the reference of DPO.
    """

    parameters: float = 0.0
    optimizer: float = 0.0
    average: float = 0.0
    gradients: float = 0.0
    casts: float = 0.0
    activations: float = 0.0
    loss: float = 0.0
    gathered: float = 0.0
    weights_before: float = 0.0
    update: float = 0.0
    packed: float = 0.0
    beside: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


def needs(case: Case) -> Memory:
    """What a case needs of rank 0."""
    return Memory(**states(case), **max(passes(case), update(case), key=lambda parts: sum(parts.values())))


_LABELS = {
    "parameters": "parameters, fp32", "optimizer": "optimizer state", "average": "average of the weights", "gradients": "gradients",
    "casts": "weights in bf16", "activations": "activations kept for backward", "loss": "head and loss", "gathered": "gathered parameters",
    "weights_before": "weights before a measured update", "update": "the optimizer's working memory",
    "packed": "frozen blocks in bf16", "beside": "teacher or reference",
}  # fmt: skip


def fit_rows(case: Case, capacity: int | None) -> list[tuple[str, float]]:
    """What a rank needs at its fullest moment against what it has, as rows of a report: (label, bytes), without what takes none.

    Args:
        case: from `case_of`, with the ranks of the machine that is asked about.
        capacity: bytes of one device, or None.
    """
    memory = needs(case)
    rows = [(label, getattr(memory, name)) for name, label in _LABELS.items() if getattr(memory, name)]
    rows.append((f"all, on each of {case.ranks} ranks" if case.ranks > 1 else "all", memory.total))
    return rows if capacity is None else [*rows, ("memory of the device", float(capacity)), ("left", capacity - memory.total)]


def binary_size(size: float) -> str:
    """Bytes for people: 386 KiB, 1.5 GiB."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if abs(size) < 1023.5:
            break
        size, unit = size / 1024, larger
    return f"{size:.{1 if abs(size) < 9.95 and unit != 'B' else 0}f} {unit}"
