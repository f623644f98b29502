"""What a run needs of each device in bytes, by formulas, from the model's shape and how it trains and is laid out.

docs/scaling.md explains the formulas; `scripts/scaling_check.py` holds them against what small runs keep. They count tensors: what a
device's runtime, its libraries and memory in pieces take besides is not in them, for which `ROOM` leaves a tenth.
Shapes in the comments: M tokens of a pass, d d_model, f d_ff, a and kv the widths of queries and keys, H heads, e bytes of an activation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from typing import Literal

from gpt.config import RunConfig
from gpt.model.attention import BLOCKWISE_MAX_LENGTH, QUERY_BLOCK
from gpt.model.config import GPTConfig
from gpt.model.loss import chunk_size
from gpt.runtime.device import Device

FLOAT = 4  # bytes; parameters, gradients and states
ROOM = 0.9  # share of a device's memory that is ours; the rest is the runtime's, the collectives' and what lies in pieces


@dataclass(frozen=True)
class Parameter:
    """Parameters of one shape.

    Attributes:
        shape: of each.
        count: how many of them.
        split: the dimension that tensor parallelism divides, or None.
        in_block: whether they are a block's; the others are what FSDP's root holds.
        is_norm: whether they are a norm's within a block, which FSDP leaves whole.
    """

    shape: tuple[int, ...]
    count: int
    split: int | None = None
    in_block: bool = True
    is_norm: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied with activations under autocast, and Muon's."""
        return self.in_block and len(self.shape) == 2

    def local(self, tensor: int = 1, shards: int = 1) -> int:
        """Elements of all of them on rank 0: FSDP2 divides rows, and fills the last ranks' up to the first's."""
        shards = 1 if self.is_norm else shards
        shape = list(self.shape)
        if self.split is not None:
            shape[self.split] = -(-shape[self.split] // tensor)
        shape[0] = -(-shape[0] // shards)
        return math.prod(shape) * self.count


def parameters(c: GPTConfig) -> list[Parameter]:
    """All parameters of a model."""
    d, f, a, kv, L = c.d_model, c.d_ff, c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_layer
    biased_norm = c.norm == "layernorm" and c.bias
    found = [Parameter((c.vocab_size, d), 1, None, False)]
    found += [] if c.tie_embeddings else [Parameter((c.outputs, d), 1, None, False)]
    found += [Parameter((c.outputs,), 1, None, False)] if c.head == "tokens" else []
    found += [Parameter((c.context_length, d), 1, None, False)] if c.positions == "learned" else []
    found += [Parameter((d,), 1 + biased_norm, None, False), Parameter((d,), 2 * L * (1 + biased_norm), is_norm=True)]
    found += [Parameter((c.head_dim,), 2 * L, is_norm=True)] if c.qk_norm else []
    ups = 2 if c.activation == "swiglu" else 1
    qkv = c.bias or c.qkv_bias
    for outputs, inputs, count, split, biased in (
        (a, d, 1, 0, qkv), (kv, d, 2, 0, qkv), (d, a, 1, 1, c.bias), (f, d, ups, 0, c.bias), (d, f, 1, 1, c.bias)
    ):  # fmt: skip
        found.append(Parameter((outputs, inputs), count * L, split))
        found += [Parameter((outputs,), count * L, 0 if split == 0 else None)] if biased else []
    return found


@dataclass(frozen=True)
class Case:
    """A model, how it trains and how it is laid out.

    Attributes:
        model: its shape.
        shards: ranks that FSDP divides parameters over; 0: ddp, or one process.
        replicas: groups of those that hold the same; under ddp, all that divide the batch.
        tensor: ranks that each matrix is divided over.
        length: T, tokens of a sequence.
        micro_batch: sequences of a pass.
        passes: micro-batches of a step and rank.
        width: bytes of an activation in a matrix product: 2 bf16, 4 fp32.
        checkpointing: none, full, every_n or selective.
        every: n of every_n.
        optimizer: muon or adamw.
        ema: whether an average of the weights is kept.
        compiled: whether blocks and loss are.
        documents: whether rows hold several documents, none of which sees another.
        plain: whether RMSNorm, dropout and attention with dropout are several operations each, as on a CPU, and keep what is between
            them, and compiled attention is our own; else they are the fused ones of a GPU.
        fused_adamw: whether AdamW is one kernel; else several operations, which keep what is between them.
        chunk: tokens of which the loss holds the logits.
    """

    model: GPTConfig
    shards: int = 0
    replicas: int = 1
    tensor: int = 1
    length: int = 1024
    micro_batch: int = 1
    passes: int = 1
    width: int = 2
    checkpointing: Literal["none", "full", "every_n", "selective"] = "none"
    every: int = 1
    optimizer: Literal["muon", "adamw"] = "muon"
    ema: bool = False
    compiled: bool = False
    documents: bool = False
    plain: bool = False
    fused_adamw: bool = True
    chunk: int = 512

    @property
    def is_divided(self) -> bool:
        """Whether FSDP2 is at work: also for ddp with tensor parallelism, over groups of one."""
        return self.shards > 0 or self.tensor > 1

    @property
    def ranks(self) -> int:
        """All processes."""
        return max(1, self.shards) * self.replicas * self.tensor

    @property
    def tokens(self) -> int:
        """Of a pass, M."""
        return self.micro_batch * self.length

    @property
    def computed_again(self) -> int:
        """Blocks of which backward computes activations a second time."""
        return {"none": 0, "every_n": -(-self.model.n_layer // self.every)}.get(self.checkpointing, self.model.n_layer)

    def elements(self, blocks: bool = True, root: bool = True, matrices: bool | None = None) -> int:
        """Parameters on rank 0; of them only the blocks' or the others; `matrices`: the blocks' alone, or all but those."""
        chosen = [p for p in parameters(self.model) if (blocks if p.in_block else root) and matrices in (None, p.is_matrix)]
        return sum(p.local(self.tensor, max(1, self.shards)) for p in chosen)

    def gathered(self, blocks: bool) -> int:
        """Elements of the blocks, or of the others, as FSDP gathers them."""
        shards = max(1, self.shards)
        return sum(p.local(self.tensor, shards) * shards for p in parameters(self.model) if p.in_block is blocks and not p.is_norm)


# Activations


@dataclass(frozen=True)
class _Widths:
    """Widths of a block's activations on a rank, in elements a token."""

    d: int
    f: int
    a: int
    kv: int
    heads: int
    kv_heads: int


def _widths(case: Case) -> _Widths:
    c, t = case.model, case.tensor
    heads, kv_heads = c.n_head // t, c.n_kv_head // t
    return _Widths(c.d_model, c.d_ff // t, heads * c.head_dim, kv_heads * c.head_dim, heads, kv_heads)


def _norm_input(case: Case) -> int:
    """Bytes that a norm of all of d keeps besides its statistics: its input, and an RMSNorm in parts also what it scales."""
    return FLOAT * case.tokens * case.model.d_model * (2 if case.model.norm == "rmsnorm" and case.plain else 1)


def _norm_statistics(case: Case) -> int:
    return FLOAT * case.tokens * (1 if case.model.norm == "rmsnorm" else 2)


def _drops_in_parts(case: Case) -> bool:
    """Whether attention keeps all scores: a CPU's fused kernel has no dropout."""
    return case.plain and case.model.dropout > 0


def _is_blockwise(case: Case) -> bool:
    """Whether attention is `blockwise_causal_attention`."""
    return case.compiled and case.plain and case.length <= BLOCKWISE_MAX_LENGTH and not case.model.dropout


def _seen(case: Case) -> int:
    """Scores that it makes of a head."""
    ends = [min(start + QUERY_BLOCK, case.length) for start in range(0, case.length, QUERY_BLOCK)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))


def _attention_bytes(case: Case) -> int:
    """q, k, v and the result, and what attention keeps of the scores."""
    M, e, w = case.tokens, case.width, _widths(case)
    scores = M * w.heads * case.length
    if _drops_in_parts(case):
        if case.compiled:  # q, k, v, the copy that `out` multiplies; scores in fp32, what is dropped in bytes
            return e * M * 4 * w.a + 5 * scores + 8 * M * w.heads
        return FLOAT * M * 3 * w.a + 3 * FLOAT * scores + e * M * w.a
    if _is_blockwise(case):
        return e * M * 5 * w.a + FLOAT * M * w.heads + e * case.micro_batch * w.heads * _seen(case)
    kv = w.a if case.documents and not case.plain else w.kv  # a GPU's kernel takes no mask with groups of heads
    kept = e * M * (2 * w.a + 2 * kv) + FLOAT * M * w.heads
    # The result lies as q does, head by head where those are normed or turned in part, and is then copied for `out`.
    by_head = case.model.qk_norm or (case.model.positions == "rotary" and case.model.rotary_dim < case.model.head_dim)
    return kept + (e * M * w.a if by_head and not case.compiled else 0)


def _dropout_bytes(case: Case) -> int:
    """What the two residual dropouts keep: the noise, or which elements."""
    kept = case.width if case.plain and not case.compiled else 1
    return 2 * kept * case.tokens * case.model.d_model if case.model.dropout else 0


def _rotary_bytes(case: Case, copies: int) -> int:
    """Tables of cos and sin that a block casts."""
    rows = case.tokens if case.documents else case.length
    return 2 * copies * case.width * rows * case.model.rotary_dim if case.model.positions == "rotary" and case.width == 2 else 0


def block_activations(case: Case) -> int:
    """Bytes that a block keeps for its backward pass, without weights."""
    c, M, e, w = case.model, case.tokens, case.width, _widths(case)
    is_gated, is_parallel = c.activation == "swiglu", c.parallel_residual
    head_statistics = FLOAT * M * (w.heads + w.kv_heads) if c.qk_norm else 0
    if case.compiled:
        # The compiler keeps products and inputs of products, and makes what is between them again.
        norms = FLOAT * M * w.d + _norm_statistics(case) * (1 if is_parallel else 2)
        norms += e * M * w.d * (2 if is_parallel else 3)  # both norms' results; what attention adds, where it is normed
        head_norms = e * M * (w.a + w.kv) + head_statistics if c.qk_norm else 0
        hidden = e * M * w.f * (3 if is_gated else 2)
        return norms + head_norms + _rotary_bytes(case, 1) + _attention_bytes(case) + hidden + _dropout_bytes(case)
    norms = _norm_input(case) * (1 if is_parallel else 2) + 2 * _norm_statistics(case)
    head_norms = FLOAT * M * (w.a + w.kv) * (2 if case.plain else 1) + head_statistics if c.qk_norm else 0
    casts = 3 if e == 2 else 1  # autocast casts a product's input for each product by itself
    inputs, hidden = (2 if e == 2 else 1, 4) if is_gated else (1, 2)
    products = e * M * ((casts + inputs) * w.d + hidden * w.f)
    return norms + head_norms + _rotary_bytes(case, 2) + _attention_bytes(case) + products + _dropout_bytes(case)


def kept_products(case: Case) -> int:
    """Bytes of a block's products and attention, which selective checkpointing keeps; compiled, those that backward needs."""
    c, M, e, w = case.model, case.tokens, case.width, _widths(case)
    if _drops_in_parts(case):
        attention = FLOAT * M * (w.a + w.heads * case.length)
    else:
        attention = e * M * w.a + (e * case.micro_batch * w.heads * _seen(case) if _is_blockwise(case) else FLOAT * M * w.heads)
    residual = (0 if c.parallel_residual else 1) if case.compiled else 2
    return e * M * (w.a + 2 * w.kv + residual * w.d + (2 if c.activation == "swiglu" else 1) * w.f) + attention


def kept_of_block(case: Case) -> int:
    """Bytes that a block keeps till backward: with checkpointing its input, and what is not computed again."""
    if not case.computed_again:
        return block_activations(case)
    return FLOAT * case.tokens * case.model.d_model + (kept_products(case) if case.checkpointing == "selective" else 0)


def activations(case: Case) -> int:
    """Bytes that the blocks, the embeddings and the final norm keep for backward; with checkpointing, and one block computed again."""
    c, M, e = case.model, case.tokens, case.width
    ends = _norm_input(case) + _norm_statistics(case) + 8 * M
    ends += (FLOAT if case.plain else 1) * M * c.d_model if c.dropout else 0
    if case.documents:
        ends += e * M * case.length  # the mask
        ends += 2 * FLOAT * M * c.rotary_dim if c.positions == "rotary" and e == FLOAT else 0
    block, again = block_activations(case), case.computed_again
    return ends + (c.n_layer - again) * block + (again * kept_of_block(case) + block if again else 0)


def loss_bytes(case: Case) -> int:
    """What `LinearCrossEntropy` keeps for backward: both gradients, made in forward."""
    return case.width * case.tokens * case.model.d_model + FLOAT * case.model.outputs * case.model.d_model


# What lasts, and the moments of a step


def states(case: Case) -> dict[str, float]:
    """Bytes on rank 0 that last from step to step, by what they are for."""
    local = case.elements()
    averaged_once = case.elements(matrices=True) if case.optimizer == "muon" else 0
    optimizer = FLOAT * (averaged_once + 2 * (local - averaged_once))
    return {"parameters": FLOAT * local, "optimizer": optimizer, "average": FLOAT * local if case.ema else 0}


def accumulated(case: Case) -> float:
    """Bytes of gradients on rank 0 while passes add them up: divided under FSDP; DDP's own, besides its buckets, which always are."""
    buckets = 0 if case.is_divided or case.replicas == 1 else FLOAT * case.elements()
    return buckets + (FLOAT * case.elements() if case.passes > 1 else 0)


def cast_weights(case: Case) -> float:
    """Bytes of autocast's copies of the blocks' matrices, which backward needs, or forward to its end. FSDP gathers them in bf16."""
    return case.width * case.elements(matrices=True) if case.width == 2 and not case.is_divided else 0


def passes(case: Case) -> dict[str, float]:
    """Bytes on rank 0 besides the states at the fullest moment of the passes, by what they are for."""
    c, M = case.model, case.tokens
    head = c.outputs * c.d_model
    again = block_activations(case) if case.computed_again else 0
    root = FLOAT * case.gathered(blocks=False) if case.is_divided else 0
    block = case.gathered(blocks=True) / c.n_layer if case.is_divided else 0
    gradients, casts = accumulated(case), cast_weights(case)
    casts_after = casts / c.n_layer * (c.n_layer - case.computed_again + (1 if again else 0))
    # The loss: dW, the head in bf16, a chunk's part of dW, and 23 bytes a logit, counted from the source; compiled, it and its gradient.
    a_logit = 2 * case.width if case.compiled else 23
    loss = loss_bytes(case) + 2 * case.width * head + a_logit * min(case.chunk, M) * c.outputs
    forward = {"activations": activations(case) - again, "loss": loss, "casts": casts_after if case.compiled else casts}
    forward["gathered"] = root + case.width * block  # FSDP2 keeps what the last block was gathered in until it gathers again
    # Backward begins: dW and dW scaled; of FSDP this block, the next one and the gradient.
    dw = case.width * M * c.d_model + 2 * FLOAT * head
    kept = activations(case)
    first = {"casts": casts_after, "activations": kept, "loss": dw, "gathered": root + 3 * case.width * block}
    # It goes on: what the block before sends is there still, in fp32; or this block's too, with what comes of it.
    sending = max(3 * case.width + FLOAT, case.width + 2 * FLOAT + FLOAT / max(1, case.shards)) * block
    of_a_block = kept_of_block(case) if c.n_layer > 1 else 0
    second = {"casts": casts_after, "activations": kept - of_a_block, "loss": dw - FLOAT * head, "gathered": root + sending}
    # And ends: all gradients, the embedding's and the head's before they are added up; what FSDP is sending is not divided yet.
    all_of_them = max(gradients, FLOAT * (case.elements() - (case.elements(root=False) // c.n_layer if case.is_divided else 0)))
    end = {"gradients": all_of_them, "activations": block_activations(case), "loss": 2 * FLOAT * head, "gathered": root + sending}
    moments = (*({"gradients": gradients, **moment} for moment in (forward, first, second)), end)
    return max(moments, key=lambda parts: sum(parts.values()))


def update(case: Case) -> dict[str, float]:
    """Bytes on rank 0 besides the states at the fullest moment of an update that is measured, for which the weights are copied."""
    size = FLOAT * case.elements()
    # Its norm is that of what is put where the gradients were; DDP's buckets stay.
    parts = {"gradients": size, "weights_before": size, "update": 0.0 if case.is_divided or case.replicas == 1 else size}
    if not case.fused_adamw:  # the gradients scaled, the divisors, the updates, those that apply; of all matrices at once
        own = [p for p in parameters(case.model) if len(p.shape) == 2 and not (p.is_matrix and case.optimizer == "muon")]
        parts["update"] = max(parts["update"], 4 * FLOAT * sum(p.local(case.tensor, max(1, case.shards)) for p in own))
    if case.optimizer != "muon":
        return parts
    sets: dict[tuple[int | None, ...], list[int]] = defaultdict(lambda: [0, 0])  # of the same shape and layout: made orthogonal together
    for p in parameters(case.model):
        if p.is_matrix:
            found = sets[(*p.shape, p.split if case.tensor > 1 else None)]
            found[0] += p.local(case.tensor, max(1, case.shards))
            found[1] += math.prod(p.shape) * p.count
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

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


def needs(case: Case) -> Memory:
    """What a case needs of rank 0."""
    return Memory(**states(case), **max(passes(case), update(case), key=lambda parts: sum(parts.values())))


def case_of(config: RunConfig, ranks: int, micro_batch: int, device: Device, compiled: bool) -> Case:
    """The case that a run is.

    Args:
        config: the run. A vocabulary that is not known yet is as large as the tokenizer's is to be.
        ranks: processes, one per device.
        micro_batch: sequences of a pass; what one rank has of a batch, if that is less.
        device: of each rank.
        compiled: whether blocks and loss are.
    """
    p, train = config.parallel, config.train
    model = replace(config.model, vocab_size=config.model.vocab_size or config.tokenizer.vocab_size)
    data = max(1, ranks // p.tensor)
    is_sharded = p.name == "fsdp" and ranks > 1
    mine = max(1, train.batch_tokens // config.sequence_length // data)
    size = min(micro_batch, mine)
    return Case(
        model, data // p.replicate if is_sharded else 0, p.replicate if is_sharded else data, p.tensor if ranks > 1 else 1,
        config.sequence_length, size, -(-mine // size), device.dtype.itemsize, train.activation_checkpointing,
        train.activation_checkpointing_n, config.optimizer.name, bool(train.ema), compiled, config.on_examples or config.data.document_mask,
        device.is_host, device.fused_adamw, chunk_size(device.type, model.outputs, size * config.sequence_length),
    )  # fmt: skip


_LABELS = {
    "parameters": "parameters, fp32", "optimizer": "optimizer state", "average": "average of the weights", "gradients": "gradients",
    "casts": "weights in bf16", "activations": "activations kept for backward", "loss": "head and loss", "gathered": "gathered parameters",
    "weights_before": "weights before a measured update", "update": "the optimizer's working memory",
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
