"""Weights in the layout that a CPU multiplies fastest, for models that only compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.inference.native_step import native_obstacle
from gpt.model.attention import Attention
from gpt.model.feedforward import FeedForward
from gpt.model.lora import merge
from gpt.model.native_products import is_plain
from gpt.model.transformer import GPT

_linear = torch.ops.mkldnn._linear_pointwise.default


class PackedLinear(nn.Module):
    """A linear layer that oneDNN computes: in fp32 much faster than `nn.Linear`.

    Args:
        linear: what it replaces.
        activation: what follows it, GELU or SiLU, computed in the same pass.
        by_rows: leave the weight (out, in) as it lies, which is as fast for fp32 and many tokens. Otherwise it is copied into oneDNN's
            layout, in which one token costs reading the weight once, at the memory's speed.
    """

    def __init__(self, linear: nn.Linear, activation: nn.Module | None = None, by_rows: bool = False) -> None:
        super().__init__()
        self.weight = linear.weight.detach() if by_rows else None
        # What torch.compile itself uses for frozen weights; there is no public name for it.
        self.packed = self.weight if by_rows else torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), 1)
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
            attention.qkv = joined(attention)
            del attention.q, attention.k, attention.v


@torch.no_grad()
def joined(attention: Attention) -> nn.Linear:
    """q, k and v as one linear layer."""
    parts = [attention.q, attention.k, attention.v]
    whole = nn.Linear(1, 1, bias=False, device="meta")
    whole.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if parts[0].bias is not None:
        whole.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return whole


@torch.no_grad()
def pack_for_inference(model: GPT, rows: int = 1) -> str:
    """Lay out the weights of a model on a CPU for decoding, in place. It can then compute, but not be trained or saved.

    Where a `NativeStep` will make the tokens, the weights of each output lie in a row of their own, and torch reads the prompt from
    them; elsewhere they lie in oneDNN's layout, if it multiplies their dtype. Either layout computes any number of rows. The weights
    are moved, not copied; only a head that is the token embedding too is copied into oneDNN's layout.

    Args:
        model: its linear layers are replaced. Nothing is done on another device.
        rows: how many texts will be written at once.

    Returns:
        By what the tokens will be made, and why, in words.
    """
    weight = model.embeddings.tokens.weight
    if not weight.is_cpu:
        return "torch"
    join_projections(model)
    for module in list(model.modules()):
        if is_plain(module):
            module.weight.data = module.weight.contiguous()  # GPT-2's, from a file, lie transposed
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout):  # which does nothing here, but not in no time
                setattr(module, name, nn.Identity())
    obstacle = native_obstacle(model, rows)
    if packs(weight.dtype):
        _pack(model, by_rows=obstacle is None)
    return "a native step" if obstacle is None else f"torch: {obstacle}"


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of that kind here."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack(model: GPT, by_rows: bool) -> None:
    for module in list(model.modules()):
        if isinstance(module, FeedForward):
            name = "up" if module.gate is None else "gate"
            if is_plain(linear := getattr(module, name)):
                setattr(module, name, PackedLinear(linear, module.activation, by_rows))
                module.activation = nn.Identity()
        for name, child in list(module.named_children()):
            if is_plain(child):
                setattr(module, name, PackedLinear(child, by_rows=by_rows))
