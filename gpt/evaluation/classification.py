"""How a classifier does: the confusion matrix of what it says, and the figures that follow from it.

The matrix is counted within the pass that measures the loss, from the very hidden states, and is a sum: over batches, and over the
processes of a run. scikit-learn makes the figures of it. Shapes: B rows, T tokens, E d_model, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.data.batches import Batch
from gpt.evaluation.spans import SpanCounts, SpanScore, are_spans, types_of
from gpt.model.loss import IGNORE
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT
from gpt.runtime.distributed import World

FIGURES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "span_f1": "span F1"}
_ROWS = 4096  # of logits at a time
_MOST_SHOWN = 12  # classes of a matrix that is written out
_NAME = 14  # characters of a class's name there


@dataclass(frozen=True)
class ClassScores:
    """What a classifier said of examples, or of their words.

    Attributes:
        classes: in order.
        matrix: (C, C) int64: how often what is of the class of a row was taken for that of a column.
        what: was classified: "example" or "word".
        spans: what is counted of spans, where the classes are tags such as B-PER; else None.
    """

    classes: list[str]
    matrix: np.ndarray
    what: str
    spans: SpanCounts | None = None

    @cached_property
    def _cells(self) -> dict[str, Any]:
        """The matrix as scikit-learn takes it: pairs of true and predicted, each so many times."""
        true, predicted = np.nonzero(self.matrix)
        return {"y_true": true, "y_pred": predicted, "sample_weight": self.matrix[true, predicted]}

    @property
    def count(self) -> int:
        """Examples or words."""
        return int(self.matrix.sum())

    @cached_property
    def accuracy(self) -> float:
        """The share that is right."""
        from sklearn.metrics import accuracy_score

        return float(accuracy_score(**self._cells))

    @cached_property
    def macro_f1(self) -> float:
        """The mean of the F1 of every class that occurs or was predicted."""
        from sklearn.metrics import f1_score

        options: dict[str, Any] = {"average": "macro", "zero_division": 0}
        return float(f1_score(**self._cells, **options))

    @cached_property
    def per_class(self) -> dict[str, dict[str, float]]:
        """Of each class its precision, recall, f1 and count."""
        from sklearn.metrics import precision_recall_fscore_support

        options: dict[str, Any] = {"labels": range(len(self.classes)), "zero_division": 0}
        figures = precision_recall_fscore_support(**self._cells, **options)
        names = ("precision", "recall", "f1", "count")
        rows = zip(*(np.asarray(figure).tolist() for figure in figures), strict=True)
        return {name: dict(zip(names, row, strict=True)) for name, row in zip(self.classes, rows, strict=True)}

    @property
    def span_f1(self) -> float | None:
        """Over all types of spans; None where there are no spans."""
        return None if self.spans is None else self.spans.total.f1

    def figures(self) -> dict[str, float]:
        """Those that tell one model from another, by name."""
        found = {"accuracy": self.accuracy, "macro_f1": self.macro_f1}
        return found if self.span_f1 is None else found | {"span_f1": self.span_f1}

    def confusions(self) -> list[tuple[str, str, int]]:
        """(class, what it was taken for, how often), the most frequent first."""
        wrong = [(int(self.matrix[i, j]), i, j) for i, j in zip(*np.nonzero(self.matrix), strict=True) if i != j]
        return [(self.classes[i], self.classes[j], count) for count, i, j in sorted(wrong, key=lambda cell: (-cell[0], cell[1:]))]


class ClassCounts:
    """Counts what a classifier says of the rows that its loss is measured on; an observer of the objective.

    Args:
        model: with a head of classes; in a run the one that the objective holds.

    Attributes:
        documents: (B, T) of the batch that is going to be observed, on the host, or None: which of a row's examples each token is of.
            Only spans need it, which end where an example does.
    """

    def __init__(self, model: GPT) -> None:
        config = model.config
        assert config.head != "language_model"
        self._head, self.classes, self._what = model.head, config.classes, "example" if config.head == "sequence" else "word"
        self._matrix = torch.zeros(len(self.classes) ** 2, dtype=torch.int64)
        self._spans = SpanCounts() if config.head == "tokens" and are_spans(self.classes) else None
        self.documents: Tensor | None = None

    @torch.no_grad()
    def __call__(self, hidden: Tensor, targets: Tensor) -> None:
        """Count what is said at targets.

        Args:
            hidden: (B, T, E), after the final norm.
            targets: (B, T) int64 with IGNORE.
        """
        predicted, true = likeliest(self._head, hidden).cpu(), targets.cpu()
        learned = true != IGNORE
        pairs = true[learned] * len(self.classes) + predicted[learned]
        self._matrix += torch.bincount(pairs, minlength=len(self._matrix))
        if self._spans is not None:
            documents = torch.zeros_like(true) if self.documents is None else self.documents
            rows = torch.arange(len(true))[:, None].expand_as(true)
            example = torch.stack((rows[learned], documents[learned]), dim=1)  # of each word
            borders = (example[1:] != example[:-1]).any(1).nonzero().flatten() + 1
            for tags in torch.stack((true[learned], predicted[learned])).tensor_split(borders, dim=1):
                self._spans.add(*([self.classes[number] for number in row] for row in tags.tolist()))

    def beside(self, nll: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
        """A measure of the loss that tells this first what it is going to see."""

        def measured(batch: Batch) -> Tensor:
            self.documents = None if batch.documents is None else batch.documents.cpu()
            return nll(batch)

        return measured

    def scores(self, world: World | None = None) -> ClassScores:
        """What was counted, in all processes together."""
        counts, types = [float(n) for n in self._matrix.tolist()], types_of(self.classes)
        parts = [] if self._spans is None else [self._spans.right, self._spans.predicted, self._spans.true]
        totals = (world or World()).total([*counts, *(float(part[kind]) for part in parts for kind in types)])
        C, found = len(self.classes), SpanCounts()
        for number, part in enumerate((found.right, found.predicted, found.true)[: len(parts)]):
            first = C * C + number * len(types)
            part.update({kind: round(n) for kind, n in zip(types, totals[first : first + len(types)], strict=True) if n})
        matrix = np.array(totals[: C * C]).round().astype(np.int64).reshape(C, C)
        return ClassScores(self.classes, matrix, self._what, found if parts else None)


@contextmanager
def observing(objective: NextTokenLoss) -> Iterator[ClassCounts | None]:
    """While an objective measures, count what its model says, if that is a classifier."""
    if objective.model.config.head == "language_model":
        yield None
        return
    counts = ClassCounts(objective.model)
    objective.observer = counts
    try:
        yield counts
    finally:
        objective.observer = None


def likeliest(head: nn.Linear, hidden: Tensor) -> Tensor:
    """The class that a head finds likeliest of hidden states (..., E), in fp32 -> (...) int64."""
    with torch.autocast(hidden.device.type, enabled=False):
        weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
        rows = [F.linear(part.float(), weight, bias).argmax(-1) for part in hidden.flatten(0, -2).split(_ROWS)]
    return torch.cat(rows).view(hidden.shape[:-1])


# For people


def in_words(scores: ClassScores) -> str:
    """`accuracy 0.913, macro-F1 0.897`, and the span F1 if there is one."""
    return ", ".join(f"{FIGURES[name]} {value:.3f}" for name, value in scores.figures().items())


def matrix_lines(scores: ClassScores) -> list[str]:
    """The confusion matrix written out; of many classes, what was most often taken for what."""
    if len(scores.classes) > _MOST_SHOWN:
        wrong = scores.confusions()[:_MOST_SHOWN]
        return [f"most often wrong, of {scores.count:,}:"] + [f"  {true} taken for {said}: {count:,}" for true, said, count in wrong]
    names = [_short(name) for name in scores.classes]
    left = max(len("true"), *map(len, names))
    wide = [max(len(name), len(f"{column.max():,}")) + 2 for name, column in zip(names, scores.matrix.T, strict=True)]
    lines = [f"{'true':<{left}}  predicted", " " * left + "".join(f"{name:>{w}}" for name, w in zip(names, wide, strict=True))]
    for name, row in zip(names, scores.matrix.tolist(), strict=True):
        lines.append(f"{name:<{left}}" + "".join(f"{count:>{w},}" for count, w in zip(row, wide, strict=True)))
    return lines


def table_lines(scores: ClassScores) -> list[str]:
    """Precision, recall and F1 of every class, and of every type of span, as lines."""
    rows = [(name, row["precision"], row["recall"], row["f1"], round(row["count"])) for name, row in scores.per_class.items()]
    lines = _table("class", rows, f"{scores.what}s")
    if scores.spans is not None:
        found = scores.spans.by_type()
        lines += ["", *_table("span", [(kind, s.precision, s.recall, s.f1, s.true) for kind, s in found.items()], "spans")]
    return lines


def _table(first: str, rows: list[tuple[str, float, float, float, int]], counted: str) -> list[str]:
    left = max([len(first), *(len(_short(name)) for name, *_ in rows)])
    head = f"{first:<{left}}  precision  recall      F1  {counted:>9}"
    return [head] + [f"{_short(name):<{left}}  {p:>9.3f}  {r:>6.3f}  {f1:>6.3f}  {n:>9,}" for name, p, r, f1, n in rows]


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


def as_json(scores: ClassScores) -> dict[str, Any]:
    """Everything, as plain values."""
    found: dict[str, Any] = {**scores.figures(), "per_class": scores.per_class, "confusion_matrix": scores.matrix.tolist()}
    if scores.spans is not None:
        found["spans"] = {kind: _figures(score) for kind, score in {**scores.spans.by_type(), "all": scores.spans.total}.items()}
    return found


def _figures(score: SpanScore) -> dict[str, float]:
    return {"precision": score.precision, "recall": score.recall, "f1": score.f1, "count": score.true}
