"""Adapters: low-rank changes to chosen matrices of a model whose own weights stay as they are.

LoRA is Hu et al. 2021 (arXiv 2106.09685), DoRA Liu et al. 2024 (arXiv 2402.09353), both as the library PEFT computes them.
Shapes: I in, O out, r rank; (..., I) any number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.model.native_products import Linear, is_plain

if TYPE_CHECKING:
    from gpt.model.config import LoRAConfig
    from gpt.model.transformer import GPT

ADAPTERS = ("lora_a", "lora_b", "magnitude")
"""Last parts of the names of what an adapter adds to a layer's parameters."""


class LoRALinear(nn.Linear):
    """A linear layer with an adapter: x -> x (W + scale B A)^T + b, or with DoRA x (m / ||W + scale B A|| (W + scale B A))^T + b.

    The sum of the weights is formed once a pass, in fp32, and rounded as full fine-tuning's weights are: what trains is what is
    exported, and activations are read no more often than without an adapter. Only dropout, which is of the adapter's input
    alone, needs the products one by one.

    Args:
        linear: what it takes the place of, whose parameters it takes over.
        rank: r.
        scale: alpha / rank.
        dropout: of the adapter's input, while training.
        dora: also learn the length of each row.

    Attributes:
        is_on: whether the adapter counts.
        keeps_sum: whether the backward pass finds the sum of the weights as forward left it, or forms it again. Where weights are
            gathered for a pass and freed after it, keeping would hold all of them at once.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float = 0.0, dora: bool = False) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make another weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.scale, self.dropout = rank, scale, dropout
        like = linear.weight
        self.lora_a = nn.Parameter(like.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(like.new_empty(self.out_features, rank))
        self.magnitude = nn.Parameter(like.new_empty(self.out_features)) if dora else None
        self.training = linear.training
        self.is_on = self.keeps_sum = True

    @torch.no_grad()
    def init_adapter(self, generator: torch.Generator | None = None) -> None:
        """Have the adapter change nothing yet: A uniform as PEFT draws it, B zero, magnitudes the rows' lengths."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_b)
        if self.magnitude is not None:
            self.magnitude.copy_(torch.linalg.vector_norm(self.weight.float(), dim=1))

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if not self.is_on:
            return super().forward(input)
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        with torch.autocast(device, enabled=False):
            x = input.to(dtype)
            if self.dropout and self.training:
                return self._with_dropout(x)
            bias = None if self.bias is None else self.bias.to(dtype)
            if self.magnitude is None:
                return cast(Tensor, _Merged.apply(x, self.weight, bias, self.lora_a, self.lora_b, self.scale, self.keeps_sum))
            # y is m / ||V|| (x V^T), and not x (m / ||V|| V)^T, so that m's gradient is a sum over rows of y.
            y = cast(Tensor, _Merged.apply(x, self.weight, None, self.lora_a, self.lora_b, self.scale, self.keeps_sum))
            y = (y * self._factor()).to(dtype)
            return y if bias is None else y + bias

    def _with_dropout(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        weight = self.weight.to(dtype)
        dropped = F.dropout(x, self.dropout)
        change = F.linear(F.linear(dropped, self.lora_a.to(dtype)), (self.lora_b * self.scale).to(dtype))
        y = F.linear(x, weight, None if self.bias is None else self.bias.to(dtype))
        if self.magnitude is None:
            return y + change
        factor = self._factor()
        return (y + (factor - 1) * F.linear(dropped, weight) + factor * change).to(dtype)

    def _factor(self) -> Tensor:
        """m / ||W + scale B A||, (O,) fp32; the length is taken for a constant (DoRA, section 4.3)."""
        assert self.magnitude is not None
        with torch.no_grad():
            lengths = torch.linalg.vector_norm(_merged(self.weight, self.lora_a, self.lora_b, self.scale), dim=1)
        return self.magnitude.float() / lengths

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (O, I) of a plain linear layer that computes the same, in this one's dtype."""
        weight = _merged(self.weight, self.lora_a, self.lora_b, self.scale)
        if self.magnitude is not None:
            weight = self._factor()[:, None] * weight
        return weight.to(self.weight.dtype)

    def extra_repr(self) -> str:
        """What `print` shows."""
        dora = ", dora=True" if self.magnitude is not None else ""
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}{dora}"


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A, (O, I) fp32 (or fp64, if they are)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale)


