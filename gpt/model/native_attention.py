"""Causal attention in bf16 on a CPU in one call of C++ (`attention.cpp`), as operators that torch differentiates and compiles around."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.model.native_library import load_library

_SOURCE = Path(__file__).with_name("attention.cpp")


class _Heads(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("time", c_int64))


class _Inputs(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("B", "H", "K", "T", "D", "threads")),
        *((name, _Heads) for name in ("q", "k", "v")),
        ("mask", c_void_p),
        ("mask_batch", c_int64),
    )


def native_attention_obstacle(head_dim: int) -> str | None:
    """Why attention with heads of this size cannot, or should not, be native on this CPU, in words; None if it will be, in bf16.

    The library is built if it is not there yet.
    """
    if head_dim % 16:
        return f"head_dim={head_dim} is no multiple of 16"
    library, why = load_library(_SOURCE)
    if library is None:
        return why
    library.attention_is_fast.restype = c_int64
    return None if library.attention_is_fast() else "the CPU has no AVX512-BF16, or matrix units besides"


_found: dict[int, bool] = {}


def is_native(head_dim: int) -> bool:
    """Whether `native_attention_obstacle` finds none; but while torch compiles, only whether it has been found before that it does not."""
    if head_dim not in _found and not torch.compiler.is_compiling():
        _found[head_dim] = native_attention_obstacle(head_dim) is None
    return _found.get(head_dim, False)


def native_causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, in which query t sees the keys up to its own place; where `is_native(D)`.

    Args:
        q: (B, H, T, D) bf16 on a CPU.
        k, v: (B, K, T, D) bf16, H a multiple of K.
        mask: (1 or B, 1, T, T) bf16, added to the scores; it gets no gradient.

    Returns:
        (B, H, T, D) bf16, laid out as (B, T, H, D).
    """
    return torch.ops.gpt.causal_attention(q, k, v, mask)[0]


@torch.library.custom_op(
    "gpt::causal_attention", mutates_args=(), device_types="cpu", schema="(Tensor q, Tensor k, Tensor v, Tensor? mask) -> (Tensor, Tensor)"
)
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    y, logarithms = _like_forward(q, k, v, mask)
    q, k, v, mask = _readable(q), _readable(k), _readable(v), None if mask is None else mask.contiguous()
    call = _library().attention_forward
    call(byref(_inputs(q, k, v, mask)), byref(_heads(y)), c_void_p(logarithms.data_ptr()))
    return y, logarithms


@torch.library.custom_op(
    "gpt::causal_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor y, Tensor logarithms, Tensor gradient) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, y: Tensor, logarithms: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _like_backward(q, k, v, mask, y, logarithms, gradient)
    q, k, v, y, gradient = map(_readable, (q, k, v, y, gradient))
    mask, logarithms = None if mask is None else mask.mT.contiguous(), logarithms.contiguous()
    call = _library().attention_backward
    call(
        byref(_inputs(q, k, v, mask)), byref(_heads(y)), c_void_p(logarithms.data_ptr()), byref(_heads(gradient)),
        *(byref(_heads(x)) for x in gradients),
    )  # fmt: skip
    return gradients


@_forward.register_fake
def _like_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _like_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, y: Tensor, logarithms: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.gpt.causal_attention_backward(*ctx.saved_tensors, gradient), None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _empty_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) of x's dtype, laid out as (B, T, H, D): what the products before and after read and write."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _readable(x: Tensor) -> Tensor:
    """x with its last dimension together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> _Heads:
    return _Heads(x.data_ptr(), *x.stride()[:3])


def _inputs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> _Inputs:
    B, H, T, D = q.shape
    assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
    assert mask is None or (mask.dtype == torch.bfloat16 and mask.shape[1:] == (1, T, T))
    batch = 0 if mask is None or len(mask) == 1 else T * T
    return _Inputs(
        B, H, k.shape[1], T, D, torch.get_num_threads(), _heads(q), _heads(k), _heads(v), None if mask is None else mask.data_ptr(), batch
    )


def _library() -> ctypes.CDLL:
    library, why = load_library(_SOURCE)
    assert library is not None, why
    library.attention_forward.restype = library.attention_backward.restype = None
    return library
