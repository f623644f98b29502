"""Small models of every family with adapters that change something."""

import torch
from stock_models import OURS, make_ours

from gpt import GPT
from gpt.model.config import LoRAConfig
from gpt.model.lora import adapter_parameters, attach_as, init_adapters


@torch.no_grad()
def adapt(model: GPT, lora: LoRAConfig) -> GPT:
    """Give a model adapters that are far from their start."""
    attach_as(model, lora)
    init_adapters(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter_parameters(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def with_adapters(name: str, lora: LoRAConfig) -> GPT:
    """One of `stock_models.OURS`, so."""
    return adapt(make_ours(OURS[name]), lora)
