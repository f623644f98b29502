"""The command as a user runs it: killed, interrupted, fed bad input. It has a process of its own where one can tell the difference."""

import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt import GPT
from gpt.cli import main
from gpt.training.checkpoint import list_checkpoints
from gpt.training.metrics import read_metrics
from tests.processes import Forked, gpt, seconds_to_end

SMALL = [
    "debug=golden",
    "data=text",
    "train.log_every=1",
    "train.eval_tokens=1024",
    "train.final_eval_tokens=1024",
    "train.sample_tokens=8",
]


@pytest.fixture
def command(tmp_path: Path, corpus: Path, cache_dir: Path) -> Callable[..., list[str]]:
    def make(*overrides: str) -> list[str]:
        places = [f"data.paths=[{corpus}]", f"data.cache_dir={cache_dir}", f"run.dir={tmp_path / 'runs'}"]
        return [sys.executable, "-m", "gpt", "pretrain", *SMALL, *places, *overrides]

    return make


def run(arguments: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, **options)


def call(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported everything."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments[3:])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def fork(arguments: list[str], log: Path, before: Callable[[], None] | None = None) -> Forked:
    """The same in a process that is forked from one that has imported everything, where `before` is called first."""
    return Forked(gpt, arguments[3:], before, log=log)


def wait_for_step(run_directory: Path, step: int, process: subprocess.Popen | Forked) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if any(m["step"] >= step for m in read_metrics(run_directory / "metrics.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was never reached")


def assert_same_end(a: Path, b: Path) -> None:
    losses = [{m["step"]: m["loss"] for m in read_metrics(r / "metrics.jsonl") if "loss" in m} for r in (a, b)]
    assert losses[0] == losses[1]
    weights = [load_file(list_checkpoints(r / "checkpoints")[-1][1] / "model.safetensors") for r in (a, b)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] | weights[1])


def test_killed_and_resumed_it_ends_as_if_it_had_not_been(command, tmp_path):
    settings = ["train.budget=48steps", "checkpoint.every=7steps", "model.dropout=0.1", "train.eval_every=20", "train.batch_tokens=2048"]
    assert call(command(*settings, "run.id=whole")).returncode == 0
    killed = tmp_path / "runs" / "killed"
    for step in (10, 26):
        process = fork(command(*settings, "run.id=killed"), tmp_path / f"{step}.log")
        wait_for_step(killed, step, process)
        process.kill()
        process.wait()
    again = call(command(*settings, "run.id=killed"))
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stderr
    assert_same_end(tmp_path / "runs" / "whole", killed)


def test_ctrl_c_ends_the_run_with_a_checkpoint_within_seconds(command, tmp_path):
    """test_faults.py has SIGTERM."""
    process = fork(command("train.budget=100000steps", "run.id=long"), tmp_path / "log")
    wait_for_step(tmp_path / "runs" / "long", 5, process)
    took = seconds_to_end(process, signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert took < 10
    assert "continue with: gpt pretrain resume=" in stderr
    checkpoint = list_checkpoints(tmp_path / "runs" / "long" / "checkpoints")[-1]
    assert (checkpoint[1] / "COMPLETE").is_file()
    generated = call([sys.executable, "-m", "gpt", "generate", f"model={tmp_path / 'runs/long'}", "prompt=import ", "max_tokens=5"])
    assert generated.returncode == 0, generated.stderr
    assert "has not finished" in generated.stderr


def test_resume_by_directory_takes_the_runs_own_config(command, tmp_path):
    assert call(command("train.budget=3steps", "run.id=a", "model.d_model=96")).returncode == 0
    done = call([sys.executable, "-m", "gpt", "pretrain", f"resume={tmp_path / 'runs' / 'a'}", "train.budget=5steps"])
    assert done.returncode == 0, done.stderr
    assert "at step 3" in done.stderr
    assert read_metrics(tmp_path / "runs" / "a" / "metrics.jsonl")[-1]["step"] == 5
    refused = call([sys.executable, "-m", "gpt", "pretrain", f"resume={tmp_path / 'runs' / 'a'}", "model.d_model=64"])
    assert refused.returncode == 2
    assert "model.d_model=64" in refused.stderr


def test_the_exported_model_is_ours_to_the_last_digit(command, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert call(command("run.id=a", "tokenizer=bpe", "tokenizer.vocab_size=400")).returncode == 0
    folder = tmp_path / "runs" / "a" / "model"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = GPT.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("def main():\n    return 1\n", return_tensors="pt").input_ids
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max().item() <= 1e-5
    assert type(theirs).__name__ == "Qwen3ForCausalLM"


def test_generate_streams_and_is_reproducible(command, tmp_path):
    assert call(command("run.id=a")).returncode == 0
    for where in ("a", "a/model"):
        generate = [sys.executable, "-m", "gpt", "generate", f"model={tmp_path / 'runs' / where}", "prompt=import ", "max_tokens=30"]
        one, two = call([*generate, "seed=1"]), call([*generate, "seed=1"])
        assert one.returncode == 0, one.stderr
        assert one.stdout.startswith("import ")
        assert one.stdout == two.stdout
        assert call([*generate, "seed=2"]).stdout != one.stdout
        assert call([*generate, "temperature=0"]).stdout == call([*generate, "temperature=0", "seed=5"]).stdout


def bad_inputs(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> overrides and what the sentence must contain."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("  \n")
    (tmp_path / "short.txt").write_text("only a few words")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "latin.txt").write_bytes("un caf\xe9 ".encode("latin-1") * 2000)
    (tmp_path / "words.txt").write_text("one two three " * 2000)

    def text(name: str) -> str:
        return f"data.paths=[{tmp_path / name}]"

    return {
        "empty folder": ([text("empty")], "has no files"),
        "nothing but blanks": ([text("blank.txt")], "there is no text"),
        "no match": ([text("*.md")], "no file matches"),
        "shorter than a context": ([text("short.txt")], "model.context_length=64"),
        "binary only": ([text("binary.bin")], "1 binary"),
        "binary, strict": ([text("binary.bin"), "data.on_error=raise"], "is a binary file"),
        "not utf-8, strict": ([text("latin.txt"), "data.on_error=raise"], "is not UTF-8"),
        "vocabulary too large": ([text("words.txt"), "tokenizer=bpe", "tokenizer.vocab_size=5000"], "tokenizer.vocab_size=5000"),
        "cache not writable": ([text("words.txt"), f"data.cache_dir={tmp_path / 'words.txt'}"], "data.cache_dir"),
        "run not writable": ([text("words.txt"), f"run.dir={tmp_path / 'words.txt'}"], "run.dir"),
        "no such tokenizer": ([text("words.txt"), "tokenizer=pretrained", f"tokenizer.path={tmp_path / 'nowhere'}"], "nowhere"),
    }


def test_bad_input_gets_one_sentence_and_exit_2(command, tmp_path):
    for name, (overrides, expected) in bad_inputs(tmp_path).items():
        done = call(command(*overrides))
        assert done.returncode == 2, f"{name}: {done.stderr}"
        error = [line for line in done.stderr.splitlines() if line.startswith("gpt: ")]
        assert len(error) == 1, f"{name}: {done.stderr}"
        assert expected in error[0], f"{name}: {error[0]}"
        assert "Traceback" not in done.stderr
    runs = tmp_path / "runs"
    assert not runs.exists() or not list(runs.iterdir()), "a run that never began leaves no folder"


def test_text_that_is_not_utf8_is_replaced_and_counted(command, tmp_path):
    bad_inputs(tmp_path)
    done = call(command(f"data.paths=[{tmp_path / 'latin.txt'}]", "train.budget=2steps"))
    assert done.returncode == 0, done.stderr
    assert "invalid UTF-8 in 1 files or rows, 2000 characters replaced" in done.stderr


def limit_file_size() -> None:
    """No file may grow beyond 300 kB: to the process it looks like a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_a_full_disk_keeps_the_last_good_checkpoint(command, tmp_path):
    settings = ["run.id=full", "model.n_layer=4"]
    assert call(command(*settings, "train.budget=4steps")).returncode == 0
    good = list_checkpoints(tmp_path / "runs" / "full" / "checkpoints")
    process = fork(command(*settings, "train.budget=9steps", "checkpoint.every=2steps"), tmp_path / "log", limit_file_size)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2, stderr
    assert "warning: the checkpoint of step 6 could not be written" in stderr
    assert "Traceback" not in stderr
    assert list_checkpoints(tmp_path / "runs" / "full" / "checkpoints") == good
    assert sorted(p.name for p in (tmp_path / "runs" / "full" / "checkpoints").iterdir()) == [good[0][1].name]
    assert call(command(*settings, "train.budget=6steps")).returncode == 0


SIX = ["run.id=a", "checkpoint.every=2steps", "checkpoint.keep_last=9", "train.eval_every=0", "train.budget=6steps"]


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory, corpus, cache_dir) -> Path:
    """A run with a checkpoint every other step, all kept."""
    runs = tmp_path_factory.mktemp("six")
    places = [f"data.paths=[{corpus}]", f"data.cache_dir={cache_dir}", f"run.dir={runs}"]
    assert main(["pretrain", *SMALL, *places, *SIX]) == 0
    return runs / "a"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "incomplete"])
def test_a_damaged_checkpoint_is_passed_over_aloud(command, six_steps, tmp_path, damage):
    shutil.copytree(six_steps, tmp_path / "runs" / "a")
    newest = list_checkpoints(tmp_path / "runs" / "a" / "checkpoints")[-1][1]
    weights = newest / "model.safetensors"
    if damage == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "flipped":
        data = bytearray(weights.read_bytes())
        data[-10] ^= 1
        weights.write_bytes(data)
    else:
        (newest / "COMPLETE").unlink()
    done = call(command(*SIX))
    assert done.returncode == 0, done.stderr
    assert f"{newest} is not whole" in done.stderr
    assert "at step 4" in done.stderr


def test_no_cpp_compiler_is_a_warning(command, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    done = run(command("compile=true", "train.budget=2steps"), env={**os.environ, "PATH": str(empty)})
    assert done.returncode == 0, done.stderr
    assert "there is no C++ compiler" in done.stderr


def test_a_mistake_ends_a_run_at_once_also_while_it_compiles(tmp_path):
    (tmp_path / "short.txt").write_text("a few words, and no more than that")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(
        [sys.executable, "-m", "gpt", "pretrain", "compile=true", "data=text", f"data.paths=[{tmp_path / 'short.txt'}]", "tokenizer=byte"],
        cwd=tmp_path,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert done.returncode == 2, done.stderr
    assert "model.context_length=256" in done.stderr
    assert "Traceback" not in done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 12, "what the compilation goes on to take is not waited for"


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(command, tmp_path):
    settings = ["compile=true", "train.budget=20steps", "checkpoint.every=8steps", "model.dropout=0.1", "precision=auto"]
    assert run(command(*settings, "run.id=whole")).returncode == 0
    process = subprocess.Popen(command(*settings, "run.id=killed"), stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path / "runs" / "killed", 10, process)
    process.kill()
    process.wait()
    again = run(command(*settings, "run.id=killed"))
    assert again.returncode == 0, again.stderr
    assert "compile=true" in again.stderr
    assert_same_end(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed")
