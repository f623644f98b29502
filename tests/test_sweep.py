"""Sweeps: what stands for several values, and what is run, in which order, after failures and Ctrl-C."""

import importlib.util
import itertools
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import GPT, GPTConfig
from gpt.arguments import sweep_values
from gpt.cli import main
from gpt.compose import compose_run
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.runtime.signals import StopRequest
from gpt.sweep import Sweep, SweptRun, _compose, _label, _lines, _read, _run_one, combinations, format_table, join_earlier, ranked
from gpt.training.metrics import read_metrics

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TINY = [
    "debug=golden", "data=text", "train.log_every=1", "train.eval_every=0", "train.eval_tokens=1024", "train.final_eval_tokens=1024",
    "train.sample_prompts=[import]", "train.sample_tokens=4",
]  # fmt: skip


@dataclass
class Row:
    """What is read of `gpt.runs.listing.RunRow`."""

    best_val_loss: float | None
    val_bpb: float | None
    step: int = 0
    seconds: float = 0.0


def describe(directory: Path) -> Row:
    lines = read_metrics(directory / "metrics.jsonl")
    best = min((line for line in lines if "val_loss" in line), key=lambda line: line["val_loss"], default={})
    return Row(best.get("val_loss"), best.get("val_bpb"), max((line["step"] for line in lines), default=0))


def stand_in(monkeypatch: pytest.MonkeyPatch, describe_run: Callable[[Path], Row]) -> None:
    """`gpt.runs` in a few lines."""

    def write_comparison(runs, page: Path, title: str) -> Path:
        page.write_text("\n".join([title, *(run.name for run in runs)]))
        return page

    listing, compare = ModuleType("gpt.runs.listing"), ModuleType("gpt.runs.compare")
    listing.__dict__["describe_run"], compare.__dict__["write_comparison"] = describe_run, write_comparison
    for name, module in (("gpt.runs", ModuleType("gpt.runs")), ("gpt.runs.listing", listing), ("gpt.runs.compare", compare)):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def sweep(monkeypatch, capsys, tmp_path, corpus, cache_dir):
    """`gpt pretrain -m` on a tiny model: exit code, stdout, stderr."""
    if importlib.util.find_spec("gpt.runs") is None:
        stand_in(monkeypatch, describe)
    places = [f"data.paths=[{corpus}]", f"data.cache_dir={cache_dir}", f"run.dir={tmp_path / 'runs'}"]

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments if arguments[:1] == ("pretrain",) else ["pretrain", "-m", *TINY, *places, *arguments])
        return code, *capsys.readouterr()

    return call


# What is a sweep


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("optimizer.lr=1e-3,3e-3", ["0.001", "0.003"]),
        ("optimizer.lr=1e-3", ["1e-3"]),
        ("optimizer.lr= 1, 2", ["1", "2"]),
        ("model=nano,gpt2-mini", ["nano", "gpt2-mini"]),
        ("model=glob(gpt2-*)", ["gpt2-large", "gpt2-medium", "gpt2-mini", "gpt2-xl"]),
        ("model=glob([gpt2*,nano],exclude=*-*)", ["gpt2", "nano"]),
        ("experiment=null,quick", ["null", "quick"]),
        ("seed=range(1,4)", ["1", "2", "3"]),
        ("model.dropout=range(0,0.3,0.1)", ["0.0", "0.1", "0.2"]),
        ("seed=choice(4,5)", ["4", "5"]),
        ("seed=sort(3,1,2)", ["1", "2", "3"]),
        ("train.micro_batch=auto,2", ["auto", "2"]),
        ("model.bias=true,False", ["true", "false"]),
        ("train.budget=1min,2 min", ["1min", "2 min"]),
        ("checkpoint.every=5,10", ["5", "10"]),
        ("init=runs/a,~/b", ["runs/a", "~/b"]),
        ("init=é,s3://a/b", ["é", "s3://a/b"]),
        ("init='a,b'", ["a,b"]),
        ("init='a,b',c", ["a,b", "c"]),
        ("init=a (b)", ["a (b)"]),
        ("init=x(1,2)", ["x(1,2)"]),
        ("data.paths=[a,b]", ["[a,b]"]),
        ("data.paths=[a],[b,c]", ["[a]", "[b,c]"]),
        ("data.paths=a.txt,b.txt", ["a.txt", "b.txt"]),
        ("run.dir=/a,b", ["/a,b"]),
        ("run.id=range(1,3)", ["range(1,3)"]),
    ],
)
def test_what_stands_for_several_values(argument, values):
    key = argument.partition("=")[0]
    assert sweep_values(argument) == [f"{key}={value}" for value in values]


