"""Products of linear layers in bf16 on a CPU in C++ (`products.cpp`), as operators that torch differentiates and compiles around.

They are faster than oneDNN's (benchmarks/RESULTS.md, "Linear layers"), and what stands around them costs next to nothing: weights are
narrowed where they are laid out for the product, biases and GELU are added and computed where its sums are, gradients of weights are fp32
sums.

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


def native_linears(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """Layers that read the same x (..., I), with or without biases, all alike -> (..., O) bf16 of each; where they suit."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return torch.ops.gpt.linears(x.bfloat16(), [layer.weight for layer in layers], biases)


def native_feedforward(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> Tensor:
    """GELU(x U^T + u) D^T + d, GELU by its tanh approximation: x (..., I), up (O, I), down (I', O) -> (..., I') bf16; where they suit."""
    return torch.ops.gpt.gelu_feedforward(x.bfloat16(), up, up_bias, down, down_bias)[0]


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
    """x (..., K) bf16 times what is packed for it, plus bias (width,) -> (..., width) bf16, in `out` if that is given.

    Raises:
        RuntimeError: x is not as wide as what the weight was packed for.
    """
    y = x.new_empty(*x.shape[:-1], width) if out is None else out
    assert y.is_contiguous()
    assert y.shape == (*x.shape[:-1], width)
    assert bias is None or len(bias) == width
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
    for x, packed in rows:
        assert x.dtype == torch.bfloat16
        if (x.shape[-1], -(-width // _PANEL)) != (2 * packed.shape[1], packed.shape[0]):  # C++ would read beyond
            raise RuntimeError(f"rows of {x.shape[-1]} numbers for {width} do not fit a weight laid out for {2 * packed.shape[1]}")
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


@torch.library.custom_op(
    "gpt::linears", mutates_args=(), device_types="cpu", schema="(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor[]"
)
def _linears(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    return [multiply(x, pack_for_forward(w), len(w), bias) for w, bias in zip(weights, biases or [None] * len(weights), strict=True)]


@torch.library.custom_op(
    "gpt::linears_input_gradient", mutates_args=(), device_types="cpu", schema="(Tensor[] gradients, Tensor[] weights) -> Tensor"
)
def _linears_input_gradient(gradients: list[Tensor], weights: list[Tensor]) -> Tensor:
    of_x = _like_input_gradient(gradients, weights)
    _multiply("multiply", [(g, pack_for_backward(w)) for g, w in zip(gradients, weights, strict=True)], of_x.shape[-1], None, of_x)
    return of_x


@torch.library.custom_op(
    "gpt::linears_weight_gradients", mutates_args=(), device_types="cpu", schema="(Tensor[] gradients, Tensor x) -> (Tensor[], Tensor[])"
)
def _linears_weight_gradients(gradients: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    of_weights, of_biases = _like_weight_gradients(gradients, x)
    multiply_transposed(gradients, x, of_weights, of_biases)
    return of_weights, of_biases


@torch.library.custom_op(
    "gpt::gelu_feedforward",
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


_linears.register_fake(lambda x, weights, biases: [x.new_empty(*x.shape[:-1], len(w)) for w in weights])
_gelu_input_gradient.register_fake(lambda gradient, down, before: (torch.empty_like(before), torch.empty_like(before)))


@_linears_input_gradient.register_fake
def _like_input_gradient(gradients: list[Tensor], weights: list[Tensor]) -> Tensor:
    return gradients[0].new_empty(*gradients[0].shape[:-1], weights[0].shape[1])


@_linears_weight_gradients.register_fake
def _like_weight_gradients(gradients: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    of_weights = [x.new_empty(g.shape[-1], x.shape[-1], dtype=torch.float32) for g in gradients]
    return of_weights, [x.new_empty(g.shape[-1], dtype=torch.float32) for g in gradients]


@_feedforward.register_fake
def _like_feedforward(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], len(down)), x.new_empty(*x.shape[:-1], len(up))


def _of_parameters(
    gradients: list[Tensor], x: Tensor | None, parameters: list[tuple[torch.dtype, ...]], needed: list[tuple[bool, ...]]
) -> list[list[Tensor | None]]:
    """For each layer the gradients of its weight, and its bias if it has one, as far as they are needed, in the parameters' dtypes."""
    learning = [n for n, (weight, *_) in enumerate(needed) if weight]
    found: list[list[Tensor | None]] = [[None] * len(dtypes) for dtypes in parameters]
    if learning:
        of_weights, of_biases = torch.ops.gpt.linears_weight_gradients([gradients[n] for n in learning], x)
        for n, pair in zip(learning, zip(of_weights, of_biases, strict=True), strict=True):
            found[n] = [of.to(dtype) if need else None for of, dtype, need in zip(pair, parameters[n], needed[n], strict=False)]
    for n in set(range(len(gradients))).difference(learning):
        if needed[n][1:] == (True,):
            found[n][1] = gradients[n].flatten(0, -2).sum(0, dtype=torch.float32).to(parameters[n][1])
    return found


def _keep_linears(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases = inputs
    learns = any(ctx.needs_input_grad[1 : 1 + len(weights)])  # a frozen matrix needs no x
    ctx.save_for_backward(x if learns else None, *weights)
    ctx.dtypes = [tuple(p.dtype for p in layer) for layer in zip(*([weights, biases] if biases else [weights]), strict=True)]


def _differentiate_linears(ctx: Any, gradients: list[Tensor]) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    x, *weights = ctx.saved_tensors
    of_x, *of_parameters = ctx.needs_input_grad
    found = _of_parameters(gradients, x, ctx.dtypes, list(zip(*(needed for needed in of_parameters if needed), strict=True)))
    input_gradient = torch.ops.gpt.linears_input_gradient(gradients, weights) if of_x else None
    return input_gradient, [layer[0] for layer in found], [layer[1] for layer in found if len(layer) > 1]


def _keep_feedforward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, up, _, down, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, up, down, output[1])
    ctx.dtypes = [tuple(p.dtype for p in inputs[n : n + 2] if p is not None) for n in (1, 3)]


def _differentiate_feedforward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, up, down, before = ctx.saved_tensors
    needed = ctx.needs_input_grad
    of_before, hidden = torch.ops.gpt.gelu_input_gradient(gradient, down, before)
    of_x = torch.ops.gpt.linears_input_gradient([of_before], [up]) if needed[0] else None
    of_up = _of_parameters([of_before], x, ctx.dtypes[:1], [needed[1 : 1 + len(ctx.dtypes[0])]])[0]
    of_down = _of_parameters([gradient], hidden, ctx.dtypes[1:], [needed[3 : 3 + len(ctx.dtypes[1])]])[0]
    return of_x, *(*of_up, None)[:2], *(*of_down, None)[:2]


_linears.register_autograd(_differentiate_linears, setup_context=_keep_linears)
_feedforward.register_autograd(_differentiate_feedforward, setup_context=_keep_feedforward)


class Linear(nn.Linear):
    """torch's, but in C++ where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return native_linears(input, self)[0] if suits_product(input, self.weight) else super().forward(input)


def is_plain(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a layer is linear and nothing else: no adapter, not quantized."""
    return type(layer) in (Linear, nn.Linear)


def suits_together(x: Tensor, *layers: nn.Module | None) -> bool:
    """Whether products of x with these layers can be one operator: they suit, are plain, all or none have a bias, and no hook wants to see
    them one by one."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    plain = [layer for layer in layers if is_plain(layer)]
    seen = any(getattr(layer, hook) for layer in plain for hook in hooks)
    alike = len({layer.bias is None for layer in plain}) == 1
    return len(plain) == len(layers) and alike and not seen and suits_product(x, *(layer.weight for layer in plain))
