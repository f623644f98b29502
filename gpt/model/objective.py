"""What is minimised: a model and its loss as one module, whose call DDP and FSDP can surround."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpt.model.loss import IGNORE, LinearCrossEntropy
from gpt.model.transformer import GPT


class NextTokenLoss(nn.Module):
    """The sum of the losses of a batch's targets: the tokens that follow, or classes.

    Args:
        model: predicts.
        loss: measures.

    Attributes:
        observer: in eval mode, told the hidden states (B, T, E) and the targets (B, T) of each pass, for figures besides the loss.
        keep_states: given what frozen blocks at the bottom have made (B, T, E); what it returns is gone on with.
    """

    def __init__(self, model: GPT, loss: LinearCrossEntropy) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        self.keep_states: Callable[[Tensor], Tensor] | None = None

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        rows: Tensor | None = None,
        states: Tensor | None = None,
        start: int = 0,
        **given: Any,
    ) -> Tensor:
        """tokens, targets and documents (B, T) as in a `Batch`, rows as of `valid_rows` -> fp32 sum of the losses of the targets.

        With states (B, T, E), what the blocks below `start` have made of the tokens, those are not run. Without, frozen ones at the bottom
        are run without gradients, and nothing of them is kept for the backward pass. What else is given goes to the loss.
        """
        hidden = self.hidden(tokens, targets, documents, states, start)
        return self.loss(hidden, self.model.head.weight, targets, rows, self.model.head.bias, **given)

    def hidden(
        self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None, states: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """What the head is given, (B, T, E), shown to the observer. The arguments are those of `forward`."""
        depth = self.model.frozen_depth
        if states is None and depth is not None:
            states, start = self.model.frozen_states(tokens, documents), depth
            if self.keep_states is not None:
                states = self.keep_states(states)
        hidden = self.model.hidden_states(tokens, documents=documents, states=states, start=start)
        if self.observer is not None and not self.training:
            self.observer(hidden, targets)
        return hidden

    def units(self, targets: Tensor, documents: Tensor | None = None) -> int:
        """What the sum of a batch's losses is divided by, given its targets and documents (B, T): how many targets count."""
        return int((targets != IGNORE).sum())

    def figures(self, summed: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """As of `LinearCrossEntropy`."""
        return self.loss.figures(summed)


def document_numbers(targets: Tensor, documents: Tensor | None) -> Tensor:
    """(B * T,) int64: where, in a flat (B, T) tensor, stands what is said of each token's document; there are at most T in a row."""
    first = torch.arange(len(targets), device=targets.device)[:, None] * targets.shape[1]
    return (first.expand_as(targets) if documents is None else first + documents).flatten()
