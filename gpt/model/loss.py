"""Next-token cross-entropy that never holds all the logits.

Shapes: N tokens, C tokens of a chunk, E d_model, V vocabulary, P V rounded up to a multiple of 64. The head's matrix product,
the softmax and both gradients are made chunk by chunk while the chunk is in the cache; backward only scales them. On two CPU
cores this takes half the time of `linear` + `cross_entropy` in bf16 (benchmarks/RESULTS.md, "loss").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.model.kernels import kernels_of
from gpt.model.native_products import multiply, multiply_transposed, pack_for_backward, pack_for_forward, suits_product
from gpt.model.native_rowwise import native_cross_entropy, suits_products

IGNORE = -100  # the target of a token that is not to be learned from, torch's convention


_VOCABULARY_MULTIPLE = 64  # products with an odd number of columns are slower, by half on some GPUs
_WORTH_GATHERING = 3 / 4  # of the rows: with more of them valid, picking them out saves too little


def chunk_size(device_type: str, vocab_size: int, rows: int) -> int:
    """Tokens per chunk, of `rows` in a pass."""
    kernels = kernels_of(device_type)
    most = kernels.logits_chunk
    if kernels.logits_bytes:
        most = max(128, min(most, kernels.logits_bytes // (4 * vocab_size) // 128 * 128))
    if kernels.even_chunks:
        return next(size for size in range(min(most, rows), 0, -1) if rows % size == 0)
    return most


def valid_rows(targets: Tensor, chunk: int) -> Tensor | None:
    """The places of the targets that count, for the loss to compute no others; made on the host, so that no device is waited for.

    Args:
        targets: any shape, int64 with IGNORE, on the CPU.
        chunk: tokens per chunk of the loss that is going to use them.

    Returns:
        (n,) int64 places in the flattened targets, n a multiple of chunk: those that count, then as many that do not as fill the
        last chunk; None where so many count that it does not pay.
    """
    valid = targets.flatten() != IGNORE
    rows = valid.nonzero().flatten()
    missing = -len(rows) % chunk
    if len(rows) + missing > _WORTH_GATHERING * len(valid):
        return None
    return torch.cat([rows, (~valid).nonzero().flatten()[:missing]])


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (C, P), targets (C,) -> fp32 sum over valid targets of -log softmax(logits)[target]."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")


def _each_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """As `_nll`, each by itself: (C,) fp32, 0 where a target does not count."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")


