"""profile=true: the steps that are recorded, the trace, the table, and runs that end too soon."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt.runtime.cpu import Cpu
from gpt.runtime.mps import Mps
from gpt.training.profile import DEAREST, Profiler, dearest_operations

HEADING = ["operation", "calls/step", "ms/step", "share"]


def train(directory: Path, steps: int) -> list[str]:
    said: list[str] = []
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    profiler = Profiler(directory, Cpu("CPU", torch.float32), said.append)
    for _ in range(steps):
        model(torch.ones(128, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        profiler.step()
    profiler.close()
    profiler.close()
    return said


def recorded(directory: Path) -> list[str]:
    with gzip.open(directory / "trace.json.gz", "rt") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert "aten::addmm" in names
    return sorted(name for name in names if name.startswith("ProfilerStep"))


def test_three_steps_are_recorded_after_five_and_the_dearest_operations_said_once(tmp_path):
    said = train(tmp_path / "profile", 12)
    assert recorded(tmp_path / "profile") == ["ProfilerStep#5", "ProfilerStep#6", "ProfilerStep#7"]
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["trace.json.gz"]
    assert str(tmp_path / "profile" / "trace.json.gz") in said[0]
    assert said[1].split() == HEADING
    rows = said[2:]
    assert len(rows) == DEAREST
    assert len({len(row) for row in said[1:]}) == 1  # aligned
    shares = [float(row.split()[-1].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.1
    products = {row.split()[0]: row.split()[1] for row in rows}
    assert products["aten::addmm"] == "2"  # a forward pass has two
    assert products["aten::mm"] == "3"  # a backward pass has three: the input needs no gradient


def test_a_run_that_ends_within_the_window_gives_what_it_has(tmp_path):
    said = train(tmp_path, 7)
    assert "2 of the 3 steps" in said[0]
    assert recorded(tmp_path)[:2] == ["ProfilerStep#5", "ProfilerStep#6"]  # the third had begun
    assert said[2].split() == HEADING
    assert {row.split()[0]: row.split()[1] for row in said[3:]}["aten::addmm"] == "2"  # per step, of two


@pytest.mark.parametrize("steps", [0, 3, 5])
def test_a_run_that_ends_before_says_that_nothing_was_recorded(steps, tmp_path):
    said = train(tmp_path, steps)
    assert len(said) == 1
    assert f"after {steps} steps" in said[0]
    assert not any(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_is_said_and_the_table_still_comes(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    said = train(tmp_path / "profile", 8)
    assert "could not be written" in said[0]
    assert said[1].split() == HEADING
    assert len(said) == 2 + DEAREST


def event(key: str, on_device: bool, microseconds: float, annotation: bool = False) -> SimpleNamespace:
    device = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
    return SimpleNamespace(
        key=key, count=6, device_type=device, is_user_annotation=annotation,
        self_cpu_time_total=microseconds, self_device_time_total=microseconds,
    )  # fmt: skip


def test_of_an_accelerator_its_kernels_count_once_and_long_names_are_cut():
    events = [
        event("aten::mm", False, 9000), event("ProfilerStep*", True, 9000), event("ProfilerStep*", False, 9000),
        event("Optimizer.step", True, 9000, annotation=True), event("copy", True, 1500), event("gemm" * 30, True, 4500),
    ]  # fmt: skip
    heading, gemm, copy = dearest_operations(events, 3, on_cpu=False)
    assert heading.split() == HEADING
    assert gemm.split()[1:] == ["2", "1.50", "75.0%"]
    assert len(gemm.split()[0]) == 60
    assert gemm.split()[0].endswith("…")
    assert copy.split() == ["copy", "2", "0.50", "25.0%"]
    assert len(heading) == len(gemm) == len(copy)


def test_a_device_that_did_nothing_is_said():
    assert dearest_operations([event("aten::mm", False, 1.0)], 3, on_cpu=False) == [
        "profile: the device did nothing that could be recorded"
    ]


def test_a_device_that_the_profiler_cannot_see_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.profiler, "supported_activities", lambda: {torch.profiler.ProfilerActivity.CPU})
    said: list[str] = []
    Profiler(tmp_path, Mps("MPS", torch.float32), said.append).close()
    assert "cannot look into mps" in said[0]
