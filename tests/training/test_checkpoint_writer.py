"""Writing in the background: what is written, what fails, what stays, and what a kill leaves.

Run as a program, this file is a process that saves checkpoints and is killed over and over: `test_checkpoint_writer.py <folder>`.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoint_models import EVERYTHING, learn, optimizers_of, save, tiny_model
from safetensors.torch import load_file

from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT
from gpt.training import checkpoint_writer
from gpt.training.checkpoint import TrainingState, find_damage, list_checkpoints, model_tensors, newest_whole, optimizer_tensors, read_state
from gpt.training.checkpoint_retention import Retention
from gpt.training.checkpoint_writer import CheckpointWriter

ROOT = Path(__file__).parents[2]
KILLS = 15


def steps_in(directory: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(directory)]


def nothing_left_over(directory: Path) -> bool:
    return not any(path.name.startswith(".") for path in directory.iterdir())


@pytest.fixture
def held(monkeypatch):
    """Writing waits until this is set."""
    go, write = threading.Event(), checkpoint_writer.write_checkpoint

    def when_let(*arguments):
        assert go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", when_let)
    yield go
    go.set()


def test_what_changes_after_save_is_not_written(tmp_path, held):
    model = tiny_model(0)
    optimizers = optimizers_of(model)
    learn(model, optimizers)
    state, manifest = TrainingState(step=3, stream={"at": [1, 2]}), {"kind": "text"}
    ema = {name: t + 1 for name, t in model_tensors(model).items()}
    expected = [{k: t.clone() for k, t in tensors.items()} for tensors in (model_tensors(model), optimizer_tensors(model, optimizers), ema)]
    writer = CheckpointWriter(tmp_path, EVERYTHING)
    writer.save(model, optimizers, state, manifest, ema)
    learn(model, optimizers, seed=1)
    for t in ema.values():
        t.zero_()
    state.step, manifest["kind"] = 4, "changed"
    assert state.stream
    state.stream["at"].append(3)
    assert writer.saved is None
    held.set()
    writer.wait()
    path = tmp_path / "step-00000003"
    assert writer.saved == path
    for name, tensors in zip(("model", "optimizer/state", "ema"), expected, strict=True):
        stored = load_file(path / f"{name}.safetensors")
        assert all(torch.equal(stored[key], t) for key, t in tensors.items())
    assert read_state(path) == TrainingState(step=3, stream={"at": [1, 2]})
    assert "text" in (path / "data_manifest.json").read_text()


def test_a_second_save_waits_for_the_first_and_both_are_right(tmp_path, held):
    model, writer = tiny_model(0), CheckpointWriter(tmp_path, EVERYTHING)
    weights = []
    for step in (1, 2):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(step)
        weights.append(model.embeddings.tokens.weight.detach().clone())
        if step == 2:
            threading.Timer(0.3, held.set).start()
        writer.save(model, [], TrainingState(step=step))
    assert held.is_set()
    assert writer.stall_seconds > 0
    writer.close()
    for (_, path), expected in zip(list_checkpoints(tmp_path), weights, strict=True):
        assert torch.equal(load_file(path / "model.safetensors")["embeddings.tokens.weight"], expected)


def test_the_memory_of_a_snapshot_is_used_again_and_made_anew_where_it_does_not_fit(tmp_path):
    model, writer = tiny_model(0), CheckpointWriter(tmp_path, EVERYTHING)
    optimizers = optimizers_of(model)
    places = []
    for step in range(4):
        writer.save(model, optimizers, TrainingState(step=step))
        writer.wait()
        places.append([file._memory.data_ptr() for file in writer._files.values()])
        assert load_file(tmp_path / f"step-{step:08d}/optimizer/state.safetensors").keys() == optimizer_tensors(model, optimizers).keys()
        learn(model, optimizers)
    assert places[0][0] == places[1][0] == places[3][0]
    assert places[0][1] != places[1][1] == places[3][1], "there was no optimizer state at step 0"


def test_every_dtype_lies_where_safetensors_looks_for_it(tmp_path):
    model = tiny_model(0)
    [optimizer] = [torch.optim.SGD([model.final_norm.weight])]
    kinds = [torch.bool, torch.float16, torch.int64, torch.uint8, torch.bfloat16, torch.float64, torch.int32, torch.float32]
    optimizer.state[model.final_norm.weight] = {
        **{str(kind): torch.tensor([1, 0, 1]).to(kind) for kind in kinds},
        "cut": torch.arange(12.0).view(3, 4).T[1:], "empty": torch.empty(0, 3), "scalar": torch.tensor(7.0),
    }  # fmt: skip
    stored = load_file(save(tmp_path, model, [optimizer]) / "optimizer/state.safetensors")
    for key, tensor in optimizer.state[model.final_norm.weight].items():
        assert stored[f"final_norm.weight|{key}"].dtype == tensor.dtype
        assert torch.equal(stored[f"final_norm.weight|{key}"], tensor), key


def test_processes_that_do_not_write_leave_no_file(tmp_path):
    writer = CheckpointWriter(tmp_path / "checkpoints", EVERYTHING, is_writer=False)
    writer.save(tiny_model(0), [], TrainingState())
    writer.wait()
    assert writer.problem() is None
    assert not (tmp_path / "checkpoints").exists()


# What fails


@pytest.fixture(params=["mid-file", "on flushing"])
def full_disk(request, monkeypatch):
    """Calls that fill the disk and that make room again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fsync = os.fsync

    def fill():
        if request.param == "mid-file":
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        else:
            monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))

    def clear():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.setattr(os, "fsync", fsync)

    yield fill, clear
    clear()


