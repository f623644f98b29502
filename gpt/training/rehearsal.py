"""What a rehearsal on a simulated device tells of the real one: graphs, operations, memory, time, and what it cannot tell.

Text for a terminal, which is also kept as `rehearsal.txt` in the run directory.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt.config import RunConfig
from gpt.runtime.case import Case
from gpt.runtime.compiling import FixedGraphs
from gpt.runtime.device import Device
from gpt.runtime.memory import binary_size, fit_rows
from gpt.runtime.neuron_sim_record import Graph, Record

FILE = "rehearsal.txt"
EAGER_SECONDS = 60e-6  # that an operation outside of a graph takes on the chip, by reports of people who measured it
_CANNOT_TELL = (
    "how good the chip's kernels are, and which operations it lacks (device.unsupported plays some)",
    "what its compiler refuses, or how long it takes: seconds for a small graph, up to 50 minutes for a large model",
    "its rounding in bf16: gpt parity compares that there",
    "how fast it is: times above follow from a share of the peak that is assumed, not measured",
)


@dataclass(frozen=True)
class Rehearsed:
    """A run as far as the report needs it.

    Attributes:
        record: what the simulated device of this process has done.
        device: it.
        config: the run.
        ranks: processes.
        case: (ranks) -> what it needs of each, by formulas.
        steps: done, in this process.
        total_steps: of the whole run; None: its length is a time.
        flops_per_token: of training.
        graphs: compiled and expected.
    """

    record: Record
    device: Device
    config: RunConfig
    ranks: int
    case: Callable[[int], Case]
    steps: int
    total_steps: int | None
    flops_per_token: int
    graphs: FixedGraphs

    @property
    def told_ranks(self) -> int:
        """Of how many ranks memory and time are told."""
        return self.config.device.ranks or self.ranks


def write_rehearsal(run: Rehearsed, directory: Path) -> str:
    """The report, which is kept in the run directory too."""
    text = describe(run)
    (directory / FILE).write_text(text, encoding="utf-8")
    return text


def describe(run: Rehearsed) -> str:
    """The report."""
    ranks = f"{run.ranks} rank{'s' if run.ranks > 1 else ''}"
    sections = [
        _graphs(run),
        _outside(run),
        _memory(run),
        _time(run),
        ["What this cannot tell:", *(f"  - {line}" for line in _CANNOT_TELL)],
    ]
    told = f", memory and time for {run.told_ranks}" if run.told_ranks != run.ranks else ""
    title = f"Rehearsal of {run.config.device.chip} on {ranks}{told}"
    return "\n\n".join([title, *("\n".join(map(_wrapped, lines)) for lines in sections)]) + "\n"


def _wrapped(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 3)
    return "\n".join(textwrap.wrap(line, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def _graphs(run: Rehearsed) -> list[str]:
    graphs = run.record.graphs
    as_expected = "as expected" if run.graphs.count == run.graphs.expected else f"BUT {run.graphs.expected} were expected"
    lines = [f"Graphs: {run.graphs.count} compiled, {as_expected}; with backward passes apart, {len(graphs)} programs:"]
    for number, graph in enumerate(graphs, 1):
        lines.append(f"  {number}. {graph.function}, {graph.kind}: {graph.nodes} operations on {_shapes(graph)}")
        lines.append(f"     because: {graph.cause}")
    return lines


def _shapes(graph: Graph) -> str:
    """The inputs that are not a model's parameters: those with most dimensions."""
    most = max((len(shape) for shape in graph.shapes), default=0)
    names = [
        f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"
        for shape, dtype in zip(graph.shapes, graph.dtypes, strict=True)
        if len(shape) == most
    ]
    counted = Counter(names)
    return ", ".join(f"{name}{f' x {n}' if n > 1 else ''}" for name, n in counted.most_common())


def _outside(run: Rehearsed) -> list[str]:
    record = run.record
    kernels = {name: len(shapes) for name, shapes in record.eager_kernels.items() if not _is_view(name)}
    most = ", ".join(f"{name.removeprefix('aten::')} {n}" for name, n in sorted(kernels.items(), key=lambda item: -item[1])[:6])
    programs = f"{len(kernels)} operations in {sum(kernels.values())} shapes, each a small program that is compiled once"
    fallbacks = ", ".join(f"{name} ({n} calls)" for name, n in record.fallbacks.most_common()) or "none"
    return [
        f"Outside of graphs: {programs} ({most})",
        f"  {_calls(run):,.0f} calls a step, evaluation and checkpoints included",
        f"  on the CPU, for want of a kernel: {fallbacks}",
    ]


def _calls(run: Rehearsed) -> float:
    """Of operations outside of graphs, in a step."""
    return sum(n for name, n in run.record.operations.items() if not _is_view(name)) / max(1, run.steps)


def _is_view(name: str) -> bool:
    """Whether an operation only looks at its input in another way."""
    namespace, _, of_it = name.partition("::")
    packet, _, overload = of_it.partition(".")
    operation = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    alias = operation._schema.returns[0].alias_info if operation._schema.returns else None
    return alias is not None and not alias.is_write


def _memory(run: Rehearsed) -> list[str]:
    case = run.case(run.told_ranks)
    here = "measured here, where nothing is fused" + (f", on {run.ranks}" if run.told_ranks != run.ranks else "")
    rows = [*fit_rows(case, run.device.memory_limit()), (here, float(run.record.peak_bytes))]
    width = max(len(label) for label, _ in rows)
    lines = [f"  {label:<{width}}  {binary_size(size):>10}" for label, size in rows]
    return ["Memory of a rank at its fullest moment, by the formulas of docs/scaling.md:", *lines]


def _time(run: Rehearsed) -> list[str]:
    config, chip = run.config, run.device.chip_peak_flops()
    if chip is None:
        return ["Time: not told, for the chip's peak is known in bf16 only, and this is fp32"]
    flops = config.train.batch_tokens * run.flops_per_token
    inside, outside = flops / (chip * config.device.mfu * run.told_ranks), _calls(run) * EAGER_SECONDS
    lines = [
        "Time, but for compiling:",
        f"  a step of {config.train.batch_tokens:,} tokens, {flops:.3g} operations in graphs at {config.device.mfu:.0%} of the chip's "
        f"{chip / 1e12:.4g} TFLOP/s (device.mfu): {_seconds(inside)}",
        f"  its calls outside of graphs, at {EAGER_SECONDS * 1e6:.0f} us each: {_seconds(outside)}",
    ]
    if run.total_steps is not None:
        lines.append(f"  the run's {run.total_steps:,} steps, both together: {_seconds((inside + outside) * run.total_steps)}")
    return lines


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{math.floor(seconds / 3600)} h {seconds % 3600 / 60:.0f} min"
