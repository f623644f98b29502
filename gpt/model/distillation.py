"""The loss of a student that learns from a teacher's probabilities (Hinton et al., "Distilling the knowledge in a neural network", 2015).

Shapes: N tokens, C tokens of a chunk, E d_model, V the student's vocabulary, P V rounded up as in its head's product, K likeliest tokens.
As in `gpt.model.loss`, logits, the teacher's too, are made chunk by chunk, and the gradients already in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.model.loss import IGNORE, LinearCrossEntropy, product, product_bias, product_weight


class Answers(Protocol):
    """What a teacher says to the N tokens of a pass."""

    def logits(self, chunk: slice | Tensor, width: int) -> Tensor:
        """(C, width) of the tokens of a chunk, -inf for those of which it says nothing by themselves."""
        ...

    def rest(self, chunk: slice | Tensor) -> Tensor | None:
        """(C,) how probable the tokens with -inf are together; None: not at all."""
        ...


class TeacherHead:
    """A teacher's output head, cut to the ids of the tokenizer: what is beyond them is padding, and no token.

    Args:
        weight: (at least `tokens`, E).
        bias: as many, or None.
        tokens: how many ids there are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, tokens: int) -> None:
        self.tokens = tokens
        self.weight = product_weight(weight[:tokens].detach(), weight.dtype, always=True)
        self.bias = product_bias(None if bias is None else bias[:tokens].detach(), self.weight)

    def __call__(self, states: Tensor) -> Tensor:
        """(C, E) -> (C, tokens or more), -inf for what is more."""
        with torch.autocast(states.device.type, enabled=False):
            return product(states.to(self.weight.dtype), self.weight, self.bias, self.tokens)


@dataclass(frozen=True)
class AllAnswers:
    """All of a teacher's probabilities, made of its hidden states (N, E) when they are asked for."""

    states: Tensor
    head: Callable[[Tensor], Tensor]
    """(C, E) -> logits (C, number of tokens or, with -inf, more); a `TeacherHead`."""

    def logits(self, chunk: slice | Tensor, width: int) -> Tensor:
        """As of `Answers`."""
        found = self.head(self.states[chunk])[:, :width]
        missing = width - found.shape[-1]
        return F.pad(found, (0, missing), value=float("-inf")) if missing else found

    def rest(self, chunk: slice | Tensor) -> Tensor | None:
        """As of `Answers`."""
        return None


