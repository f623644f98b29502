"""The page while a run goes on: what it says, who draws it, and that it never replaces the final one."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from gpt.config import RunConfig
from gpt.training.report import LiveReport, write_live_report, write_report
from tests.training.report_pages import (
    SAMPLES,
    SUMMARY,
    Page,
    detailed_line,
    training_line,
    validation_line,
    write_metrics,
)


@pytest.fixture
def running(tmp_path: Path) -> Path:
    """A run of 1150 steps at its 400th; its lock is for the test to take."""
    config = RunConfig().to_dict()
    config["train"]["budget"] = "1150steps"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    write_metrics(tmp_path, [detailed_line(step) for step in range(10, 401, 10)] + [validation_line(200, 2.2), validation_line(400, 2.3)])
    return tmp_path


def refreshes(page: Page) -> bool:
    return ("meta", "http-equiv", "refresh") in page.attributes


def header(page: Page) -> str:
    return " ".join(page.texts["header"][0].split())


def test_a_running_run_says_how_far_it_is_and_reloads(running: Path) -> None:
    with FileLock(running / ".lock"):
        page = Page(write_live_report(running))
    assert "Running, step 400 of 1,150, 34%, 2 min left · GPT2 shape Drawn at " in header(page)
    assert refreshes(page)
    assert ("meta", "content", "30") in page.attributes
    cards = dict(zip(page.texts["dt"], page.texts["dd"][::2], strict=True))
    assert cards == {
        "Bits per byte": "1.100", "Best validation loss": "2.200", "Tokens": "1.638M", "Training time": "1m 08s",
        "Tokens per second": "25,000",
    }  # fmt: skip
    assert "Where a step's time goes" in page.charts


def test_a_run_whose_process_is_gone_is_interrupted_and_does_not_reload(running: Path) -> None:
    page = Page(write_live_report(running))
    assert header(page).endswith("Interrupted after 400 steps · GPT2 shape")
    assert not refreshes(page)
    with FileLock(running / ".lock"):
        page = Page(write_live_report(running, stopped=True))
    assert "Interrupted after 400 steps" in header(page)
    assert not refreshes(page)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("400steps", "Running, step 400 of 400, all trained; measuring and saving the result"),
        ("4Mtokens", "Running, step 400 of 977, 40%, 98 s left"),
        ("1epochs", "Running, step 400 of 900, 44%, 85 s left"),
        ("100000steps", "Running, step 400 of 100,000, 0%, 4.7 h left"),
        ("2min", "Running, step 400, 56%, 52 s left"),
    ],
)
def test_how_much_is_left(running: Path, budget: str, said: str) -> None:
    config = yaml.safe_load((running / "config.yaml").read_text())
    config["train"]["budget"] = budget
    write_metrics(running, [{key: training_line(step)[key] for key in ("step", "seconds", "epoch", "loss")} for step in range(2, 401, 2)])
    (running / "config.yaml").write_text(yaml.safe_dump(config))
    with FileLock(running / ".lock"):
        assert said in header(Page(write_live_report(running)))


def test_a_run_that_has_not_logged_yet(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"):
        page = Page(write_live_report(tmp_path))
    assert "Running, no step logged yet" in header(page)
    assert "No metrics are recorded yet." in page.texts["p"]


def test_parameters_are_counted_in_the_checkpoint(running: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    folder = running / "checkpoints" / "step-00000400"
    folder.mkdir(parents=True)
    save_file({"a": np.zeros((300, 400)), "b": np.zeros(5000)}, folder / "model.safetensors", {"format": "pt"})
    (running / "checkpoints" / "step-00000410").mkdir()
    (running / "checkpoints" / "step-00000410" / "model.safetensors").write_bytes(b"cut")
    page = Page(write_live_report(running))
    assert "0.12M parameters, GPT2 shape" in header(page)


def test_the_page_of_a_finished_run_is_left_alone(running: Path) -> None:
    write_metrics(running, [training_line(step) for step in range(10, 1151, 10)])
    (running / "model").mkdir()
    (running / "model" / "config.json").write_text("{}")
    final = write_report(running, SAMPLES, SUMMARY).read_bytes()
    assert write_live_report(running).read_bytes() == final
    (running / "report.html").unlink()
    assert "Finished after 1,150 steps" in header(Page(write_live_report(running)))


def wait_until(happens: Any, seconds: float = 200) -> None:
    """The drawing process has the lowest priority, so a busy machine makes it wait long."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.02)


def drawing(live: LiveReport) -> bool:
    return live._thread is not None and live._thread.is_alive()


def test_the_page_is_drawn_beside_the_run_and_not_too_often(running: Path) -> None:
    said: list[str] = []
    live = LiveReport(running, every_seconds=0, say=said.append)
    with FileLock(running / ".lock"):
        started = time.monotonic()
        live.refresh()
        assert time.monotonic() - started < 0.5, "training does not wait"
        first = live._thread
        live.refresh(now=True)
        assert live._thread is first, "never two at once"
        wait_until(lambda: not drawing(live))
        assert "Running, step 400" in header(Page(running / "report.html"))
        live.refresh()
        assert live._thread is first, "the first one took some time, so the next one waits for many times that"
        assert 10 < live._due - time.monotonic() < 500
        live.refresh(now=True)
        assert live._thread is not first
        live.close(stopped=True)
    wait_until(lambda: not drawing(live))
    assert "Interrupted after 400 steps" in header(Page(running / "report.html"))
    assert said == []


def test_nothing_is_drawn_after_the_close(running: Path) -> None:
    said: list[str] = []
    for pause in (0, 0.01, 0.3):
        live = LiveReport(running, say=said.append)
        with FileLock(running / ".lock"):
            live.refresh()
            time.sleep(pause)
            live.close()
            assert not drawing(live)
            final = write_report(running, [], SUMMARY).read_bytes()
            live.refresh(now=True)
            assert not drawing(live)
    time.sleep(0.5)
    assert (running / "report.html").read_bytes() == final
    assert said == []
    LiveReport(running).close()  # without a page


def test_the_first_page_that_fails_is_named_once(running: Path) -> None:
    said: list[str] = []
    (running / "report.html").mkdir()
    live = LiveReport(running, every_seconds=0, say=said.append)
    for _ in range(2):
        live.refresh(now=True)
        wait_until(lambda: not drawing(live))
    live.close()
    assert len(said) == 1
    assert re.fullmatch(rf"warning: {re.escape(str(running))}/report.html could not be drawn \(.*directory.*\); training goes on", said[0])


def test_drawing_costs_less_than_two_seconds_of_a_core_at_the_lowest_priority(running: Path) -> None:
    write_metrics(running, [detailed_line(step) for step in range(10, 50_001, 10)])
    code = f"import os; from gpt.training.report import main; main([{str(running)!r}]); print(os.nice(0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    seconds, niceness = done.stdout.split()
    assert int(niceness) == 19
    assert 0.1 < float(seconds) < 3  # alone on its core 1.0; a sibling on the same core can double it


def test_the_import_is_light() -> None:
    code = (
        "import sys, gpt.training.report, gpt.runs.command; "
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'jinja2', 'numpy', 'torch')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
