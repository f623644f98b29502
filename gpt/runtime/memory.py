"""What a run needs of each device in bytes, by formulas, from the model's shape and how it trains and is laid out.

docs/scaling.md explains the formulas; `scripts/scaling_check.py` holds them against what small runs keep. They count tensors: what a
device's runtime, its libraries and memory in pieces take besides is not in them, for which `ROOM` leaves a tenth.
Shapes in the comments: M tokens of a pass, d d_model, f d_ff, a and kv the widths of queries and keys, H heads, e bytes of an activation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Literal, cast

from gpt.config import RunConfig
from gpt.model.attention import BLOCKWISE_MAX_LENGTH, QUERY_BLOCK
from gpt.model.config import GPTConfig, LoRAConfig
from gpt.model.loss import chunk_size
from gpt.runtime.device import Device
from gpt.runtime.shapes import Parameter, parameters

FLOAT = 4  # bytes; parameters, gradients and states
ROOM = 0.9  # share of a device's memory that is ours; the rest is the runtime's, the collectives' and what lies in pieces


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
        lora: its adapters.
        trains: names of the parameters that train; None: all.
        beside: bytes of another model that the device holds, a teacher or a reference.
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
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    trains: frozenset[str] | None = None
    beside: float = 0.0

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

    @cached_property
    def parameters(self) -> list[Parameter]:
        """All of them, those of adapters too."""
        return parameters(self.model, self.lora)

    @property
    def depth(self) -> int:
        """Blocks at the bottom that run without gradients: nothing below, or in them, trains."""
        if self.learns("embeddings."):
            return 0
        return min((n for n in range(self.model.n_layer) if self.learns(f"blocks.{n}.")), default=self.model.n_layer)

    @property
    def layers(self) -> int:
        """Blocks that backward goes through."""
        return self.model.n_layer - self.depth

    @property
    def computed_again(self) -> int:
        """Blocks of which backward computes activations a second time."""
        every_n = sum(number % self.every == 0 for number in range(self.depth, self.model.n_layer))
        return {"none": 0, "every_n": every_n}.get(self.checkpointing, self.layers)

    def learns(self, beginning: str, end: str = "") -> bool:
        """Whether any parameter trains whose name begins, and ends, so."""
        return self.trains is None or any(name.startswith(beginning) and name.endswith(end) for name in self.trains)

    @property
    def head_learns(self) -> bool:
        """Whether the head has a gradient."""
        return self.learns("embeddings.tokens." if self.model.tie_embeddings else "head.")

    def chosen(self, blocks: bool = True, root: bool = True, matrices: bool | None = None, learning: bool = False) -> list[Parameter]:
        """Parameters: of all only the blocks' or the others; `matrices`: the blocks' alone, or all but those; only those that train."""
        return [
            p
            for p in self.parameters
            if (root if p.block is None else blocks)
            and matrices in (None, p.is_matrix)
            and (not learning or self.trains is None or p.name in self.trains)
        ]

    def elements(self, blocks: bool = True, root: bool = True, matrices: bool | None = None, learning: bool = False) -> int:
        """Elements of the chosen ones on rank 0."""
        return sum(p.local(self.tensor, max(1, self.shards)) for p in self.chosen(blocks, root, matrices, learning))

    def gathered(self, blocks: bool, learning: bool = False) -> int:
        """Elements of the blocks, or of the others, as FSDP gathers them; or of those that train."""
        shards = max(1, self.shards)
        return sum(p.local(self.tensor, shards) * shards for p in self.chosen(blocks, not blocks, None, learning) if not p.is_norm)


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


def _learns(case: Case, module: str) -> bool:
    """Whether this part of a block trains in any block, itself or by its adapter: else products need no inputs for backward."""
    return case.trains is None or any(name.split(".", 2)[-1].startswith(f"{module}.") for name in case.trains)


def _norm_input(case: Case, name: str) -> int:
    """Bytes that a norm of all of d keeps besides its statistics: its input, and an RMSNorm in parts, if it trains, also what it scales."""
    learns = case.learns(name) if name == "final_norm" else _learns(case, name)
    return FLOAT * case.tokens * case.model.d_model * (2 if case.model.norm == "rmsnorm" and case.plain and learns else 1)


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
    return kept + (e * M * w.a if by_head and not case.compiled and _learns(case, "attention.out") else 0)


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
    inputs_of_norms = [_norm_input(case, name) for name in ("attention_norm", "feedforward_norm")]
    norms = (max(inputs_of_norms) if is_parallel else sum(inputs_of_norms)) + 2 * _norm_statistics(case)
    twice = case.plain and (_learns(case, "attention.q_norm") or _learns(case, "attention.k_norm"))
    head_norms = FLOAT * M * (w.a + w.kv) * (2 if twice else 1) + head_statistics if c.qk_norm else 0
    # What a product with a frozen matrix reads is not kept for it. Autocast casts a product's input for each product by itself.
    qkv = sum(_learns(case, f"attention.{name}") for name in "qkv")
    ups = sum(_learns(case, f"feedforward.{name}") for name in (("gate", "up") if is_gated else ("up",)))
    hidden = (3 if is_gated else 1) + _learns(case, "feedforward.down")
    inputs = qkv + ups if e == 2 else min(qkv, 1) + min(ups, 1)
    products = e * M * (inputs * w.d + hidden * w.f)
    return norms + head_norms + _rotary_bytes(case, 2) + _attention_bytes(case) + products + _dropout_bytes(case)


def kept_products(case: Case) -> int:
    """Bytes of a block's products and attention, which selective checkpointing keeps; compiled, those that backward needs."""
    c, M, e, w = case.model, case.tokens, case.width, _widths(case)
    if _drops_in_parts(case):
        attention = FLOAT * M * (w.a + w.heads * case.length)
    else:
        attention = e * M * w.a + (e * case.micro_batch * w.heads * _seen(case) if _is_blockwise(case) else FLOAT * M * w.heads)
    adapted = frozenset(case.lora.modules(c))  # the sum of a matrix and its adapter is a product, in fp32
    sums = FLOAT * sum(p.local(case.tensor) for p in case.parameters if p.name.removesuffix(".weight") in adapted) // c.n_layer
    residual = (0 if c.parallel_residual else 1) if case.compiled else 2
    return e * M * (w.a + 2 * w.kv + residual * w.d + (2 if c.activation == "swiglu" else 1) * w.f) + attention + sums


