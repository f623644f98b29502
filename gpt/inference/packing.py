"""Weights in the layout that a CPU multiplies fastest, for models that only compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.model.attention import Attention
from gpt.model.feedforward import FeedForward
from gpt.model.transformer import GPT

_linear = torch.ops.mkldnn._linear_pointwise.default


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN wants it: one token costs reading the weight once, at the memory's speed.

    Args:
        linear: what it replaces; its weight (out, in) is copied.
        activation: what follows it, computed in the same pass.
    """

    def __init__(self, linear: nn.Linear, activation: nn.GELU | nn.SiLU | None = None) -> None:
        super().__init__()
        # What torch.compile itself uses for frozen weights; there is no public name for it.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), 1)
        self.bias = None if linear.bias is None else linear.bias.detach()
        gelu = isinstance(activation, nn.GELU)
        self.post = ("gelu" if gelu else "none" if activation is None else "swish", [], activation.approximate if gelu else "")

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        # In two dimensions: with three, finding the right kernel takes as long as a small product.
        y = _linear(x.reshape(-1, x.shape[-1]), self.packed, self.bias, *self.post)
        return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def join_projections(model: GPT) -> None:
    """Make one linear layer of each block's q, k and v, in place: one large product is faster than three small ones."""
    for attention in model.modules():
        if isinstance(attention, Attention) and attention.qkv is None:
            parts = [attention.q, attention.k, attention.v]
            joined = nn.Linear(1, 1, bias=False, device="meta")
            joined.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
            if parts[0].bias is not None:
                joined.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
            attention.qkv = joined
            del attention.q, attention.k, attention.v


def pack_for_inference(model: GPT) -> None:
    """Replace the linear layers of a model on a CPU in place. It can then be read from, not trained or saved.

    Elsewhere, or where torch comes without oneDNN for the weights' dtype, nothing is done. Memory: the weights are moved, not
    copied, but for a head that is the token embedding too.
    """
    weight = model.embeddings.tokens.weight
    if not (weight.is_cpu and torch.backends.mkldnn.is_available() and weight.dtype in (torch.float32, torch.bfloat16)):
        return
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    join_projections(model)
    for module in model.modules():
        if isinstance(module, FeedForward):
            name = "up" if module.gate is None else "gate"
            if type(linear := getattr(module, name)) is nn.Linear:
                setattr(module, name, PackedLinear(linear, module.activation))
                module.activation = nn.Identity()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
            elif isinstance(child, nn.Dropout):  # which does nothing here, but not in no time
                setattr(parent, name, nn.Identity())
