"""F1 of spans in sequences of tags such as B-PER, I-PER, O: which spans there are follows seqeval 1.2.2, as `f1_score` counts by default.

Those are the rules of conlleval (Tjong Kim Sang, CoNLL-2000), which take a tag sequence as it comes: a span begins at B, at S, at an I
or E that nothing open precedes, and wherever the type changes; it ends before what begins another, at E and at S. They hold for IOB1,
IOB2, IOE and IOBES alike. seqeval itself is no longer maintained, hence this; its own answers are kept in the tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_MARKS = ("B-", "I-", "E-", "S-")
_ENDS_A_SPAN = {("B", "B"), ("B", "S"), ("B", "O"), ("I", "B"), ("I", "S"), ("I", "O")}  # and whatever stands behind E or S
_BEGINS_ONE = {("E", "E"), ("E", "I"), ("S", "E"), ("S", "I"), ("O", "E"), ("O", "I")}  # and B or S, whatever stands before them

Span = tuple[str, int, int]
"""Type, first and last place."""


def are_spans(classes: Iterable[str]) -> bool:
    """Whether classes look like tags of spans: O and such as B-PER, all of them, and at least one of the latter."""
    rest = [name for name in classes if name != "O"]
    return bool(rest) and all(name.startswith(_MARKS) and len(name) > 2 for name in rest)


def spans(tags: Sequence[str]) -> list[Span]:
    """The spans of one sequence, in order."""
    found: list[Span] = []
    mark_before, type_before, begin = "O", "", 0
    for place, tag in enumerate((*tags, "O")):
        mark, kind = tag[:1], tag[1:].split("-", maxsplit=1)[-1] or "_"
        changes = type_before != kind
        if mark_before in ("E", "S") or (mark_before, mark) in _ENDS_A_SPAN or (mark_before != "O" and changes):
            found.append((type_before, begin, place - 1))
        if mark in ("B", "S") or (mark_before, mark) in _BEGINS_ONE or (mark != "O" and changes):
            begin = place
        mark_before, type_before = mark, kind
    return found


@dataclass(frozen=True)
class SpanScore:
    """How well spans were found; each figure is 0 where it would be 0 / 0."""

    right: int
    """Predicted spans whose type and both ends are right."""
    predicted: int
    true: int

    @property
    def precision(self) -> float:
        """Of the predicted spans, the share that is right."""
        return self.right / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Of the true spans, the share that was found."""
        return self.right / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        both = self.predicted + self.true
        return 2 * self.right / both if both else 0.0


@dataclass
class SpanCounts:
    """What is counted of spans, by type; counts of several processes or batches are added up."""

    right: Counter[str] = field(default_factory=Counter)
    predicted: Counter[str] = field(default_factory=Counter)
    true: Counter[str] = field(default_factory=Counter)

    def add(self, true: Sequence[str], predicted: Sequence[str]) -> None:
        """Count one sequence.

        Args:
            true: the tags that are right.
            predicted: as many, of the model.
        """
        assert len(true) == len(predicted)
        wanted, found = set(spans(true)), set(spans(predicted))
        for counter, counted in ((self.right, wanted & found), (self.predicted, found), (self.true, wanted)):
            counter.update(kind for kind, _, _ in counted)

    @property
    def total(self) -> SpanScore:
        """Over all types: the micro average, which is what is called span F1."""
        return SpanScore(self.right.total(), self.predicted.total(), self.true.total())

    def by_type(self) -> dict[str, SpanScore]:
        """Of each type that occurs, in alphabetical order."""
        return {kind: SpanScore(self.right[kind], self.predicted[kind], self.true[kind]) for kind in sorted(self.predicted | self.true)}


def types_of(classes: Iterable[str]) -> list[str]:
    """The types that spans of these tags can have, in alphabetical order."""
    return sorted({kind for name in classes for kind, _, _ in spans([name])})
