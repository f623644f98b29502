"""The position-wise feed-forward of a block: one hidden layer, gated when the activation is swiglu."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gpt.model.config import GPTConfig
from gpt.model.kernels import kernels_of
from gpt.model.native_products import Linear, native_feedforward, native_linears, suits_together
from gpt.model.native_rowwise import native_gelu, native_swiglu, suits_products


class GELUTanh(nn.GELU):
    """GELU by its tanh approximation (Hendrycks and Gimpel, 2016), which is x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""

    def __init__(self) -> None:
        super().__init__("tanh")

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same."""
        if suits_products(input):
            return native_gelu(input)
        if not (torch.compiler.is_compiling() and kernels_of(input.device.type).sigmoid_gelu):
            return super().forward(input)
        x = input.float()
        return (x * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x))).to(input.dtype)


class FeedForward(nn.Module):
    """(B, T, d_model) -> (B, T, d_model): `down(act(up x))`, or `down(silu(gate x) * up x)` for swiglu."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.gate = Linear(config.d_model, config.d_ff, bias=config.bias) if config.activation == "swiglu" else None
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)
        self.activation: nn.Module = nn.GELU() if config.activation == "gelu" else GELUTanh()
        if self.gate is not None:
            self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d_model) -> (B, T, d_model)."""
        if self.gate is not None:
            gate, up = native_linears(x, self.gate, self.up) if suits_together(x, self.gate, self.up) else (self.gate(x), self.up(x))
            is_native = isinstance(self.activation, nn.SiLU) and suits_products(gate)  # where weights are packed the gate has it in it
            return self.down(native_swiglu(gate, up) if is_native else self.activation(gate) * up)
        if type(self.activation) is GELUTanh and not self.activation._forward_hooks and suits_together(x, self.up, self.down):
            return native_feedforward(x, self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        return self.down(self.activation(self.up(x)))
