"""What forward keeps of a pass for backward, in bytes, by formulas; `gpt.runtime.memory` says what else a run needs.

Shapes in the comments: M tokens of a pass, d d_model, f d_ff, a and kv the widths of queries and keys, H heads, e bytes of an activation.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt.model.attention import BLOCKWISE_MAX_LENGTH, QUERY_BLOCK
from gpt.model.kernels import kernels_of
from gpt.runtime.case import FLOAT, Case

_NORMS = ("attention_norm", "feedforward_norm")  # of a block


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


def _is_root_mean_square(case: Case, norm: str) -> bool:
    """Whether a norm is torch's RMSNorm: ours keeps means too."""
    return case.model.norm == "rmsnorm" and not (case.native_rows and norm in _NORMS)


def _is_in_parts(case: Case, norm: str) -> bool:
    """Whether a norm is several operations, of which each keeps what it needs."""
    return case.plain and _is_root_mean_square(case, norm)


def _norm_statistics(case: Case, norm: str) -> int:
    return FLOAT * case.tokens * (1 if _is_root_mean_square(case, norm) else 2)


def _norm_bytes(case: Case, norm: str) -> int:
    """Bytes that a norm of all of d keeps: its input and statistics, and in parts, if it trains, also what it scales."""
    learns = case.learns(norm) if norm == "final_norm" else _learns(case, norm)
    tensors = 2 if _is_in_parts(case, norm) and learns else 1
    return FLOAT * case.tokens * case.model.d_model * tensors + _norm_statistics(case, norm)


def _drops_in_parts(case: Case) -> bool:
    """Whether attention keeps all scores: a CPU's fused kernel has no dropout."""
    return case.plain and case.model.dropout > 0


def _is_blockwise(case: Case) -> bool:
    """Whether attention is `blockwise_causal_attention`."""
    is_ours = case.compiled and case.plain and not case.model.dropout
    return is_ours and not case.native_attention and case.length <= BLOCKWISE_MAX_LENGTH


def _seen(case: Case) -> int:
    """Scores that it makes of a head."""
    ends = [min(start + QUERY_BLOCK, case.length) for start in range(0, case.length, QUERY_BLOCK)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))


def _attention_bytes(case: Case) -> int:
    """q, k, v and the result, and what attention keeps of the scores."""
    M, e, w = case.tokens, case.width, _widths(case)
    scores = M * w.heads * case.length
    if _drops_in_parts(case):
        if case.compiled:  # q, k, v, the copy that `out` multiplies; scores in fp32 and as v reads them, what is dropped in bytes
            return e * M * 4 * w.a + (FLOAT + e + 1) * scores + 8 * M * w.heads
        return FLOAT * M * 3 * w.a + 3 * FLOAT * scores + e * M * w.a
    if _is_blockwise(case):
        return e * M * 5 * w.a + FLOAT * M * w.heads + e * case.micro_batch * w.heads * _seen(case)
    kv = w.a if case.documents and not case.plain else w.kv  # a GPU's kernel takes no mask with groups of heads
    kept = e * M * (2 * w.a + 2 * kv) + FLOAT * M * w.heads
    if case.compiled or case.native_attention or not _learns(case, "attention.out"):
        return kept
    # The result lies as q does, head by head where those are normed or turned in part, and is then copied for `out`.
    by_head = case.model.qk_norm or (case.model.positions == "rotary" and case.model.rotary_dim < case.model.head_dim)
    return kept + (e * M * w.a if by_head else 0)


def _dropout_bytes(case: Case) -> int:
    """What the two residual dropouts keep: the noise, or which elements."""
    kept = case.width if case.plain and not case.compiled else 1
    return 2 * kept * case.tokens * case.model.d_model if case.model.dropout else 0


def _rotary_bytes(case: Case, copies: int) -> int:
    """Tables of cos and sin that a block casts."""
    rows = case.tokens if case.documents else case.length
    return 2 * copies * case.width * rows * case.model.rotary_dim if case.model.positions == "rotary" and case.width == 2 else 0


def _is_one_call(case: Case) -> bool:
    """Whether both products of the feed-forward and the GELU between them are one operator, which computes GELU again."""
    adapted = any(".feedforward." in name for name in case.lora.modules(case.model))
    return case.native_products and case.tensor == 1 and case.model.activation == "gelu_tanh" and not adapted


