"""Next-token cross-entropy that never holds all the logits.

Shapes: N tokens, C tokens of a chunk, E d_model, V vocabulary. The head's matrix product, the softmax and both gradients are
made chunk by chunk while the chunk is in the cache; backward only scales them. On two CPU cores this takes half the time of
`linear` + `cross_entropy` in bf16 (benchmarks/RESULTS.md, "loss").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # the target of a token that is not to be learned from, torch's convention


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (C, V), targets (C,) -> fp32 sum over valid targets of -log softmax(logits)[target]."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")


def _nll_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `_nll`, and its gradient with respect to the logits, (C, V) in their dtype."""
    wide = logits.float()
    peak = wide.amax(-1, keepdim=True)
    exp = (wide - peak).exp()
    total = exp.sum(-1, keepdim=True)
    valid = targets[:, None] != IGNORE  # (C, 1)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    hit = columns == targets[:, None]  # (C, V)
    at_target = torch.where(hit, wide, 0.0).sum(-1, keepdim=True)
    nll = torch.where(valid, total.log() + peak - at_target, 0.0).sum()
    gradient = torch.where(valid, exp / total - hit.float(), 0.0)
    return nll, gradient.to(logits.dtype)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, chunk: int, softmax: Callable[..., Any]
    ) -> Tensor:
        narrow = weight.to(dtype)
        hidden_gradient = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        nll = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            rows = hidden[start : start + chunk].to(dtype)  # (C, E)
            part, gradient = softmax(rows @ narrow.T, targets[start : start + chunk])
            nll += part
            if hidden_gradient is not None:
                torch.mm(gradient, narrow, out=hidden_gradient[start : start + chunk])
            if weight_gradient is not None:
                weight_gradient += gradient.T @ rows
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.dtypes = hidden.dtype, weight.dtype
        return nll

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (scale,) = outputs
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return (
            None if hidden_gradient is None else (hidden_gradient * scale).to(ctx.dtypes[0]),
            None if weight_gradient is None else (weight_gradient * scale).to(ctx.dtypes[1]),
            None, None, None, None,
        )  # fmt: skip


class LinearCrossEntropy(nn.Module):
    """Sum of the next-token losses of hidden states under an output head.

    Args:
        dtype: of the matrix products; log-sum-exp and the sums are always fp32.
        chunk: tokens per chunk.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, chunk: int = 512) -> None:
        super().__init__()
        self.dtype = dtype
        self.chunk = chunk
        self.softmax: Callable[..., Any] = _nll_and_gradient

    def compile_softmax(self, **options: Any) -> None:
        """Fuse the softmax part with `torch.compile(**options)`; the matrix products stay as they are."""
        self.softmax = torch.compile(_nll_and_gradient, **options)

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden (..., E), weight (V, E), targets (...) int64 with IGNORE where nothing is learned -> scalar fp32 sum."""
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            with torch.autocast(hidden.device.type, enabled=False):
                return cast(Tensor, _Function.apply(hidden, weight, targets, self.dtype, self.chunk, self.softmax))
        nll = hidden.new_zeros((), dtype=torch.float32)
        narrow = weight.to(self.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, wanted in zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True):
                nll += _nll(rows.to(self.dtype) @ narrow.T, wanted)
        return nll
