"""The job's first process on one host, with a run that is played: what it sets up, passes on, hands over and says."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpt.aws.container import _is_installed
from tests.aws.played_wheel import CONTAINER, lay_out


def start(root: Path, entrypoint: Path, **environment: str) -> subprocess.Popen[str]:
    """As a rehearsal without namespaces starts it."""
    env = {**os.environ, "GPT_ML_ROOT": str(root), "PIP_NO_INDEX": "1", "PYTHONPATH": "", **environment}
    return subprocess.Popen([sys.executable, "-u", str(entrypoint)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def run(root: Path, act: str, environment: dict[str, str] | None = None, **layout: Any) -> tuple[int, str]:
    """Exit code and stderr of a whole job."""
    process = start(root, lay_out(root, act, **layout), **(environment or {}))
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def seen(root: Path, host: str = "algo-1") -> dict[str, Any]:
    return json.loads((root / "checkpoints" / "r" / f"seen-{host}.json").read_text())


def failure(root: Path) -> str | None:
    file = root / "output" / "failure"
    return file.read_text(encoding="utf-8") if file.exists() else None


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def test_it_has_only_the_standard_library():
    tree = ast.parse(CONTAINER.read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in modules} <= sys.stdlib_module_names | {"__future__"}


# What it sets up


def test_the_model_and_what_tells_of_the_run_are_handed_over(tmp_path):
    assert run(tmp_path, "train") == (0, "")
    assert (tmp_path / "model" / "weights").read_text() == "model"
    data = tmp_path / "output" / "data"
    assert {path.name for path in data.iterdir()} == {"report.html", "config.yaml", "seen-algo-1.json", "start-1", "adapter"}
    assert failure(tmp_path) is None


def test_user_code_is_told_what_sagemaker_tells_it(tmp_path):
    run(tmp_path, "train", environment={"GLOO_SOCKET_IFNAME": "mine"})
    told = seen(tmp_path)["environment"]
    assert told["SM_CURRENT_HOST"] == "algo-1"
    assert json.loads(told["SM_HOSTS"]) == ["algo-1"]
    assert told["SM_CHANNEL_TRAIN"] == str(tmp_path / "input" / "data" / "train")
    assert json.loads(told["SM_CHANNELS"]) == ["code", "train"]
    assert (told["SM_MODEL_DIR"], told["SM_OUTPUT_DATA_DIR"]) == (str(tmp_path / "model"), str(tmp_path / "output" / "data"))
    assert json.loads(told["SM_HPS"]) == {"optimizer.lr": "007", "text": "a 'b' \"c\" = ü"}
    assert told["SM_HP_OPTIMIZER.LR"] == "007"
    assert told["SM_CURRENT_INSTANCE_TYPE"] == "ml.p5.48xlarge"
    assert told["SM_NUM_GPUS"].isdigit()
    whole = json.loads(told["SM_TRAINING_ENV"])
    assert whole["channel_input_dirs"]["train"] == told["SM_CHANNEL_TRAIN"]
    assert whole["resource_config"]["network_interface_name"] == "eth7"
    assert told["NCCL_SOCKET_IFNAME"] == "eth7"
    assert told["GLOO_SOCKET_IFNAME"] == "mine", "what the job's environment says counts"


def test_a_host_knows_its_number_and_where_the_hosts_meet(tmp_path):
    hosts = [f"algo-{number}" for number in (10, 2, 1)]
    text = {"data": {"paths": ["/opt/ml/input/data/train", "/opt/mlx", "not /opt/ml"], "cache_dir": "/tmp/gpt"}}
    run(tmp_path / "2", "both write", host="algo-2", hosts=hosts, **text)
    given = json.loads((tmp_path / "2" / "checkpoints" / "r" / "seen.json").read_text())["config"]
    assert given["launch"] == {"name": "local", "node_rank": 1, "nnodes": 3, "endpoint": "127.0.0.1:7777"}
    assert given["data"]["paths"] == [str(tmp_path / "2" / "input" / "data" / "train"), "/opt/mlx", "not /opt/ml"]
    assert given["data"]["cache_dir"].endswith("/gpt")
    assert not list((tmp_path / "2" / "model").iterdir()), "the model is the first host's affair"
    assert run(tmp_path / "1", "train")[0] == 0
    assert seen(tmp_path / "1")["config"]["launch"]["endpoint"] == "", "alone there is nobody to meet"


def test_inputs_have_the_same_time_on_every_host(tmp_path):
    entrypoint = lay_out(tmp_path, "train")
    file = tmp_path / "input" / "data" / "train" / "large.txt"
    file.write_text("text")
    start(tmp_path, entrypoint).communicate(timeout=60)
    assert file.stat().st_mtime == 0


def test_what_the_image_lacks_is_named_all_of_it(tmp_path):
    needs = ["torch>=2.11", "no-such-package>=1.2,<2", "another-one", "numpy>=999", 'of-an-extra>=1; extra == "aws"', "pytest[x]>=1"]
    code, stderr = run(tmp_path, "train", needs=needs)
    assert code == 1
    lacks = "the image lacks no-such-package>=1.2,<2, another-one, numpy>=999, and pip could not install it here"
    assert failure(tmp_path) == f"{lacks}; take an image that has it, launch.image_uri=..."
    assert lacks in stderr


@pytest.mark.parametrize(
    ("need", "met"),
    [
        ("pytest", True),
        ("PyTest>=8", True),
        ("pytest (>=1.0)", True),
        ("pytest>=1.0,<2", False),
        ("pytest<9999.1", True),
        ("nothing-such", False),
    ],
)
def test_requirements_are_compared_by_number(need, met):
    assert _is_installed(need) == met


def test_outside_a_job_it_says_so(tmp_path):
    process = start(tmp_path, CONTAINER)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"{tmp_path}/input/config/resourceconfig.json is missing: this runs in a SageMaker training job" in stderr


# How it ends


def test_the_users_error_is_the_failure_word_for_word(tmp_path):
    text = "data.paths: no file matches 'corpus/*.txt' = \"ü\" (looked in /x)."
    assert run(tmp_path, f"say:{text}")[0] == 2
    assert failure(tmp_path) == text
    assert (tmp_path / "output" / "data" / "seen-algo-1.json").is_file(), "what tells of the run is kept"
    assert not list((tmp_path / "model").iterdir())


def test_a_long_error_is_cut(tmp_path):
    assert run(tmp_path, "say:" + "ü" * 3000)[0] == 2
    assert failure(tmp_path) == "ü" * 1024


def test_a_host_that_only_lost_the_others_says_nothing(tmp_path):
    assert run(tmp_path, "lose the others")[0] == 1
    assert failure(tmp_path) is None


def test_of_a_crash_before_the_run_could_speak_the_last_lines_are_kept(tmp_path):
    code, stderr = run(tmp_path, "crash")
    assert code == 128 + signal.SIGABRT
    assert "Fatal: a crash" in stderr
    assert "Fatal: a crash" in (failure(tmp_path) or "")


def test_a_signal_is_passed_on_and_is_no_failure(tmp_path):
    process = start(tmp_path, lay_out(tmp_path, "stop when told"))
    wait_for(tmp_path / "checkpoints" / "r" / "ready")
    process.terminate()
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "algo-1 was interrupted; what was saved is in" in stderr
    assert (tmp_path / "checkpoints" / "r" / "saved-1").exists()
    assert failure(tmp_path) is None


def test_a_signal_before_the_run_starts_ends_it(tmp_path):
    hosts = ["algo-1", "no-such-host.invalid"]
    root = tmp_path
    entrypoint = lay_out(root, "train", hosts=hosts)
    code = f"import runpy, sys; sys.argv=['x']; import os; m = runpy.run_path({str(entrypoint)!r}); "
    # The true names are waited for only outside a rehearsal.
    code += "m['main'].__globals__['ROOT'] = " + repr(str(root)) + "; sys.exit(m['main']())"
    environment = {name: value for name, value in os.environ.items() if name != "GPT_ML_ROOT"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment)
    time.sleep(1.5)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert failure(root) is None


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are found through /proc")
def test_nothing_that_the_run_started_is_left(tmp_path):
    mark = f"left-by-{os.getpid()}"
    code, _ = run(tmp_path, f"leave children:{mark}")
    assert code == 1, "a run without a model is no success"
    left = [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or []) or p.info["cmdline"] == ["sleep", "61"]]
    assert not left
