"""What the simulated device has done: graphs compiled, operations run, fallbacks, memory. The rehearsal report is made of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch


@dataclass(frozen=True)
class Graph:
    """One graph that the chip's compiler would be given.

    Attributes:
        kind: which pass it computes; inference: a forward pass that keeps nothing.
        function: the function of ours that it was traced from, such as Block.forward.
        cause: in words, why it was compiled: a first call, or what differs from the calls before.
        shapes, dtypes: of its inputs, in order.
        operations: ATen name -> how often it stands in the graph.
        nodes: operations in the graph, views included.
        output_bytes: of the tensors that it makes; of a forward pass that includes what is kept for the backward pass.
        scratch_bytes: the most that its own tensors, outputs included, take at once if each lives from its making to its last use.
            The chip's compiler fuses operations and needs less.
    """

    kind: Literal["forward", "backward", "inference"]
    function: str
    cause: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    operations: Counter[str]
    nodes: int
    output_bytes: int
    scratch_bytes: int


@dataclass
class Record:
    """What the device of this process has done since it was made, or since `clear`.

    Attributes:
        unsupported: operations that the chip is said to lack: "aten::topk" (every overload) or "aten::topk.values" (one).
        strict: whether such an operation is an error outside a graph, too; else it runs on the CPU and counts as a fallback.
        graphs: in the order of compilation.
        operations: ATen name -> calls outside graphs, views and copies included.
        eager_kernels: ATen name -> the (shape, dtype, shape, dtype, ...) of tensors that it was called with outside graphs. The chip
            compiles a small program for each.
        fallbacks: ATen name -> calls that ran on the CPU for want of a kernel.
        allocated_bytes: of the device's storages that are alive.
        peak_bytes: the most there were at once since `reset_peak`, with what graphs take while they run (`Graph.scratch_bytes`).
        memory_limit: what `torch.accelerator.get_memory_info` calls the total: by default that of a trn2 rank. Nothing is refused
            beyond it.
    """

    unsupported: frozenset[str] = frozenset()
    strict: bool = False
    graphs: list[Graph] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    eager_kernels: defaultdict[str, set[tuple[torch.Size | torch.dtype, ...]]] = field(default_factory=lambda: defaultdict(set))
    fallbacks: Counter[str] = field(default_factory=Counter)
    allocated_bytes: int = 0
    peak_bytes: int = 0
    memory_limit: int = 24 * 2**30

    def lacks(self, name: str) -> bool:
        """Whether the operation `aten::name.overload` is among the unsupported ones."""
        return name in self.unsupported or name.partition(".")[0] in self.unsupported

    def allocate(self, size: int) -> None:
        """Count bytes as taken, or with a negative size as given back."""
        self.allocated_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)

    def use(self, size: int) -> None:
        """Count bytes that are taken for a moment."""
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes + size)

    def reset_peak(self) -> None:
        """Measure the peak from here on."""
        self.peak_bytes = self.allocated_bytes

    def clear(self) -> None:
        """Forget what was done; storages that are alive stay counted."""
        for counted in (self.graphs, self.operations, self.eager_kernels, self.fallbacks):
            counted.clear()
        self.reset_peak()


def operation_names(names: Collection[str]) -> frozenset[str]:
    """Names of operations as ATen has them: topk and aten::topk are the same.

    Raises:
        ValueError: there is no such operation, or it is made of others and never reaches a device itself.
    """
    found = set()
    for name in names:
        whole = name if "::" in name else f"aten::{name}"
        overloads = [o for o in _overloads() if o == whole or o.partition(".")[0] == whole]
        if not overloads:
            raise ValueError(f"{name!r}, which torch {torch.__version__} does not know")
        plain = [o for o in overloads if not o.endswith("out")] or overloads
        if whole != SDPA and all(torch._C._dispatch_has_kernel_for_dispatch_key(o, "CompositeImplicitAutograd") for o in plain):
            raise ValueError(f"{name!r}, which is made of other operations and never reaches a device: name those")
        found.add(whole)
    return frozenset(found)


def overloads_of(name: str) -> list[str]:
    """The overloads of `aten::name`, or the one that `aten::name.overload` is."""
    return [o for o in _overloads() if o == name or o.partition(".")[0] == name]


def _overloads() -> list[str]:
    return torch._C._dispatch_get_all_op_names()


SDPA = "aten::scaled_dot_product_attention"
# The CPU's fused attention stands for the chip's, and is counted as that which people call, and as what torch has for its backward pass on
# a device of its own.
COUNTED_AS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": SDPA,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "aten::_scaled_dot_product_fused_attention_overrideable_backward",
}
