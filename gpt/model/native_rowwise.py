"""Norms, activations and the loss between bf16 products on a CPU in C++ (`rowwise.cpp`), the first two as operators that torch
differentiates and compiles around.

They take less time than what torch compiles, activations most (benchmarks/RESULTS.md, "Between products").
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_bool, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.model.kernels import kernels_of
from gpt.model.native_library import load_library

_SOURCE = Path(__file__).with_name("rowwise.cpp")


_found: list[bool] = []


def is_native() -> bool:
    """Whether the library is there, which is built if it is not; but while torch compiles, only whether it has been found before."""
    if not _found and not torch.compiler.is_compiling():
        _found.append(load_library(_SOURCE)[0] is not None)
    return bool(_found and _found[0])


def suits_products(x: Tensor) -> bool:
    """Whether x is what these operators read between products: bf16 on a CPU, and they are there."""
    return kernels_of(x.device.type).native and x.dtype == torch.bfloat16 and is_native()


def suits_residual(x: Tensor, weight: Tensor) -> bool:
    """Whether a norm reads x in fp32 on a CPU and a product in bf16 reads the norm, and the operators are there."""
    device = x.device.type
    return (
        kernels_of(device).native
        and x.dtype == weight.dtype == torch.float32
        and torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device) == torch.bfloat16
        and is_native()
    )


def native_gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation: any shape, bf16 -> the same."""
    return torch.ops.gpt.gelu(x)


def native_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up: any shape, bf16 -> the same."""
    return torch.ops.gpt.swiglu(gate, up)


def native_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """LayerNorm over the last dimension, or RMSNorm where it is not centred: x (..., E), weight and bias (E,) fp32 -> (..., E) bf16."""
    return torch.ops.gpt.norm(x, weight, bias, eps, centred)[0]


def add_to(x: Tensor, y: Tensor) -> Tensor:
    """x += y, without gradients: any shape, x fp32 and contiguous, y bf16 -> x."""
    assert (x.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    assert x.shape == y.shape
    assert x.is_contiguous()
    _call("add_to", x, y.contiguous(), c_int64(x.numel()), c_int64(torch.get_num_threads()))
    return x


def native_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of -log softmax(logits)[target], and its gradient, which takes the place of the logits.

    Args:
        logits: (C, P) bf16, contiguous.
        targets: (C,) int64, negative where nothing is learned.

    Returns:
        Scalar, fp32, and (C, P) bf16, the same tensor as `logits`.

    Raises:
        IndexError: a target is beyond the logits, which C++ would write to.
    """
    losses, targets = torch.empty(len(logits)), targets.contiguous()
    assert logits.is_contiguous()
    assert targets.dtype == torch.int64
    if len(targets) and (highest := int(targets.max())) >= logits.shape[1]:
        raise IndexError(f"target {highest} is beyond {logits.shape[1]} logits")
    _call("cross_entropy", logits, targets, losses, *_sizes(logits))
    return losses.sum(), logits


def _call(name: str, *arguments: Tensor | c_int64 | c_bool | c_double | None) -> None:
    library, why = load_library(_SOURCE)
    assert library is not None, why
    function = getattr(library, name)
    function.restype = None
    addresses = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    function(*(c_void_p(x) if x is None or isinstance(x, int) else x for x in addresses))


def _elementwise(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    assert all(x.dtype == torch.bfloat16 and x.shape == inputs[0].shape for x in inputs)
    _call(name, *(x.contiguous() for x in inputs), *outputs, c_int64(inputs[0].numel()), c_int64(torch.get_num_threads()))


def _plain(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("gpt::gelu", mutates_args=(), device_types="cpu", schema="(Tensor x) -> Tensor")
def _gelu(x: Tensor) -> Tensor:
    y = _plain(x)
    _elementwise("gelu_forward", [x], [y])
    return y


@torch.library.custom_op("gpt::gelu_backward", mutates_args=(), device_types="cpu", schema="(Tensor x, Tensor gradient) -> Tensor")
def _gelu_backward(x: Tensor, gradient: Tensor) -> Tensor:
    result = _plain(x)
    _elementwise("gelu_backward", [x, gradient], [result])
    return result


@torch.library.custom_op("gpt::swiglu", mutates_args=(), device_types="cpu", schema="(Tensor gate, Tensor up) -> Tensor")
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = _plain(gate)
    _elementwise("swiglu_forward", [gate, up], [y])
    return y


@torch.library.custom_op(
    "gpt::swiglu_backward", mutates_args=(), device_types="cpu", schema="(Tensor gate, Tensor up, Tensor gradient) -> (Tensor, Tensor)"
)
def _swiglu_backward(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    of_gate, of_up = _plain(gate), _plain(up)
    _elementwise("swiglu_backward", [gate, up, gradient], [of_gate, of_up])
    return of_gate, of_up


@torch.library.custom_op(
    "gpt::norm",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor? bias, float eps, bool centred) -> (Tensor, Tensor, Tensor)",
)
def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    assert {t.dtype for t in (x, weight, *([] if bias is None else [bias]))} == {torch.float32}
    y, means, scales = _like_norm(x, weight, bias, eps, centred)
    statistics = (y, means, scales, *_sizes(x))
    _call("norm_forward", x.contiguous(), weight.contiguous(), bias, c_double(eps), c_bool(centred), *statistics)
    return y, means, scales


@torch.library.custom_op(
    "gpt::norm_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor means, Tensor scales, bool centred, Tensor gradient) -> (Tensor, Tensor, Tensor)",
)
def _norm_backward(
    x: Tensor, weight: Tensor, means: Tensor, scales: Tensor, centred: bool, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    results = _like_norm_backward(x, weight, means, scales, centred, gradient)
    read = [t.contiguous() for t in (x, weight, means, scales)]
    _call("norm_backward", *read, c_bool(centred), gradient.contiguous(), *results, *_sizes(x))
    return results


def _sizes(x: Tensor) -> tuple[c_int64, ...]:
    width = x.shape[-1]
    return c_int64(x.numel() // width), c_int64(width), c_int64(torch.get_num_threads())


@_norm.register_fake
def _like_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[:-1])
    return torch.empty_like(x, dtype=torch.bfloat16, memory_format=torch.contiguous_format), statistics, torch.empty_like(statistics)


@_norm_backward.register_fake
def _like_norm_backward(
    x: Tensor, weight: Tensor, means: Tensor, scales: Tensor, centred: bool, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _plain(x), _plain(weight), _plain(weight)


_gelu.register_fake(_plain)
_gelu_backward.register_fake(lambda x, gradient: _plain(x))
_swiglu.register_fake(lambda gate, up: _plain(gate))
_swiglu_backward.register_fake(lambda gate, up, gradient: (_plain(gate), _plain(up)))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, ctx.centred = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, *output[1:])


def _differentiate_norm(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_bias = torch.ops.gpt.norm_backward(*ctx.saved_tensors, ctx.centred, gradient)
    return of_x, of_weight, of_bias if ctx.has_bias else None, None, None


_gelu.register_autograd(lambda ctx, gradient: torch.ops.gpt.gelu_backward(*ctx.saved_tensors, gradient), setup_context=_keep)
_swiglu.register_autograd(lambda ctx, gradient: torch.ops.gpt.swiglu_backward(*ctx.saved_tensors, gradient), setup_context=_keep)
_norm.register_autograd(_differentiate_norm, setup_context=_keep_norm)
