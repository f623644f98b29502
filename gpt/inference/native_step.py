"""The step that makes a token in one call of C++ (`decode_step.cpp`), where torch would make hundreds, which take as long as the
products of a small model.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt.model.attention import KVCache
from gpt.model.native_library import load_library
from gpt.model.transformer import GPT, Block

_SOURCE = Path(__file__).with_name("decode_step.cpp")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "swiglu": 2}
# Up to so many rows it is faster than torch (benchmarks/RESULTS.md, "Writing"), which multiplies many rows by bf16 without widening it.
_MOST_ROWS = {torch.float32: 1, torch.bfloat16: 1, torch.int8: 16}


class _Matrix(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("out", c_int64), ("in_", c_int64))


class _Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("attention_norm", "feedforward_norm")),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
        *((name, _Matrix) for name in ("qkv", "out", "up", "down", "gate")),
    )


_SIZES = ("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff")


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in (*_SIZES, "outputs", "rotary_dim")),
        *((name, c_int64) for name in ("weight_type", "embedding_type", "activation", "rmsnorm", "parallel_residual")),
        *((name, c_double) for name in ("norm_eps", "embedding_scale")),
        *((name, c_void_p) for name in ("tokens", "learned_positions", "fixed_positions", "cos", "sin")),
        ("blocks", POINTER(_Block)),
        ("final_norm", _Norm),
        ("head", _Matrix),
    )


class _Cache(ctypes.Structure):
    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("padding", c_void_p), ("length", c_int64), ("slots", c_int64))


def native_obstacle(model: GPT, rows: int) -> str | None:
    """Why a native step cannot, or should not, make the tokens of so many texts, in words; None if it will.

    The weights must lie on a CPU as `pack_for_inference` leaves them. The library is built if it is not there yet.
    """
    weights: list[Any] = [getattr(matrix, "weight", None) for block in model.blocks for matrix in _matrices(block)]
    weights.append(getattr(model.head, "weight", None))
    if not all(isinstance(weight, Tensor) and weight.is_cpu and weight.is_contiguous() for weight in weights):
        return "the weights are not laid out for a native step"
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1 or not dtypes <= _MOST_ROWS.keys():
        return f"no native step reads weights in {' and '.join(sorted(str(dtype)[6:] for dtype in dtypes))}"
    if rows > _MOST_ROWS[dtypes.pop()]:
        return f"it is faster than a native step for {rows} texts at once"
    return load_library(_SOURCE)[1] or None


def _matrices(block: nn.Module) -> list[nn.Module | None]:
    """What a block multiplies by; q, k and v must be in one, and only swiglu has a gate."""
    assert isinstance(block, Block)
    feedforward = block.feedforward
    gate = [] if feedforward.gate is None else [feedforward.gate]
    return [block.attention.qkv, block.attention.out, feedforward.up, feedforward.down, *gate]


class NativeStep:
    """Reads one token of each row of a model on a CPU.

    Args:
        model: in eval mode, for which there is no `native_obstacle`. Its weights are read where they lie: it must not be changed.
    """

    def __init__(self, model: GPT) -> None:
        config, library = model.config, load_library(_SOURCE)[0]
        assert library is not None
        self._step = library.decode_step
        self._step.restype = None
        self._outputs = config.outputs
        self._kept: list[Tensor] = []  # what the pointers point to
        embeddings, rotates = model.embeddings, config.positions == "rotary"
        self._blocks = (_Block * config.n_layer)(*map(self._block, model.blocks))
        self._model = _Model(
            *(getattr(config, name) for name in _SIZES),
            outputs=config.outputs,
            rotary_dim=config.rotary_dim if rotates else 0,
            weight_type=_TYPES[model.head.weight.dtype],
            embedding_type=_TYPES[embeddings.tokens.weight.dtype],
            activation=_ACTIVATIONS[config.activation],
            rmsnorm=config.norm == "rmsnorm",
            parallel_residual=config.parallel_residual,
            norm_eps=config.norm_eps,
            embedding_scale=config.embedding_scale,
            tokens=self._address(embeddings.tokens.weight),
            learned_positions=self._address(None if embeddings.positions is None else embeddings.positions.weight),
            fixed_positions=self._floats(getattr(embeddings, "table", None)),
            cos=self._floats(model.get_buffer("rotary_cos")) if rotates else None,
            sin=self._floats(model.get_buffer("rotary_sin")) if rotates else None,
            blocks=self._blocks,
            final_norm=self._norm(model.final_norm),
            head=self._matrix(model.head),
        )

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read tokens (B, 1) after those that an fp32 cache holds: fp32 logits (B, V) of what follows them."""
        rows, stored = len(tokens), [*cache.keys, *cache.values]
        assert tokens.shape == (rows, 1)
        assert all(t.dtype == torch.float32 and t.is_contiguous() and len(t) == rows for t in stored)
        assert cache.length < cache.max_length
        tokens, logits = tokens.contiguous(), torch.empty(rows, self._outputs)
        padding = torch.zeros(rows, dtype=torch.int64) if cache.padding is None else cache.padding
        keys, values = ((c_void_p * len(side))(*(t.data_ptr() for t in side)) for side in (cache.keys, cache.values))
        held = _Cache(ctypes.addressof(keys), ctypes.addressof(values), padding.data_ptr(), cache.length, cache.max_length)
        self._step(byref(self._model), byref(held), c_void_p(tokens.data_ptr()), c_int64(rows), c_void_p(logits.data_ptr()),
                   c_int64(torch.get_num_threads()))  # fmt: skip
        cache.advance(1)
        return logits

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _floats(self, tensor: Any) -> int | None:
        """The numbers of a tensor, or of none, in fp32."""
        return None if tensor is None else self._address(tensor.detach().float().contiguous())

    def _norm(self, norm: Any) -> _Norm:
        return _Norm(self._floats(norm.weight), self._floats(getattr(norm, "bias", None)))

    def _matrix(self, linear: Any) -> _Matrix:
        scale = getattr(linear, "scale", None)  # of int8 weights
        return _Matrix(self._address(linear.weight), self._floats(scale), self._floats(linear.bias), *linear.weight.shape)

    def _block(self, block: Any) -> _Block:
        attention = block.attention
        norms = (None if norm is None else self._floats(norm.weight) for norm in (attention.q_norm, attention.k_norm))
        return _Block(self._norm(block.attention_norm), self._norm(block.feedforward_norm), *norms, *map(self._matrix, _matrices(block)))
