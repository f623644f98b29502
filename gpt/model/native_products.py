"""Products of linear layers in bf16 on a CPU in C++ (`products.cpp`), as operators that torch differentiates and compiles around.

They are faster than oneDNN's (benchmarks/RESULTS.md, "Products"), and what stands around them costs next to nothing: weights are narrowed
where they are laid out for the product, biases and GELU are added and computed where its sums are, gradients of weights are fp32 sums.

Shapes: (..., I) any number of rows, M of them in all; O outputs and I inputs of a layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_bool, c_int64, c_void_p
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from gpt.model.kernels import kernels_of
from gpt.model.native_library import load_library

_SOURCE = Path(__file__).with_name("products.cpp")
_MULTIPLE = 16  # of which all widths are
_PANEL = 64
_LEAST_ROWS = 64  # with fewer, laying out the weight takes too long


class _Factors(ctypes.Structure):
    _fields_ = (("x", c_void_p), ("packed", c_void_p), ("K", c_int64))


class _Layer(ctypes.Structure):
    _fields_ = (("gradient", c_void_p), ("of_weight", c_void_p), ("of_bias", c_void_p), ("O", c_int64))


def native_products_obstacle() -> str | None:
    """Why products cannot, or should not, be native on this CPU, in words; None if they can. The library is built if it is not there."""
    library, why = load_library(_SOURCE)
    if library is None:
        return why
    library.products_are_fast.restype = c_int64
    return None if library.products_are_fast() else "the CPU has no AVX512-BF16, or matrix units besides"


_found: list[bool] = []


def is_native() -> bool:
    """Whether `native_products_obstacle` finds none; but while torch compiles, only whether it has been found before that it does not."""
    if not _found and not torch.compiler.is_compiling():
        _found.append(native_products_obstacle() is None)
    return bool(_found and _found[0])


def suits_product(x: Tensor, *weights: Tensor) -> bool:
    """Whether products of x (..., I) with weights (O, I) are native: in bf16 on a CPU, of enough rows, and not divided over processes."""
    device = x.device.type
    if not kernels_of(device).native or x.shape[:-1].numel() < _LEAST_ROWS:
        return False
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    dtypes = {torch.float32, torch.bfloat16} if torch.is_autocast_enabled(device) else {torch.bfloat16}
    return (
        dtype == torch.bfloat16
        and all(type(w) in (Tensor, nn.Parameter) and w.dtype in dtypes for w in weights)
        and not any(width % _MULTIPLE for w in weights for width in w.shape)
        and is_native()
    )


def native_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b: x (..., I), weight (O, I), bias (O,) -> (..., O) bf16; where x and weight suit."""
    return torch.ops.gpt.linear(x.bfloat16(), weight, bias)


