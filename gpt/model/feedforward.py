"""The position-wise feed-forward of a block: one hidden layer, gated when the activation is swiglu."""

from __future__ import annotations

from torch import Tensor, nn

from gpt.model.config import GPTConfig


class FeedForward(nn.Module):
    """(B, T, d_model) -> (B, T, d_model): `down(act(up x))`, or `down(silu(gate x) * up x)` for swiglu."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.bias) if config.activation == "swiglu" else None
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)
        self.activation: nn.Module = nn.SiLU() if self.gate is not None else nn.GELU("none" if config.activation == "gelu" else "tanh")

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d_model) -> (B, T, d_model)."""
        if self.gate is not None:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))
