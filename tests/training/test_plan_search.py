"""`gpt finetune freeze=search`: what is tried, what is refused, and how a search goes on."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from finetuning import SMALL, SUMS, save_small_model, write_rows

import gpt.sweep
from gpt.cli import main
from gpt.compose import compose_run, load_run
from gpt.errors import UserError
from gpt.sweep import SweptRun
from gpt.training.trainer import Trainer

PLANS = "freeze.search_plans=[none,'first_n freeze.first_n_blocks=1']"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of two blocks, and rows to fine-tune them on."""
    folder = tmp_path_factory.mktemp("start")
    write_rows(folder / "rows.jsonl", SUMS)
    return save_small_model(folder / "model")


@pytest.fixture
def search(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command on a tiny model: exit code, stdout, stderr."""
    places = [f"init={start}", "data=jsonl", f"data.paths=[{start.parent / 'rows.jsonl'}]", f"data.cache_dir={tmp_path / 'cache'}"]

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["finetune", *SMALL, *places, f"run.dir={tmp_path / 'runs'}", "run.id=s", *arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[SweptRun]:
    """What is run; nothing is trained, but each run leaves what a finished one does, with a loss of its number."""
    run: list[SweptRun] = []

    def leave(one: SweptRun, stop: object) -> int:
        assert one.config is not None
        run.append(one)
        (one.path / "model").mkdir(parents=True)
        (one.path / "frozen").mkdir()
        (one.path / "config.yaml").write_text("command: finetune\n")
        line = {"step": 2, "tokens": 512, "seconds": 10.0 / len(run), "val_loss": 3 + 0.01 * len(run), "tokens_per_second": 100.0}
        (one.path / "metrics.jsonl").write_text(json.dumps(line | {"loss": 3.0, "memory_bytes": 2**30}) + "\n")
        if one.settings.get("freeze") == "head_only" and len(run) < 4:
            (one.path / "error.txt").write_text("gpt: it is so\n")
            return 2
        (one.path / "model" / "config.json").write_text("{}")
        return 0

    monkeypatch.setattr(gpt.sweep, "_run_one", leave)
    return run


def test_a_search_is_a_run_for_each_plan_with_all_else_the_same(search: Call, tries: list[SweptRun], tmp_path: Path) -> None:
    code, out, err = search("freeze=search", "train.budget=8steps", "seed=5")
    assert code == 0, err
    assert [run.path.name for run in tries] == [
        "s-01-none", "s-02-embeddings", "s-03-first_n-first_n_blocks_1", "s-04-norms_and_biases-lr_0.002", "s-05-head_only-lr_0.002",
        "s-06-rank_8-lr_0.002",
    ]  # fmt: skip
    configs = [run.config for run in tries if run.config is not None]
    assert len(configs) == 6
    assert [c.freeze.name for c in configs] == ["none", "embeddings", "first_n", "norms_and_biases", "head_only", "none"]
    assert [c.lora.rank for c in configs] == [0, 0, 0, 0, 0, 8]
    assert {(c.train.budget, c.seed, c.train.sample_tokens, c.init) for c in configs} == {("2steps", 5, 4, configs[0].init)}
    assert [c.freeze.cache_dir for c in configs] == [str(run.path / "frozen") for run in tries], (
        "none profits from what another has computed"
    )
    assert not list((tmp_path / "runs").glob("*/frozen")), "which goes when the try has ended"
    assert "Take " in out
    command = shlex.split(out.split("The whole run: gpt ")[1].splitlines()[0])
    whole = compose_run(command[0], command[1:])
    assert (whole.train.budget, whole.seed, whole.run.id, whole.freeze.cache_dir) == ("8steps", 5, "", None)
    assert whole.freeze.name != "search"
    assert (tmp_path / "runs" / "s.txt").read_text() == out.strip("\n") + "\n"
    assert "Loss against memory" in (tmp_path / "runs" / "s.html").read_text()


def test_the_same_command_goes_on_and_may_have_another_plan(search: Call, tries: list[SweptRun], tmp_path: Path) -> None:
    code, out, err = search("freeze=search", PLANS.replace("]", ",head_only]"))
    assert code == 1
    assert "it is so" in out
    assert "1 of 3 runs did not finish; the same command tries them again: gpt finetune " in err
    assert "freeze=search" in err.rpartition("tries them again")[2]
    shutil.rmtree(tmp_path / "runs" / "s-03-head_only")
    code, out, err = search("freeze=search", PLANS.replace("]", ",norms_and_biases,head_only]"))
    assert code == 0, err
    assert err.count("finished before") == 2
    assert [run.path.name for run in tries[3:]] == ["s-03-head_only", "s-04-norms_and_biases"]
    assert len(re.findall(r"finished$", out, re.MULTILINE)) == 4
    code, _, err = search("freeze=search", PLANS, "freeze.search_budget=0.5")
    assert (code, err.count("\n")) == (2, 1)
    assert "the search s was started with freeze.search_budget=0.25" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["freeze=search", "unfreeze=[{at: 0.5, all: true}]"], "unfreeze: with freeze=search each plan says"),
        (["freeze=search", "freeze.first_n_blocks=1"], "freeze.first_n_blocks: with freeze=search each plan says"),
        (["-m", "freeze=search", "seed=1,2"], "-m: freeze=search is a sweep over plans by itself"),
        (["freeze=search", "freeze.search_plans=[none]"], "nothing to choose from"),
        (["freeze=search", "freeze.search_plans=[none,none]"], "none is there twice"),
        (["freeze=search", "freeze.search_plans=[none,frist_n]"], "Did you mean first_n?"),
        (["freeze=search", "freeze.search_plans=[none,'first_n freeze.first_n_blocks=9']"], "there are 2 blocks, 0 to 1"),
        (["freeze=search", "freeze.search_budget=7"], "such as 7steps"),
        (["freeze.search_budget=0.5"], "add freeze=search"),
        (["freeze=search", "precompile=true"], "precompile=true"),
        (["freeze=search", "lora.rank=4"], "adapters are a plan like others"),
        (["freeze=search", "freeze.search_plans=[none,'embeddings seed=3']"], "seed is the same for all plans"),
    ],
)
def test_what_does_not_go_together_is_one_sentence_and_nothing_is_started(
    arguments: list[str], said: str, search: Call, tries: list[SweptRun], tmp_path: Path
) -> None:
    code, _, err = search(*arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert said in err
    assert not tries
    assert not list(tmp_path.glob("runs/*"))


def test_a_search_under_torchrun_and_one_of_another_command_are_refused(
    search: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", "freeze=search"]) == 2
    assert "gpt pretrain tries no plans, gpt finetune does" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = search("freeze=search")
    assert (code, "launch.nproc" in err) == (2, True)


def test_a_trainer_is_given_one_plan() -> None:
    with pytest.raises(UserError, match=r"freeze\.name=search is no plan of one run"):
        Trainer(compose_run("pretrain", ["debug=golden", "freeze=search"]))


def test_a_search_for_real(search: Call, tmp_path: Path) -> None:
    code, out, err = search("freeze=search", PLANS, "freeze.search_budget=1", "train.budget=20steps", "train.log_every=5")
    assert code == 0, err
    folder = tmp_path / "runs"
    first_n = folder / "s-02-first_n-first_n_blocks_1"
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:3]}
    assert rows["none"][1] == "100.0%"
    assert 0 < float(rows["first_n"][2].rstrip("%")) < 100
    assert "frozen-prefix cache: on" in err, "the budget is more than an epoch of these rows"
    assert str(first_n / "frozen") in err
    assert not (first_n / "frozen").exists()
    assert load_run(first_n).freeze.first_n_blocks == 1
    page = (first_n / "report.html").read_text()
    assert "What trains" in page
    assert "embeddings.tokens" in page
    assert "What trains" not in (folder / "s-01-none" / "report.html").read_text(), "where all trains, there is no table"
    assert "Loss against time" in (folder / "s.html").read_text()
    code, again, err = search("freeze=search", PLANS, "freeze.search_budget=1", "train.budget=20steps", "train.log_every=5")
    assert (code, again) == (0, out)
    assert err.count("finished before") == 2
