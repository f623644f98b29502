"""Figures of classifiers: those that scikit-learn makes of the plain lists, and of every example what a model says of it alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from gpt.evaluation.classification import ClassCounts, ClassScores, as_json, in_words, likeliest, matrix_lines, observing, table_lines
from gpt.model.config import GPTConfig
from gpt.model.loss import IGNORE, LinearCrossEntropy
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT
from gpt.runtime.distributed import World

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def model_with(head: str, classes: list[str]) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=31, context_length=16, n_layer=1, n_head=2, d_model=16, head=head, classes=classes)  # pyright: ignore
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() == 2 else 1)
    return model


def a_batch(classes: int, rows: int = 12, share: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, targets and documents, two examples a row."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(31, (rows, 16), generator=generator)
    targets = torch.randint(classes, (rows, 16), generator=generator)
    targets[torch.rand(rows, 16, generator=generator) > share] = IGNORE
    return tokens, targets, (torch.arange(16) >= 9).long().expand(rows, 16)


def scores_of(model: GPT, tokens, targets, documents=None) -> ClassScores:
    counts = ClassCounts(model)
    counts.documents = documents
    with torch.no_grad():
        counts(model.hidden_states(tokens, documents=documents), targets)
    return counts.scores()


@pytest.mark.parametrize("missing", [False, True])
def test_figures_are_those_of_scikit_learn(missing):
    """Also where a class never occurs and is never said, which a mean over all classes would take for a failure."""
    classes = ["a", "b", "c", "d"]
    model = model_with("sequence", classes)
    tokens, targets, _ = a_batch(4)
    if missing:
        targets[targets == 3] = 0
        with torch.no_grad():
            model.head.weight[3] = 0
            model.head.weight[0] = -model.head.weight[1]  # one of the two is above the 0 of the last class
    with torch.no_grad():
        said = model(tokens).argmax(-1)[targets != IGNORE]
    true = targets[targets != IGNORE]
    scores = scores_of(model, tokens, targets)
    assert 0.1 < scores.accuracy < 0.9
    assert (missing and not (said == 3).any()) or not missing
    assert scores.count == len(true)
    assert scores.accuracy == pytest.approx(accuracy_score(true, said), abs=1e-12)
    assert scores.macro_f1 == pytest.approx(f1_score(true, said, average="macro"), abs=1e-12)
    assert np.array_equal(scores.matrix, confusion_matrix(true, said, labels=range(4)))
    figures: Any = precision_recall_fscore_support(true, said, labels=range(4), zero_division=0.0)  # pyright: ignore
    for number, name in enumerate(classes):
        assert list(scores.per_class[name].values()) == pytest.approx([column[number] for column in figures], abs=1e-12)
    assert scores.span_f1 is None


def test_spans_end_where_an_example_does():
    """Two examples in one row, I-PER at the border of both: one span for who does not look at the documents."""
    model = model_with("tokens", TAGS)
    targets = torch.full((1, 16), IGNORE)
    targets[0, 6:12] = torch.tensor([0, 1, 2, 2, 0, 0])
    documents = (torch.arange(16) >= 9)[None].long()
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    apart, together = scores_of(model, tokens, targets, documents), scores_of(model, tokens, targets)
    assert apart.spans is not None
    assert together.spans is not None
    assert (apart.spans.true["PER"], together.spans.true["PER"]) == (2, 1)


def test_counts_of_batches_and_processes_add_up():
    model = model_with("tokens", TAGS)
    tokens, targets, documents = a_batch(5)
    whole = scores_of(model, tokens, targets, documents)
    assert whole.spans is not None
    assert whole.spans.total.true > 10
    parts = ClassCounts(model)
    for rows in (slice(0, 5), slice(5, 12)):
        parts.documents = documents[rows]
        with torch.no_grad():
            parts(model.hidden_states(tokens[rows], documents=documents[rows]), targets[rows])
    parts.documents = documents
    parts(torch.zeros(12, 16, 16), torch.full_like(targets, IGNORE))  # of a process that has no batch left
    found = parts.scores()
    assert np.array_equal(found.matrix, whole.matrix)
    assert found.spans == whole.spans

    class TwoAlike(World):
        def total(self, values):
            return [2 * value for value in values]

    twice = parts.scores(TwoAlike())
    assert np.array_equal(twice.matrix, 2 * whole.matrix)
    assert twice.spans is not None
    assert twice.spans.total.true == 2 * whole.spans.total.true
    assert twice.figures() == pytest.approx(whole.figures())


@pytest.mark.parametrize("head", ["sequence", "tokens"])
def test_the_observer_sees_what_the_model_says(head):
    model = model_with(head, TAGS)
    tokens, targets, documents = a_batch(5)
    objective = NextTokenLoss(model, LinearCrossEntropy()).eval()
    with observing(objective) as counts, torch.no_grad():
        assert counts is not None
        loss = objective(tokens, targets, documents)
        logits = model(tokens, documents=documents)[targets != IGNORE]
    assert objective.observer is None
    true = targets[targets != IGNORE]
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, true, reduction="sum").item(), rel=1e-5)
    assert counts.scores().accuracy == pytest.approx((logits.argmax(-1) == true).double().mean().item())


def test_training_is_not_observed():
    model = model_with("sequence", ["a", "b"])
    tokens, targets, _ = a_batch(2)
    objective = NextTokenLoss(model, LinearCrossEntropy()).train()
    with observing(objective) as counts:
        assert counts is not None
        objective(tokens, targets)
        assert counts.scores().count == 0


def test_a_language_model_has_no_classes_to_observe():
    model = GPT(GPTConfig(vocab_size=31, context_length=16, n_layer=1, n_head=2, d_model=16))
    with observing(NextTokenLoss(model, LinearCrossEntropy())) as counts:
        assert counts is None


def test_the_likeliest_class_is_found_in_fp32_whatever_surrounds_it():
    """Two classes a hair apart: bf16 could not tell them."""
    head = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1e-3]]))
    hidden = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])
    with torch.autocast("cpu", torch.bfloat16):
        assert likeliest(head, hidden).tolist() == [[1, 0]]
    assert torch.equal(likeliest(head, hidden.expand(3000, 2, 2)), torch.tensor([1, 0]).expand(3000, 2))


# In words


def made(matrix: list[list[int]], classes: list[str], what: str = "example") -> ClassScores:
    return ClassScores(classes, np.array(matrix), what)


def test_the_matrix_is_written_out():
    scores = made([[1200, 3], [0, 40]], ["ham", "a very long name indeed"])
    assert matrix_lines(scores) == [
        "true            predicted",
        "                  ham  a very long n…",
        "ham             1,200               3",
        "a very long n…      0              40",
    ]
    assert in_words(scores) == "accuracy 0.998, macro-F1 0.981"
    assert table_lines(scores)[1] == "ham                 1.000   0.998   0.999      1,203"


def test_of_many_classes_the_worst_confusions_are_named():
    matrix = np.eye(20, dtype=int) * 5
    matrix[3, 4], matrix[7, 1] = 9, 2
    lines = matrix_lines(made(matrix.tolist(), [f"c{n}" for n in range(20)]))
    assert lines == ["most often wrong, of 111:", "  c3 taken for c4: 9", "  c7 taken for c1: 2"]


def test_everything_goes_into_json():
    model = model_with("tokens", TAGS)
    found = as_json(scores_of(model, *a_batch(5)))
    assert set(found) == {"accuracy", "macro_f1", "span_f1", "per_class", "confusion_matrix", "spans"}
    assert found["spans"]["all"]["f1"] == found["span_f1"]
    assert set(found["spans"]) == {"PER", "LOC", "all"}
    assert sum(map(sum, found["confusion_matrix"])) == sum(row["count"] for row in found["per_class"].values())
