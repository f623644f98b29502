"""The page of a run: what it shows, what it survives, how large it gets, and that it asks the network for nothing.

Pages are read back with the parser of the standard library, as a browser would, not compared with a stored copy.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpt.training.report import Sample, write_report
from tests.training.report_pages import (
    CURVES,
    SAMPLES,
    SUMMARY,
    UNKNOWN,
    Page,
    detailed_line,
    note,
    points,
    training_line,
    validation_line,
    write_metrics,
)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    lines = [training_line(step) for step in range(10, 1151, 10)] + [validation_line(step, 2.2) for step in range(200, 1151, 200)]
    write_metrics(tmp_path, lines)
    (tmp_path / "config.yaml").write_text("seed: 1337\nmodel:\n  n_layer: 4\n")
    (tmp_path / "environment.json").write_text(json.dumps({"torch": "2.13.0", "git": {"commit": "0a1b2c", "dirty": True}, "ranks": [0, 1]}))
    return tmp_path


def test_a_full_run_is_shown_whole(full: Path) -> None:
    path = write_report(full, SAMPLES, SUMMARY)
    assert path == full / "report.html"
    assert not (full / "report.html.tmp").exists()
    page = Page(path)
    assert page.texts["h1"] == ["pretrain-20261120-kmqz"]
    cards = dict(zip(page.texts["dt"], page.texts["dd"][::2], strict=True))
    assert cards == {
        "Bits per byte": "1.187",
        "Best validation loss": "2.104",
        "Tokens": "4.71M",
        "Training time": "3m 12s",
        "Tokens per second": "24,890",
        "Parameters": "2.2M",
    }
    assert page.texts["dd"][1::2] == [
        "26% below xz -9e",
        "at step 1,000",
        "1,150 steps",
        "167 ms a step",
        "over the run",
        "2.1 tokens each",
    ]
    assert page.charts == [CURVES[0], "Held-out text, compressed", *CURVES[1:]]
    assert page.texts["pre"] == ["def add(a, b):\n    return a + b\n", "import os\n", "seed: 1337\nmodel:\n  n_layer: 4"]
    assert page.texts["span"] == ["def add(a, b):", "import "]
    rows = list(zip(page.texts["th"], page.texts["td"], strict=True))
    assert rows == [("torch", "2.13.0"), ("git.commit", "0a1b2c"), ("git.dirty", "true"), ("ranks", "[0, 1]")]
    assert "Finished after 1,150 steps" in page.texts["header"][0]
    assert "skipped" not in page.texts["header"][0]
    labels = page.texts["text"]
    for label in (
        "training, smoothed",
        "validation",
        "step",
        "training time, minutes",
        "loss, nats per token, log scale",
        "tokens per second",
    ):
        assert label in labels
    for label in ("this model", "1.187", "xz -9e", "1.612", "gzip -9", "1.934", "1,000", "20k"):
        assert label in labels


def test_the_page_is_self_contained(full: Path) -> None:
    page = Page(write_report(full, SAMPLES, SUMMARY))
    assert not {"script", "img", "iframe", "object"} & ({tag for tag, _, _ in page.attributes} | page.texts.keys())
    links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action", "data")]
    assert links
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"@import|url\((?!#)", page.source)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes


def test_every_chart_is_sound_svg_with_ids_of_its_own_and_colours_of_the_page(full: Path) -> None:
    page = Page(write_report(full, SAMPLES, SUMMARY))
    images = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)
    assert len(images) == 6
    ids = []
    for image in images:
        tree = ElementTree.fromstring(image)
        own = {element.get("id") for element in tree.iter() if element.get("id")}
        assert own >= set(re.findall(r'(?:url\(|href=")#([^")]+)', image))
        ids += own
    assert len(ids) == len(set(ids))
    assert not re.search("#0000..", page.source)
    used = set(re.findall(r"var\((--\w+)\)", page.source))
    assert used <= set(re.findall(r"(--\w+):", page.source))


def test_the_curve_shows_the_numbers_and_a_lighter_raw_line(full: Path) -> None:
    raw, smoothed, validation = points(Page(write_report(full, [], SUMMARY)), "Loss by step")
    assert (len(raw), len(smoothed), len(validation)) == (115, 115, 5)
    assert raw[0][1] < raw[-1][1], "y grows downwards in SVG: the loss fell"
    assert len({round(y) for _, y in validation}) == 1

    def wobble(curve: list[tuple[float, float]]) -> float:
        heights = [y for _, y in curve[60:]]
        return sum(abs(a - b) for a, b in itertools.pairwise(heights))

    assert wobble(smoothed) < 0.5 * wobble(raw)
    # Over the steep part the average stays on the curve, it does not trail behind it.
    lag = [a[1] - b[1] for a, b in zip(smoothed[5:30], raw[5:30], strict=True)]
    assert abs(sum(lag) / len(lag)) < 5


@pytest.mark.parametrize("metrics", [None, "", "\n\n", '{"step": 10, "lo', "[1, 2]\n7\nnull\n", '{"loss": 3.0}\n'])
def test_without_metrics_the_rest_is_shown(tmp_path: Path, metrics: str | None) -> None:
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    page = Page(write_report(tmp_path, [], UNKNOWN))
    assert page.charts == []
    assert "No metrics were recorded." in page.texts["p"]
    assert page.texts["dd"][:2] == ["–", "not measured"]
    assert page.texts["h2"] == ["Curves"]
    assert "details" not in page.texts


def test_an_interrupted_run_and_skipped_steps_are_named(tmp_path: Path) -> None:
    summary = dataclasses.replace(UNKNOWN, finished=False, skipped_steps=1, steps=1, seconds=0.0, model="a model of unknown size")
    page = Page(write_report(tmp_path, [], summary))
    assert "Interrupted after 1 step\n" in re.sub(" +", " ", page.texts["header"][0])
    assert "1 step skipped" in page.texts["header"][0]
    assert "Parameters" not in page.texts["dt"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "0.0s"), (59.94, "59.9s"), (59.96, "1m 00s"), (3599.7, "1h 00m"), (4500.0, "1h 15m"), (400_000.0, "111h 06m")],
)
def test_durations_carry_over(tmp_path: Path, seconds: float, shown: str) -> None:
    page = Page(write_report(tmp_path, [], dataclasses.replace(SUMMARY, seconds=seconds)))
    assert shown in page.texts["dd"]


@pytest.mark.parametrize("step", [0, 10])
def test_one_line_is_a_dot(tmp_path: Path, step: int) -> None:
    write_metrics(tmp_path, [training_line(step)])
    page = Page(write_report(tmp_path, [], UNKNOWN))
    assert page.charts == CURVES
    assert page.source.count("<use ") >= len(CURVES)
    assert "validation" not in page.texts["text"]


def test_validation_alone_is_drawn(tmp_path: Path) -> None:
    write_metrics(tmp_path, [validation_line(200), validation_line(400, 2.2)])
    page = Page(write_report(tmp_path, [], UNKNOWN))
    assert page.charts == ["Loss by step", "Loss by time"]
    assert "validation" in page.texts["text"]


def test_a_torn_line_is_left_out_at_the_end_and_in_the_middle(tmp_path: Path) -> None:
    lines = [training_line(10), training_line(20), training_line(30)]
    write_metrics(tmp_path, lines, tail='{"step": 40, "loss": 2.\n' + json.dumps(training_line(50)) + '\n{"step": 60, "loss": 1')
    (curve,) = points(Page(write_report(tmp_path, [], UNKNOWN)), "Loss by step")
    assert len(curve) == 4


def test_steps_trained_again_after_a_resume_count_once(tmp_path: Path) -> None:
    before = [training_line(step, loss=9.0 + step % 20) for step in (10, 20, 30, 40)]
    after = [training_line(step, loss=2.0 + step % 20) for step in (30, 40, 50)]
    write_metrics(tmp_path, [*before, validation_line(20), validation_line(20, 3.0), *after])
    curve, validation = points(Page(write_report(tmp_path, [], UNKNOWN)), "Loss by step")
    assert [x for x, _ in curve] == sorted({x for x, _ in curve})
    assert len(curve) == 5
    assert len(validation) == 1
    assert curve[2][1] == curve[4][1] > curve[0][1], "y grows downwards in SVG"
    assert curve[3][1] > curve[1][1]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, None, "nan"])
def test_losses_that_are_no_numbers_are_left_out(tmp_path: Path, loss: object) -> None:
    write_metrics(tmp_path, [training_line(step, loss=loss if step % 20 else 3.0, grad_norm=loss) for step in range(10, 101, 10)])
    page = Page(
        write_report(tmp_path, [], dataclasses.replace(SUMMARY, best_val_loss=math.nan, val_bpb=math.nan, tokens_per_second=math.nan))
    )
    assert page.charts == CURVES[:-1]
    assert len(points(page, "Loss by step")[0]) == 5
    assert page.texts["dd"][:3:2] == ["–", "–"]
    assert not re.search(r"\b(nan|inf)", "".join(page.texts["main"]).replace("nano", ""))


@pytest.mark.parametrize("loss", [0.0, -1.0, 5.0])
def test_a_flat_curve_and_a_loss_without_a_logarithm_are_drawn(tmp_path: Path, loss: float) -> None:
    write_metrics(tmp_path, [training_line(step, loss=loss, lr=0.0) for step in range(10, 301, 10)])
    page = Page(write_report(tmp_path, [], UNKNOWN))
    assert page.charts == CURVES
    assert page.texts["text"].count("loss, nats per token, log scale") == (2 if loss > 0 else 0)


def test_a_huge_run_stays_a_small_page_and_keeps_its_spike(tmp_path: Path) -> None:
    noise = [((step * 7919) % 1009) / 1009 for step in range(100_000)]
    lines = [training_line(step, loss=2 + value, grad_norm=1 + value, tokens_per_second=2e4 + value) for step, value in enumerate(noise)]
    lines[54_321]["loss"] = 40.0
    lines += [validation_line(step, 2.4 + noise[step]) for step in range(0, 100_000, 20)]
    write_metrics(tmp_path, lines)
    path = write_report(tmp_path, SAMPLES, SUMMARY)
    assert path.stat().st_size < 1_500_000
    page = Page(path)
    curves = points(page, "Loss by step")
    assert len(curves) == 3
    assert all(1500 < len(curve) <= 2000 for curve in curves)
    heights = sorted(y for _, y in curves[0])
    assert heights[0] < heights[1] - 50, "the spike stands alone above the rest"
    assert "100k" in page.texts["text"]
    assert "training time, hours" in page.texts["text"]


def test_everything_is_escaped(full: Path) -> None:
    evil = "</pre><script>alert('x')</script>&amp;<b>\"{{ 7 * 7 }}"
    (full / "config.yaml").write_text(f"run:\n  id: {evil}\n")
    (full / "environment.json").write_text(json.dumps({evil: evil}))
    page = Page(write_report(full, [Sample(evil, evil + "\nnul \0 half \ud800")], dataclasses.replace(SUMMARY, title=evil, model=evil)))
    assert not {"script", "b"} & page.texts.keys()
    assert page.texts["h1"] == page.texts["title"] == page.texts["th"] == page.texts["td"] == [evil]
    assert page.texts["pre"][0].startswith(evil + evil + "\nnul ")
    assert page.texts["pre"][1] == f"run:\n  id: {evil}"


@pytest.mark.parametrize("environment", ["", "{", "\ufeffnot json"])
def test_an_environment_that_cannot_be_read_is_left_out(full: Path, environment: str) -> None:
    (full / "environment.json").write_text(environment, encoding="utf-8")
    assert "table" not in Page(write_report(full, [], SUMMARY)).texts


def test_a_second_report_replaces_the_first(full: Path) -> None:
    first = write_report(full, SAMPLES, SUMMARY).read_bytes()
    assert write_report(full, SAMPLES, SUMMARY).read_bytes() == first
    (full / "metrics.jsonl").unlink()
    assert Page(write_report(full, SAMPLES, SUMMARY)).charts == ["Held-out text, compressed"]


def test_a_model_that_compresses_worse_than_xz_is_told_so(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, [], dataclasses.replace(SUMMARY, val_bpb=2.418, gzip_bpb=None)))
    assert "50% above xz -9e" in page.texts["dd"]
    assert "gzip -9" not in page.texts["text"]


# What newer runs record


def areas(page: Page) -> dict[str, list[list[tuple[float, float]]]]:
    """Colour -> the outlines of the areas in the chart of a step's time, then that of the mark in the legend."""
    figure = next(part for part in page.source.split("<figure>") if "Where a step's time goes" in part or "Where a step&#39;s" in part)
    found: dict[str, list[list[tuple[float, float]]]] = {}
    defined = dict(re.findall(r'<path id="([^"]*)" d="([^"]*)"', figure))
    for path, colour in re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\((--series-\d)\)', figure):
        found.setdefault(colour, []).append([(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)])
    for name, colour in re.findall(r'<use xlink:href="#([^"]*)"[^>]*style="fill: var\((--series-\d)\)', figure):
        found.setdefault(colour, []).insert(0, [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", defined[name])])
    return found


def test_a_run_that_records_everything_has_every_chart(tmp_path: Path) -> None:
    write_metrics(tmp_path, [detailed_line(step) for step in range(10, 501, 10)])
    page = Page(write_report(tmp_path, [], UNKNOWN))
    assert page.charts == [*CURVES[:4], "Where a step's time goes", "Gradient and update norm", "Memory"]
    assert note(page, "Throughput") == "MFU 41.2%, median"
    assert note(page, "Where a step&#39;s time goes") == (
        "Of the steps: data 0.6%, forward 31.2%, backward 50.0%, optimizer 12.5%, other 5.6%. "
        "Of the whole run: evaluation 3.2%, checkpointing 0.9%."
    )
    assert note(page, "Memory") == "Highest: 0.49 GiB"
    for label in ("data", "forward", "backward", "optimizer", "other", "milliseconds a step", "gradient, smoothed", "GiB"):
        assert label in page.texts["text"]
    gradient, gradient_mean, update, _ = points(page, "Gradient and update norm")
    assert len(gradient) == len(update) == len(gradient_mean) == 50
    assert gradient[0][1] < update[0][1], "y grows downwards in SVG: the gradient is the larger one"


def test_the_areas_of_a_steps_time_are_as_high_as_their_times(tmp_path: Path) -> None:
    write_metrics(tmp_path, [detailed_line(step) for step in range(10, 501, 10)])
    found = areas(Page(write_report(tmp_path, [], UNKNOWN)))
    heights = [max(y for _, y in found[f"--series-{i}"][0]) - min(y for _, y in found[f"--series-{i}"][0]) for i in range(1, 6)]
    for height, milliseconds in zip(heights, (1, 50, 80, 20, 9), strict=True):
        assert height / sum(heights) == pytest.approx(milliseconds / 160, abs=0.002)


@pytest.mark.parametrize("gone", [None, math.nan, "x"])
def test_times_that_are_missing_or_no_numbers_leave_the_others(tmp_path: Path, gone: object) -> None:
    keys = ("time_data", "time_other", "update_norm", "share_evaluation", "mfu", "memory_bytes")
    lines = [training_line(10), *(detailed_line(step, **dict.fromkeys(keys, gone)) for step in range(20, 201, 10))]
    write_metrics(tmp_path, lines)
    page = Page(write_report(tmp_path, [], UNKNOWN))
    assert page.charts == [*CURVES[:4], "Where a step's time goes", "Gradient norm"]
    assert note(page, "Where a step&#39;s time goes").startswith("Of the steps: data 0.0%, forward 33.3%, backward 53.3%, ")
    assert note(page, "Where a step&#39;s time goes").endswith("Of the whole run: checkpointing 0.9%.")
    assert note(page, "Throughput") == ""


@pytest.mark.parametrize("steps", [1, 2, 100_000])
def test_times_of_one_step_and_of_many_are_drawn(tmp_path: Path, steps: int) -> None:
    write_metrics(tmp_path, [detailed_line(step) for step in range(1, steps + 1, max(1, steps // 5000))])
    found = areas(Page(write_report(tmp_path, [], UNKNOWN)))
    assert len(found) == 5
    assert all(4 <= len(outline[0]) <= 2 * 300 + 3 for outline in found.values())
    assert found["--series-3"][0][0][0] != found["--series-3"][0][1][0] or len(found["--series-3"][0]) > 4
