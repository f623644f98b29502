"""How a token's place enters the model: the sinusoidal table and the rotary embedding.

Shapes: B batch, T time, H heads, D head_dim, R rotary_dim <= D. Tables are fp32 and are computed on CPU, so that every
device and every load sees the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoidal_table(length: int, d_model: int) -> Tensor:
    """The fixed position table of "Attention Is All You Need" (2017), section 3.5, sine and cosine interleaved.

    Returns:
        (length, d_model) fp32: `table[p, 2i] = sin(p / 10000^(2i/d))`, `table[p, 2i+1] = cos(p / 10000^(2i/d))`.
    """
    position = torch.arange(length, dtype=torch.float64)[:, None]  # (T, 1)
    frequency = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000.0) / d_model))
    angle = position * frequency  # (T, ceil(d/2))
    table = torch.empty(length, d_model, dtype=torch.float64)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle.cos()[:, : d_model // 2]
    return table.float()


def rotary_tables(
    length: int, rotary_dim: int, theta: float, llama3: tuple[float, float, float, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (RoFormer, 2021), in the half-split layout of Llama and GPT-NeoX.

    Computed in fp32 step by step as `transformers` does, so that exported models agree to the last bit.

    Args:
        length: T, number of positions.
        rotary_dim: R, how many dimensions of a head are rotated.
        theta: base of the frequencies.
        llama3: `GPTConfig.llama3_scaling`.

    Returns:
        cos, sin: each (length, rotary_dim) fp32.
    """
    frequency = 1.0 / (theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim))  # (R/2,)
    if llama3 is not None:
        frequency = _llama3_frequency(frequency, *llama3)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency  # (T, R/2)
    angle = torch.cat((angle, angle), dim=-1)  # (T, R)
    return angle.cos(), angle.sin()


def _llama3_frequency(frequency: Tensor, factor: float, low: float, high: float, context: int) -> Tensor:
    """(R/2,) frequencies stretched as in Llama 3.1 ("The Llama 3 Herd of Models", 2024; the rule is in its reference code)."""
    wavelength = 2 * math.pi / frequency  # in tokens
    scaled = torch.where(wavelength > context / low, frequency / factor, frequency)
    smooth = (context / wavelength - low) / (high - low)  # 0 at the longest wavelength of the passage, 1 at the shortest
    between = ~(wavelength < context / high) * ~(wavelength > context / low)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R dimensions of every head by its position's angle.

    Args:
        x: (B, H, T, D) queries or keys.
        cos, sin: (T, R) or (B, 1, T, R) rows of `rotary_tables` for these positions.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    rotary_dim = cos.shape[-1]
    turned = x[..., :rotary_dim]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), dim=-1)
