"""The norms of a block, whose results only matrix products read."""

from __future__ import annotations

from torch import Tensor, nn

from gpt.model.config import GPTConfig
from gpt.model.native_rowwise import native_norm, suits_residual


class LayerNorm(nn.LayerNorm):
    """torch's, but in the dtype of the products that read it where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., E) -> the same."""
        if suits_residual(input, self.weight):
            return native_norm(input, self.weight, self.bias, self.eps, centred=True)
        return super().forward(input)


class RMSNorm(nn.RMSNorm):
    """torch's, but in the dtype of the products that read it where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> the same."""
        if suits_residual(x, self.weight):
            assert self.eps is not None
            return native_norm(x, self.weight, None, self.eps, centred=False)
        return super().forward(x)


def block_norm(config: GPTConfig) -> nn.Module:
    """The config's normalisation over d_model, before a block's attention or feed-forward."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    return LayerNorm(config.d_model, config.norm_eps, bias=config.bias)


def final_norm(config: GPTConfig) -> nn.Module:
    """The config's normalisation over d_model, of what the head reads: in fp32 where the residual is."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, config.norm_eps, bias=config.bias)
