"""Causal multi-head self-attention, grouped-query when n_kv_head < n_head, with a static key/value cache.

Shapes: B batch, T time of this call, S time attended to, H query heads, K key/value heads, D head_dim, E d_model.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.model.config import GPTConfig
from gpt.model.kernels import kernels_of
from gpt.model.native_attention import is_native, native_causal_attention
from gpt.model.native_products import Linear, native_linears, suits_together
from gpt.model.positions import rotate

# On a CPU attention is native in bf16 where that is possible (`native_attention.py`). Where it is not, products of blocks of queries with
# the keys that they may see, around compiled softmaxes, train faster than the fused kernel (benchmarks/RESULTS.md, "attention"); not
# compiled, or beyond this length, where the scores fill the memory, that is used.
BLOCKWISE_MAX_LENGTH = 1024
QUERY_BLOCK = 128


class KVCache:
    """Keys and values of what has been read, in buffers of fixed size, one pair per block.

    It works in one of two ways. As made, it hands attention the filled part of its buffers. After `fix_shapes` every step has the
    same shapes and depends on no number outside a tensor, so that it can be compiled or recorded once: attention gets the whole
    buffers and a mask.

    Args:
        config: the model's shape.
        batch_size: B.
        max_length: S, the most tokens it can hold.
        device, dtype: of the buffers; attention over them is computed in this dtype.
        padding: (B,) int64, how many tokens at the start of each row are padding that nobody sees; None: none in any.

    Raises:
        ValueError: max_length exceeds the config's context_length.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        padding: Tensor | None = None,
    ) -> None:
        if max_length > config.context_length:
            raise ValueError(f"a KV cache of {max_length} tokens exceeds context_length={config.context_length}")
        shape = (batch_size, config.n_kv_head, max_length, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]  # each (B, K, S, D)
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.padding = padding
        self.length = 0
        self.max_length = max_length
        self._place: Tensor | None = None  # (1,) int64, after fix_shapes

    def fix_shapes(self) -> None:
        """From here on, single tokens only, in steps of one shape."""
        self._place = torch.tensor([self.length], device=self.keys[0].device)

    def buffers(self) -> list[Tensor]:
        """Every tensor that a step writes to."""
        return [*self.keys, *self.values, *([] if self._place is None else [self._place])]

    def repeat(self, n: int) -> None:
        """Make n rows of each, next to one another."""
        self.keys = [k.repeat_interleave(n, dim=0) for k in self.keys]
        self.values = [v.repeat_interleave(n, dim=0) for v in self.values]
        if self.padding is not None:
            self.padding = self.padding.repeat_interleave(n)

    def places(self, T: int) -> tuple[slice | Tensor, Tensor | None]:
        """Where the next T tokens stand, and whom they see.

        Returns:
            Their positions, a slice or an index (T,) or (B, T); and the mask to add to their attention scores, (1 or B, 1, T, S),
            or None if each sees all before it.

        Raises:
            ValueError: more tokens than the cache holds.
        """
        if self._place is not None:
            now = self._place
            visible = torch.arange(self.max_length, device=now.device) <= now  # (S,)
            if self.padding is None:
                return now, _additive(visible[None, None, None], self.keys[0].dtype)
            visible = visible & (torch.arange(self.max_length, device=now.device) >= self.padding[:, None])  # (B, S)
            return now - self.padding[:, None], _additive(visible[:, None, None], self.keys[0].dtype)
        end = self.length + T
        if end > self.max_length:
            raise ValueError(f"{end} tokens do not fit a KV cache of {self.max_length}")
        if self.padding is None:
            visible = torch.ones(T, end, dtype=torch.bool, device=self.keys[0].device).tril(self.length) if 1 < T < end else None
            return slice(self.length, end), None if visible is None else _additive(visible[None, None], self.keys[0].dtype)
        now, slots = (torch.arange(n, end, device=self.padding.device) for n in (self.length, 0))
        visible = (slots <= now[:, None]) & (slots >= self.padding[:, None, None])  # (B, T, S)
        visible |= slots == now[:, None]  # padding sees itself: a softmax over nothing is not a number
        return (now - self.padding[:, None]).clamp(min=0), _additive(visible[:, None], self.keys[0].dtype)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store this call's k, v (B, K, T, D) after what block `layer` already holds; return what attention reads (B, K, S, D)."""
        keys, values = self.keys[layer], self.values[layer]
        if self._place is not None:
            keys.index_copy_(2, self._place, k.to(keys.dtype))
            values.index_copy_(2, self._place, v.to(values.dtype))
            return keys, values
        end = self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        if self.length == 0:
            return k, v  # nothing was there before: no need to read it back
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, T: int) -> None:
        """Count T tokens as read, when every block has stored them."""
        if self._place is not None:
            self._place += T
        else:
            self.length += T


