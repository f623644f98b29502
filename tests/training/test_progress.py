"""What a person sees of a run: a bar that keeps to one line of a terminal, whole lines elsewhere."""

from __future__ import annotations

import re

import pytest

from gpt.training.progress import Progress, fitting

PARTS = ["step 1200", "loss 3.210", "val 3.333", "1.187 bits/byte", "24,890 tokens/s", "mfu 41.3%", "0:33 left"]


def line(step: int, mfu: float | None = 0.413) -> dict[str, float | None]:
    return {"step": step, "loss": 3.21, "tokens": step * 4096, "tokens_per_second": 24890.0, "mfu": mfu, "seconds": step / 10}


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (200, PARTS),
        (71, [part for part in PARTS if "bits" not in part]),
        (60, ["step 1200", "loss 3.210", "val 3.333", "24,890 tokens/s", "0:33 left"]),
        (45, ["step 1200", "loss 3.210", "val 3.333", "0:33 left"]),
        (10, ["step 1200", "loss 3.210"]),
    ],
)
def test_what_a_line_can_best_do_without_goes_first(width, shown):
    assert fitting(PARTS, width) == "  ".join(shown)


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_the_bar_keeps_to_one_line(columns, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress(1200, timed=False) as progress:
        progress.validated({"val_loss": 3.333, "val_bpb": 1.187})
        progress.update(line(600))
        progress.say("a line in between")
        progress.update(line(1200))
    shown = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text) for text in re.split(r"[\r\n]", capsys.readouterr().err)]
    assert "a line in between" in shown
    assert all(len(text) <= columns for text in shown)
    last = [text for text in shown if "step 1200" in text][-1]
    assert "loss 3.210" in last
    assert "━━━" in last
    assert "…" not in last
    assert ("mfu 41.3%" in last) == (columns >= 80)
    assert ("val 3.333" in last) == (columns >= 60)


def test_elsewhere_lines_are_whole_and_few(capsys):
    with Progress(1200, timed=False) as progress:
        progress.validated({"val_loss": 3.333, "val_bpb": 1.187})
        progress.update(line(400))
        progress.update(line(800))  # within a moment
        progress.say("a line in between")
        progress.update(line(1200, mfu=None))
    assert capsys.readouterr().err.splitlines() == [
        "step 400  loss 3.210  val 3.333  1.187 bits/byte  24,890 tokens/s  mfu 41.3%  2:12 left",
        "a line in between",
        "step 1200  loss 3.210  val 3.333  1.187 bits/byte  24,890 tokens/s  0:00 left",
    ]