words = st.text("abé~/.-_@ ", min_size=1, max_size=6).filter(lambda word: word == word.strip())
SWEPT_KEYS = {
    "model": st.sampled_from(["nano", "gpt2", "gpt2-mini"]),
    "experiment": st.sampled_from(["quick", "null"]),
    "seed": st.integers(0, 99).map(str),
    "optimizer.lr": st.sampled_from(["0.001", "0.01", "1e-05", "3"]),
    "train.budget": st.sampled_from(["1min", "500steps", "2 epochs"]),
    "train.micro_batch": st.sampled_from(["auto", "2"]),
    "compile": st.sampled_from(["auto", "true", "false"]),
    "init": words,
}


@given(st.data())
@settings(max_examples=60)
def test_the_combinations_are_the_product_in_the_order_given(data):
    keys = data.draw(st.lists(st.sampled_from(sorted(SWEPT_KEYS)), min_size=1, max_size=4, unique=True))
    values = {key: data.draw(st.lists(SWEPT_KEYS[key], min_size=2, max_size=4)) for key in keys}
    fixed = data.draw(st.lists(st.sampled_from(["model.n_layer=2", "data.paths=[a,b]", "run.dir=x,y"]), unique=True))
    arguments = [f"{key}={','.join(of)}" for key, of in values.items()]
    same, swept = _read("pretrain", data.draw(st.permutations(fixed)) + arguments, None)
    assert sorted(same.values()) == sorted(fixed)
    assert [tuple(one.values()) for one in combinations(swept)] == list(itertools.product(*values.values()))
    assert all(list(one) == keys for one in combinations(swept))


@given(st.dictionaries(st.sampled_from(sorted(SWEPT_KEYS)), st.text(max_size=300), min_size=1))
def test_a_label_makes_a_run_id(values):
    assert RUN_ID.fullmatch(f"sweep-01{_label(values)}")
    assert len(_label(values)) <= 80


def test_a_label_says_the_values():
    values = {"optimizer.lr": "1e-05", "model": "gpt2-mini", "init": "runs/first/", "data.paths": "[a,b]"}
    assert _label(values) == "-lr_1e-05-gpt2-mini-init_first-paths_a-b"


def test_a_combination_is_composed_as_a_run_of_its_own_would_be():
    fixed, swept = _read("pretrain", ["model=nano,gpt2-mini", "train.budget=5steps,1min", "seed=3"], None)
    plan = _compose("pretrain", fixed, swept, None)
    assert [run.settings["model"] for run in plan.runs] == ["nano", "nano", "gpt2-mini", "gpt2-mini"]
    for run in plan.runs:
        alone = compose_run("pretrain", ["seed=3", *(f"{key}={value}" for key, value in run.settings.items())])
        assert run.config == alone


def test_cfg_lists_the_combinations_and_starts_nothing(sweep, tmp_path):
    code, out, _ = sweep("seed=1,2", "optimizer.lr=range(1,3)", "--cfg")
    assert code == 0
    assert out.splitlines() == [f"{n}  seed={s} optimizer.lr={lr}" for n, (s, lr) in enumerate(itertools.product((1, 2), (1, 2)), 1)]
    assert not list(tmp_path.iterdir())


def test_finetune_sweeps(capsys, tmp_path):
    GPT(GPTConfig(vocab_size=257, context_length=64, n_layer=1, n_head=1, d_model=16)).save_pretrained(tmp_path, tokenizer=byte_tokenizer())
    assert main(["finetune", "-m", f"init={tmp_path}", "loss_on=all,completion", "--cfg"]) == 0
    assert capsys.readouterr().out == "1  loss_on=all\n2  loss_on=completion\n"


