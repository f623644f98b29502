"""How many sequences go through the model at once. The batch is the same whatever this is, so a result does not depend on the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from gpt.data.batches import Batch
from gpt.errors import UserError
from gpt.model.objective import NextTokenLoss
from gpt.runtime.case import Case
from gpt.runtime.device import Device
from gpt.runtime.memory import ROOM, peak
from gpt.training.objectives import Giver, given

# micro_batch=auto: the most tokens of a pass. More make no step faster, and on a CPU, where memory is shared, nothing says when it is full.
MOST_TOKENS = 16384


def divisors(sequences: int, most: int) -> list[int]:
    """Sizes of micro-batches that divide `sequences` and are at most `most`, the largest first; at least 1."""
    return [d for d in range(min(sequences, max(1, most)), 0, -1) if sequences % d == 0]


def largest_by_formula(sizes: list[int], case_of: Callable[[int], Case], device: Device) -> int:
    """The largest size that the formulas of `gpt.runtime.memory` let fit, for a device on which trying one would be compiling it.

    Args:
        sizes: to choose from, the largest first; the last one where none fits, or the first where the device's memory is not known.
        case_of: (sequences) -> the run, with so many in a pass.
        device: of each process.
    """
    limit = device.memory_limit()
    if limit is None:
        return sizes[0]
    return next((size for size in sizes if peak(case_of(size)) <= ROOM * limit), sizes[-1])


def largest_that_fits(attempt: Callable[[int], None], sizes: list[int]) -> int:
    """The largest size for which `attempt` does not run out of memory.

    Args:
        attempt: a forward and backward pass of that many sequences.
        sizes: to try, the largest first.

    Raises:
        UserError: not even the last one fits.
    """
    from accelerate.utils import find_executable_batch_size

    remaining = iter(sizes)

    def try_size(batch_size: int) -> int:
        attempt(batch_size)
        return batch_size

    find = find_executable_batch_size(try_size, starting_batch_size=next(remaining), reduce_batch_size_fn=lambda: next(remaining, 0))
    try:
        return cast(Callable[[], int], find)()  # the decorator gives the size
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        problem = f"train.micro_batch=auto: not even {sizes[-1]} sequence fits into memory"
        raise UserError(f"{problem}; try train.activation_checkpointing=full, or parallel=fsdp") from error


def try_pass(objective: nn.Module, givers: list[Giver], device: Device, length: int, documents: bool, sequences: int) -> None:
    """A forward and backward pass of `sequences` rows of `length` tokens, with documents or not, that leaves nothing behind."""
    tokens = torch.zeros(sequences, length, dtype=torch.int64, device=device.type)
    try:
        with device.autocast():
            part = Batch(tokens, tokens, tokens if documents else None)
            loss = objective(part.tokens, part.targets, part.documents, **given(givers, part))
        loss.backward()
        device.synchronize()
    finally:
        if isinstance(objective, NextTokenLoss):
            objective.figures(lambda sums: sums)  # of a trial nothing is told
        objective.zero_grad(set_to_none=True)
