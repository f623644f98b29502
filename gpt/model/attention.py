"""Causal multi-head self-attention, grouped-query when n_kv_head < n_head, with a static key/value cache.

Shapes: B batch, T time of this call, S time attended to, H query heads, K key/value heads, D head_dim, E d_model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.model.config import GPTConfig
from gpt.model.positions import rotate

# On a CPU two batched products around a softmax, compiled into one loop, train faster than the fused kernel while the (T, S)
# scores are small (benchmarks/RESULTS.md, "attention"); not compiled, or beyond this length, the fused kernel wins.
PLAIN_ATTENTION_MAX_LENGTH = 512


class KVCache:
    """Keys and values of what has been read, in buffers of fixed size, one pair per block.

    Args:
        config: the model's shape.
        batch_size: B.
        max_length: S, the most tokens it can hold.
        device, dtype: of the buffers.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, max_length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        shape = (config.n_layer, batch_size, config.n_kv_head, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, K, S, D)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.max_length = max_length

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store this call's k, v (B, K, T, D) after what block `layer` already holds; return all of it (B, K, S, D)."""
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"{end} tokens do not fit a KV cache of {self.max_length}")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where query t sees the keys up to its own place; the last query is at the last key.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, S, D) with S >= T and H a multiple of K.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, H, T, D).
    """
    T, S = q.shape[2], k.shape[2]
    if torch.compiler.is_compiling() and q.device.type == "cpu" and T == S <= PLAIN_ATTENTION_MAX_LENGTH and not dropout:
        return _plain_causal_attention(q, k, v)
    mask = None
    if 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=T == S and T > 1, enable_gqa=q.shape[1] != k.shape[1]
    )


def _plain_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups, T = q.shape[1] // k.shape[1], q.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5  # (B, H, T, S)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1).to(q.dtype) @ v


class Attention(nn.Module):
    """One block's self-attention: project to q, k, v, (norm and rotate q and k), attend, project back."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        query_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        qkv_bias = config.bias or config.qkv_bias
        self.q = nn.Linear(config.d_model, query_width, bias=qkv_bias)
        self.k = nn.Linear(config.d_model, kv_width, bias=qkv_bias)
        self.v = nn.Linear(config.d_model, kv_width, bias=qkv_bias)
        self.out = nn.Linear(query_width, config.d_model, bias=config.bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None = None) -> Tensor:
        """x (B, T, E), rotary = (cos, sin) each (T, R) or None -> (B, T, E)."""
        B, T, _ = x.shape
        q = self.q(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            # In the dtype of the norms' weights: fp32 in training, whatever the products are in.
            norm_dtype = self.q_norm.weight.dtype
            q, k = self.q_norm(q.to(norm_dtype)).to(v.dtype), self.k_norm(k.to(norm_dtype)).to(v.dtype)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = causal_attention(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))