def test_a_sweep_under_torchrun_is_refused(sweep, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = sweep("seed=1,2")
    assert code == 2
    assert "launch.nproc" in err


# Going on


def joined(folder: Path, *arguments: str) -> Sweep:
    folder.mkdir(exist_ok=True)
    fixed, swept = _read("pretrain", [f"run.dir={folder}", "run.id=s", *arguments], None)
    plan = _compose("pretrain", fixed, swept, None)
    join_earlier(plan)
    return plan


def test_the_same_command_has_the_same_directories_and_a_new_value_the_next_number(tmp_path):
    first = joined(tmp_path, "seed=1,2", "model=nano")
    assert [run.path.name for run in first.runs] == ["s-01-seed_1", "s-02-seed_2"]
    assert joined(tmp_path, "model=nano", "seed=1,2").to_dict() == first.to_dict()
    more = joined(tmp_path, "seed=3,2", "model=nano")
    assert [run.path.name for run in more.runs] == ["s-01-seed_1", "s-02-seed_2", "s-03-seed_3"]
    assert [run.config is not None for run in more.runs] == [False, True, True]
    assert [run.config.run.id for run in more.runs if run.config] == ["s-02-seed_2", "s-03-seed_3"]
    twice = joined(tmp_path / "other", "seed=1,1")
    assert [run.path.name for run in twice.runs] == ["s-01-seed_1", "s-02-seed_1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed=1,2", "train.budget=6steps"], "train.budget=6steps: the sweep s was started with train.budget=5steps"),
        (["seed=1,2"], "no train.budget: the sweep s was started with train.budget=5steps"),
        (["seed=1,2", "train.budget=5steps", "model=nano"], "model=nano: the sweep s was started with no model"),
        (["optimizer.lr=1,2", "train.budget=5steps"], "the swept keys=optimizer.lr: the sweep s was started with the swept keys=seed"),
        (["seed=1,2", "train.budget=5steps", "resume=never"], "resume=never"),
    ],
)
def test_another_sweep_of_the_same_id_is_refused(arguments, said, tmp_path):
    joined(tmp_path, "seed=1,2", "train.budget=5steps")
    with pytest.raises(UserError, match=re.escape(said)):
        joined(tmp_path, *arguments)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"command": "pretrain", "settings": {}, "runs": []}'])
def test_a_damaged_list_of_runs_is_refused(text, tmp_path):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match=r"s\.json cannot be read"):
        joined(tmp_path, "seed=1,2")


def test_a_sweep_is_worked_on_by_one_process(sweep, tmp_path):
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / ".s.lock"):
        code, _, err = sweep("seed=1,2", "run.id=s")
    assert (code, err.count("\n")) == (2, 1)
    assert "another process" in err


# What becomes of a run's process


@pytest.fixture
def worker(monkeypatch, tmp_path) -> Callable[[str], SweptRun]:
    """A run whose process does what a shell script says."""

    def make(script: str) -> SweptRun:
        program = tmp_path / "worker"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return SweptRun(tmp_path / "runs" / "a", {"seed": "1"}, compose_run("pretrain", ["seed=1"]))

    return make


@pytest.mark.parametrize(
    ("script", "note", "kept"),
    [
        ("echo one >&2; echo 'gpt: it is so' >&2; exit 2", "it is so", "one\ngpt: it is so\n"),
        ("echo 'gpt.errors.UserError: it is so' >&2; exit 1", "it is so", "gpt.errors.UserError: it is so\n"),
        ("exit 3", "exit code 3", "exit code 3\n"),
        ("kill -9 $$", "killed by SIGKILL", "killed by SIGKILL\n"),
        (r"printf '\033[32mstep 1\rstep 2\033[0m\n\377\n' >&2; exit 1", "�", "step 2\n�\n"),
    ],
)
def test_a_run_that_fails_leaves_its_last_words(worker, script, note, kept, capsys):
    run = worker(script)
    assert _run_one(run, StopRequest()) != 0
    assert (run.state, run.note) == ("failed", note)
    assert (run.path / "error.txt").read_text() == kept
    assert _run_one(worker("exit 0"), StopRequest()) == 0
    assert run.state == "not run", "what an earlier process said does not count"


def test_only_the_end_of_what_a_run_says_is_kept(worker, capsys):
    run = worker("seq 1 20000 >&2; exit 1")
    _run_one(run, StopRequest())
    assert run.note == "20000"
    assert (run.path / "error.txt").stat().st_size < 20000
    assert capsys.readouterr().err.startswith("1\n2\n"), "but all of it is shown"


def test_bars_that_were_drawn_over_are_no_lines():
    assert _lines("a\r\n\x1b[1A\x1b[2Kbar 1\rbar 2\n\n \nend") == ["a", "bar 2", "end"]


