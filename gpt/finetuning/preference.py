"""Learning from preferences: direct preference optimisation, DPO (Rafailov et al., 2023, arXiv 2305.18290), and the model it is held to.

Shapes: B rows, T their length. Rows 2k hold chosen completions, rows 2k + 1 the rejected ones of the same prompts: document d of row 2k
and document d of row 2k + 1 are a pair. What is said of a document stands at [row, d] of a (B, T) tensor, for there are at most T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.data.batches import Batch
from gpt.finetuning.row_store import RowStore, store_name
from gpt.model.loss import IGNORE, LinearCrossEntropy, chunk_size, valid_rows
from gpt.model.objective import NextTokenLoss, document_numbers
from gpt.model.transformer import GPT
from gpt.runtime.device import Device
from gpt.runtime.distributed import World
from gpt.runtime.sharding import reshard


class PreferenceLoss(NextTokenLoss):
    """The sum of the DPO losses of a batch's pairs.

    With the margin z = beta ((log p - log p_reference)(chosen) - (log p - log p_reference)(rejected)), where log p is of all tokens of a
    completion together, the loss of a pair is -log sigmoid(z); with label smoothing e it is -(1 - e) log sigmoid(z) - e log sigmoid(-z)
    (conservative DPO, Mitchell 2023), as in TRL's `loss_type="sigmoid"`.

    Args:
        model, loss: as of `NextTokenLoss`.
        beta, label_smoothing: the config's.

    Attributes:
        told: in eval mode, given the margins (B / 2, T) of each pass, and where there is a pair, bool.
    """

    def __init__(self, model: GPT, loss: LinearCrossEntropy, beta: float, label_smoothing: float = 0.0) -> None:
        super().__init__(model, loss)
        self.beta, self.label_smoothing = beta, label_smoothing
        self.told: Callable[[Tensor, Tensor], None] | None = None

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        rows: Tensor | None = None,
        states: Tensor | None = None,
        start: int = 0,
        reference: Tensor | None = None,
        likelihoods: bool = False,
        **given: Any,
    ) -> Tensor:
        """The sum of the losses of the pairs, fp32; of no pair, 0.

        Args:
            tokens, targets, documents, rows, states, start: as of `NextTokenLoss.forward`; B is even.
            reference: (B, T) fp32, log-likelihood of each document under the reference; None: all alike, as for a trial of memory.
            likelihoods: give the log-likelihoods (B, T) fp32 of the documents instead, 0 where there is none.
        """
        assert not given
        hidden = self.hidden(tokens, targets, documents, states, start)
        nll = self.loss.each(hidden, self.model.head.weight, targets, rows)  # (B * T,)
        places = document_numbers(targets, documents)
        of_documents = -nll.new_zeros(nll.shape).index_add(0, places, nll).view(targets.shape)
        if likelihoods:
            return of_documents
        gained = of_documents if reference is None else of_documents - reference
        margins = self.beta * (gained[0::2] - gained[1::2])
        there = _pairs(targets, places)
        if self.told is not None and not self.training:
            self.told(margins, there)
        losses = -(1 - self.label_smoothing) * F.logsigmoid(margins) - self.label_smoothing * F.logsigmoid(-margins)
        return torch.where(there, losses, 0.0).sum()

    def units(self, targets: Tensor, documents: Tensor | None = None) -> int:
        """How many pairs there are."""
        return int(_pairs(targets, document_numbers(targets, documents)).sum())

    @contextmanager
    def counting(self) -> Iterator[Tensor]:
        """Meanwhile, of every pass in eval mode, add up in fp64: pairs, those with the chosen completion ahead, margins."""
        sums = torch.zeros(3, dtype=torch.float64)

        def count(margins: Tensor, there: Tensor) -> None:
            right = there & (margins > 0)
            sums.add_(torch.stack((there.sum(), right.sum(), torch.where(there, margins, 0.0).sum())).cpu().double())

        self.told = count
        try:
            yield sums
        finally:
            self.told = None


def _pairs(targets: Tensor, places: Tensor) -> Tensor:
    """(B / 2, T) bool: whether there is a pair of documents of this number, each with something to learn."""
    if len(targets) % 2:
        raise ValueError(f"{len(targets)} rows are no whole pairs")
    valid = (targets.flatten() != IGNORE).float()
    there = torch.zeros_like(valid).index_add(0, places, valid).view(targets.shape) > 0
    return there[0::2] & there[1::2]


class InMemory:
    """As a `RowStore`, in memory."""

    def __init__(self, rows: int, shape: tuple[int, ...]) -> None:
        self._values, self._known = torch.zeros(rows, *shape), np.zeros(rows, dtype=bool)

    def holds(self, numbers: np.ndarray) -> bool:
        """Whether all these rows are there; negative numbers are of padding, which is always there."""
        return bool(self._known[numbers[numbers >= 0]].all())

    def read(self, numbers: np.ndarray) -> Tensor:
        """(n, *shape): the rows of these numbers; zeros for padding."""
        found = self._values[torch.from_numpy(numbers)]
        found[torch.from_numpy(numbers < 0)] = 0
        return found

    def write(self, numbers: np.ndarray, rows: Tensor) -> None:
        """Keep rows under these numbers; padding is left out."""
        kept = numbers >= 0
        self._values[torch.from_numpy(numbers[kept])] = rows[torch.from_numpy(kept)]
        self._known[numbers[kept]] = True

    def filled(self) -> int:
        """How many rows are there."""
        return int(self._known.sum())


class Reference:
    """Gives the objective what the model that a run began with finds of each completion. It is asked once for each row of the data.

    What it said is kept, two numbers a pair; once all rows to train on are known, the model is let go of.

    Args:
        load: makes the objective of the first weights, on its device and in eval mode; called again if it is needed later.
        rows: how many there are to train on ("train") and held out ("held_out").
        width: most documents of a row.
        device, world: of the run.
        say: told if the disk cannot be written; then answers are kept in memory.
    """

    def __init__(
        self,
        load: Callable[[], PreferenceLoss],
        rows: Mapping[str, int],
        width: int,
        device: Device,
        world: World,
        say: Callable[[str], None],
    ) -> None:
        self._load, self._rows, self._width, self._device, self._world, self._say = load, rows, width, device, world, say
        self._objective: PreferenceLoss | None = load()
        self._stores: dict[str, RowStore | InMemory] = {split: InMemory(count, (width,)) for split, count in rows.items()}

    def keep_in(self, folder: Path, key: Mapping[str, Any]) -> int:
        """Keep the answers on disk, for this run when it is resumed and for others of the same beginning and data.

        Args:
            folder: of all such answers.
            key: what they depend on, as plain values.

        Returns:
            How many rows to train on are there already.
        """
        parent = folder / store_name(key)
        try:
            for split, count in self._rows.items():
                self._stores[split] = RowStore(parent / split, {**key, "split": split}, count, (self._width,), torch.float32)
        except OSError as error:
            self._in_memory(error)
        return self._stores["train"].filled()

    def train(self, part: Batch) -> dict[str, Any]:
        """The reference's log-likelihoods (B, T) of rows to train on, as an argument for the objective."""
        return {"reference": self._of("train", part)}

    def held_out(self, part: Batch) -> dict[str, Any]:
        """Those of held-out rows."""
        return {"reference": self._of("held_out", part)}

    @property
    def is_loaded(self) -> bool:
        """Whether the reference takes memory."""
        return self._objective is not None

    def close(self) -> None:
        """Close the files."""
        for store in self._stores.values():
            if isinstance(store, RowStore):
                store.close()

    def _of(self, split: str, part: Batch) -> Tensor:
        store, numbers = self._stores[split], part.numbers
        assert numbers is not None  # examples have them
        held = self._agreed(store.holds(numbers.numpy()))
        if held:
            values = store.read(numbers.numpy())
            if self._objective is not None and self._agreed(self._stores["train"].filled() == self._rows["train"]):
                self._objective = None
        else:
            values = self._asked(part).cpu()[:, : self._width]
            # A row of which nothing is to be learned, as in a pass that only keeps others company, says nothing.
            known = np.where((values[:, 0] != 0).numpy(), numbers.numpy(), -1)
            try:
                store.write(known, values)
            except OSError as error:
                self._in_memory(error)
                self._stores[split].write(known, values)
        return F.pad(values, (0, part.targets.shape[1] - self._width)).to(self._device.type, non_blocking=True)

    @torch.no_grad()
    def _asked(self, part: Batch) -> Tensor:
        if self._objective is None:
            self._objective = self._load()
        targets = part.targets.cpu()
        rows = valid_rows(targets, chunk_size(self._device.type, self._objective.model.config.vocab_size, targets.numel()))
        on_device = None if rows is None else rows.to(self._device.type)
        found = self._objective(part.tokens, part.targets, part.documents, on_device, likelihoods=True)
        reshard(self._objective)
        return found

    def _agreed(self, known: bool) -> bool:
        """Where parameters are divided, all processes compute or none does."""
        return bool(self._world.least(known)) if self._world.is_divided else known

    def _in_memory(self, error: OSError) -> None:
        self._say(f"warning: what the reference said cannot be kept on disk ({error.strerror}); it is kept in memory")
        self.close()
        self._stores = {split: InMemory(count, (self._width,)) for split, count in self._rows.items()}