def block_activations(case: Case) -> int:
    """Bytes that a block keeps for its backward pass, without weights."""
    c, M, e, w = case.model, case.tokens, case.width, _widths(case)
    is_gated, is_parallel = c.activation == "swiglu", c.parallel_residual
    shared = FLOAT * M * w.d if is_parallel else 0  # the input of both norms
    head_statistics = FLOAT * M * (w.heads + w.kv_heads) if c.qk_norm else 0
    if case.compiled:
        # The compiler keeps products and inputs of products and of what is native, and makes what is between them again.
        norms = 2 * e * M * w.d  # their results
        if case.native_rows:
            norms += sum(_norm_bytes(case, name) for name in _NORMS) - shared
        else:  # the second norm's input is the first's and what attention adds; side by side they have the same statistics
            norms += FLOAT * M * w.d + _norm_statistics(case, "attention_norm")
            norms += 0 if is_parallel else e * M * w.d + _norm_statistics(case, "feedforward_norm")
        head_norms = e * M * (w.a + w.kv) + head_statistics if c.qk_norm else 0
        hidden = e * M * w.f * (3 if is_gated else 1 if _is_one_call(case) else 2)
        return norms + head_norms + _rotary_bytes(case, 1) + _attention_bytes(case) + hidden + _dropout_bytes(case)
    norms = sum(_norm_bytes(case, name) for name in _NORMS) - shared
    twice = case.plain and (_learns(case, "attention.q_norm") or _learns(case, "attention.k_norm"))
    head_norms = FLOAT * M * (w.a + w.kv) * (2 if twice else 1) + head_statistics if c.qk_norm else 0
    # What a product with a frozen matrix reads is not kept for it. Autocast casts a product's input for each product by itself, if it is
    # not in the products' dtype yet.
    qkv = sum(_learns(case, f"attention.{name}") for name in "qkv")
    ups = sum(_learns(case, f"feedforward.{name}") for name in (("gate", "up") if is_gated else ("up",)))
    hidden = ((2 if case.native_rows else 3) if is_gated else 1) + (_learns(case, "feedforward.down") and not _is_one_call(case))
    inputs = qkv + ups if e == 2 and not case.native_rows else min(qkv, 1) + min(ups, 1)
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
    # What the residual adds is needed again where it is normed, or where dropout, which is computed again, reads it.
    residual = (0 if c.parallel_residual else 1) if case.compiled and not c.dropout else 2
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
    ends = _norm_bytes(case, "final_norm") if learns else 0
    if case.learns("embeddings."):
        ends += 8 * M + ((FLOAT if case.plain else 1) * M * c.d_model if c.dropout else 0)
    elif case.layers and not case.compiled:  # nothing is sent down through the lowest norm
        if not _learns(case, "attention_norm"):
            ends -= _norm_bytes(case, "attention_norm")
        elif _is_in_parts(case, "attention_norm"):
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


def loss_in_forward(case: Case) -> int:
    """Bytes besides those while the loss is made: the head in the products' dtype, a part of dW, and logits with what comes of them."""
    c, M, e = case.model, case.tokens, case.width
    head = e * c.outputs * c.d_model
    made = (head if e < FLOAT else 0) + head * case.head_learns
    if case.native_products:  # it is laid out in two ways; all is added to dW at once
        return 2 * head + e * min(case.chunk, M) * (c.outputs + 2 * c.d_model) + FLOAT * M * c.d_model
    if not case.native_rows:  # counted from the source: the logits and their gradient, uncompiled 23 bytes a logit
        return made + (2 * e if case.compiled else 23) * min(case.chunk, M) * c.outputs
    # The gradient takes the place of the logits. Those of several chunks wait for dW, with what the head read, which is then joined. What
    # the last norm gave is there in fp32 all the while.
    waiting = min(-(-M // case.chunk), kernels_of("cpu").gradient_bytes // (e * case.chunk * c.outputs))
    together = waiting * case.chunk if waiting > 1 and case.head_learns else min(case.chunk, M)
    return made + e * together * (c.outputs + 2 * c.d_model) + FLOAT * M * c.d_model
