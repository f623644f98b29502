"""Which checkpoints of a run stay: the newest, the best, and some for good."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """How many checkpoints to keep.

    Attributes:
        keep_last: newest ones, at least 1.
        keep_best: best ones besides, by the validation loss of their own step.
        keep_every: those of steps that are multiples of this stay for good; 0: none.
    """

    keep_last: int = 2
    keep_best: int = 1
    keep_every: int = 0

    def superseded(self, whole: Mapping[int, float | None], damaged: set[int], saved: int, best_step: int | None) -> list[int]:
        """The steps whose checkpoints are to be removed, oldest first.

        Args:
            whole: step -> validation loss at that step, or None, of every checkpoint that is whole.
            damaged: steps of those that are not: they go, unless they would stay for good.
            saved: step of the checkpoint that was just saved, which stays even if there are later ones (the run went back).
            best_step: of the run, which always stays: at the end it is what is exported.
        """
        newest = sorted(whole)[-max(1, self.keep_last) :]
        validated = sorted((loss, step) for step, loss in whole.items() if loss is not None and math.isfinite(loss))
        best = [step for _, step in validated[: self.keep_best]]
        every = [step for step in {*whole, *damaged} if self.keep_every and step % self.keep_every == 0]
        return sorted({*whole, *damaged} - {*newest, *best, *every, saved, best_step})