def document_places(documents: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where the tokens of packed documents stand, and whom they see: earlier tokens of their own document, and themselves.

    Args:
        documents: (B, T) int64, the number of each token's document; a document's tokens follow each other.
        dtype: of the mask.

    Returns:
        positions (B, T) int64 within the documents, and the mask (B, 1, T, T) to add to attention scores.
    """
    visible = (documents[:, :, None] == documents[:, None, :]).tril()  # (B, T, T)
    return visible.sum(-1, dtype=torch.int32).long() - 1, _additive(visible[:, None], dtype)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v; without a mask, query t sees the keys up to its own place (T == S), or all (T == 1).

    Args:
        q: (B, H, T, D).
        k, v: (B, K, S, D) with S >= T and H a multiple of K; attention is computed in their dtype.
        dropout: probability of dropping an attention weight.
        mask: (1 or B, 1, T, S), added to the scores; where T == S no query may see beyond its own place.

    Returns:
        (B, H, T, D) in q's dtype.
    """
    T, S = q.shape[2], k.shape[2]
    kernels = kernels_of(q.device.type)
    if kernels.native and k.dtype == torch.bfloat16 and T == S > 1 and not dropout and is_native(q.shape[3]):
        return native_causal_attention(q.to(k.dtype), k, v, None if mask is None else mask.to(k.dtype)).to(q.dtype)
    if torch.compiler.is_compiling() and kernels.own_attention and T == S <= BLOCKWISE_MAX_LENGTH and not dropout:
        return blockwise_causal_attention(q, k, v, mask)
    dtype, heads = q.dtype, q.shape[1]
    if T == 1 and heads != k.shape[1]:
        q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # a group's queries see the same keys: (B, K, H/K, D)
    elif mask is not None and not kernels.groups_with_mask and heads != k.shape[1]:
        k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    y = F.scaled_dot_product_attention(
        q.to(k.dtype), k, v, attn_mask=None if mask is None else mask.to(k.dtype), dropout_p=dropout,
        is_causal=mask is None and T == S and T > 1, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return y.reshape(y.shape[0], heads, T, -1).to(dtype)


def blockwise_causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`causal_attention` of T == S in blocks of queries, each with the keys up to its end only; made to be compiled.

    The softmax is divided out after the product with v, and backward takes its row sums from the output (Dao et al.,
    "FlashAttention", 2022): so a score is read twice and written once in forward, and backward takes no exponential.
    """
    groups, T = q.shape[1] // k.shape[1], q.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if mask is None:
        mask = torch.full((1, 1, T, T), float("-inf"), device=q.device).triu(1)
    return cast(Tensor, _BlockwiseAttention.apply(q, k, v, mask))


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        outputs, saved = [], []
        for start, end in _query_blocks(q):
            scores = (q[:, :, start:end] @ k[:, :, :end].mT).float() * q.shape[-1] ** -0.5 + mask[:, :, start:end, :end]
            weights = (scores - scores.amax(-1, keepdim=True)).exp()  # (B, H, block, end), not normalised
            norm = 1 / weights.sum(-1, keepdim=True)
            weights = weights.to(q.dtype)
            outputs.append(((weights @ v[:, :, :end]).float() * norm).to(q.dtype))
            saved += [weights, norm]
        y = torch.cat(outputs, dim=2)
        ctx.save_for_backward(q, k, v, y, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (gradient,) = outputs
        q, k, v, y, *saved = ctx.saved_tensors
        T, scale = q.shape[2], q.shape[-1] ** -0.5
        row_sums = (gradient.float() * y.float()).sum(-1, keepdim=True)  # of weights times their gradients
        q_gradients = []
        k_gradient = v_gradient = torch.zeros((), device=q.device)
        for (start, end), weights, norm in zip(_query_blocks(q), saved[::2], saved[1::2], strict=True):
            block = (gradient[:, :, start:end].float() * norm).to(q.dtype)
            of_weights = (block @ v[:, :, :end].mT).float()
            of_scores = (weights.float() * (of_weights - row_sums[:, :, start:end] * norm)).to(q.dtype)
            q_gradients.append(of_scores @ k[:, :, :end])
            unseen = (0, 0, 0, T - end)
            k_gradient = F.pad((of_scores.mT @ q[:, :, start:end]).float(), unseen) + k_gradient
            v_gradient = F.pad((weights.mT @ block).float(), unseen) + v_gradient
        return torch.cat(q_gradients, dim=2) * scale, (k_gradient * scale).to(q.dtype), v_gradient.to(q.dtype), None


def _query_blocks(q: Tensor) -> list[tuple[int, int]]:
    T = q.shape[2]
    return [(start, min(start + QUERY_BLOCK, T)) for start in range(0, T, QUERY_BLOCK)]


class Attention(nn.Module):
    """One block's self-attention: project to q, k, v, (norm and rotate q and k), attend, project back."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        query_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        qkv_bias = config.bias or config.qkv_bias
        self.q = Linear(config.d_model, query_width, bias=qkv_bias)
        self.k = Linear(config.d_model, kv_width, bias=qkv_bias)
        self.v = Linear(config.d_model, kv_width, bias=qkv_bias)
        self.widths = [query_width, kv_width, kv_width]
        self.qkv: nn.Module | None = None  # the three in one, where `gpt.inference.packing` has joined them
        self.out = Linear(query_width, config.d_model, bias=config.bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, T, E), rotary = (cos, sin) each (T, R) or (B, 1, T, R), mask as for `causal_attention` -> (B, T, E)."""
        B, T, _ = x.shape
        if self.qkv is not None:
            q, k, v = self.qkv(x).split(self.widths, dim=-1)
        elif suits_together(x, self.q, self.k, self.v):
            q, k, v = native_linears(x, self.q, self.k, self.v)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q = q.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            # In the dtype of the norms' weights: fp32 in training, whatever the products are in.
            norm_dtype = self.q_norm.weight.dtype
            q, k = self.q_norm(q.to(norm_dtype)).to(v.dtype), self.k_norm(k.to(norm_dtype)).to(v.dtype)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = causal_attention(q, k, v, self.dropout if self.training else 0.0, mask)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))
