"""The frozen-prefix cache: what frozen embeddings and blocks at the bottom make of each row of the data is computed once and kept on disk.

It is exact: frozen modules drop nothing, so that what they make of a row is the same in every epoch. States are kept in the dtype of the
matrix products, and go through it whether they are read or just made; a run does not depend on what happens to be kept already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt.data.batches import Batch
from gpt.finetuning.row_store import RowStore, make_room, room_needed, store_name
from gpt.model.objective import NextTokenLoss
from gpt.runtime.device import Device
from gpt.runtime.distributed import World
from gpt.typed import plain


@dataclass(frozen=True)
class PrefixData:
    """The rows whose states are kept.

    Attributes:
        rows: to train on, and held out; 0: they have no numbers.
        length: T, tokens of a row.
        fingerprint: of the data and of how it is cut into rows.
        epochs: how often the run sees each row; None: not known.
    """

    rows: Mapping[str, int]
    length: int
    fingerprint: Any
    epochs: float | None


class PrefixCache:
    """Gives the objective what the frozen blocks at the bottom have made of a batch, from disk where it is there.

    Args:
        objective: of this process, not wrapped.
        stores: of the rows to train on ("train") and of those held out ("held_out").
        device, world: of the run.
        say: told once if the disk is full, after which nothing is kept any more.
    """

    def __init__(
        self, objective: NextTokenLoss, stores: Mapping[str, RowStore], device: Device, world: World, say: Callable[[str], None]
    ) -> None:
        self._objective, self._stores, self._device, self._world, self._say = objective, stores, device, world, say
        self._depth = objective.model.frozen_depth
        self._now: tuple[str, Batch] | None = None
        self._asked = self._read = 0  # passes to train on since `share_read`
        objective.keep_states = self._keep

    def train(self, part: Batch) -> dict[str, Any]:
        """The states of rows to train on, as arguments for the objective; none where they are not all there."""
        found = self._given("train", part)
        self._asked, self._read = self._asked + 1, self._read + bool(found)
        return found

    def share_read(self) -> float:
        """The share of the passes to train on since the last call for which nothing had to be computed."""
        share = self._read / self._asked if self._asked else 0.0
        self._asked = self._read = 0
        return share

    def held_out(self, part: Batch) -> dict[str, Any]:
        """The states of held-out rows."""
        return self._given("held_out", part)

    def _given(self, split: str, part: Batch) -> dict[str, Any]:
        store = self._stores.get(split)
        self._now = None
        if store is None or part.numbers is None:
            return {}
        numbers = part.numbers.numpy()
        held = store.holds(numbers)
        if self._world.is_divided:  # then blocks are computed by all processes together, or by none
            held = bool(self._world.least(held))
        if not held:
            self._now = split, part
            return {}
        states = store.read(numbers).to(self._device.type, non_blocking=True)
        return {"states": states.to(self._objective.model.embeddings.tokens.weight.dtype), "start": self._depth}

    def _keep(self, states: Tensor) -> Tensor:
        """Keep states that have just been made, and return them as they will be read."""
        if self._now is None:
            return states
        (split, part), self._now = self._now, None
        store = self._stores[split]
        rounded = states.to(store.dtype)
        assert part.numbers is not None
        try:
            store.write(part.numbers.numpy(), rounded.cpu())
        except OSError as error:
            self._say(f"warning: the frozen-prefix cache in {store.folder} cannot be written ({error.strerror}); what is there is used")
            self._objective.keep_states = lambda states: states.to(store.dtype).to(states.dtype)
        return rounded.to(states.dtype)

    def close(self) -> None:
        """Let the objective make its own states, and close the files."""
        self._objective.keep_states = None
        for store in self._stores.values():
            store.close()


def open_prefix_cache(
    setting: str,
    limit_gb: float,
    folder: Path,
    objective: NextTokenLoss,
    data: PrefixData,
    frozen: Mapping[str, str],
    device: Device,
    world: World,
    say: Callable[[str], None],
) -> PrefixCache | None:
    """The cache of a run from here on, or None; says which, and why.

    Args:
        setting: `freeze.cache`.
        limit_gb: `freeze.cache_gb`.
        folder: that holds all such caches.
        objective: of this process, not wrapped, with what trains now.
        data: the rows.
        frozen: SHA-256 of every parameter that does not train.
        device, world: of the run.
        say: takes the line for people.

    Raises:
        UserError: there is one under this name that other weights have made.
    """
    model = objective.model
    depth = model.frozen_depth
    reason = "freeze.cache=off" if setting == "off" else ""
    if depth is None:
        reason = reason or "the embeddings train, below which nothing lies"
    elif depth == 0:
        reason = reason or "the lowest block trains"
    elif not all(data.rows.values()):
        reason = reason or "every epoch cuts the text into other rows"
    if reason:
        say(f"frozen-prefix cache: off ({reason})")
        return None
    assert depth is not None
    below = ("embeddings.", *(f"blocks.{number}." for number in range(depth)))
    weights = sorted(item for item in frozen.items() if item[0].startswith(below))
    key = {
        "weights": world.share(lambda: hashlib.sha256(repr(weights).encode()).hexdigest()),
        "shape": plain(model.config), "depth": depth, "data": data.fingerprint, "length": data.length, "rows": dict(data.rows),
        "device": device.type, "dtype": str(device.dtype),
    }  # fmt: skip
    dtype, shape = device.dtype, (data.length, model.config.d_model)
    parent = folder / store_name(key)
    size = sum(room_needed(rows, shape, dtype) for rows in data.rows.values())
    once = data.epochs is not None and data.epochs <= 1 and not world.share((parent / "train").is_dir)
    full = None if once else world.share(lambda: make_room(folder, parent.name, size, int(limit_gb * 1e9)))
    if once or full:
        say(f"frozen-prefix cache: off ({full or 'the run sees every example once'})")
        return None
    stores = {split: RowStore(parent / split, key | {"split": split}, rows, shape, dtype) for split, rows in data.rows.items()}
    there, rows = sum(store.filled() for store in stores.values()), sum(data.rows.values())
    what = f"{depth} block{'s' * (depth > 1)}, {size / 1e9:.2g} GB at most"
    say(f"frozen-prefix cache: on ({what}, {there:,} of {rows:,} rows are there), in {parent}")
    return PrefixCache(objective, stores, device, world, say)
