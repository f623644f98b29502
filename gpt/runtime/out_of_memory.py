"""What to do when a run does not fit: which settings would save how much, by the formulas of `gpt.runtime.memory`, the cheapest first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.runtime.case import Case
from gpt.runtime.memory import ROOM, binary_size, peak

if TYPE_CHECKING:
    from gpt.runtime.device import Device

# CUDA and MPS; cuBLAS; the Neuron runtime; a CPU's allocator, on Linux and on Windows.
_WORDS = re.compile(
    r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|RESOURCE_EXHAUSTED|NRT_RESOURCE|[Ff]ailed to allocate|(can't|cannot) allocate memory"
    r"|not enough memory"
)
_MOST_DEVICES = 64
_WORTH_SAYING = 0.01  # of what the run needs


@dataclass(frozen=True)
class Remedy:
    """A setting that saves memory.

    Attributes:
        setting: as it is given on the command line.
        cost: to the user, in words.
        saves: bytes of one device.
        enough: whether the run then fits; None: nobody knows how much memory there is.
        new_run: whether a run that has begun cannot go on with it.
    """

    setting: str
    cost: str
    saves: float
    enough: bool | None
    new_run: bool

    def __str__(self) -> str:
        then = ", and the run fits" if self.enough else ""
        return f"{self.setting} saves {binary_size(self.saves)}{then} ({self.cost}{'; in a new run' if self.new_run else ''})"


def says_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None)


def memory_error(error: RuntimeError, config: RunConfig, case_of: Callable[[], Case], device: Device, where: str) -> UserError | None:
    """What to tell the user of an error, if it says that memory ran out: a sentence, and in its notes the settings that would help.

    Args:
        error: what came out of a step.
        config: the run.
        case_of: says what it needs.
        device: of each process.
        where: when it happened and what is safe, in words.
    """
    if not says_out_of_memory(error):
        return None
    case = case_of()
    capacity = device.memory_limit()
    compiles = config.compile is not True and device.compile_obstacle() is None
    lines = advice(case, capacity, config.precision == "fp32", compiles, device.is_host)
    there = f" of the {binary_size(capacity)} that {device.description} has" if capacity is not None else ""
    directory = Path(config.run.dir).expanduser() / config.run.id
    go_on = f"go on with: gpt {config.command} resume={directory}, and" if (directory / "config.yaml").is_file() else "set"
    told = UserError(f"out of memory while {where}; the run needs about {binary_size(peak(case))}{there}; {go_on} one of these:")
    for line in lines:
        told.add_note(line)
    return told


def advice(case: Case, capacity: int | None, chose_fp32: bool = False, compiles: bool = False, is_host: bool = False) -> list[str]:
    """Lines for people: what would save how much, the cheapest first, and at last whether it would do.

    Args:
        case: the run that does not fit.
        capacity: bytes of one device, or None.
        chose_fp32: whether precision=fp32 was asked for.
        compiles: whether blocks that are not compiled could be.
        is_host: whether the devices are one machine's memory, which more of them do not add to.
    """
    limit = None if capacity is None else ROOM * capacity
    now = peak(case)
    if capacity is not None and limit is not None and now <= limit:
        limit = None  # the formulas do not see what fills it
    remedies = list(_remedies(case, limit, chose_fp32, compiles, is_host))
    lines = [str(remedy) for remedy, _ in remedies]
    if capacity is not None and limit is None:
        return [*lines, "by the formulas the run fits: another program on the device, or memory that lies in pieces, takes the rest"]
    if limit is None or any(remedy.enough for remedy, _ in remedies):
        return lines
    together: dict[str, str] = {}
    for remedy, apply in remedies:
        changed = apply(case)
        if changed is None or remedy.setting.endswith("devices") or peak(changed) >= peak(case):
            continue
        case = changed
        key, value = remedy.setting.split("=")
        together[key] = value
        if peak(case) <= limit:
            return [*lines, f"none is enough alone; together these are: {' '.join(f'{k}={v}' for k, v in together.items())}"]
    rest = f"all of them together still need {binary_size(peak(case))}" if together else "no setting saves enough"
    return [*lines, f"{rest}: take a smaller model (model.n_layer, model.d_model), more devices, or ones with more memory"]


def _remedies(
    case: Case, limit: float | None, chose_fp32: bool, compiles: bool, is_host: bool
) -> Iterator[tuple[Remedy, Callable[[Case], Case | None]]]:
    now = peak(case)
    shards = max(1, case.shards) * case.replicas  # if FSDP divided parameters over all that divide the batch
    mine = case.micro_batch * case.passes
    size = _first_that_fits((n for n in range(case.micro_batch - 1, 0, -1) if mine % n == 0), lambda n: _with_size(case, n), limit) or 1
    more = (case.ranks * 2**n for n in range(1, 7) if case.ranks * 2**n <= _MOST_DEVICES and mine % 2**n == 0)
    devices = _first_that_fits(more, lambda n: _on_devices(case, n), limit) or case.ranks
    half = case.length // 2
    for setting, cost, new_run, applies, apply in (
        (f"train.micro_batch={size}", "the same result", False, size < case.micro_batch, lambda c: _with_size(c, size)),
        ("precision=bf16", "coarser products", False, chose_fp32, lambda c: replace(c, width=2)),
        ("compile=true", "some seconds to compile", False, compiles and not case.compiled, lambda c: replace(c, compiled=True)),
        ("train.activation_checkpointing=selective", "what is not a product is computed twice", False,
         case.checkpointing == "none", lambda c: replace(c, checkpointing="selective")),
        ("train.activation_checkpointing=full", "a third more compute", False, case.checkpointing != "full",
         lambda c: replace(c, checkpointing="full")),
        ("parallel=fsdp", "sends parameters in every pass", False, case.ranks > 1 and not case.shards,
         lambda c: replace(c, shards=shards, replicas=1)),
        (f"parallel.tensor={case.tensor * 2}", "sends activations within every pass", False, _divides_twice(case), _twice_divided),
        (f"parallel=fsdp on {devices} devices", "as many times the machine", False, not is_host and devices > case.ranks,
         lambda c: _on_devices(c, devices)),
        ("train.ema=0", "validates a little worse", True, case.ema, lambda c: replace(c, ema=False)),
        ("optimizer=muon", "other learning rates", True, case.optimizer == "adamw", lambda c: replace(c, optimizer="muon")),
        ("model.dropout=0", "may overfit a small corpus", True, case.model.dropout > 0,
         lambda c: replace(c, model=replace(c.model, dropout=0.0))),
        (f"train.sequence_length={half}", "learns from shorter texts", True, case.length % 2 == 0,
         lambda c: replace(c, length=half, passes=2 * c.passes)),
    ):  # fmt: skip
        changed = apply(case) if applies else None
        if changed is not None and now - peak(changed) > _WORTH_SAYING * now:
            yield Remedy(setting, cost, now - peak(changed), None if limit is None else peak(changed) <= limit, new_run), apply


def _first_that_fits(numbers: Iterator[int], apply: Callable[[int], Case], limit: float | None) -> int | None:
    """The first number with which the case fits; where none does the last, where no limit is known the first."""
    last = None
    for last in numbers:
        if limit is None or peak(apply(last)) <= limit:
            break
    return last


def _with_size(case: Case, micro_batch: int) -> Case:
    return replace(case, micro_batch=micro_batch, passes=-(-case.micro_batch * case.passes // micro_batch))


def _on_devices(case: Case, ranks: int) -> Case:
    """Divided by FSDP over so many, which share the batch."""
    times = ranks // case.ranks
    shards = max(1, case.shards) * case.replicas * times
    mine = max(1, case.micro_batch * case.passes // times)
    return _with_size(replace(case, shards=shards, replicas=1, micro_batch=mine, passes=1), min(case.micro_batch, mine))


def _divides_twice(case: Case) -> bool:
    c, t = case.model, 2 * case.tensor
    return max(case.shards, case.replicas) % 2 == 0 and all(n % t == 0 for n in (c.n_head, c.n_kv_head, c.d_ff))


def _twice_divided(case: Case) -> Case | None:
    """Matrices divided over twice as many of the same devices, of which half as many divide the batch."""
    if not _divides_twice(case):
        return None
    shards, replicas = (case.shards // 2, case.replicas) if case.shards % 2 == 0 and case.shards else (case.shards, case.replicas // 2)
    return replace(case, tensor=2 * case.tensor, shards=shards, replicas=max(1, replicas), passes=2 * case.passes)
