"""Real runs under launch=emulated: the same weights as here, to the bit, however the job is laid out and whatever happens to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from gpt.aws.emulated_hosts import namespaces_problem
from gpt.aws.emulator import emulate
from gpt.compose import compose_run
from gpt.config import RunConfig
from gpt.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
ISOLATED = "portable" if namespaces_problem() else "namespaces"
PROMPTS = ["it's \"so\" = 'é' 日本 😀, ${x} \\n", "a b", "007", "1e-3", "=", "--flag=1"]
TINY = [
    "debug=golden", "precision=fp32", "train.log_every=1", "train.eval_tokens=1024", "train.final_eval_tokens=1024", "train.ema=0.9",
    "train.sample_tokens=2", "train.budget=12steps", "optimizer.lr=1e-3", "run.id=r",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts in a folder that must be quoted everywhere."""
    folder = tmp_path_factory.mktemp("texts") / 'it\'s = a "ü" folder'
    shutil.copytree(corpus, folder)
    return folder


@pytest.fixture(scope="module")
def here(texts: Path, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Callable[..., Path]:
    """The run directory of a run on this machine; the same settings train once."""
    found: dict[tuple[str, ...], Path] = {}

    def train(*settings: str) -> Path:
        if settings not in found:
            folder = tmp_path_factory.mktemp("here")
            config = config_of(texts, folder, *settings)
            config.data.cache_dir = str(cache_dir)
            file = folder / "config.yaml"
            file.write_text(yaml.safe_dump(config.to_dict(), allow_unicode=True), encoding="utf-8")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "gpt.launch", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250, check=False)
            assert done.returncode == 0, done.stderr
            found[settings] = folder / "r"
        return found[settings]

    return train


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def config_of(texts: Path, folder: Path, *settings: str) -> RunConfig:
    """As the command line composes it."""
    given = {"data.paths": [str(texts)], "train.sample_prompts": PROMPTS}
    quoted = {key: ",".join("'" + text.replace("'", "\\'") + "'" for text in values) for key, values in given.items()}
    words = [f"{key}=[{values}]" for key, values in quoted.items()]
    config = compose_run("pretrain", [*TINY, "data=text", f"run.dir={folder}", *words, *settings])
    assert (config.data.paths, config.train.sample_prompts) == (given["data.paths"], PROMPTS)
    return config


def emulated(texts: Path, folder: Path, *settings: str, isolation: str = ISOLATED) -> int:
    return emulate(config_of(texts, folder, "launch=emulated", f"launch.emulated.isolation={isolation}", *settings))


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def description(run: Path) -> dict[str, Any]:
    (file,) = (run / "emulated").glob("*/description.json")
    return json.loads(file.read_text(encoding="utf-8"))


# The same weights


def test_one_host_and_one_process(texts, here, tmp_path, capfd):
    assert emulated(texts, tmp_path, isolation="portable") == 0
    mine, other = tmp_path / "r", here()
    assert weights(mine) == weights(other)
    assert [line.get("loss") for line in read_metrics(mine / "metrics.jsonl")] == [
        line.get("loss") for line in read_metrics(other / "metrics.jsonl")
    ]
    assert {path.name for path in (mine / "checkpoints").iterdir()} == {path.name for path in (other / "checkpoints").iterdir()}
    own, its = (yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) for run in (mine, other))
    assert own["model"] == its["model"], "with the size of the vocabulary"
    assert own["data"]["paths"] == [str(texts)]
    (there,) = (mine / "emulated" / "s3").glob("*/r/checkpoints/r/config.yaml")
    of_job = yaml.safe_load(there.read_text(encoding="utf-8"))
    assert of_job["train"] == its["train"], "quotes, blanks, = and other alphabets arrive as they are"
    assert of_job["train"]["sample_prompts"] == PROMPTS
    assert of_job["optimizer"] == its["optimizer"]
    (model,) = (mine / "emulated" / "s3").glob("*/r/jobs/*/output/model/model.safetensors")
    assert model.read_bytes() == weights(mine)
    assert "algo-1 | step 12  loss" in capfd.readouterr().err


