"""`gpt runs` and `gpt runs compare` as one types them."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import write_run

from gpt.cli import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def three(here: Path) -> Path:
    write_run(here / "runs" / "pretrain-1-abcd", best=2.5)
    write_run(here / "runs" / "pretrain-2-efgh", step=20, started="2026-11-20T11:00:00+00:00", optimizer__lr=0.02)
    write_run(here / "runs" / "sweep" / "0", best=3.0, started="2026-11-20T09:00:00+00:00")
    return here


def first_words(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines() if line]


def test_no_runs_yet_is_no_mistake(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs in runs yet; gpt pretrain makes one\n"
    (here / "other").mkdir()
    assert main(["runs", "dir=other"]) == 0
    assert capsys.readouterr().out == "no runs in other\n"
    assert [path.name for path in here.iterdir()] == ["other"]


def test_runs_are_listed_the_newest_last(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    assert first_words(capsys.readouterr().out) == ["run", "sweep/0", "pretrain-1-abcd", "pretrain-2-efgh", "3"]
    assert main(["runs", "sort=val_loss"]) == 0
    assert first_words(capsys.readouterr().out) == ["run", "pretrain-2-efgh", "pretrain-1-abcd", "sweep/0", "3"]
    assert main(["runs", "dir=runs/sweep"]) == 0
    assert first_words(capsys.readouterr().out) == ["run", "0", "1"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain-1-abcd", "pretrain-2-efgh"],
        ["runs=[pretrain-1-abcd,pretrain-2-efgh]"],
        ["abcd", "efgh", "runs/pretrain-1-abcd"],
        ["dir=runs", "runs/pretrain-1-abcd/", "efgh"],
    ],
)
def test_runs_are_compared_by_words_or_by_a_setting(arguments: list[str], three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "compare", *arguments]) == 0
    out = capsys.readouterr().out
    assert first_words(out) == ["run", "pretrain-2-efgh", "pretrain-1-abcd", "2", "They", "page:"]
    assert "They differ in: optimizer.lr\npage: compare.html\n" in out
    page = (three / "compare.html").read_text(encoding="utf-8")
    assert "<h1>pretrain-2-efgh and pretrain-1-abcd</h1>" in page


def test_a_path_with_an_equals_sign_is_a_word(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(three / "sweeps" / "lr=0.1")
    assert main(["runs", "compare", "sweeps/lr=0.1", "abcd", "sweep/0", "output=out.html"]) == 0
    assert "lr=0.1" in capsys.readouterr().out
    assert "<h1>3 runs compared</h1>" in (three / "out.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("runs compare abcd", "runs: which runs besides abcd? Name at least two"),
        ("runs compare abcd pretrain-1-abcd", "runs: abcd, pretrain-1-abcd are all the same run"),
        ("runs compare abcd pretrain-2-efhg", "runs: pretrain-2-efhg: no such run in runs. Did you mean pretrain-2-efgh?"),
        ("runs compare abcd pretrain", "runs: pretrain may be pretrain-1-abcd, pretrain-2-efgh; write more of the name"),
        ("runs compare abcd runs", "runs: runs is no run directory but holds 3 runs; name some"),
        ("runs compare abcd efgh runs=[x]", "abcd: give words or runs=[...], not both"),
        ("runs compare abcd efgh output=runs", "output=runs: is a folder; name a file in it"),
        ("runs compare abcd efgh output=no/x.html", "output=no/x.html: there is no folder no"),
        ("runs compare abcd efgh output=", "output: which file?"),
        ("runs compare abcd efgh dir=rnus", "dir=rnus: there is no such folder. Did you mean runs?"),
        ("runs compare abcd efgh outptu=x", "outptu=x: no such key. Did you mean output?"),
        ("runs dir=rusn", "dir=rusn: there is no such folder. Did you mean runs?"),
        ("runs dir=", "dir: which folder of runs?"),
        ("runs runs/sweep", "runs/sweep: must be key=value. Did you mean dir=runs/sweep?"),
        ("runs compar abcd efgh", "runs compar: no such command. Did you mean gpt runs compare?"),
        ("runs sort=loss", "sort=loss: must be one of started, val_loss, time, step"),
    ],
)
def test_slips_get_one_line(line: str, said: str, three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"gpt: {said}")
    assert err.count("\n") == 1
    assert not (three / "compare.html").exists()