def native_projections(x: Tensor, q: nn.Linear, k: nn.Linear, v: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Three layers of the same x (..., I) -> (..., O) bf16 each; where they suit."""
    return torch.ops.gpt.projections(x.bfloat16(), q.weight, q.bias, k.weight, k.bias, v.weight, v.bias)


def native_feedforward(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> Tensor:
    """GELU(x U^T + u) D^T + d, GELU by its tanh approximation: x (..., I), up (O, I), down (I', O) -> (..., I') bf16; where they suit."""
    return torch.ops.gpt.feedforward(x.bfloat16(), up, up_bias, down, down_bias)[0]


def pack_for_forward(weight: Tensor) -> Tensor:
    """A weight (O, I), fp32 or bf16, as `multiply` reads it for products with rows of I numbers."""
    return _packed("pack_for_forward", weight, weight.shape[1], weight.shape[0])


def pack_for_backward(weight: Tensor) -> Tensor:
    """A weight (O, I), fp32 or bf16, as `multiply` reads it for products with rows of O numbers."""
    return _packed("pack_for_backward", weight, weight.shape[0], weight.shape[1])


def _packed(name: str, weight: Tensor, depth: int, width: int) -> Tensor:
    packed = weight.new_empty(-(-width // _PANEL), depth // 2, _PANEL, dtype=torch.int32)
    weight = weight.contiguous()
    _call(name, weight, c_bool(weight.dtype == torch.float32), *map(c_int64, weight.shape), packed, _threads())
    return packed


def multiply(x: Tensor, packed: Tensor, width: int, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x (..., K) bf16 times what is packed for it, plus bias (width,) -> (..., width) bf16, in `out` if that is given."""
    y = x.new_empty(*x.shape[:-1], width) if out is None else out
    assert y.is_contiguous()
    _multiply("multiply", [(x, packed)], width, _wide(bias), y)
    return y


def multiply_transposed(
    gradients: Sequence[Tensor], x: Tensor, of_weights: Sequence[Tensor], of_biases: Sequence[Tensor] = (), add: bool = False
) -> None:
    """Gradients of weights and biases of layers that read the same x (..., I) bf16: each of_weight (O, I) fp32 = gradient (..., O)^T x,
    of_bias (O,) fp32 the sum of gradient; or they are added to."""
    x, gradients = x.contiguous(), [gradient.contiguous() for gradient in gradients]
    for gradient, of_weight in zip(gradients, of_weights, strict=True):
        assert (gradient.dtype, x.dtype, of_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert gradient.shape[:-1] == x.shape[:-1]
        assert of_weight.shape == (gradient.shape[-1], x.shape[-1])
        assert of_weight.is_contiguous()
    biases: Sequence[Tensor | None] = of_biases or [None] * len(gradients)
    layers = [
        _Layer(gradient.data_ptr(), of_weight.data_ptr(), None if of_bias is None else of_bias.data_ptr(), gradient.shape[-1])
        for gradient, of_weight, of_bias in zip(gradients, of_weights, biases, strict=True)
    ]
    sizes = c_int64(x.shape[:-1].numel()), c_int64(x.shape[-1])
    _call("multiply_transposed", (_Layer * len(layers))(*layers), c_int64(len(layers)), x, *sizes, c_bool(add), _threads())


def _multiply(name: str, terms: Sequence[tuple[Tensor, Tensor]], width: int, *arguments: Tensor | None) -> None:
    """A product of C++, of x (..., K) and what is packed for it, or the sum of several."""
    rows = [(x.contiguous(), packed) for x, packed in terms]
    assert all(x.dtype == torch.bfloat16 for x, _ in rows)
    factors = [_Factors(x.data_ptr(), packed.data_ptr(), x.shape[-1]) for x, packed in rows]
    sizes = c_int64(rows[0][0].shape[:-1].numel()), c_int64(width)
    _call(name, (_Factors * len(factors))(*factors), c_int64(len(factors)), *arguments, *sizes, _threads())


def _call(name: str, *arguments: Tensor | ctypes.Array[Any] | c_int64 | c_bool | None) -> None:
    library, why = load_library(_SOURCE)
    assert library is not None, why
    function = getattr(library, name)
    function.restype = None
    function(*(c_void_p(x.data_ptr()) if isinstance(x, Tensor) else c_void_p(None) if x is None else x for x in arguments))


def _threads() -> c_int64:
    return c_int64(torch.get_num_threads())


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


@torch.library.custom_op("gpt::linear", mutates_args=(), device_types="cpu", schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return multiply(x, pack_for_forward(weight), len(weight), bias)


@torch.library.custom_op(
    "gpt::linear_input_gradient", mutates_args=(), device_types="cpu", schema="(Tensor gradient, Tensor weight) -> Tensor"
)
def _linear_input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    return multiply(gradient, pack_for_backward(weight), weight.shape[1])


@torch.library.custom_op(
    "gpt::linear_weight_gradient", mutates_args=(), device_types="cpu", schema="(Tensor gradient, Tensor x) -> (Tensor, Tensor)"
)
def _linear_weight_gradient(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    of_weight, of_bias = _like_weight_gradient(gradient, x)
    multiply_transposed([gradient], x, [of_weight], [of_bias])
    return of_weight, of_bias


@torch.library.custom_op(
    "gpt::projections",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor q, Tensor? q_bias, Tensor k, Tensor? k_bias, Tensor v, Tensor? v_bias) -> (Tensor, Tensor, Tensor)",
)
def _projections(
    x: Tensor, q: Tensor, q_bias: Tensor | None, k: Tensor, k_bias: Tensor | None, v: Tensor, v_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _linear(x, q, q_bias), _linear(x, k, k_bias), _linear(x, v, v_bias)


@torch.library.custom_op(
    "gpt::projections_input_gradient",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor of_q, Tensor of_k, Tensor of_v, Tensor q, Tensor k, Tensor v) -> Tensor",
)
def _projections_input_gradient(of_q: Tensor, of_k: Tensor, of_v: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    of_x = of_q.new_empty(*of_q.shape[:-1], q.shape[1])
    terms = [(gradient, pack_for_backward(weight)) for gradient, weight in ((of_q, q), (of_k, k), (of_v, v))]
    _multiply("multiply", terms, q.shape[1], None, of_x)
    return of_x


@torch.library.custom_op(
    "gpt::projections_weight_gradient",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor of_q, Tensor of_k, Tensor of_v, Tensor x) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _projections_weight_gradient(of_q: Tensor, of_k: Tensor, of_v: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    results = _like_projections_weight_gradient(of_q, of_k, of_v, x)
    multiply_transposed([of_q, of_k, of_v], x, results[::2], results[1::2])
    return results


@torch.library.custom_op(
    "gpt::feedforward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias) -> (Tensor, Tensor)",
)
def _feedforward(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    before = x.new_empty(*x.shape[:-1], len(up))
    hidden = torch.empty_like(before)
    _multiply("multiply_gelu", [(x, pack_for_forward(up))], len(up), _wide(up_bias), before, hidden)
    return multiply(hidden, pack_for_forward(down), len(down), down_bias), before


@torch.library.custom_op(
    "gpt::gelu_input_gradient",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor gradient, Tensor down, Tensor before) -> (Tensor, Tensor)",
)
def _gelu_input_gradient(gradient: Tensor, down: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of what is `before` GELU, and GELU of it once more, so that forward need not keep it."""
    before = before.contiguous()
    of_before, hidden = torch.empty_like(before), torch.empty_like(before)
    _multiply("multiply_gelu_gradient", [(gradient, pack_for_backward(down))], down.shape[1], before, of_before, hidden)
    return of_before, hidden


_linear.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)))
_linear_input_gradient.register_fake(lambda gradient, weight: gradient.new_empty(*gradient.shape[:-1], weight.shape[1]))
_gelu_input_gradient.register_fake(lambda gradient, down, before: (torch.empty_like(before), torch.empty_like(before)))


@_linear_weight_gradient.register_fake
def _like_weight_gradient(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    O = gradient.shape[-1]  # noqa: E741
    return gradient.new_empty(O, x.shape[-1], dtype=torch.float32), gradient.new_empty(O, dtype=torch.float32)


@_projections.register_fake
def _like_projections(
    x: Tensor, q: Tensor, q_bias: Tensor | None, k: Tensor, k_bias: Tensor | None, v: Tensor, v_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.new_empty(*x.shape[:-1], len(weight)) for weight in (q, k, v))
    return q, k, v


_projections_input_gradient.register_fake(lambda of_q, of_k, of_v, q, k, v: of_q.new_empty(*of_q.shape[:-1], q.shape[1]))


@_projections_weight_gradient.register_fake
def _like_projections_weight_gradient(of_q: Tensor, of_k: Tensor, of_v: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return *_like_weight_gradient(of_q, x), *_like_weight_gradient(of_k, x), *_like_weight_gradient(of_v, x)


@_feedforward.register_fake
def _like_feedforward(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], len(down)), x.new_empty(*x.shape[:-1], len(up))


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen matrix needs no x
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate_linear(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x = torch.ops.gpt.linear_input_gradient(gradient, weight) if ctx.needs_input_grad[0] else None
    return of_x, *_of_parameters(gradient, x, weight, ctx.bias_dtype, ctx.needs_input_grad[1:3])


def _of_parameters(
    gradient: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype | None, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a weight and its bias, as far as they are needed."""
    if needed[0]:
        of_weight, of_bias = torch.ops.gpt.linear_weight_gradient(gradient, x)
        return of_weight.to(weight.dtype), of_bias.to(bias_dtype) if needed[1] and bias_dtype else None
    return None, gradient.flatten(0, -2).sum(0, dtype=torch.float32).to(bias_dtype) if needed[1] and bias_dtype else None


def _keep_projections(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, q, _, k, _, v, _ = inputs
    ctx.save_for_backward(x if any(ctx.needs_input_grad[1::2]) else None, q, k, v)
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[1:]]


def _differentiate_projections(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    x, *weights = ctx.saved_tensors
    of_x = torch.ops.gpt.projections_input_gradient(*gradients, *weights) if ctx.needs_input_grad[0] else None
    needed = ctx.needs_input_grad[1:]
    if all(needed[::2]):
        found = torch.ops.gpt.projections_weight_gradient(*gradients, x)
        return of_x, *(f.to(dtype) if need and dtype else None for f, dtype, need in zip(found, ctx.dtypes, needed, strict=True))
    found = [
        f
        for n, (gradient, weight) in enumerate(zip(gradients, weights, strict=True))
        for f in _of_parameters(gradient, x, weight, ctx.dtypes[2 * n + 1], needed[2 * n : 2 * n + 2])
    ]
    return of_x, *found


def _keep_feedforward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, up, up_bias, down, down_bias = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, up, down, output[1])
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (up_bias, down_bias)]


def _differentiate_feedforward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, up, down, before = ctx.saved_tensors
    of_before, hidden = torch.ops.gpt.gelu_input_gradient(gradient, down, before)
    of_x = torch.ops.gpt.linear_input_gradient(of_before, up) if ctx.needs_input_grad[0] else None
    return (
        of_x,
        *_of_parameters(of_before, x, up, ctx.bias_dtypes[0], ctx.needs_input_grad[1:3]),
        *_of_parameters(gradient, hidden, down, ctx.bias_dtypes[1], ctx.needs_input_grad[3:5]),
    )


_linear.register_autograd(_differentiate_linear, setup_context=_keep_linear)
_projections.register_autograd(_differentiate_projections, setup_context=_keep_projections)
_feedforward.register_autograd(_differentiate_feedforward, setup_context=_keep_feedforward)


class Linear(nn.Linear):
    """torch's, but in C++ where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return native_linear(input, self.weight, self.bias) if suits_product(input, self.weight) else super().forward(input)


def is_plain(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a layer is linear and nothing else: no adapter, not quantized."""
    return type(layer) in (Linear, nn.Linear)


def suits_together(x: Tensor, *layers: nn.Module | None) -> bool:
    """Whether products of x with these layers can be one operator: they suit, are plain, and no hook wants to see them one by one."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    plain = [layer for layer in layers if is_plain(layer)]
    seen = any(getattr(layer, hook) for layer in plain for hook in hooks)
    return len(plain) == len(layers) and not seen and suits_product(x, *(layer.weight for layer in plain))
