"""Which of several ways to compute the same is fast on which device: the only file of the model that knows one device from another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Kernels:
    """What suits a device.

    Attributes:
        native: what lies between bf16 products, attention too, is our own C++, where that can be built.
        own_attention: a compiled block computes attention itself, block by block of queries; else torch's fused kernel does.
        groups_with_mask: the fused kernel takes a mask together with heads in groups.
        sigmoid_gelu: a compiled GELU is faster as a sigmoid than as the tanh that it is.
        logits_chunk: the most tokens of which the loss makes logits at once.
        logits_bytes: the most fp32 logits that it makes at once; 0: as many as `logits_chunk` tokens have.
        gradient_bytes: the most gradients of logits that wait for one product with what the head read, if more than a chunk's do.
        even_chunks: all these chunks have one size, for each is compiled.
    """

    native: bool = False
    own_attention: bool = False
    groups_with_mask: bool = False
    sigmoid_gelu: bool = False
    logits_chunk: int = 4096  # large products are what is fast
    logits_bytes: int = 2**28
    gradient_bytes: int = 0
    even_chunks: bool = False


_ACCELERATOR = Kernels()
_KERNELS = {
    # A chunk's logits stay in the cache; a compiled tanh takes three times as long as a sigmoid. Larger blocks of memory than 32 MB are
    # asked of the system anew each time.
    "cpu": Kernels(
        native=True,
        own_attention=True,
        groups_with_mask=True,
        sigmoid_gelu=True,
        logits_chunk=512,
        logits_bytes=0,
        gradient_bytes=2**25 - 2**16,
    ),
    # A GPU's memory-efficient kernel takes a mask but no groups; with groups all scores would be kept. torch's flex_attention takes both,
    # skips what no query sees and is faster there for packed documents; it is not used yet.
    "cuda": _ACCELERATOR,
    "neuron": Kernels(even_chunks=True),
}


def kernels_of(device_type: str) -> Kernels:
    """What suits a device of this type, as torch calls it."""
    return _KERNELS.get(device_type, _ACCELERATOR)


@contextmanager
def without_native() -> Iterator[None]:
    """Within it torch computes what is our own C++ otherwise: for a second opinion."""
    before = _KERNELS.copy()
    _KERNELS.update({device: replace(kernels, native=False) for device, kernels in before.items()})
    try:
        yield
    finally:
        _KERNELS.update(before)
