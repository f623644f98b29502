"""What a run directory says about its run, in every state that it can be in, and the table of many."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from made_runs import write_run

from gpt.compose import compose_run
from gpt.errors import UserError
from gpt.runs.listing import ORDERS, describe_run, find_run, find_runs, format_table

ROOT = Path(__file__).parents[2]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_finished_run_in_figures(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "one")
    before = contents(directory)
    row = describe_run(directory)
    assert (row.id, row.path, row.command, row.state, row.problem) == ("one", directory, "pretrain", "finished", "")
    assert (row.step, row.total, row.total_seconds, row.tokens) == (40, 40, None, 40 * 4096)
    assert (row.best_val_loss, row.best_step, row.val_bpb) == (2.0, 20, 1.0)
    assert row.last_loss == pytest.approx(2.0916, abs=1e-4)
    assert row.seconds == 10.5, "the checkpoint knows of time after the last line"
    assert row.size_bytes == sum(map(len, before.values()))
    assert row.started == "2026-11-20T10:00:00+00:00"
    assert contents(directory) == before


def test_a_run_by_the_trainer_itself(tmp_path: Path, corpus: Path, cache_dir: Path) -> None:
    from gpt.training.trainer import Trainer

    places = [f"data.paths=[{corpus}]", f"data.cache_dir={cache_dir}", f"run.dir={tmp_path}", "run.id=real", "data=text"]
    sizes = ["train.budget=4steps", "train.log_every=2", "train.eval_every=3", "train.eval_tokens=1024", "train.final_eval_tokens=1024"]
    config = compose_run("pretrain", ["debug=golden", "train.sample_prompts=[a]", "train.sample_tokens=2", *places, *sizes])
    result = Trainer(config).fit()
    row = describe_run(tmp_path / "real")
    assert (row.state, row.problem, row.step, row.total) == ("finished", "", 4, 4)
    state = result.state
    assert (row.best_val_loss, row.best_step, row.tokens, row.seconds) == (
        state.best_val_loss,
        state.best_step,
        state.tokens,
        state.seconds,
    )
    longer = yaml.safe_load((tmp_path / "real" / "config.yaml").read_text())
    longer["train"]["budget"] = "9steps"  # as if it went on from there, and were killed
    (tmp_path / "real" / "config.yaml").write_text(yaml.safe_dump(longer))
    row = describe_run(tmp_path / "real")
    assert (row.state, row.step, row.total) == ("interrupted", 4, 9)


def test_a_run_is_running_as_long_as_its_lock_is_held(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "one", step=20)
    assert describe_run(directory).state == "interrupted"
    lock = FileLock(directory / ".lock")
    with lock:
        assert describe_run(directory).state == "running"
    assert describe_run(directory).state == "interrupted"
    lock.acquire(timeout=0)  # reading left it free
    lock.release()
    with FileLock(tmp_path / "new" / ".lock"):  # it still prepares its data
        row = describe_run(tmp_path / "new")
        assert (row.state, row.problem, row.step, row.total) == ("running", "", 0, None)


def test_looking_makes_no_lock(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "one")
    (directory / ".lock").unlink()
    assert describe_run(directory).state == "finished"
    assert not (directory / ".lock").exists()


@pytest.mark.parametrize(
    ("changes", "state", "total", "total_seconds"),
    [
        ({"step": 40, "finished": False}, "interrupted", 40, None),  # killed while it measured the result
        ({"step": 38, "finished": True}, "interrupted", 40, None),
        ({"step": 40, "budget": "163840tokens"}, "finished", 40, None),
        ({"step": 40, "budget": "163841tokens"}, "interrupted", 41, None),
        ({"step": 40, "budget": "4epochs"}, "finished", 40, None),
        ({"step": 38, "budget": "4epochs", "finished": True}, "interrupted", 40, None),
        ({"step": 40, "budget": "10s"}, "finished", None, 10.0),
        ({"step": 38, "budget": "10s", "finished": True}, "interrupted", None, 10.0),
        ({"step": 0, "finished": False}, "not started", 40, None),
        ({"step": 40, "budget": "soon"}, "finished", None, None),
    ],
)
def test_a_run_is_finished_when_its_length_is_reached_and_its_model_is_there(
    tmp_path: Path, changes: dict[str, Any], state: str, total: int | None, total_seconds: float | None
) -> None:
    row = describe_run(write_run(tmp_path / "one", **changes))
    assert (row.state, row.total, row.total_seconds) == (state, total, total_seconds)


@pytest.mark.parametrize("text", [None, "", "[1]", "{", "a: b: c", "\ud800", "train: 3", "train: {budget: [1]}"])
def test_a_config_that_is_none(tmp_path: Path, text: str | None) -> None:
    directory = write_run(tmp_path / "one")
    (directory / "config.yaml").unlink()
    if text is not None:
        (directory / "config.yaml").write_bytes(text.encode(errors="surrogatepass"))
    row = describe_run(directory)
    if text is not None and "train" in text:  # a config, but of another kind
        assert (row.state, row.total) == ("finished", None)
    else:
        assert row.state == "broken"
        assert row.problem == ("no config.yaml" if text is None else "config.yaml cannot be read")
    assert (row.step, row.best_val_loss) == (40, 2.0), "what can be read is shown"


def test_a_cut_last_line_is_no_damage_but_others_are(tmp_path: Path) -> None:
    metrics = write_run(tmp_path / "one") / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 42, "loss": 1.')
    assert (describe_run(tmp_path / "one").step, describe_run(tmp_path / "one").problem) == (40, "")
    metrics.write_text("\0\0\0\0\n" + whole)
    assert (describe_run(tmp_path / "one").step, describe_run(tmp_path / "one").problem) == (40, "metrics.jsonl is damaged")
    metrics.write_bytes(b"\xff\xfe")
    row = describe_run(tmp_path / "one")
    assert (row.best_val_loss, row.last_loss, row.step, row.problem) == (None, None, 40, "metrics.jsonl is damaged")
    metrics.write_text('{"step": "x", "loss": null, "tokens": NaN}\n{"val_loss": Infinity, "step": 2}\n{"val_loss": 3.5}\n')
    row = describe_run(tmp_path / "one")
    assert (row.best_val_loss, row.best_step, row.last_loss, row.step) == (3.5, None, None, 40)


def test_damaged_json_is_passed_over_and_named(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "one", step=30, finished=False)
    for name, text in (("step-00000032", "{"), ("step-00000034", None), ("step-00000036", "[]")):
        (directory / "checkpoints" / name).mkdir()
        if text is not None:
            (directory / "checkpoints" / name / "state.json").write_text(text)
    (directory / "environment.json").write_text('{"started": ')
    row = describe_run(directory)
    assert (row.step, row.seconds, row.state) == (30, 8.0, "interrupted")
    assert row.problem == "checkpoints step-00000036, step-00000034, step-00000032 without a readable state.json"
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row.started)


def test_runs_are_found_in_a_folder_and_in_its_folders(tmp_path: Path) -> None:
    for name in ("b", "a", "sweep/2", "sweep/1", "sweep/.hidden"):
        write_run(tmp_path / name)
    (tmp_path / "sweep" / "deeper" / "still").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    assert [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)] == ["a", "b", "half", "sweep/1", "sweep/2"]
    assert describe_run(tmp_path / "half").state == "broken"
    assert find_runs(tmp_path / "nowhere") == []


def test_a_run_is_found_by_path_id_or_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pretrain-1-abcd", "pretrain-2-efgh", "pretrain-22-ijkl", "sweep/0", "sweep/1"):
        write_run(tmp_path / "runs" / name)
    runs = tmp_path / "runs"
    assert find_run("pretrain-2-efgh", runs) == runs / "pretrain-2-efgh"
    assert find_run("abcd", runs) == find_run("pretrain-1", runs) == runs / "pretrain-1-abcd"
    assert find_run(str(runs / "sweep/1"), tmp_path / "other") == find_run("sweep/1", runs) == runs / "sweep/1"
    monkeypatch.chdir(runs)
    assert find_run("pretrain-1-abcd", Path("nowhere")) == Path("pretrain-1-abcd")
    for name, said in (
        ("pretrain-2", "pretrain-2 may be pretrain-2-efgh, pretrain-22-ijkl; write more"),
        ("pretrain-2-efhg", "no such run in .*Did you mean pretrain-2-efgh"),
        ("runs/sweep/11", "Did you mean .*sweep/1"),
        ("zzz", r"There are pretrain-1-abcd, pretrain-2-efgh, pretrain-22-ijkl and 2 more$"),
        ("sweep", "sweep is no run directory but holds 2 runs; name some"),
        ("x" * 5000, "no such run"),
    ):
        with pytest.raises(UserError, match=said):
            find_run(name, runs)


def test_the_table(tmp_path: Path) -> None:
    write_run(tmp_path / "old", best=2.5)
    write_run(tmp_path / "new", step=10, started="2026-11-20T11:00:00+00:00")
    write_run(tmp_path / "timed", step=20, budget="1min", best=2.2, started="2026-11-19T11:00:00+00:00")
    (tmp_path / "bad" / "checkpoints").mkdir(parents=True)
    rows = [describe_run(path) for path in find_runs(tmp_path)]
    assert [row.id for row in sorted(rows, key=ORDERS["val_loss"])] == ["timed", "old", "bad", "new"]
    assert [row.id for row in sorted(rows, key=ORDERS["started"])][:3] == ["timed", "old", "new"]
    assert [row.id for row in sorted(rows, key=ORDERS["step"])] == ["bad", "new", "timed", "old"]
    lines = format_table(sorted(rows, key=ORDERS["time"])).splitlines()
    cells = [re.split(r"  +", line) for line in lines]
    assert cells[0] == ["run", "state", "step", "best val loss", "bits/byte", "last loss", "time", "size"]
    assert cells[1] == ["bad", "broken", "0", "-", "-", "-", "0.0s", "0 B", "(no config.yaml)"]
    assert cells[2][:7] == ["new", "interrupted", "10 of 40", "-", "-", "3.839", "3.0s"]
    assert cells[3][:7] == ["timed", "interrupted", "20", "2.200 at 20", "1.100", "2.877", "5.5s of 1m 00s"]
    assert cells[4][:7] == ["old", "finished", "40", "2.500 at 20", "1.250", "2.592", "10.5s"]
    assert lines[5] == ""
    assert re.fullmatch(r"4 runs \(2 interrupted, 1 broken, 1 finished\), 19\.0s, \d+\.\d kB", lines[6])
    assert len({len(line.partition("  (")[0]) for line in lines[:5]}) == 1
    assert format_table([]).endswith("0 runs (), 0.0s, 0 B")


def test_hundreds_of_runs_are_listed_fast_and_without_torch(tmp_path: Path) -> None:
    model = write_run(tmp_path / "0", step=1000, budget="2000steps")
    texts = contents(model)
    for number in range(1, 200):
        for name, text in texts.items():
            (tmp_path / f"{number}" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{number}" / name).write_bytes(text)
    code = (
        "import sys, time\nfrom gpt.cli import main\n"
        f"assert main(['runs', 'dir={tmp_path}']) == 0\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'rich', 'hydra'} & sys.modules.keys()\n"
        "print(time.process_time())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, cwd=ROOT
    ).stdout.splitlines()
    assert out[-2].startswith("200 runs (200 interrupted)")
    assert float(out[-1]) < 3


def test_rows_are_read_from_json_that_holds_anything(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "one")
    for value in (None, [], {}, "x", True, -1, 1e400):
        text = json.dumps({"step": value, "tokens": value, "seconds": value, "val_loss": value, "loss": value, "epoch": value})
        (directory / "metrics.jsonl").write_text(text + "\n" + text)
        (directory / "checkpoints" / "step-00000040" / "state.json").write_text(text)
        (directory / "environment.json").write_text(json.dumps({"started": value}))
        format_table([describe_run(directory)])
