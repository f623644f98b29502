"""Weights as 8-bit integers with one scale per row, for models that only compute.

torchao chooses the integers and the scales. The product of few rows is ours: torchao's own turns all the integers back into floats
at every call, which costs more than reading half as many bytes saves.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.errors import UserError
from gpt.inference.packing import join_projections
from gpt.model.native_products import is_plain
from gpt.model.transformer import GPT

# torch's int8 kernel for bf16 rows does one row after another: fast as long as reading the weights is what takes the time.
_FEW_ROWS = 16
# It takes a row's numbers so many at a time, and reads beyond the end of one that is no multiple of this.
_KERNEL_WIDTH = 16


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale per output.

    Args:
        weight: (out, in) int8.
        scale: (out,).
        bias: (out,) or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        rows = x.flatten(0, -2)
        if x.is_cpu and rows.shape[0] <= _FEW_ROWS and rows.shape[1] % _KERNEL_WIDTH == 0:
            # The kernel is fast in bf16 only: fp32 rows are rounded to it, the scales are not.
            native = x.dtype == torch.bfloat16
            scale = self.scale if native else torch.ones(len(self.weight), dtype=torch.bfloat16)
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, scale)
            y = y if native else y.to(x.dtype) * self.scale
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])


@torch.no_grad()
def quantize_int8(model: GPT) -> None:
    """Replace the linear layers of a model by int8 ones, in place: weights only, symmetric, one scale per output (torchao's
    Int8WeightOnlyConfig). Embeddings stay as they are; a head that is tied to them gets integers of its own.

    Raises:
        UserError: torchao is not installed.
    """
    quantize_, config = _torchao()
    join_projections(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_plain(child):
                # A copy of the module alone: quantize_ replaces its weight, which the embedding may share.
                shell = nn.Sequential(nn.Linear(1, 1, bias=False, device="meta"))
                shell[0].weight = nn.Parameter(child.weight.detach().contiguous(), requires_grad=False)
                quantize_(shell, config())
                found: Any = shell[0].weight
                bias = None if child.bias is None else child.bias.detach()
                setattr(parent, name, Int8Linear(found.qdata, found.scale.flatten().to(child.weight.dtype), bias))


def _torchao() -> tuple[Any, Any]:
    # While it loads it lists the GPU kernels that this machine has not, and torch finds fault with its enums.
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError("quantize=int8 needs torchao: pip install 'gpt-trainer[quantize]'") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return quantize_, Int8WeightOnlyConfig
