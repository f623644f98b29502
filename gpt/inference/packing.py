"""Weights in the layout that a CPU multiplies fastest, for models that only compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.model.transformer import GPT


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN wants it: one token costs reading the weight once, at the memory's speed.

    Args:
        linear: what it replaces; its weight (out, in) is copied.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # What torch.compile itself uses for frozen weights; there is no public name for it.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


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
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