@pytest.mark.parametrize("layout", [["launch.nproc=2"], ["launch.instance_count=2"]], ids=["1x2", "2x1"])
def test_two_processes_on_one_host_and_on_two(texts, here, tmp_path, capfd, layout):
    assert emulated(texts, tmp_path, "parallel=ddp", *layout) == 0
    assert weights(tmp_path / "r") == weights(here("parallel=ddp", "launch.nproc=2"))
    assert "both write" not in capfd.readouterr().err, "one host alone writes checkpoints"


@pytest.mark.slow
def test_two_hosts_with_two_processes_each_that_share_the_parameters_out(texts, here, tmp_path):
    assert emulated(texts, tmp_path, "parallel=fsdp", "launch.nproc=2", "launch.instance_count=2", "launch.network_isolation=true") == 0
    assert weights(tmp_path / "r") == weights(here("parallel=fsdp", "launch.nproc=4"))


LONG = ["train.budget=800steps", "checkpoint.every=20steps", "train.log_every=100", "train.eval_every=0"]


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_two_interruptions_leave_no_trace_in_the_weights(texts, here, tmp_path, hosts):
    layout = ["parallel=ddp", "launch.instance_count=2"] if hosts == 2 else []
    again = ["launch.emulated.interrupt_after=9s", "launch.emulated.interruptions=2"]
    assert emulated(texts, tmp_path, *LONG, *layout, *again) == 0
    assert description(tmp_path / "r")["Interruptions"] == 2
    assert weights(tmp_path / "r") == weights(here(*LONG, *(["parallel=ddp", "launch.nproc=2"] if hosts == 2 else [])))


@pytest.mark.slow
def test_a_host_that_is_killed_goes_on_from_what_s3_has(texts, here, tmp_path):
    """Without the notice there is no last checkpoint."""
    again = ["launch.emulated.interrupt_after=10s", "launch.emulated.notice=0.1s"]
    assert emulated(texts, tmp_path, *LONG, *again) == 0
    assert weights(tmp_path / "r") == weights(here(*LONG))


@pytest.mark.slow
def test_a_torn_newest_checkpoint_is_passed_over(texts, here, tmp_path, capfd):
    settings = ["schedule=constant", "checkpoint.every=5steps", "checkpoint.keep_last=3"]
    assert emulated(texts, tmp_path, *settings, "train.budget=20steps") == 0
    (run,) = (tmp_path / "r" / "emulated" / "s3").glob("*/r/checkpoints/r")
    newest = run / "checkpoints" / "step-00000020" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert emulated(texts, tmp_path, *settings, "train.budget=30steps") == 0
    said = capfd.readouterr().err
    assert re.search(r"step-00000020 is not whole \(model.safetensors has \d+ bytes", said)
    assert "step-00000015 at step 15" in said
    assert weights(tmp_path / "r") == weights(here(*settings, "train.budget=30steps"))


# Failures


def test_the_users_mistake_is_the_reason_word_for_word(texts, tmp_path, capfd):
    assert emulated(texts, tmp_path, "tokenizer=char", "model.vocab_size=257") == 2
    (said,) = re.findall(r"^algo-1 \| gpt: (.*)$", capfd.readouterr().err, re.MULTILINE)
    assert said.startswith("model.vocab_size=257 is smaller than the tokenizer's ")
    assert description(tmp_path / "r")["FailureReason"] == f"AlgorithmError: {said}, exit code: 2"


def test_a_process_that_dies_on_the_second_host_is_named(texts, tmp_path):
    def kill() -> None:
        deadline = time.monotonic() + 120
        pattern = "r/emulated/*/hosts/algo-1/checkpoints/r/metrics.jsonl"
        while not any(file.stat().st_size for file in tmp_path.glob(pattern)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == "1" and "gpt.launch" in process.cmdline():
                    process.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert emulated(texts, tmp_path, "parallel=ddp", "launch.instance_count=2", "train.budget=100000steps") == 1
    killer.join()
    reason = "process 1 of the run was ended by SIGKILL; was it out of memory?, and the others with it"
    assert description(tmp_path / "r")["FailureReason"] == f"AlgorithmError: {reason}, exit code: 1"
