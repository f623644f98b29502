"""Which of several ways to compute the same is fast on which device: the only file of the model that knows one device from another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernels:
    """What suits a device.

    Attributes:
        own_attention: a compiled block computes attention itself, block by block of queries; else torch's fused kernel does.
        groups_with_mask: the fused kernel takes a mask together with heads in groups.
        sigmoid_gelu: a compiled GELU is faster as a sigmoid than as the tanh that it is.
        logits_chunk: the most tokens of which the loss makes logits at once.
        logits_bytes: the most fp32 logits that it makes at once; 0: as many as `logits_chunk` tokens have.
        even_chunks: all these chunks have one size, for each is compiled.
    """

    own_attention: bool = False
    groups_with_mask: bool = False
    sigmoid_gelu: bool = False
    logits_chunk: int = 4096  # large products are what is fast
    logits_bytes: int = 2**28
    even_chunks: bool = False


_ACCELERATOR = Kernels()
_KERNELS = {
    # A chunk's logits stay in the cache; a compiled tanh takes three times as long as a sigmoid.
    "cpu": Kernels(own_attention=True, groups_with_mask=True, sigmoid_gelu=True, logits_chunk=512, logits_bytes=0),
    # A GPU's memory-efficient kernel takes a mask but no groups; with groups all scores would be kept. torch's flex_attention takes both,
    # skips what no query sees and is faster there for packed documents; it is not used yet.
    "cuda": _ACCELERATOR,
    "neuron": Kernels(even_chunks=True),
}


def kernels_of(device_type: str) -> Kernels:
    """What suits a device of this type, as torch calls it."""
    return _KERNELS.get(device_type, _ACCELERATOR)
