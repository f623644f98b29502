"""Weights in the layout that a CPU multiplies fastest, for models that only compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpt.model.attention import Attention
from gpt.model.feedforward import FeedForward
from gpt.model.lora import merge
from gpt.model.transformer import GPT

_linear = torch.ops.mkldnn._linear_pointwise.default


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN wants it: one token costs reading the weight once, at the memory's speed.

    Args:
        linear: what it replaces; its weight (out, in) is copied.
        activation: what follows it, GELU or SiLU, computed in the same pass.
    """

    def __init__(self, linear: nn.Linear, activation: nn.Module | None = None) -> None:
        super().__init__()
        # What torch.compile itself uses for frozen weights; there is no public name for it.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), 1)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.post: tuple[str, list[float], str] = ("none", [], "")
        if isinstance(activation, nn.GELU):
            self.post = ("gelu", [], activation.approximate)
        elif isinstance(activation, nn.SiLU):
            self.post = ("swish", [], "")
        else:
            assert activation is None, activation

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        # In two dimensions: with three, finding the right kernel takes as long as a small product.
        y = _linear(x.reshape(-1, x.shape[-1]), self.packed, self.bias, *self.post)
        return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def join_projections(model: GPT) -> None:
    """Make one linear layer of each block's q, k and v, in place, adapters merged: one large product is faster than three small ones."""
    merge(model)
    for attention in model.modules():
        if isinstance(attention, Attention) and attention.qkv is None:
            parts = [attention.q, attention.k, attention.v]
            joined = nn.Linear(1, 1, bias=False, device="meta")
            joined.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
            if parts[0].bias is not None:
                joined.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
            attention.qkv = joined
            del attention.q, attention.k, attention.v


@torch.no_grad()
def pack_for_inference(model: GPT, rows: int = 1) -> None:
    """Lay out the weights of a model on a CPU for decoding, in place. It can then compute, but not be trained or saved.

    For one row in bf16 the weights of each output lie in a row of their own, for torch's product of a matrix and a vector (see
    `without_onednn`). For more rows, and in fp32, they lie in oneDNN's own layout. Either layout computes any number of rows.
    Nothing is done on another device, for another dtype, or where oneDNN cannot multiply the weights' dtype. The weights are
    moved, not copied; only a head that is the token embedding too is copied into oneDNN's layout.

    Args:
        model: its linear layers are replaced.
        rows: how many texts will be written at once.
    """
    weight = model.embeddings.tokens.weight
    if not (weight.is_cpu and torch.backends.mkldnn.is_available() and weight.dtype in (torch.float32, torch.bfloat16)):
        return
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    join_projections(model)
    by_rows = rows == 1 and weight.dtype == torch.bfloat16
    for module in list(model.modules()):
        if isinstance(module, FeedForward) and not by_rows:
            name = "up" if module.gate is None else "gate"
            if type(linear := getattr(module, name)) is nn.Linear:
                setattr(module, name, PackedLinear(linear, module.activation))
                module.activation = nn.Identity()
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and by_rows:
                child.weight.data = child.weight.contiguous()  # GPT-2's, from a file, lie transposed
            elif type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
            elif isinstance(child, nn.Dropout):  # which does nothing here, but not in no time
                setattr(module, name, nn.Identity())


def is_packed_by_rows(model: GPT) -> bool:
    """Whether every matrix is as `pack_for_inference` lays it out for one row in bf16."""
    linears = [module for module in model.modules() if isinstance(module, (nn.Linear, PackedLinear))]
    return bool(linears) and all(
        type(linear) is nn.Linear and linear.weight.is_cpu and linear.weight.dtype == torch.bfloat16 and linear.weight.is_contiguous()
        for linear in linears
    )


@contextmanager
def without_onednn() -> Iterator[None]:
    """Multiply by torch's own kernels within the block.

    For one row in bf16 they read the weights faster than oneDNN's, whose every call takes as long as a small product.
    """
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled  # pyright: ignore[reportAttributeAccessIssue]
