"""Runs in several processes: the same losses in every layout, checkpoints that fit every layout, and one end for all."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from gpt.compose import compose_run
from gpt.config import RunConfig
from gpt.training.metrics import read_metrics
from tests.end_to_end.test_pretrain import wait_for_step
from tests.processes import run_together
from tests.training.conftest import settings
from tests.training.finetuning import SUMS, save_small_model, write_rows
from tests.training.process_runs import train_all

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    2: {
        "ddp": ["parallel=ddp"],
        "fsdp": ["parallel=fsdp"],
        "ddp-tensor": ["parallel=ddp", "parallel.tensor=2"],
    },
    4: {
        "ddp": ["parallel=ddp"],
        "fsdp": ["parallel=fsdp"],
        "fsdp-tensor": ["parallel=fsdp", "parallel.tensor=2"],
        "fsdp-replicate": ["parallel=fsdp", "parallel.replicate=2"],
    },
}
# Clipping bites at every step; two micro-batches a step in one process.
TEXT = ["train.batch_tokens=1024", "train.grad_clip=0.2", "optimizer=muon", "train.ema=0.9", "train.eval_every=10", "model.n_head=4"]


def launch(configs: dict[str, RunConfig], folder: Path, processes: int) -> None:
    """Train configs, named, in `processes` processes, one after another."""
    folder.mkdir()
    for name, config in configs.items():
        config.run.id = name
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config.to_dict()))
    run_together(train_all, folder, processes=processes, log=folder / "log")


def curve(run: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(run / "metrics.jsonl") if key in line]


def assert_same_losses(run: Path, reference: Path, steps: int) -> None:
    assert len(curve(run, "loss")) == steps
    assert curve(run, "loss") == pytest.approx(curve(reference, "loss"), abs=1e-5)
    assert curve(run, "val_loss") == pytest.approx(curve(reference, "val_loss"), abs=1e-5)
    assert curve(run, "grad_norm") == pytest.approx(curve(reference, "grad_norm"), rel=1e-4)
    assert curve(run, "tokens") == curve(reference, "tokens")


# The embeddings and the first block are frozen; in the second epoch of 48 rows, from step 6 on, they are not run; at last the block trains.
FREEZING = ["freeze=first_n", "freeze.first_n_blocks=1", "unfreeze=[{at: 8, blocks: '0'}]", "layerwise_lr_decay=0.9", "train.ema=0.9"]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_every_layout_has_the_losses_of_one_process(text_run, tmp_path, cache_dir, processes):
    """Text with accumulation, clipping, Muon and an average; masked examples of uneven length, of which frozen parts are computed once and
    begin to train at last. Each process accumulates over two micro-batches at least."""
    model = save_small_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", SUMS[:48])
    ten = ["train.budget=10steps", "train.eval_every=5", "train.eval_tokens=1024", "train.final_eval_tokens=1024"]
    examples = ["data=jsonl", f"data.paths=[{rows}]", f"init={model}", "data.packing=none", "train.batch_tokens=512", "optimizer=muon"]

    def runs(name: str, *layout: str) -> dict[str, RunConfig]:
        text = text_run(*TEXT, *ten, *layout)
        own = [f"data.cache_dir={tmp_path / f'cache-{name}'}", *FREEZING]
        finetune = compose_run("finetune", [*settings(tmp_path, cache_dir), *examples, *ten, *own, *layout])
        return {f"text-{name}": text, f"examples-frozen-{name}": finetune}

    launch(runs("one", "train.micro_batch=4"), tmp_path / "one", 1)
    configs = {}
    for name, layout in LAYOUTS[processes].items():
        configs |= runs(name, f"train.micro_batch={4 // processes}", *layout)
    launch(configs, tmp_path / "many", processes)
    for name in configs:
        kind = "text" if name.startswith("text") else "examples-frozen"
        assert_same_losses(tmp_path / "runs" / name, tmp_path / "runs" / f"{kind}-one", 10)
        assert (tmp_path / "runs" / name / "model" / "config.json").is_file()


def test_fsdp_in_bf16_has_the_losses_of_ddp(text_run, tmp_path):
    """FSDP gathers blocks in bf16, and autocast casts them elsewhere: the first losses are the same. FSDP's gradients of a process are in
    bf16, where those of ddp can be sums in fp32, so then roundings differ."""
    run = [*TEXT, "precision=bf16", "train.budget=10steps", "train.micro_batch=2", "optimizer=adamw"]
    launch({name: text_run(*run, f"parallel={name}") for name in ("ddp", "fsdp")}, tmp_path / "two", 2)
    ours, theirs = (tmp_path / "runs" / name for name in ("fsdp", "ddp"))
    assert curve(ours, "grad_norm")[:2] == pytest.approx(curve(theirs, "grad_norm")[:2], rel=1e-3)
    assert curve(ours, "loss")[0] == pytest.approx(curve(theirs, "loss")[0], abs=1e-6)
    assert curve(ours, "loss") == pytest.approx(curve(theirs, "loss"), abs=5e-4)


def test_a_run_goes_on_in_another_layout_as_if_it_had_not_changed(text_run, tmp_path):
    budget, more = ["train.budget=6steps", "schedule=constant"], ["train.budget=12steps", "schedule=constant"]
    launch({"whole": text_run(*TEXT, *more), "back": text_run(*TEXT, *budget)}, tmp_path / "one", 1)
    launch({"moved": text_run(*TEXT, *budget, "parallel=fsdp")}, tmp_path / "two", 2)
    launch({"moved": text_run(*TEXT, *more)}, tmp_path / "three", 1)
    launch({"back": text_run(*TEXT, *more, "parallel=ddp", "parallel.tensor=2")}, tmp_path / "four", 2)
    for name in ("moved", "back"):
        assert curve(tmp_path / "runs" / name, "loss") == pytest.approx(curve(tmp_path / "runs" / "whole", "loss"), abs=1e-5)


def test_a_gradient_that_is_not_finite_in_one_process_is_left_out_by_all(text_run, tmp_path):
    layouts = {"nan-ddp": ["parallel=ddp"], "nan-fsdp": ["parallel=fsdp"]}
    launch({"nan-one": text_run(*TEXT, "train.budget=8steps")}, tmp_path / "one", 1)
    launch({name: text_run(*TEXT, "train.budget=8steps", *layout) for name, layout in layouts.items()}, tmp_path / "two", 2)
    for name in ("nan-one", *layouts):
        assert curve(tmp_path / "runs" / name, "skipped_steps") == [0, 0, 0, 1, 1, 1, 1, 1], name
    for name in layouts:
        ours, theirs = curve(tmp_path / "runs" / name, "loss"), curve(tmp_path / "runs" / "nan-one", "loss")
        assert [*ours[:3], *ours[4:]] == pytest.approx([*theirs[:3], *theirs[4:]], abs=1e-5)


# As a user starts them


@pytest.fixture
def command(tmp_path: Path, corpus: Path, cache_dir: Path) -> Callable[..., list[str]]:
    def make(*overrides: str) -> list[str]:
        places = ["data=text", f"data.paths=[{corpus}]", *settings(tmp_path, cache_dir), "train.eval_tokens=1024"]
        return ["pretrain", *places, "train.final_eval_tokens=1024", "train.eval_every=0", "launch.nproc=2", *overrides]

    return make


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "gpt", *arguments], stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def workers(process: subprocess.Popen) -> list[int]:
    return [child.pid for child in psutil.Process(process.pid).children() if "gpt.launch" in " ".join(child.cmdline())]


def test_a_process_that_dies_takes_the_others_with_it(command, tmp_path):
    process = start(command("parallel=ddp", "train.budget=100000steps", "run.id=r"))
    wait_for_step(tmp_path / "runs" / "r", 3, process)
    both = workers(process)
    assert len(both) == 2
    killed = time.monotonic()
    os.kill(both[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert time.monotonic() - killed < 60, "they do not wait for it until their timeout, 600 s"
    assert process.returncode == 1
    assert stderr.count("gpt: ") == 1, stderr
    assert "process 1 of the run was ended by SIGKILL" in stderr
    assert "Traceback" not in stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a process that its parent is gone")
def test_without_their_launcher_the_processes_save_and_end(command, tmp_path):
    process = start(command("parallel=ddp", "train.budget=100000steps", "run.id=r", "checkpoint.every=1h"))
    wait_for_step(tmp_path / "runs" / "r", 3, process)
    both = workers(process)
    process.kill()
    _, stderr = process.communicate(timeout=30)  # which they hold open until they end
    assert "interrupted at step" in stderr
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in both)


def test_processes_are_started_again_and_go_on_from_the_last_checkpoint(command, tmp_path):
    settings = ["parallel=ddp", "train.budget=60steps", "checkpoint.every=10steps"]
    process = start(command(*settings, "launch.max_restarts=1", "run.id=killed"))
    wait_for_step(tmp_path / "runs" / "killed", 15, process)
    os.kill(workers(process)[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "resuming from" in stderr
    launch({"whole": compose_run("pretrain", command(*settings)[1:])}, tmp_path / "alone", 2)
    assert curve(tmp_path / "runs" / "killed", "loss") == curve(tmp_path / "runs" / "whole", "loss")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_saves_a_checkpoint(command, tmp_path, number, code):
    process = start(command("parallel=fsdp", "train.budget=100000steps", "run.id=r", "checkpoint.every=1h"))
    wait_for_step(tmp_path / "runs" / "r", 5, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    assert "interrupted at step" in stderr
    assert list((tmp_path / "runs" / "r" / "checkpoints").glob("step-*/COMPLETE"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["parallel=ddp", "launch.nproc=3"], "train.batch_tokens=512 is 8 sequences, which 3 processes cannot share evenly (nearest: 576)"),
        (["parallel=ddp", "model.vocab_size=300", "tokenizer=bpe", "tokenizer.vocab_size=290", "train.eval_tokens=64", "resume=never",
          "data.paths=[nowhere]"], "data.paths"),
        pytest.param(["parallel=fsdp", "parallel.replicate=3"], "parallel.replicate=3 does not divide the 2 processes",
                     marks=pytest.mark.slow),  # as the first: all processes find it
    ],
)  # fmt: skip
def test_a_mistake_is_said_once(command, overrides, sentence):
    process = start(command(*overrides))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert stderr.count("gpt: ") == 1, stderr
    assert sentence in stderr
    assert "Traceback" not in stderr


def test_a_process_that_does_not_come_is_a_timeout_that_names_the_step(command, tmp_path):
    process = start(command("parallel=ddp", "train.budget=100000steps", "run.id=r", "launch.timeout=4s"))
    wait_for_step(tmp_path / "runs" / "r", 3, process)
    stuck = workers(process)[1]
    os.kill(stuck, signal.SIGSTOP)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 1, stderr
    waited = r"waited 4s \(launch\.timeout\) for the others in vain while training step \d+, in all_(reduce|gather \(the matrices)"
    assert re.search(waited, stderr), stderr


def test_torchrun_and_accelerate_start_the_same_run(command, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = command("parallel=ddp", "train.budget=3steps")
    starters = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
                       "--dynamo_backend=no", "--main_process_port=0"],
    }  # fmt: skip
    for name, starter in starters.items():
        line = [sys.executable, "-m", *starter, "-m", "gpt", *arguments, f"run.id={name}"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "2 processes" in done.stderr
    assert curve(tmp_path / "runs" / "torchrun", "loss") == curve(tmp_path / "runs" / "accelerate", "loss")
    assert len(list((tmp_path / "runs").iterdir())) == 2