def test_a_second_ctrl_c_ends_a_run_that_does_not_stop(worker, tmp_path, capsys):
    run = worker(f"trap '' INT; echo $$ > {tmp_path / 'pid'}; while :; do sleep 0.1; done")

    def press(stop: StopRequest) -> None:
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) == stop._receive:  # two at once would be one
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with StopRequest() as stop:
        threading.Thread(target=press, args=(stop,)).start()
        with pytest.raises(KeyboardInterrupt):
            _run_one(run, stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# The table


def test_the_table_is_sorted_by_loss_with_what_failed_last(tmp_path, monkeypatch):
    rows = {
        "s-01": Row(2.5, 1.25, 1000, 61.4), "s-02": Row(1.5, 0.75, 7), "s-03": Row(math.nan, None), "s-04": Row(0.1, 0.1, 3),
        "s-05": Row(None, None), "s-06": Row(2.25, 1.0),
    }  # fmt: skip
    stand_in(monkeypatch, lambda path: rows[path.name])
    plan = Sweep("pretrain", "s", tmp_path, {}, [SweptRun(tmp_path / name, {"seed": name[-1]}) for name in [*rows, "s-07"]])
    for name in rows:
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    for name in ("s-01", "s-02", "s-03"):
        (tmp_path / name / "model" / "config.json").touch()
    (tmp_path / "s-04" / "error.txt").write_text("so it is\n")
    assert format_table(plan, ranked(plan)).splitlines() == [
        "run  seed  val loss  bits/byte  steps  seconds  state",
        "02      2    1.5000     0.7500      7        0  finished",
        "01      1    2.5000     1.2500  1,000       61  finished",
        "03      3       nan          -      0        0  finished",
        "06      6    2.2500     1.0000      0        0  interrupted",
        "05      5         -          -      0        0  interrupted",
        "04      4    0.1000     0.1000      3        0  failed       so it is",
        "07      7         -          -      -        -  not run",
    ]


# For real


def states(out: str) -> list[str]:
    """The second column, the swept value, and the state, of each line of the table."""
    return [f"{line.split()[1]} {re.search('finished|interrupted|failed|not run', line)[0]}" for line in out.splitlines()[1:]]  # type: ignore[index]


def test_a_failure_and_a_ctrl_c_and_the_command_that_goes_on(sweep, tmp_path):
    folder = tmp_path / "runs"
    long = folder / "s-02-lr_0.01"

    def press():
        while not any(line["step"] >= 5 for line in read_metrics(long / "metrics.jsonl")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    code, out, err = sweep("optimizer.lr=1e30,0.01", "train.max_skipped_steps=1", "train.budget=200steps", "run.id=s")
    assert code == 130, err
    assert states(out) == ["0.01 interrupted", "1e+30 failed"], "the failed one did not stop the rest"
    assert "training diverged" in out
    assert "training diverged" in (folder / "s-01-lr_1e-30" / "error.txt").read_text()
    assert [f"[{n}/2]" in err for n in (1, 2)] == [True, True]
    assert "interrupted at step" in err

    again = shlex.split(err.rpartition("continue with: gpt ")[2])
    code, out, err = sweep(*again)
    assert code == 1, err
    assert states(out) == ["0.01 finished", "1e+30 failed"]
    assert err.count("resuming from") == 1
    assert max(line["step"] for line in read_metrics(long / "metrics.jsonl")) == 200
    assert (folder / "s.txt").read_text() == out
    assert "s-02-lr_0.01" in (folder / "s.html").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["s-01-lr_1e-30", "s-02-lr_0.01", "s.html", "s.json", "s.txt"]

    before = (long / "model" / "config.json").stat().st_mtime_ns
    code, out, err = sweep(*again)
    assert code == 1
    assert "finished before" in err
    assert (long / "model" / "config.json").stat().st_mtime_ns == before


def test_a_sweep_of_which_all_is_there_ends_well(sweep, tmp_path):
    for name in ("s-01-seed_1", "s-02-seed_2"):
        (tmp_path / "runs" / name / "model").mkdir(parents=True)
        (tmp_path / "runs" / name / "model" / "config.json").touch()
    code, out, err = sweep("seed=1,2", "run.id=s")
    assert (code, err.count("finished before")) == (0, 2)
    assert states(out) == ["1 finished", "2 finished"]
    (tmp_path / "runs" / "s.txt").unlink()
    (tmp_path / "runs" / "s.txt").mkdir()
    again, same, err = sweep("seed=1,2", "run.id=s")
    assert (again, same) == (0, out), "the table is printed where it cannot be kept"
    assert "could not be written" in err