def kept_of_block(case: Case) -> int:
    """Bytes that a block keeps till backward: with checkpointing its input, and what is not computed again."""
    if not case.computed_again:
        return block_activations(case)
    return FLOAT * case.tokens * case.model.d_model + (kept_products(case) if case.checkpointing == "selective" else 0)


def activations(case: Case) -> int:
    """Bytes that the blocks, the embeddings and the final norm keep for backward; with checkpointing, and one block computed again."""
    c, M, e = case.model, case.tokens, case.width
    learns = case.layers > 0 or case.learns("final_norm")  # anything below the head
    ends = _norm_input(case, "final_norm") + _norm_statistics(case) if learns else 0
    if case.learns("embeddings."):
        ends += 8 * M + ((FLOAT if case.plain else 1) * M * c.d_model if c.dropout else 0)
    elif case.layers and not case.compiled:  # nothing is sent down through the lowest norm
        if not _learns(case, "attention_norm"):
            ends -= _norm_input(case, "attention_norm") + _norm_statistics(case)
        elif c.norm == "rmsnorm" and case.plain:
            ends -= FLOAT * M * c.d_model
    if case.documents:
        ends += e * M * case.length  # the mask
        ends += 2 * FLOAT * M * c.rotary_dim if c.positions == "rotary" and e == FLOAT else 0
    block, again = block_activations(case), case.computed_again
    return ends + (case.layers - again) * block + (again * kept_of_block(case) + block if again else 0)


def loss_bytes(case: Case) -> int:
    """What `LinearCrossEntropy` keeps for backward: both gradients, made in forward."""
    d = case.model.d_model
    below = case.layers > 0 or case.learns("final_norm")
    return case.width * case.tokens * d * below + FLOAT * case.model.outputs * d * case.head_learns


# What lasts, and the moments of a step


def states(case: Case) -> dict[str, float]:
    """Bytes on rank 0 that last from step to step, by what they are for."""
    learning = case.elements(learning=True)
    averaged_once = case.elements(matrices=True, learning=True) if case.optimizer == "muon" else 0
    optimizer = FLOAT * (averaged_once + 2 * (learning - averaged_once))
    return {
        "parameters": FLOAT * case.elements(), "optimizer": optimizer, "average": FLOAT * learning if case.ema else 0, "beside": case.beside
    }  # fmt: skip