class _Merged(torch.autograd.Function):
    """x (W + scale B A)^T + b, whose backward never forms the gradient of the sum, as large as W, unless W itself trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, keep: bool) -> Tensor:
        narrow = _merged(weight, a, b, scale).to(x.dtype)  # (O, I)
        ctx.save_for_backward(x, a, b, narrow if keep else weight)
        ctx.keep = keep
        ctx.scale, ctx.weight_dtype = scale, weight.dtype
        return F.linear(x, narrow, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (gradient,) = outputs
        x, a, b, narrow = ctx.saved_tensors
        of_x, of_weight, of_bias, of_a, of_b, *_ = ctx.needs_input_grad
        if of_x and not ctx.keep:
            narrow = _merged(narrow, a, b, ctx.scale).to(x.dtype)
        x_gradient = gradient @ narrow if of_x else None
        rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        weight_gradient = (rows.mT @ inputs).to(ctx.weight_dtype) if of_weight else None
        bias_gradient = rows.sum(0) if of_bias else None
        a_gradient = ((rows @ (b * ctx.scale).to(x.dtype)).mT @ inputs).to(a.dtype) if of_a else None  # (r, N) (N, I)
        b_gradient = (rows.mT @ (inputs @ (a * ctx.scale).to(x.dtype).mT)).to(b.dtype) if of_b else None  # (O, N) (N, r)
        return x_gradient, weight_gradient, bias_gradient, a_gradient, b_gradient, None, None


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """Every layer of a model that has an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's adapters, by name."""
    found = dict(model.named_parameters())
    names = (f"{layer}.{kind}" for layer in adapted(model) for kind in ADAPTERS)
    return {name: found[name] for name in names if name in found}


def attach(model: GPT, ranks: Mapping[str, tuple[int, float]], dropout: float = 0.0, dora: bool = False) -> None:
    """Give layers of a model adapters, in place, not yet initialised, and let nothing else of it train.

    Args:
        model: without adapters.
        ranks: the layers by name, each with its rank and scale.
        dropout, dora: as of `LoRALinear`.
    """
    model.requires_grad_(False)
    for name, (rank, scale) in ranks.items():
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        assert is_plain(linear), name
        setattr(model.get_submodule(parent), last, LoRALinear(linear, rank, scale, dropout, dora))


def attach_as(model: GPT, lora: LoRAConfig) -> None:
    """`attach` what a config asks for; a head of classes trains beside the adapters.

    Raises:
        ValueError: a target that names no projection of this model.
    """
    attach(model, dict.fromkeys(lora.modules(model.config), (lora.rank, lora.scale)), lora.dropout, lora.dora)
    model.head.requires_grad_(model.config.head != "language_model")


def init_adapters(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Have the adapters of a model, whose own weights are there, change nothing yet."""
    for layer in adapted(model).values():
        layer.init_adapter(generator)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what its base does. Compiled blocks have a graph of their own for that."""
    layers = adapted(model).values()
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def merged_parameters(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the model without adapters that computes the same, each once; made one by one where an adapter is merged."""
    layers = {f"{name}.weight": layer for name, layer in adapted(model).items()}
    own = adapter_parameters(model)
    for name, parameter in model.named_parameters():
        if name not in own:
            yield name, layers[name].merged_weight() if name in layers else parameter.detach()


@torch.no_grad()
def merge(model: GPT) -> None:
    """Turn every adapted layer into a plain one that computes the same, in place."""
    for name, layer in adapted(model).items():
        parent, _, last = name.rpartition(".")
        plain = Linear(1, 1, bias=False, device="meta")
        plain.in_features, plain.out_features = layer.in_features, layer.out_features
        plain.weight = nn.Parameter(layer.merged_weight(), requires_grad=layer.weight.requires_grad)
        plain.bias = layer.bias
        setattr(model.get_submodule(parent), last, plain.train(layer.training))


def merged(model: GPT) -> GPT:
    """A model without adapters that computes the same; `model` itself if it has none. It shares all but the merged weights."""
    return _plain(model, merged_parameters(model)) if adapted(model) else model


def base(model: GPT) -> GPT:
    """The model that the adapters were given to; it shares all weights."""
    own = adapter_parameters(model)
    return _plain(model, ((name, p.detach()) for name, p in model.named_parameters() if name not in own))


def _plain(model: GPT, parameters: Iterable[tuple[str, Tensor]]) -> GPT:
    whole = type(model).materialise(model.config, "meta")
    for name, parameter in parameters:
        parent, _, last = name.rpartition(".")
        setattr(whole.get_submodule(parent), last, nn.Parameter(parameter, requires_grad=False))
    whole.tie()
    for name, buffer in model.named_buffers():
        parent, _, last = name.rpartition(".")
        whole.get_submodule(parent).register_buffer(last, buffer, persistent=False)
    return whole.train(model.training)
