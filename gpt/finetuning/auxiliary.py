"""Classes learned with language modelling beside them, so that a few texts are not merely known by heart; as by the first GPT (Radford et
al., 2018, "Improving language understanding by generative pre-training", section 3.2).

Shapes: B rows, T tokens of each, E d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt.model.loss import IGNORE, LinearCrossEntropy
from gpt.model.objective import NextTokenLoss, document_numbers
from gpt.model.transformer import GPT


class AuxiliaryLanguageLoss(NextTokenLoss):
    """The sum of the losses of a batch's classes; in training mode with each, `weight` times the mean loss of its text's next tokens.

    So it is divided, like the classes' own, by how many of these the batch has over all its processes, and no process need know of the
    others' tokens. As in the first GPT the embeddings are the output head of the next tokens.

    Args:
        model: with a head of classes.
        loss: as of `NextTokenLoss`.
        weight: greater than 0; 0.5 in the paper.
    """

    def __init__(self, model: GPT, loss: LinearCrossEntropy, weight: float) -> None:
        super().__init__(model, loss)
        self.weight = weight
        self._sums: Tensor | None = None  # on the device, since figures were last asked for: the next tokens' losses; targets

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
        """As of `NextTokenLoss`."""
        hidden = self.hidden(tokens, targets, documents, states, start)
        classes = self.loss(hidden, self.model.head.weight, targets, rows, self.model.head.bias, **given)
        if not self.training:
            return classes
        following, weights = next_tokens(tokens, targets, documents)
        language = self.loss(hidden, self.model.embeddings.tokens.weight, following, weights=weights)
        if self._sums is None:
            self._sums = torch.zeros(2, device=hidden.device)
        self._sums += torch.stack((language.detach(), (targets != IGNORE).sum().float()))
        return classes + self.weight * language

    def figures(self, summed: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """As of `NextTokenLoss`: `lm_loss`, nats a token, the mean over the targets of what is added to each, before it is weighted."""
        if self._sums is None:
            return {}
        language, count = summed(self._sums).tolist()
        self._sums = None
        return {"lm_loss": language / count} if count else {}


def next_tokens(tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What follows each token in its text, and how much it counts.

    Args:
        tokens, targets, documents: (B, T) as in a `Batch`, where a document without targets is padding.

    Returns:
        (B, T) int64, with IGNORE at the last token of each text and in padding; and (B, T) fp32 weights, which over the tokens of a text
        that have a next one add up to the number of its targets.
    """
    places = document_numbers(targets, documents)

    def of_text(places_that: Tensor) -> Tensor:
        """(B, T) bool -> (B, T) fp32: at each token, how many there are in its text."""
        counts = torch.zeros(targets.numel(), device=targets.device).index_add(0, places, places_that.flatten().float())
        return counts[places].view(targets.shape)

    learned = of_text(targets != IGNORE)
    numbers = places.view(targets.shape)
    follows = (numbers == numbers.roll(-1, 1)) & (learned > 0)
    follows = follows & (torch.arange(targets.shape[1], device=targets.device) < targets.shape[1] - 1)
    following = torch.where(follows, tokens.roll(-1, 1), IGNORE)
    return following, torch.where(follows, learned / of_text(follows).clamp(min=1), 0.0)
