"""The page of a search: loss against time and memory, the advice, and the tries."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from made_runs import write_run
from matplotlib.figure import Figure

from gpt.finetuning.search import Tried, pareto
from gpt.finetuning.trainable import TableRow
from gpt.runs.search_page import format_tries, measure, write_search_page
from gpt.training.charts import ACCENT, draw_scatter
from gpt.training.freezing_figure import TRAINABLE

TRIES = [
    Tried("none", "finished", 1.0, 3.0, 200.0, 4096, 1234.5, 3 * 2**30),
    Tried("first_n freeze.first_n_blocks=2", "finished", 0.4, 3.02, 100.0, 4096, 2000.0, 2**30),
    Tried("norms_and_biases", "finished", 0.0004, 3.5, 150.0, 4096, 1500.0, 2 * 2**30),
    Tried("head_only", "failed", None, None, 0.0, 0, None, None, "it is so"),
]


def page_of(tmp_path: Path, tries: list[Tried], timed: bool = False) -> str:
    runs = [write_run(tmp_path / "s-01-none"), write_run(tmp_path / "s-02-first_n", best=2.5)]
    return write_search_page(runs, tmp_path / "s.html", "s", tries, "Take <this>.", "gpt finetune freeze=none", timed).read_text()


def test_the_page_has_the_advice_the_table_and_both_charts(tmp_path: Path) -> None:
    page = page_of(tmp_path, TRIES)
    assert "<p>Take &lt;this&gt;.</p>" in page
    assert '<pre class="sample">gpt finetune freeze=none</pre>' in page
    assert re.findall(r"<figcaption>(Loss .*?)<", page) == ["Loss against time", "Loss against memory"]
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>(.*?)</tr>', page)[:4]
    assert [row[0] for row in rows] == [one.plan for one in TRIES]
    assert re.findall(r">([^<]+)</td>", rows[1][1]) == ["40.0%", "3.0200", "1m 40s", "2,000", "1.00 GiB", "finished"]
    assert re.findall(r">([^<]+)</td>", rows[3][1]) == ["-", "-", "-", "-", "-", "failed: it is so"]
    for chart in page.split("<figure>")[1:3]:
        names = re.findall(r">([^<>]+)</text>", chart)
        assert {"none", "first_n 2", "norms_and_biases"} <= set(names)
        assert "head_only" not in names, "it has no loss"
    assert "Validation loss by time" in page, "and the curves of all runs"
    assert "training time, minutes" in page


def test_tries_of_the_same_time_are_compared_by_what_a_million_tokens_take(tmp_path: Path) -> None:
    assert "hours for a million tokens" in page_of(tmp_path, TRIES, timed=True)


def test_without_figures_the_page_is_there_all_the_same(tmp_path: Path) -> None:
    page = page_of(tmp_path, TRIES[3:])
    assert "Loss against" not in page
    assert "it is so" in page


def test_the_table_is_aligned_and_says_why_a_try_failed() -> None:
    lines = format_tries(TRIES).splitlines()
    assert lines[0].split() == ["plan", "trains", "val", "loss", "time", "tokens/s", "memory", "state"]
    assert lines[3].split()[1] == "0.040%"
    assert lines[4].endswith("failed    it is so")
    assert len({line.index("finished") for line in lines[1:4]}) == 1


def test_a_run_is_measured_by_its_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    assert measure(run) == ([16384.0] * 20, None, 1.0)
    (run / TRAINABLE).write_text(json.dumps([asdict(TableRow("a", 30, 10, 1.0, 0, 10)), asdict(TableRow("b", 10, 10, 1.0, 0.5, 0))]))
    (run / "metrics.jsonl").write_text('{"step": 1, "memory_bytes": 7}\n{"step": 2, "memory_bytes": 5}\n')
    assert measure(run) == ([], 7, 0.25), "what begins later does not train yet"


@pytest.mark.parametrize(
    "points", [[(1.0, 2.0, "alone")], [(0.0, 0.0, "a"), (0.0, 0.0, "b")], [(5.0, 3.0, "x" * 60), (5.0, 3.0, "y" * 60)]]
)
def test_few_and_equal_points_are_drawn(points: list[tuple[float, float, str]]) -> None:
    axes = Figure().add_subplot()
    draw_scatter(axes, points, pareto([point[:2] for point in points]), "x", "y", shaded=2.5)
    assert [text.get_text() for text in axes.texts] == [name for *_, name in points]


def test_the_line_joins_the_front_and_names_hide_neither_points_nor_each_other() -> None:
    points = [(4.0, 1.0, "none"), (3.6, 1.004, "embeddings"), (3.0, 1.01, "first_n 3"), (2.0, 1.03, "first_n 6"), (3.5, 1.2, "norms")]
    front = pareto([point[:2] for point in points])
    figure = Figure(figsize=(5.6, 3.2))
    axes = figure.add_subplot()
    draw_scatter(axes, points, front, "x", "y", shaded=1.01)
    line = axes.lines[0]
    assert list(zip(*line.get_data(), strict=True)) == [points[n][:2] for n in (3, 2, 1, 0)]
    assert [dot.get_color() == ACCENT for dot in axes.lines[1:]] == [True, True, True, True, False]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    dots = [axes.transData.transform(point[:2]) for point in points]
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
