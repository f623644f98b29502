"""Span F1: what seqeval 1.2.2 answers by default, which is kept in a file, and asked where it is installed."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from gpt.evaluation.spans import SpanCounts, are_spans, spans, types_of

ANSWERS = json.loads(Path(__file__).with_name("seqeval_answers.json").read_text())
TAGS = {
    "iob2": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
    "iobes": ["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("PER", "LOC", "A-B"))],
    "odd": ["O", "B", "I", "E", "S", "B-", "I-X", "S-a-b"],
}


def counted(true: list[list[str]], predicted: list[list[str]]) -> SpanCounts:
    counts = SpanCounts()
    for pair in zip(true, predicted, strict=True):
        counts.add(*pair)
    return counts


def test_the_answers_are_of_every_scheme_and_not_all_alike():
    assert len({case["scheme"] for case in ANSWERS}) == 3
    assert len({case["micro"][2] for case in ANSWERS}) > 20


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_spans_and_figures_are_those_of_seqeval(number):
    case = ANSWERS[number]
    true, predicted = ([text.split() for text in case[key]] for key in ("true", "predicted"))
    assert [[list(span) for span in spans(tags)] for tags in true] == case["spans"]
    counts = counted(true, predicted)
    score = counts.total
    assert [score.precision, score.recall, score.f1, score.true] == pytest.approx(case["micro"], abs=1e-12)
    by_type = {kind: [s.precision, s.recall, s.f1, s.true] for kind, s in counts.by_type().items()}
    assert by_type.keys() == case["by_type"].keys()
    assert all(by_type[kind] == pytest.approx(figures, abs=1e-12) for kind, figures in case["by_type"].items())


@pytest.mark.parametrize("tags", TAGS)
def test_random_sequences_are_taken_as_seqeval_takes_them(tags):
    seqeval: Any = pytest.importorskip("seqeval.metrics")
    entities: Any = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    draw = random.Random(0)
    for _ in range(500):
        true = [[draw.choice(TAGS[tags]) for _ in range(draw.randint(0, 8))] for _ in range(draw.randint(1, 4))]
        predicted = [[tag if draw.random() < 0.6 else draw.choice(TAGS[tags]) for tag in row] for row in true]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert [spans(row) for row in true] == [[tuple(span) for span in entities(row)] for row in true]
            wanted = seqeval.f1_score(true, predicted, zero_division=0)
        assert counted(true, predicted).total.f1 == pytest.approx(wanted, abs=1e-12)


def test_nothing_to_find_and_nothing_found_is_zero():
    score = counted([["O", "O"]], [["O", "O"]]).total
    assert (score.precision, score.recall, score.f1) == (0, 0, 0)


@pytest.mark.parametrize(
    ("classes", "yes"),
    [
        (["O", "B-PER", "I-PER"], True),
        (["B-PER", "I-PER"], True),
        (["S-X", "O"], True),
        (["O"], False),
        (["NOUN", "VERB", "O"], False),
        (["B-PER", "NOUN"], False),
        (["B-", "O"], False),
        ([], False),
    ],
)
def test_tags_of_spans_are_known_by_their_names(classes, yes):
    assert are_spans(classes) == yes


def test_types_are_what_tags_name():
    assert types_of(["O", "I-B", "B-A", "S-A", "E-x-y"]) == ["A", "B", "x-y"]
