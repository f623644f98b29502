"""A run's page read back as a browser would, and files of runs to make pages of."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from gpt.training.report import Sample, Summary

SUMMARY = Summary(
    title="pretrain-20261120-kmqz",
    model="nano, 2.2M parameters, Qwen3 shape",
    steps=1150,
    tokens=4_710_400,
    seconds=191.6,
    tokens_per_second=24_890.2,
    best_val_loss=2.1042,
    best_step=1000,
    val_bpb=1.1871,
    gzip_bpb=1.934,
    xz_bpb=1.612,
    skipped_steps=0,
    finished=True,
)
UNKNOWN = dataclasses.replace(SUMMARY, best_val_loss=None, best_step=None, val_bpb=None, gzip_bpb=None, xz_bpb=None)
SAMPLES = [Sample("def add(a, b):", "\n    return a + b\n"), Sample("import ", "os\n")]
CURVES = ["Loss by step", "Loss by time", "Learning rate", "Throughput", "Gradient norm"]
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page taken apart: the text under each kind of tag, the attributes, and whether the tags close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append((tag, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        opened, text = self.open.pop()
        assert opened == tag
        self.texts.setdefault(tag, []).append("".join(text))

    def handle_data(self, data: str) -> None:
        for _, text in self.open:
            text.append(data)

    @property
    def charts(self) -> list[str]:
        return self.texts.get("figcaption", [])


def training_line(step: int, **changes: Any) -> dict[str, Any]:
    line = {"step": step, "tokens": step * 4096, "epoch": step / 900, "loss": 2 + 5 * math.exp(-step / 100) + 0.1 * (step % 3)}
    rates = {"lr": 0.004, "grad_norm": 1.2, "tokens_per_second": 25000.0, "mfu": None, "seconds": step * 0.17, "skipped_steps": 0}
    return {**line, **rates, **changes}


def validation_line(step: int, loss: float = 2.5) -> dict[str, Any]:
    return {"step": step, "tokens": step * 4096, "seconds": step * 0.17, "val_loss": loss, "val_bpb": loss / 2}


def write_metrics(directory: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def points(page: Page, chart: str) -> list[list[tuple[float, float]]]:
    """The curves of one chart, in the coordinates of its SVG. The legend, which repeats each line, comes after them."""
    figure = next(part for part in page.source.split("<figure>") if f"<figcaption>{chart}<" in part)
    found = re.findall(r'<path d="([^"]*)" style="fill: none; stroke: var\(--(?:accent|second)\)', figure)
    curves = [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in found]
    names = ("training", "training, smoothed", "validation", "gradient, smoothed", "update, smoothed")
    handles = sum(f">{label}</text>" in figure for label in names)
    return curves[: len(curves) - handles]


def detailed_line(step: int, **changes: Any) -> dict[str, Any]:
    times = {"time_data": 0.001, "time_forward": 0.05, "time_backward": 0.08, "time_optimizer": 0.02, "time_other": 0.009}
    others = {"update_norm": 0.01, "mfu": 0.412, "memory_bytes": step * 2**20, "share_evaluation": 0.032, "share_checkpointing": 0.009}
    return {**training_line(step), **times, **others, **changes}


def note(page: Page, chart: str) -> str:
    figure = next(part for part in page.source.split("<figure>") if f"<figcaption>{chart}<" in part)
    return re.sub(r".*</svg>\s*|</?p>\s*|</figure>.*", "", figure, flags=re.DOTALL).strip()