@dataclass(frozen=True)
class LikeliestAnswers:
    """The logits (N, K) of a teacher's likeliest tokens, whose ids are (N, K) int64, and how probable all others are together, (N,)."""

    values: Tensor
    ids: Tensor
    others: Tensor

    def logits(self, chunk: slice | Tensor, width: int) -> Tensor:
        """As of `Answers`."""
        values, ids = self.values[chunk].float(), self.ids[chunk]
        everything = torch.full((len(ids), width), float("-inf"), device=values.device)
        return everything.scatter_(1, ids, values)

    def rest(self, chunk: slice | Tensor) -> Tensor | None:
        """As of `Answers`."""
        return self.others[chunk].float()


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, teacher: Tensor, rest: Tensor | None, temperature: float, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What a chunk costs.

    Args:
        logits, teacher: (C, P) of the student and of the teacher.
        targets: (C,), IGNORE where nothing is learned.
        rest: (C,) the teacher's probability of all tokens together of which its logit is -inf; None: 0.
        temperature, weight: of the loss.

    Returns:
        fp32 sum over valid targets of weight temperature^2 KL + (1 - weight) cross-entropy; its gradient with respect to the student's
        logits, (C, P) in their dtype; and the fp32 sum of the KL(teacher || student), at that temperature.
    """
    valid = targets[:, None] != IGNORE  # (C, 1)
    wide = logits.float()
    wide = wide - wide.amax(-1, keepdim=True)
    asked = teacher.float()
    asked = (asked - asked.amax(-1, keepdim=True)) / temperature
    exp_asked = asked.exp()
    total_asked = exp_asked.sum(-1, keepdim=True)
    p = exp_asked / total_asked  # (C, P) the teacher's probabilities
    exp_soft = (wide / temperature).exp()
    total_soft = exp_soft.sum(-1, keepdim=True)
    difference = torch.where(p > 0, asked - wide / temperature, 0.0)  # -inf less -inf where neither has a token
    divergence = (p * difference).sum(-1, keepdim=True) + total_soft.log() - total_asked.log()  # (C, 1)
    if rest is not None:
        # All others are one token to both. Within it the teacher is taken to share out its probability as the student does.
        others = rest[:, None]  # (C, 1)
        within = torch.where(teacher.isinf(), exp_soft, 0.0)
        total_within = within.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        said = 1 - others
        apart = others * (others.clamp(min=1e-30).log() - total_within.log() + total_soft.log())
        divergence = said * (divergence + said.clamp(min=1e-30).log()) + apart
        p = said * p + others * within / total_within
    exp = wide.exp()
    total = exp.sum(-1, keepdim=True)
    hit = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]  # (C, P)
    nll = total.log() - torch.where(hit, wide, 0.0).sum(-1, keepdim=True)
    loss = torch.where(valid, weight * temperature**2 * divergence + (1 - weight) * nll, 0.0).sum()
    gradient = weight * temperature * (exp_soft / total_soft - p) + (1 - weight) * (exp / total - hit.float())
    return loss, torch.where(valid, gradient, 0.0).to(logits.dtype), torch.where(valid, divergence, 0.0).sum()


class DistillationLoss(LinearCrossEntropy):
    """Sum over tokens of weight temperature^2 KL(teacher || student) + (1 - weight) cross-entropy; without a teacher's answers the latter.

    The KL is that of both models' probabilities with their logits divided by the temperature. Its square keeps the gradients, which shrink
    so, as large as those of the cross-entropy.

    Args:
        temperature: greater than 0.
        weight: of the teacher, 0 to 1.
        dtype, chunk: as of `LinearCrossEntropy`.
    """

    def __init__(self, temperature: float, weight: float, dtype: torch.dtype = torch.float32, chunk: int | None = None) -> None:
        super().__init__(dtype, chunk)
        self.temperature, self.weight = temperature, weight
        self.distilled: Callable[..., Any] = _loss_and_gradient
        self._sums: Tensor | None = None  # on the device: of the KL, and how many tokens, since figures were last asked for

    def compile_softmax(self, **options: Any) -> None:
        """As of `LinearCrossEntropy`."""
        super().compile_softmax(**options)
        self.distilled = torch.compile(_loss_and_gradient, **options)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: Tensor | None = None,
        bias: Tensor | None = None,
        weights: Tensor | None = None,
        teacher: Answers | None = None,
    ) -> Tensor:
        """As of `LinearCrossEntropy`, with what the teacher answers to the same places."""
        if teacher is None:
            return super().forward(hidden, weight, targets, rows, bias, weights)
        assert weights is None
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        if self._sums is None:  # also where this process learns nothing of the batch, for all have to tell figures or none
            self._sums = torch.zeros(2, device=hidden.device)
        sums = self._sums

        def distilled(logits: Tensor, chunk: slice | Tensor) -> tuple[Tensor, Tensor]:
            answers = teacher.logits(chunk, logits.shape[-1])
            asked = (targets[chunk], answers, teacher.rest(chunk), self.temperature, self.weight)
            loss, gradient, divergence = self.distilled(logits, *asked)
            sums.add_(torch.stack((divergence, (targets[chunk] != IGNORE).sum().float())))
            return loss, gradient

        return self.summed(hidden, weight, bias, self.chunks(hidden, weight, rows), distilled)

    def figures(self, summed: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """As of `LinearCrossEntropy`: `distill_kl`, nats a token from the teacher's probabilities to the student's, at the temperature."""
        if self._sums is None:
            return {}
        divergence, tokens = summed(self._sums).tolist()
        self._sums = None
        return {"distill_kl": divergence / tokens} if tokens else {}
