"""The page of `gpt runs compare`: each run's own numbers, one look for each, and only the settings that differ."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from made_runs import write_run

from gpt.errors import UserError
from gpt.runs.compare import MOST_CURVES, differing_keys, write_comparison
from gpt.runs.listing import describe_run

CHARTS = [
    "Validation loss by tokens", "Validation loss by time", "Training loss by step", "Training loss by tokens", "Training loss by time",
    "Learning rate", "Throughput", "Gradient norm",
]  # fmt: skip


class Tables(HTMLParser):
    """The tables of a page as rows of texts, and the texts of its other elements."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.source = page.read_text(encoding="utf-8")
        self.tables: list[list[list[str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag in ("h1", "title", "figcaption", "li"):
            self.texts.setdefault(tag, []).append("")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            if tag in ("th", "td"):
                self.tables[-1][-1][-1] += data.strip()
            if tag in ("h1", "title", "figcaption", "li"):
                self.texts[tag][-1] += data.strip()


def curves(page: Tables, chart: str) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """Colour, dashes and points in the coordinates of the SVG of every curve of a chart, the one on top last."""
    figure = next(part for part in page.source.split("<figure>") if f"<figcaption>{chart}<" in part)
    found = re.findall(r'<path d="([^"]*)" style="fill: none; (?:stroke-dasharray: ([^;]*);[^"]*?)?stroke: (var\(--series[^;]*)', figure)
    return [(colour, dash, [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]) for path, dash, colour in found]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three runs, the second one the best, and a broken one."""
    directories = [
        write_run(tmp_path / "first", best=2.5, seed=1),
        write_run(tmp_path / "second", best=2.0, seed=2, optimizer__lr=0.02),
        write_run(tmp_path / "third", step=30, best=3.0, seed=3),
    ]
    (tmp_path / "broken" / "checkpoints").mkdir(parents=True)
    return [*directories, tmp_path / "broken"]


def test_a_page_of_runs_the_best_first(runs: list[Path], tmp_path: Path) -> None:
    path = write_comparison(runs[:3], tmp_path / "page.html", "A <sweep> & more")
    assert path == tmp_path / "page.html"
    assert not (tmp_path / "page.html.tmp").exists()
    page = Tables(path)
    assert page.texts["h1"] == page.texts["title"] == ["A <sweep> & more"]
    assert page.texts["figcaption"] == CHARTS
    table, settings = page.tables
    head = ["run", "state", "best val loss", "at step", "bits/byte", "last loss", "steps", "tokens learned", "time", "learned/s"]
    assert table[0] == head
    assert table[1] == ["second", "finished", "2.0000", "20", "1.000", "2.0916", "40", "163.8k", "10.5s", "15,604"]
    assert [row[0] for row in table[1:]] == ["second", "first", "third"]
    assert table[3][1:7] == ["interrupted", "3.0000", "20", "1.500", "3.2489", "30 of 40"]
    assert settings == [["run", "seed", "optimizer.lr"], ["second", "2", "0.02"], ["first", "1", "0.01"], ["third", "3", "0.01"]]
    assert page.texts["li"] == ["secondseed=2 lr=0.02", "firstseed=1 lr=0.01", "thirdseed=3 lr=0.01"]


def test_every_curve_has_its_look_and_its_numbers(runs: list[Path], tmp_path: Path) -> None:
    page = Tables(write_comparison(runs[:3], tmp_path / "page.html", ""))
    legend = re.findall(r'<path d="M0 4H26" style="stroke: ([^;"]*)', page.source)
    best, first, third = (f"var(--series-{number})" for number in (1, 2, 3))
    assert legend[:3] == legend[3:6] == legend[-3:] == [best, first, third], "in both tables and above the curves"
    losses = {colour: points for colour, _, points in curves(page, "Training loss by step")}
    assert {colour: len(points) for colour, points in losses.items()} == {best: 20, first: 20, third: 15}
    ends = {colour: points[-1][1] for colour, points in losses.items()}
    assert ends[best] > ends[first] > ends[third], "y grows downwards in SVG"
    checks = curves(page, "Validation loss by tokens")
    assert [(colour, len(points)) for colour, _, points in checks] == [(third, 1), (first, 2), (best, 2)], "the best one on top"
    assert losses[third][-1][0] == pytest.approx(losses[best][14][0], abs=0.1), "the same step is at the same place"


def test_the_page_is_sound_and_asks_for_nothing(runs: list[Path], tmp_path: Path) -> None:
    page = Tables(write_comparison(runs, tmp_path / "page.html", "all"))
    ids: list[str] = []
    for image in re.findall(r"<svg(?! class).*?</svg>", page.source, flags=re.DOTALL):
        ids += [str(element.get("id")) for element in ElementTree.fromstring(image).iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > len(CHARTS)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page.source
    assert not re.search(r"<script|@import|url\((?!#)|#0000..", page.source)
    assert set(re.findall(r"var\((--[\w-]+)\)", page.source)) <= set(re.findall(r"(--[\w-]+):", page.source))


def test_as_many_runs_as_can_be_told_apart_have_curves(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{number:02}", best=2 + number / 100) for number in range(MOST_CURVES + 2)]
    page = Tables(write_comparison(runs, tmp_path / "page.html", "many"))
    looks = [(colour, dash) for colour, dash, _ in curves(page, "Learning rate")]
    assert len(looks) == len(set(looks)) == MOST_CURVES == 24
    assert [row[0] for row in page.tables[0][1:]] == [run.name for run in runs]
    assert page.texts["li"] == [run.name for run in runs[:MOST_CURVES]]
    assert "The 24 best have curves." in page.source
    assert "None: their configs are the same." in page.source


def test_one_run_broken_runs_and_runs_of_the_same_name(runs: list[Path], tmp_path: Path) -> None:
    page = Tables(write_comparison(runs[3:], tmp_path / "page.html", "broken"))
    assert page.tables == [[page.tables[0][0], ["broken", "broken: no config.yaml", *["–"] * 4, "0", "0", "0.0s", "–"]]]
    assert "None of them has recorded metrics." in page.source
    other = write_run(tmp_path / "elsewhere" / "first")
    page = Tables(write_comparison([runs[0], other, runs[3]], tmp_path / "page.html", ""))
    assert [row[0] for row in page.tables[0][1:]] == [str(other), str(runs[0]), "broken"]
    assert ["seed", "1337", "1", "–"] in page.tables[1], "more keys than runs: a row for each key"
    assert len(Tables(write_comparison(runs[:1], tmp_path / "page.html", "")).tables) == 1


def test_what_an_older_run_did_not_write_down_has_its_default(runs: list[Path]) -> None:
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    del config["train"]["ema"], config["parallel"]
    config["train"]["forgotten"] = [1, "a"]
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [describe_run(run) for run in runs[:2]]
    assert differing_keys(rows) == {"seed": ["1", "2"], "optimizer.lr": ["0.01", "0.02"], "train.forgotten": ["[1, a]", "–"]}


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "</td><script>alert('x')</script>&amp;{{ 7 * 7 }}"
    runs = [write_run(tmp_path / "a", init=evil), write_run(tmp_path / "<b>&amp;")]
    page = Tables(write_comparison(runs, tmp_path / "page.html", evil))
    assert page.texts["h1"] == [evil]
    assert "<script" not in page.source
    assert {row[0]: row[1] for row in page.tables[1][1:]} == {"a": evil, "<b>&amp;": "null"}


def test_a_page_that_cannot_be_written(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"output=.*no/page.html: cannot be written: No such file"):
        write_comparison(runs, tmp_path / "no" / "page.html", "")
