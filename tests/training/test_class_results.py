"""What people see of a classifier: the picture of its confusions, held-out examples with what is said of them, lines of the page."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from gpt.data.config import EXAMPLE_SOURCES, TEXT_SOURCES, SourceConfig
from gpt.evaluation.classification import ClassScores
from gpt.training.classes import confusion_chart, say_samples
from gpt.training.export import _named
from gpt.training.report import Sample, Summary, write_live_report, write_report

SUMMARY = Summary(
    "r", "1.00M parameters", 3, 60, 2.0, 100.0, 0.5, 3, None, None, None, 0, True, "held-out examples", "example",
    {"accuracy": 0.75, "macro_f1": 0.5}, counted="example",
)  # fmt: skip


def scores_of(count: int) -> ClassScores:
    matrix = np.diag(np.arange(count) + 1)
    matrix[count - 1, count - 2] = 1234
    return ClassScores([f"class {number}" for number in range(count)], matrix, "word")


@pytest.mark.parametrize("count", [2, 9, 20, 60])
def test_confusions_are_drawn(count):
    chart = confusion_chart(scores_of(count))
    assert chart.svg.startswith("<svg")
    assert "<image" not in chart.svg  # areas in the colours of the page, no picture
    assert {"var(--accent)", "var(--second)"} <= set(re.findall(r"var\(--\w+\)", chart.svg))
    named = set(re.findall(r">(class \d+)<", chart.svg))
    assert len(named) == min(count, 40)
    assert f"class {count - 1}" in named  # the most frequent
    assert (">1,234<" in chart.svg) == (count <= 14)
    assert ("The 40 most frequent of 60 classes" in chart.note) == (count == 60)
    assert f"Held-out words: {scores_of(count).count:,}" in chart.note


def test_names_of_classes_are_no_markup():
    scores = ClassScores(["<b>a</b>", "$x^$ & more"], np.array([[3, 1], [0, 2]]), "example")
    drawn = confusion_chart(scores).svg
    assert "<b>" not in drawn
    assert "$x^$ &amp; more" in drawn  # nor formulas


def test_wrong_ones_are_marked():
    said: list[str] = []
    samples = [Sample("a long\ntext", "\n→ ham", "ham"), Sample("other", "\n→ ham", "spam")]
    say_samples([*samples, Sample("", "a/O b/X", "the same"), Sample("", "a/O b/X", "a/O b/O")], said.append)
    assert said == [
        "--- a long text\n    -> ham", "--- other\n    -> ham   (right: spam)", "--- a/O b/X", "--- a/O b/X   (right: a/O b/O)",
    ]  # fmt: skip


def test_the_page_of_a_classifier(tmp_path):
    lines = [f'{{"step": {n}, "loss": 1.0, "seconds": {n}, "tokens": {20 * n}}}' for n in range(1, 4)]
    lines.append('{"step": 3, "tokens": 60, "seconds": 3, "val_loss": 0.5, "val_accuracy": 0.75, "val_macro_f1": 0.5}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = write_report(tmp_path, [Sample("text", "\n→ ham", "spam")], SUMMARY, [confusion_chart(scores_of(3))]).read_text()
    assert page.index("What was taken for what") < page.index("Held-out accuracy and F1") < page.index("Loss by step")
    assert re.search(r"Accuracy</dt><dd class=\"value\">0.750</dd><dd class=\"note\">of held-out examples", page)
    assert "Macro-F1</dt>" in page
    assert "loss, nats per example" in page
    assert "<dt>Examples</dt>" in page
    assert "Bits per byte" not in page
    assert "tokens each" not in page
    beside = "with lm_weight times that of the next tokens; validation: the classes alone"
    assert beside not in page
    (tmp_path / "metrics.jsonl").write_text("\n".join(line.replace('"loss": 1.0', '"loss": 1.0, "lm_loss": 0.8') for line in lines))
    assert write_report(tmp_path, [], SUMMARY).read_text().count(beside) == 2, "under the loss by step, and by time"
    page = write_report(tmp_path, [], replace(SUMMARY, counted="token")).read_text()  # loss_on=all: learned at every token
    assert "<dt>Tokens</dt>" in page
    assert "tokens each" not in page
    assert "loss, nats per" not in page
    for curve in ("training, per token", "validation, per example"):
        assert curve in page


def test_the_page_of_a_classifier_that_still_learns(tmp_path):
    """Drawn from the files alone."""
    (tmp_path / "config.yaml").write_text("model: {head: tokens, classes: [a, b]}\n")
    line = {"step": 3, "val_loss": 0.5, "val_accuracy": 0.75, "val_macro_f1": 0.5, "val_span_f1": 0.25, "seconds": 3, "tokens": 60}
    (tmp_path / "metrics.jsonl").write_text(str(line).replace("'", '"') + "\n")
    page = write_live_report(tmp_path, stopped=True).read_text()
    for shown in ('Span F1</dt><dd class="value">0.250', "of held-out words", "loss, nats per word", "<dt>Words</dt>"):
        assert shown in page


@pytest.mark.parametrize("source", [*EXAMPLE_SOURCES, *TEXT_SOURCES])
def test_a_model_card_has_words_for_every_source(source):
    data = SourceConfig(source, paths=["a/book.txt"] if source == "text" else [])  # pyright: ignore
    assert _named(data)