def accumulated(case: Case) -> float:
    """Bytes of gradients on rank 0 while passes add them up: divided under FSDP; DDP's own, besides its buckets, which always are."""
    size = FLOAT * case.elements(learning=True)
    return (0 if case.is_divided or case.replicas == 1 else size) + (size if case.passes > 1 else 0)


def cast_weights(case: Case) -> float:
    """Bytes of the copies of the blocks' matrices that backward needs, or forward to its end: autocast's, and sums with adapters.

    FSDP gathers matrices in bf16, and makes sums again. Blocks that run without gradients keep none.
    """
    if case.is_divided:
        return 0
    matrices = [p for p in case.chosen(matrices=True) if cast(int, p.block) >= case.depth]
    if case.width == FLOAT:
        adapted = frozenset(case.lora.modules(case.model))
        matrices = [p for p in matrices if p.name.removesuffix(".weight") in adapted]
    return case.width * sum(p.local(case.tensor) for p in matrices)


def passes(case: Case) -> dict[str, float]:
    """Bytes on rank 0 besides the states at the fullest moment of the passes, by what they are for."""
    c, M, layers = case.model, case.tokens, case.layers
    head = c.outputs * c.d_model
    dw_head = head * case.head_learns
    again = block_activations(case) if case.computed_again else 0
    root = FLOAT * case.gathered(blocks=False) if case.is_divided else 0
    block = case.gathered(blocks=True) / c.n_layer if case.is_divided else 0
    learning = case.gathered(blocks=True, learning=True) / c.n_layer if case.is_divided else 0
    gradients, casts = accumulated(case), cast_weights(case)
    casts_after = casts / max(1, layers) * (layers - case.computed_again + (1 if again else 0))
    # The loss: dW, the head in bf16, a chunk's part of dW, and 23 bytes a logit, counted from the source; compiled, it and its gradient.
    a_logit = 2 * case.width if case.compiled else 23
    narrow = case.width * head if case.width < FLOAT else 0
    loss = loss_bytes(case) + narrow + case.width * dw_head + a_logit * min(case.chunk, M) * c.outputs
    forward = {"activations": activations(case) - again, "loss": loss, "casts": casts_after if case.compiled else casts}
    forward["gathered"] = root + case.width * block  # FSDP2 keeps what the last block was gathered in until it gathers again
    # Backward begins: dW and dW scaled; of FSDP this block, the next one and the gradient.
    dw = case.width * M * c.d_model + 2 * FLOAT * dw_head
    kept = activations(case)
    first = {"casts": casts_after, "activations": kept, "loss": dw, "gathered": root + case.width * (2 * block + learning)}
    # It goes on: what the block before sends is there still, in fp32; or this block's too, with what comes of it.
    e, rest = case.width, 2 * FLOAT + FLOAT / max(1, case.shards)
    sending = max(2 * e * block + (e + FLOAT) * learning, e * block + rest * learning)
    of_a_block = kept_of_block(case) if layers > 1 else 0
    second = {"casts": casts_after, "activations": kept - of_a_block, "loss": dw - FLOAT * dw_head, "gathered": root + sending}
    # And ends: all gradients, the embedding's and the head's before they are added up; what FSDP is sending is not divided yet.
    of_blocks = case.elements(root=False, learning=True)
    all_of_them = max(gradients, FLOAT * (case.elements(learning=True) - (of_blocks // c.n_layer if case.is_divided else 0)))
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
    beside: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


def needs(case: Case) -> Memory:
    """What a case needs of rank 0."""
    return Memory(**states(case), **max(passes(case), update(case), key=lambda parts: sum(parts.values())))


def case_of(config: RunConfig, ranks: int, micro_batch: int, device: Device, compiled: bool, trains: frozenset[str] | None = None) -> Case:
    """The case that a run is, without another model beside it.

    Args:
        config: the run. A vocabulary that is not known yet is as large as the tokenizer's is to be.
        ranks: processes, one per device.
        micro_batch: sequences of a pass; what one rank has of a batch, if that is less.
        device: of each rank.
        compiled: whether blocks and loss are.
        trains: names of the parameters that train; None: all.
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
        config.lora, trains,
    )  # fmt: skip


_LABELS = {
    "parameters": "parameters, fp32", "optimizer": "optimizer state", "average": "average of the weights", "gradients": "gradients",
    "casts": "weights in bf16", "activations": "activations kept for backward", "loss": "head and loss", "gathered": "gathered parameters",
    "weights_before": "weights before a measured update", "update": "the optimizer's working memory",
    "beside": "teacher or reference",
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
