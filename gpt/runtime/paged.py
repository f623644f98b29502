"""Weights that are seldom read, in a file: what is mapped from it counts as memory only once it is read, and can be taken back."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import nn

_ALIGNMENT = 64  # bytes, as torch aligns what it allocates


def move_to_file(parameters: Sequence[nn.Parameter], folder: Path) -> None:
    """Have parameters, contiguous ones on the CPU, lie in a file without a name, which is gone when nothing maps it any more.

    They stay what they are: where one is written to, it gets memory of its own, and the file does not change.

    Raises:
        OSError: the file cannot be written; the parameters are where they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = [0, *accumulate(-(-p.nbytes // _ALIGNMENT) * _ALIGNMENT for p in parameters)]
    with tempfile.TemporaryFile(dir=folder) as file:
        for p, place in zip(parameters, places, strict=False):
            file.seek(place)
            file.write(p.detach().view(-1).view(torch.uint8).numpy().data)
        file.truncate(places[-1])
        mapped = np.memmap(file, np.uint8, "c") if places[-1] else np.empty(0, np.uint8)
    for p, place in zip(parameters, places, strict=False):
        p.data = torch.from_numpy(mapped[place : place + p.nbytes]).view(p.dtype).view(p.shape)