def test_a_full_disk_is_told_once_and_harms_nothing(tmp_path, full_disk):
    fill, clear = full_disk
    model = tiny_model(0)
    optimizers = optimizers_of(model)
    learn(model, optimizers)
    writer = CheckpointWriter(tmp_path, EVERYTHING)
    writer.save(model, optimizers, TrainingState(step=1))
    writer.wait()
    before = {k: t.clone() for k, t in {**model_tensors(model), **optimizer_tensors(model, optimizers)}.items()}
    fill()
    try:
        writer.save(model, optimizers, TrainingState(step=2))
        writer.close()
        problem = writer.problem()
    finally:
        clear()
    assert problem
    assert problem.startswith("the checkpoint of step 2 could not be written (")
    assert "File too large" in problem or "No space left" in problem
    assert writer.problem() is None
    after = {**model_tensors(model), **optimizer_tensors(model, optimizers)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert writer.saved == newest_whole(tmp_path, pytest.fail) == tmp_path / "step-00000001"
    assert nothing_left_over(tmp_path)
    fill()
    try:
        writer.save(model, optimizers, TrainingState(step=2))
        with pytest.raises(OSError, match=r"File too large|No space left"):
            writer.wait()
    finally:
        clear()
    writer.save(model, optimizers, TrainingState(step=3))
    writer.wait()
    assert writer.problem() is None
    assert steps_in(tmp_path) == [1, 3]
    assert find_damage(tmp_path / "step-00000003") is None


def test_a_folder_that_cannot_be_made_is_told_and_a_failure_that_was_followed_by_success_is_no_failure(tmp_path):
    blocked = tmp_path / "checkpoints"
    blocked.write_text("")
    writer = CheckpointWriter(blocked, EVERYTHING)
    writer.save(tiny_model(0), [], TrainingState(step=1))
    writer.close()
    blocked.unlink()
    writer.save(tiny_model(0), [], TrainingState(step=2))
    writer.wait()
    assert "step 1" in str(writer.problem())
    assert steps_in(blocked) == [2]


def test_without_threads_the_checkpoint_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    writer = CheckpointWriter(tmp_path, EVERYTHING)
    writer.save(tiny_model(0), [], TrainingState(step=1))
    assert find_damage(tmp_path / "step-00000001") is None


# What stays


def write_steps(writer: CheckpointWriter, losses: dict[int, float | None]) -> None:
    """Save at these steps, validated where there is a loss."""
    state = TrainingState()
    for step, loss in losses.items():
        state.step = step
        if loss is not None:
            state.validated_step, state.val_loss = step, loss
            if state.best_val_loss is None or loss < state.best_val_loss:
                state.best_step, state.best_val_loss = step, loss
        writer.save(tiny_model(0), [], state)
        writer.wait()


def test_the_last_the_best_and_those_for_good_stay(tmp_path):
    writer = CheckpointWriter(tmp_path, Retention(keep_last=2, keep_best=2, keep_every=50))
    write_steps(writer, {10: 5.0, 20: 3.0, 30: 4.0, 40: None, 50: None, 60: 6.0, 70: None, 80: None})
    assert steps_in(tmp_path) == [20, 30, 50, 70, 80]
    assert nothing_left_over(tmp_path)


def test_a_damaged_checkpoint_does_not_count_and_goes(tmp_path):
    keep_two = Retention(keep_last=2, keep_best=0)
    write_steps(CheckpointWriter(tmp_path, EVERYTHING), {10: None, 20: None, 30: None})
    file = tmp_path / "step-00000030/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    writer = CheckpointWriter(tmp_path, keep_two)
    write_steps(writer, {25: None})
    assert steps_in(tmp_path) == [20, 25]
    (tmp_path / "step-00000025/COMPLETE").write_text("{}")  # of one that this very writer knows as whole
    write_steps(writer, {40: None})
    assert steps_in(tmp_path) == [20, 40]


def test_files_that_have_not_changed_are_not_hashed_again(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, EVERYTHING)
    write_steps(writer, {1: None})
    monkeypatch.setattr(checkpoint_writer, "find_damage", lambda path: pytest.fail(f"{path} was read"))
    write_steps(writer, {2: None, 3: None})
    assert writer.problem() is None
    assert steps_in(tmp_path) == [1, 2, 3]


def test_what_a_killed_process_left_is_removed_and_what_it_set_aside_returns(tmp_path):
    write_steps(CheckpointWriter(tmp_path, EVERYTHING), {1: None, 2: None})
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000003.new")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000001.old")
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.replaced")
    write_steps(CheckpointWriter(tmp_path, EVERYTHING), {4: None})
    assert steps_in(tmp_path) == [1, 2, 4]
    assert nothing_left_over(tmp_path)
    assert find_damage(tmp_path / "step-00000002") is None


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    model = tiny_model(0)
    for value in (1.0, 2.0):
        torch.nn.init.constant_(model.final_norm.weight, value)
        path = save(tmp_path, model)
    assert load_file(path / "model.safetensors")["final_norm.weight"][0] == 2
    assert steps_in(tmp_path) == [1]
    assert nothing_left_over(tmp_path)


