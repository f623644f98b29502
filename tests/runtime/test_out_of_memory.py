"""When memory runs out: it is recognised on every device, and the settings that are named save what the formulas say."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt.cli import main
from gpt.compose import compose_run
from gpt.model.config import GPTConfig
from gpt.runtime.case import Case
from gpt.runtime.memory import ROOM, binary_size, peak
from gpt.runtime.out_of_memory import advice, memory_error, says_out_of_memory
from gpt.training.step import Step

CASE = Case(GPTConfig(50257, 1024), micro_batch=16, passes=2)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("RESOURCE_EXHAUSTED: LoadExecutable: Failed to load NEFF"),
        RuntimeError("nrt_tensor_allocate status=4 NRT_RESOURCE"),
        RuntimeError("Failed to allocate 1073741824 bytes on device"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_a_lack_of_memory_is_recognised(error):
    assert says_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_are_not(error):
    assert not says_out_of_memory(error)


def test_a_real_lack_of_memory_of_this_machine_is_recognised():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60)
    assert says_out_of_memory(failed.value)


def settings_of(lines: list[str]) -> list[str]:
    return [match[1] for line in lines if (match := re.match(r"(\S+=\S+)(?: on \d+ devices)? saves ", line))]


def test_settings_are_named_with_what_they_save_the_cheapest_first():
    case = replace(CASE, optimizer="adamw", ema=True, replicas=4, checkpointing="none")
    lines = advice(case, None, chose_fp32=False, compiles=True)
    assert settings_of(lines) == [
        "train.micro_batch=8", "compile=true", "train.activation_checkpointing=selective", "train.activation_checkpointing=full",
        "parallel=fsdp", "parallel.tensor=2", "parallel=fsdp", "train.ema=0", "optimizer=muon", "train.sequence_length=512",
    ]  # fmt: skip
    saved = peak(case) - peak(replace(case, micro_batch=8, passes=4))
    assert lines[0] == f"train.micro_batch=8 saves {binary_size(saved)} (the same result)"
    assert saved > 2**30


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"micro_batch": 1}, "train.micro_batch"), ({"compiled": True}, "compile"),
        ({"checkpointing": "full"}, "full"), ({"optimizer": "muon"}, "optimizer"), ({"ema": False}, "ema"),
        ({"replicas": 1, "shards": 4}, "parallel=fsdp saves"), ({"width": 2}, "precision"),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_apply_is_not_named(changes, setting):
    case = replace(CASE, optimizer="adamw", ema=True, replicas=4, width=4)
    assert setting in "\n".join(advice(case, None, chose_fp32=True, compiles=True))
    assert setting not in "\n".join(advice(replace(case, **changes), None, chose_fp32="width" not in changes, compiles=True))


def test_more_devices_are_no_help_where_they_share_the_memory():
    assert "devices" in "\n".join(advice(CASE, None))
    assert "devices" not in "\n".join(advice(CASE, None, is_host=True))


def test_a_micro_batch_that_fits_is_found():
    target = replace(CASE, micro_batch=4, passes=8)
    (line,) = [line for line in advice(CASE, int(peak(target) / ROOM) + 1) if line.startswith("train.micro_batch")]
    assert line.startswith("train.micro_batch=4 saves")
    assert ", and the run fits" in line


def test_what_is_enough_only_together_is_said():
    case = replace(CASE, model=GPTConfig(50257, 8192), length=8192, micro_batch=2, passes=1)
    full = replace(case, micro_batch=1, passes=2, compiled=True, checkpointing="full")
    *lines, last = advice(case, int(peak(full) / ROOM) + 1, compiles=True, is_host=True)
    assert not any("fits" in line for line in lines)
    assert last == "none is enough alone; together these are: train.micro_batch=1 compile=true train.activation_checkpointing=full"


def test_if_nothing_suffices_it_is_said():
    last = advice(CASE, 2**28, is_host=True)[-1]
    assert re.match(r"all of them together still need [\d.]+ GiB: take a smaller model \(model.n_layer, model.d_model\)", last)


def test_a_run_that_should_fit_points_elsewhere():
    assert advice(CASE, 2**50)[-1].startswith("by the formulas the run fits: another program")


def test_an_error_of_another_kind_has_no_advice():
    config = compose_run("pretrain", ["run.id=r"])
    assert memory_error(RuntimeError("shapes differ"), config, lambda: CASE, None, "here") is None  # type: ignore[arg-type]


def test_a_step_that_runs_out_of_memory_ends_the_run_with_advice(tmp_path: Path, corpus: Path, cache_dir, monkeypatch, capsys):
    """Made up: the third step raises what CUDA would. The run goes on from its checkpoint with a setting that was named."""
    small = ["debug=golden", "data=text", "train.batch_tokens=256", "device=cpu", "compile=false", "train.sample_prompts=[]"]
    places = [f"data.paths=[{corpus}]", f"data.cache_dir={cache_dir}", f"run.dir={tmp_path}", "run.id=r"]
    lengths = ["train.budget=4steps", "checkpoint.every=1steps", "train.eval_every=0", "train.eval_tokens=64", "train.final_eval_tokens=64"]
    whole, done = Step.__call__, []

    def runs_out(step: Step, *args, **options) -> bool:
        done.append(1)
        if len(done) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(step, *args, **options)

    monkeypatch.setattr(Step, "__call__", runs_out)
    assert main(["pretrain", *small, *places, *lengths]) == 2
    said = capsys.readouterr().err.splitlines()
    problem, *lines = said[next(i for i, line in enumerate(said) if line.startswith("gpt: ")) :]
    checkpoint = tmp_path / "r" / "checkpoints" / "step-00000002"
    assert problem.startswith("gpt: out of memory while training step 3; the last checkpoint is " + str(checkpoint))
    assert problem.endswith(f"go on with: gpt pretrain resume={tmp_path / 'r'}, and one of these:")
    assert [line[:2] for line in lines] == ["  "] * len(lines)
    assert "train.micro_batch=2" in settings_of([line.strip() for line in lines])
    assert main(["pretrain", f"resume={tmp_path / 'r'}", "train.micro_batch=2"]) == 0
    assert f"resuming from {checkpoint} at step 2" in capsys.readouterr().err
