"""Best-fit packing: several examples share a row of the batch, so that few places are left empty and no example is cut for it.

Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv:2404.10830). There a segment tree
finds the fullest pack that has room for one example; here all examples of one length are placed at once, so no tree is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Put examples into packs, the longest first, each into the fullest pack that has room for it.

    Packs are listed by their longest example, the longest first. The same lengths give the same packs.

    Args:
        lengths: (N,) places that each example takes, 1 to `capacity`.
        capacity: places of a pack.

    Returns:
        The indices of the examples of each pack, int64. Each of the N is in exactly one pack.

    Raises:
        ValueError: a length that is not 1 to `capacity`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return []
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}; a pack holds examples of 1 to {capacity}")
    order = np.argsort(-lengths, kind="stable")  # indices of the examples, the longest first
    pack_of = np.empty(len(lengths), dtype=np.int64)  # pack of each example in `order`
    open_packs = _OpenPacks()
    packs = position = 0
    sizes, counts = np.unique(lengths, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = position + count
        while position < end:
            room = open_packs.least_room(size)
            each = (room or capacity) // size  # a pack that took one example is now the fullest with room for the next
            wanted = -(-(end - position) // each)
            if room:
                taken = open_packs.take(room, wanted)
            else:
                room, taken = capacity, np.arange(packs, packs + wanted)
                packs += wanted
            placed = min(each * len(taken), end - position)
            pack_of[position : position + placed] = np.repeat(taken, each)[:placed]
            position += placed
            in_last = placed - each * (len(taken) - 1)
            open_packs.add(room - each * size, taken[:-1])
            open_packs.add(room - in_last * size, taken[-1:])
    by_pack = np.argsort(pack_of, kind="stable")
    return np.split(order[by_pack], np.cumsum(np.bincount(pack_of, minlength=packs))[:-1])


class _OpenPacks:
    """Packs that have room left, by how much; the set bits of an int say for which amounts there are any."""

    def __init__(self) -> None:
        self._by_room: dict[int, list[np.ndarray]] = {}
        self._rooms = 0

    def least_room(self, size: int) -> int:
        """The smallest room of at least `size` that some pack has; 0 if none has."""
        above = self._rooms >> size
        return size + (above & -above).bit_length() - 1 if above else 0

    def take(self, room: int, wanted: int) -> np.ndarray:
        """At most `wanted` packs of those with this room, the latest first."""
        stack = self._by_room[room]
        found = stack.pop()
        if len(found) > wanted:
            stack.append(found[:-wanted])
            found = found[-wanted:]
        if not stack:
            self._rooms &= ~(1 << room)
        return found

    def add(self, room: int, packs: np.ndarray) -> None:
        if room and len(packs):
            self._by_room.setdefault(room, []).append(packs)
            self._rooms |= 1 << room


def efficiency(lengths: np.ndarray, packs: Sequence[np.ndarray], capacity: int) -> float:
    """Share of the places of all packs that hold a token, 0 to 1; 1 where there are no packs."""
    return float(sum(int(lengths[pack].sum()) for pack in packs)) / (len(packs) * capacity) if packs else 1.0