# What ends the process

EXIT = """
import atexit, sys, threading, time
from pathlib import Path
from checkpoint_models import EVERYTHING, tiny_model
from gpt.training import checkpoint_writer
from gpt.training.checkpoint import TrainingState

write, directory = checkpoint_writer.write_checkpoint, Path(sys.argv[1])
checkpoint_writer.write_checkpoint = lambda *arguments: time.sleep(0.5) or write(*arguments)
model, writer = tiny_model(0), checkpoint_writer.CheckpointWriter(directory, EVERYTHING)

@atexit.register
def at_exit():
    print([path.name for path in directory.iterdir()])
    writer.save(model, [], TrainingState(step=2))
    writer.close()

writer.save(model, [], TrainingState(step=1))
raise SystemExit(143)
"""


def process_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}


def test_an_exit_waits_for_the_checkpoint_and_one_can_be_saved_while_the_interpreter_shuts_down(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EXIT, str(tmp_path)], env=process_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "['step-00000001']\n", "")
    assert [find_damage(path) for _, path in list_checkpoints(tmp_path)] == [None, None]


def save_until_killed(directory: Path, model: GPT, optimizers: list[torch.optim.Optimizer], first: int, tell: int) -> None:
    """Checkpoints whose every weight is their step, each saved twice; the steps that are on disk go to the pipe `tell`."""
    writer = CheckpointWriter(directory, Retention(keep_last=2, keep_best=0))
    for step in range(first, first + 10**6):
        with torch.no_grad():
            for tensor in (*model.parameters(), *optimizer_tensors(model, optimizers).values()):
                tensor.fill_(step)
        for _ in range(2):
            writer.save(model, optimizers, TrainingState(step=step))
            writer.wait()
            os.write(tell, b"%d\n" % step)


def kill_over_and_over(directory: Path) -> None:
    model = GPT(GPTConfig(512, 8, n_layer=1, n_head=2, d_model=128))
    optimizers = optimizers_of(model, "adamw")
    learn(model, optimizers)
    chance, newest, interrupted = random.Random(0), 0, 0
    for _ in range(KILLS):
        heard, tell = os.pipe()
        child = os.fork()
        if not child:
            save_until_killed(directory, model, optimizers, newest + 1, tell)
        os.close(tell)
        told = os.read(heard, 100)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(heard, 10_000):
            told += more
        os.close(heard)
        on_disk = int(told.split()[-1])
        said: list[str] = []
        path = newest_whole(directory, said.append)
        assert path is not None
        assert not said, "even what comes last is whole"
        newest = read_state(path).step
        assert newest in (on_disk, on_disk + 1), (newest, on_disk)
        for file in ("model.safetensors", "optimizer/state.safetensors"):
            tensors = load_file(path / file)
            assert tensors
            for name, tensor in tensors.items():
                assert (tensor == newest).all(), (path, name)
        interrupted += any(each.name.startswith(".") for each in directory.iterdir())
    print(interrupted)


def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=process_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= KILLS // 3, "most kills were to come while something was being written"


if __name__ == "__main__":
    kill_over_and_over(Path(sys.argv[1]))