def _nll_and_gradient(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `_nll`, each loss times its weight (C,), and the gradient with respect to the logits, (C, P) in their dtype."""
    wide = logits.float()
    peak = wide.amax(-1, keepdim=True)
    exp = (wide - peak).exp()
    total = exp.sum(-1, keepdim=True)
    valid = targets[:, None] != IGNORE  # (C, 1)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    hit = columns == targets[:, None]  # (C, P)
    at_target = torch.where(hit, wide, 0.0).sum(-1, keepdim=True)
    nll = torch.where(valid, total.log() + peak - at_target, 0.0)  # (C, 1)
    gradient = torch.where(valid, exp / total - hit.float(), 0.0)
    if weights is not None:
        nll, gradient = nll * weights[:, None], gradient * weights[:, None]
    return nll.sum(), gradient.to(logits.dtype)


def product_weight(weight: Tensor, dtype: torch.dtype, always: bool = False) -> Tensor:
    """The head's weight (V, E) in the products' dtype; where that makes a copy, or always, with rows of zeros up to P of them."""
    missing = -len(weight) % _VOCABULARY_MULTIPLE
    if not missing or (weight.dtype == dtype and not always):
        return weight.to(dtype)
    padded = weight.new_empty(len(weight) + missing, weight.shape[1], dtype=dtype)
    padded[: len(weight)] = weight
    padded[len(weight) :] = 0
    return padded


def product_bias(bias: Tensor | None, narrow: Tensor) -> Tensor | None:
    """The head's bias (V,) in the products' dtype, as long as their weight (P, E)."""
    return None if bias is None else F.pad(bias.to(narrow.dtype), (0, len(narrow) - len(bias)))


def product(rows: Tensor, narrow: Tensor, bias: Tensor | None, vocab_size: int, out: Tensor | None = None) -> Tensor:
    """rows (C, E), narrow (P, E), bias (P,) -> (C, P), with no probability left to the columns beyond the vocabulary."""
    logits = torch.mm(rows, narrow.T, out=out) if bias is None else torch.addmm(bias, rows, narrow.T, out=out)
    if vocab_size < len(narrow):
        logits[:, vocab_size:] = float("-inf")
    return logits


def _lengths(chunks: list[slice | Tensor], rows: int) -> list[int]:
    """How many rows each chunk has, of so many in all."""
    return [len(range(rows)[chunk]) if isinstance(chunk, slice) else len(chunk) for chunk in chunks]


class _HeadProducts:
    """Products with the head's weight in the dtype of products, chunk by chunk; where they are native it is laid out for them once.

    Args:
        weight: (V, E).
        bias: (V,), of a head that has one.
        dtype: of the products.
        rows: of a chunk, at most.
        learns: whether `of_rows` will be asked.

    Attributes:
        shape: (P, E).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int, learns: bool) -> None:
        narrow = product_weight(weight, dtype)
        self.vocab_size, self.shape, self.dtype = len(weight), narrow.shape, dtype
        self._bias = product_bias(bias, narrow)
        self.is_native = suits_product(narrow.new_empty(rows, 0), narrow)  # of an x with a chunk's rows
        self._narrow = None if self.is_native else narrow
        self._forward = pack_for_forward(narrow) if self.is_native else None
        self._backward = pack_for_backward(narrow) if self.is_native and learns else None

    def logits(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """(C, E) -> (C, P), with no probability left to the columns beyond the vocabulary."""
        if self._forward is None:
            assert self._narrow is not None
            return product(rows, self._narrow, self._bias, self.vocab_size, out)
        logits = multiply(rows, self._forward, self.shape[0], self._bias, out)
        if self.vocab_size < self.shape[0]:
            logits[:, self.vocab_size :] = float("-inf")
        return logits

    def of_rows(self, gradient: Tensor) -> Tensor:
        """(C, P) -> (C, E)."""
        if self._narrow is not None:
            return gradient @ self._narrow
        assert self._backward is not None
        return multiply(gradient, self._backward, self.shape[1])

    def add_of_weight(self, gradient: Tensor, rows: Tensor, to: Tensor) -> None:
        """(C, P), (C, E), added to (P, E) fp32."""
        if self.is_native:
            multiply_transposed([gradient], rows, [to], add=True)
        else:
            to += gradient.T @ rows


class _WeightGradient:
    """The gradient of the head's weight (P, E) in fp32, added up chunk by chunk, or by several chunks where adding costs much.

    Where the loss's gradient takes the place of the logits, and a product has a result of its own, chunks wait side by side till they are
    `gradient_bytes` together: each product is then longer, and its result is widened and added less often.
    """

    def __init__(self, products: _HeadProducts, hidden: Tensor, rows: int, chunk: int) -> None:
        """For so many rows of hidden in all, in chunks of at most so many."""
        self._products = products
        width, like = products.shape[0], hidden.new_empty(0, dtype=products.dtype)
        self.sum = hidden.new_zeros(products.shape, dtype=torch.float32)
        most = kernels_of(hidden.device.type).gradient_bytes // (width * like.element_size()) // chunk * chunk
        waits = chunk < min(most, rows) and suits_products(like) and not products.is_native
        self._waiting = like.new_empty(min(most, rows), width) if waits else None
        self._rows: list[Tensor] = []
        self._used = 0

    def place(self, rows: int) -> Tensor | None:
        """Where the next chunk's logits may be made, (C, P)."""
        if self._waiting is None:
            return None
        if self._used + rows > len(self._waiting):
            self.finish()
        return self._waiting[self._used : self._used + rows]

    def add(self, gradient: Tensor, rows: Tensor, place: Tensor | None) -> None:
        """A chunk: the gradient of its logits (C, P), what the head read (C, E), and the place that it was given."""
        if place is None:
            self._products.add_of_weight(gradient, rows, self.sum)
            return
        if gradient.data_ptr() != place.data_ptr():
            place.copy_(gradient)
        self._rows.append(rows)
        self._used += len(rows)

    def finish(self) -> None:
        """Add what waits."""
        if self._rows:
            assert self._waiting is not None
            self._products.add_of_weight(self._waiting[: self._used], torch.cat(self._rows), self.sum)
            self._rows, self._used = [], 0


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        chunks: list[slice | Tensor],
        softmax: Callable[[Tensor, slice | Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        lengths = _lengths(chunks, len(hidden))
        most = max(lengths, default=1)
        products = _HeadProducts(weight, bias, dtype, most, ctx.needs_input_grad[0])
        hidden_gradient = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if ctx.needs_input_grad[0] else None
        weight_gradient = _WeightGradient(products, hidden, sum(lengths), most) if ctx.needs_input_grad[1] else None
        bias_gradient = torch.zeros(products.shape[0], dtype=torch.float32, device=weight.device) if ctx.needs_input_grad[2] else None
        nll = hidden.new_zeros((), dtype=torch.float32)
        for chunk in chunks:
            rows = hidden[chunk].to(dtype)  # (C, E)
            place = None if weight_gradient is None else weight_gradient.place(len(rows))
            part, gradient = softmax(products.logits(rows, place), chunk)
            nll += part
            if hidden_gradient is not None:
                hidden_gradient[chunk] = products.of_rows(gradient)
            if weight_gradient is not None:
                weight_gradient.add(gradient, rows, place)
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0, dtype=torch.float32)
            del gradient  # before the logits of the next chunk are made
        if weight_gradient is not None:
            weight_gradient.finish()
        of_weight = None if weight_gradient is None else weight_gradient.sum
        ctx.save_for_backward(hidden_gradient, *(None if g is None else g[: len(weight)] for g in (of_weight, bias_gradient)))
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return nll

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (scale,) = outputs
        gradients = (
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None)


class _Each(torch.autograd.Function):
    """The losses one by one. How much each counts is known only in the backward pass, from what was made of them.

    A row of the gradient with respect to hidden is that row's own times its weight, so it is made at once. The gradient of the head's
    weight mixes the rows: where it is needed, the logits are computed once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        chunks: list[slice | Tensor],
        softmax: Callable[..., Any],
    ) -> Tensor:
        narrow = product_weight(weight, dtype)  # (P, E)
        nll = hidden.new_zeros(len(hidden), dtype=torch.float32)
        at_once = not ctx.needs_input_grad[1]
        hidden_gradient = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if at_once else None
        for chunk in chunks:
            logits = product(hidden[chunk].to(dtype), narrow, None, len(weight))
            nll[chunk] = _each_nll(logits, targets[chunk])
            if hidden_gradient is not None:
                hidden_gradient[chunk] = softmax(logits, targets[chunk])[1] @ narrow
        ctx.save_for_backward(*((hidden_gradient,) if at_once else (hidden, weight, targets)))
        ctx.settings, ctx.hidden_dtype = (dtype, chunks, softmax), hidden.dtype
        return nll

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (scales,) = outputs  # (N,) fp32
        if not ctx.needs_input_grad[1]:
            (hidden_gradient,) = ctx.saved_tensors
            return (hidden_gradient * scales[:, None]).to(ctx.hidden_dtype), None, None, None, None, None
        hidden, weight, targets = ctx.saved_tensors
        dtype, chunks, softmax = ctx.settings
        narrow = product_weight(weight, dtype)
        hidden_gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros(narrow.shape, dtype=torch.float32, device=weight.device)
        for chunk in chunks:
            rows, scale = hidden[chunk].to(dtype), scales[chunk, None]
            gradient = softmax(product(rows, narrow, None, len(weight)), targets[chunk])[1]
            if hidden_gradient is not None:
                hidden_gradient[chunk] = (gradient @ narrow * scale).to(hidden.dtype)
            weight_gradient += gradient.T @ (rows * scale).to(dtype)
        return hidden_gradient, weight_gradient[: len(weight)].to(weight.dtype), None, None, None, None


class LinearCrossEntropy(nn.Module):
    """Sum of the next-token losses of hidden states under an output head.

    Args:
        dtype: of the matrix products; log-sum-exp and the sums are always fp32.
        chunk: tokens per chunk; None: as many as suit the device and the vocabulary (`chunk_size`).
    """

    def __init__(self, dtype: torch.dtype = torch.float32, chunk: int | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.chunk = chunk
        self.softmax: Callable[..., Any] = _nll_and_gradient

    def nll_and_gradient(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `_nll_and_gradient`, as fast as may be; the gradient may take the place of the logits."""
        return native_cross_entropy(logits, targets) if suits_products(logits) else self.softmax(logits, targets)

    def compile_softmax(self, **options: Any) -> None:
        """Fuse the softmax part with `torch.compile(**options)`; the matrix products stay as they are."""
        self.softmax = torch.compile(_nll_and_gradient, **options)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: Tensor | None = None,
        bias: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The sum over the valid targets.

        Args:
            hidden: (..., E).
            weight: (V, E).
            targets: (...) int64 with IGNORE where nothing is learned.
            rows: (n,) of `valid_rows(targets, chunk_size(...))`, on the device; the only places then looked at. None: all.
            bias: (V,), of a head that has one.
            weights: (...) fp32, by which each loss is multiplied; None: all by 1.

        Returns:
            Scalar, fp32.
        """
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        weights = None if weights is None else weights.reshape(-1)
        chunks = self.chunks(hidden, weight, rows)

        def softmax(logits: Tensor, chunk: slice | Tensor) -> tuple[Tensor, Tensor]:
            if weights is None:
                return self.nll_and_gradient(logits, targets[chunk])
            return self.softmax(logits, targets[chunk], weights[chunk])

        learns = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        if torch.is_grad_enabled() and learns:
            return self.summed(hidden, weight, bias, chunks, softmax)
        nll = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            products = _HeadProducts(weight, bias, self.dtype, max(_lengths(chunks, len(hidden)), default=1), learns=False)
            for chunk in chunks:
                logits = products.logits(hidden[chunk].to(self.dtype))
                nll += _nll(logits, targets[chunk]) if weights is None else (_each_nll(logits, targets[chunk]) * weights[chunk]).sum()
        return nll

    def each(self, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None = None) -> Tensor:
        """The losses one by one, to be added up otherwise than all alike. The arguments are those of `forward`, for a head without a bias.

        Returns:
            (N,) fp32 for the flattened targets, 0 where nothing is learned.
        """
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        chunks = self.chunks(hidden, weight, rows)
        with torch.autocast(hidden.device.type, enabled=False):
            if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
                return cast(Tensor, _Each.apply(hidden, weight, targets, self.dtype, chunks, self.nll_and_gradient))
            nll = hidden.new_zeros(len(hidden), dtype=torch.float32)
            narrow = product_weight(weight, self.dtype)
            for chunk in chunks:
                nll[chunk] = _each_nll(product(hidden[chunk].to(self.dtype), narrow, None, len(weight)), targets[chunk])
            return nll

    def chunks(self, hidden: Tensor, weight: Tensor, rows: Tensor | None) -> list[slice | Tensor]:
        """The places of hidden (N, E), or those of them in `rows`, chunk by chunk."""
        size = self.chunk or chunk_size(hidden.device.type, len(weight), len(hidden))
        if rows is not None:
            return list(rows.split(size)) if len(rows) else []
        return [slice(start, start + size) for start in range(0, len(hidden), size)]

    def summed(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunks: list[slice | Tensor],
        softmax: Callable[[Tensor, slice | Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The sum of the chunks' losses, with its gradients with respect to hidden (N, E), weight (V, E) and bias (V,).

        Args:
            softmax: logits (C, P) and their chunk -> its loss, and the gradient with respect to the logits.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return cast(Tensor, _Function.apply(hidden, weight, bias, self.dtype, chunks, softmax))

    def figures(self, summed: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Figures besides the loss of what was trained on since they were last asked for; `summed` adds up all processes' tensors."""
        return {}
