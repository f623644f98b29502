"""What a training job runs: process 1 of each of its containers, which sets up this host, starts the run on it and says how it ended.

It lies alone in the channel `code`, beside the wheel that it installs and the run's config, so it has only the standard library. What it
finds and leaves is SageMaker's contract: https://docs.aws.amazon.com/sagemaker/latest/dg/amazon-sagemaker-toolkits.html,
https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html.
"""

from __future__ import annotations

import collections
import contextlib
import email
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = "/opt/ml"
CACHES = "/tmp/gpt"
"""Where the config has caches: in the folder for temporary files."""
PORT = 7777
LONGEST_FAILURE = 1024  # characters, of what SageMaker shows as FailureReason
_HOSTS_SECONDS = 600
_LEFT_SECONDS = 5.0


class JobError(Exception):
    """The job cannot go on; the message is for the user."""


class StoppedEarlyError(Exception):
    """A signal came before the run had started."""


@dataclass(frozen=True)
class Paths:
    """Everything that SageMaker lays out, below one root: /opt/ml, or another in a rehearsal without namespaces."""

    root: Path

    @property
    def config(self) -> Path:
        """What the job is: resourceconfig.json and others."""
        return self.root / "input" / "config"

    @property
    def data(self) -> Path:
        """The input channels, a folder each."""
        return self.root / "input" / "data"

    @property
    def code(self) -> Path:
        """The channel with this file, the wheel and the run's config."""
        return self.data / "code"

    @property
    def model(self) -> Path:
        """What becomes the model in S3."""
        return self.root / "model"

    @property
    def output(self) -> Path:
        """What the job says: `failure`, and `data`, which goes to S3."""
        return self.root / "output"

    def read(self, name: str) -> Any:
        """A file of `config`, or {} where the job has none."""
        file = self.config / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@dataclass(frozen=True)
class Job:
    """Who this host is among the hosts of its job."""

    paths: Paths
    resources: dict[str, Any]
    is_portable: bool

    @property
    def host(self) -> str:
        """Such as algo-1."""
        return self.resources["current_host"]

    @property
    def hosts(self) -> list[str]:
        """All of them, in the order of their numbers."""
        return sorted(self.resources["hosts"], key=lambda name: (len(name), name))

    @property
    def rank(self) -> int:
        """Of this host; that of rank 0 has the run directory."""
        return self.hosts.index(self.host)

    @property
    def meeting_point(self) -> str:
        """host:port of the first host, or nothing where it is alone. A rehearsal without namespaces has no names for its hosts."""
        if len(self.hosts) == 1:
            return ""
        first = "127.0.0.1" if self.is_portable else self.hosts[0]
        return f"{first}:{os.environ.get('GPT_ML_PORT', PORT)}"


class Run:
    """The process that trains on this host, and all that it has started, whoever became their parent since."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._ended = False
        self.last_lines: collections.deque[str] = collections.deque(maxlen=15)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)
        _adopt_orphans()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on, to torch's agent, which passes it on to every rank; what is being copied at the end is finished."""
        self.signal = number
        if self._process is None:
            raise StoppedEarlyError
        if not self._ended:
            self._send(number)

    def _send(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)  # Popen.send_signal might take the exit code that `wait` waits for

    def start(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        """Start it; what it says on stderr is shown, and the end of it kept."""
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, cwd=folder)
        if self.signal is not None:  # it came in the meantime
            self._send(self.signal)
        self._reader = threading.Thread(target=self._show, name="stderr", daemon=True)
        self._reader.start()

    def wait(self) -> int:
        """Its exit code, negative for a signal. Meanwhile, as process 1 must, bury all who have died; at the end, end who is left."""
        assert self._process is not None
        assert self._reader is not None
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == self._process.pid:
                break
        self._ended = True
        self._process.returncode = os.waitstatus_to_exitcode(status)
        _end_everybody()
        self._reader.join(_LEFT_SECONDS)
        return self._process.returncode

    def _show(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        for line in self._process.stderr:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
            self.last_lines.append(line.decode(errors="replace").rstrip())


def _adopt_orphans() -> None:
    """Become the parent of processes whose own has died, as process 1 is (Linux)."""
    if sys.platform == "linux" and os.getpid() != 1:
        import ctypes

        set_child_subreaper = 36  # prctl(2), PR_SET_CHILD_SUBREAPER
        ctypes.CDLL(None).prctl(set_child_subreaper, 1)


def _end_everybody() -> None:
    """End every process below this one: first kindly."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _LEFT_SECONDS
        while (left := _descendants()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.05)


def _descendants() -> list[int]:
    """Every process below this one; [] where there is no /proc."""
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                below = [int(text) for text in file.read_text().split()]
                found += below
                waiting += below
    return found


def main() -> int:
    """Be a host of a job, from its layout to its exit code: 0 done, 128 and the signal when interrupted, else what the run ended with."""
    run = Run()
    root = os.environ.get("GPT_ML_ROOT")  # of a rehearsal without namespaces
    paths = Paths(Path(root or ROOT))
    try:
        with tempfile.TemporaryDirectory(prefix="gpt-job-") as folder:
            return _work(run, paths, Path(folder), is_portable=root is not None)
    except StoppedEarlyError:
        return 128 + (run.signal or signal.SIGTERM)
    except JobError as error:
        print(f"gpt: {error}", file=sys.stderr)
        _write_failure(paths, str(error))
    except Exception as error:
        traceback.print_exc()
        _write_failure(paths, "".join(traceback.format_exception_only(error)).strip())
    return 1


def _work(run: Run, paths: Paths, folder: Path, is_portable: bool) -> int:
    job = Job(paths, paths.read("resourceconfig.json"), is_portable)
    if "current_host" not in job.resources:
        raise JobError(f"{paths.config / 'resourceconfig.json'} is missing: this runs in a SageMaker training job, or launch=emulated")
    code = folder / "installed"
    _install(paths.code, code)
    _fix_times(paths.data)
    config = _config(job)
    file, failure = folder / "config.json", folder / "failure"
    file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    environment = {
        **os.environ, **_variables(job), "PYTHONUNBUFFERED": "1", "GPT_FAILURE_FILE": str(failure),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a host that loses another says so in fifty lines of addresses
    if interface := job.resources.get("network_interface_name"):
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            environment.setdefault(name, interface)
    _wait_for_hosts(job)
    run.start([sys.executable, "-m", "gpt.launch", str(file)], environment, folder)
    result = run.wait()
    directory = Path(config["run"]["dir"], config["run"]["id"])
    if result in (128 + signal.SIGTERM, 128 + signal.SIGINT) or (result and run.signal is not None):
        print(f"gpt: {job.host} was interrupted; what was saved is in {directory}", file=sys.stderr)
        return 128 + (run.signal or signal.SIGTERM)
    if result:
        said = failure.read_text(encoding="utf-8") if failure.is_file() else None
        # Nothing in it: another host says it. No such file: whatever it was, it came before the run could speak.
        _write_failure(paths, "\n".join(run.last_lines) or f"the run ended with {result}" if said is None else said)
    if job.rank == 0 and directory.is_dir():
        _hand_over(directory, paths, finished=result == 0)
    return result if result >= 0 else 128 - result


# Before the run


def _install(channel: Path, target: Path) -> None:
    """Unpack the wheel of gpt, which is all that installing a pure one does, and see that what it needs is there."""
    wheels = sorted(channel.glob("*.whl"))
    if len(wheels) != 1:
        raise JobError(f"{channel} must hold one wheel of gpt, and holds {len(wheels)}")
    zipfile.ZipFile(wheels[0]).extractall(target)
    (metadata,) = target.glob("*.dist-info/METADATA")
    needs = email.message_from_string(metadata.read_text(encoding="utf-8")).get_all("Requires-Dist", [])
    missing = [need for need in needs if "extra ==" not in need and not _is_installed(need)]
    if not missing:
        return
    print(f"gpt: the image lacks {', '.join(missing)}: installing", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries=1", *missing]
    if subprocess.run(pip, check=False).returncode:
        raise JobError(
            f"the image lacks {', '.join(missing)}, and pip could not install it here; take an image that has it, launch.image_uri=..."
        )
    importlib.invalidate_caches()


def _is_installed(need: str) -> bool:
    """Whether a requirement, such as `hydra-core>=1.3.8,<1.4`, is met; of what restricts the version, `>=` and `<` count."""
    need = need.partition(";")[0]
    name = re.split(r"[^\w.-]", need.strip(), maxsplit=1)[0]
    try:
        there = _numbers(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False
    borders = re.findall(r"(>=|<(?!=))\s*([\d.]+)", need)
    return all((there >= _numbers(version)) == (sign == ">=") for sign, version in borders)


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cu130` as (2, 13), which is 2.13 too."""
    numbers = [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version, maxsplit=1)[0])]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _fix_times(channels: Path) -> None:
    """Give inputs one time of change. Large files are known by size and time, and after an interruption they are downloaded anew."""
    for file in channels.rglob("*"):
        with contextlib.suppress(OSError):  # read-only, and then no copy of this host's
            os.utime(file, (0, 0))


def _config(job: Job) -> dict[str, Any]:
    """The run's config with what this host adds: where its files are, which host it is, and where the hosts meet."""
    config = json.loads((job.paths.code / "config.json").read_text(encoding="utf-8"))
    places = {ROOT: str(job.paths.root), CACHES: os.path.join(tempfile.gettempdir(), "gpt")}
    config = _moved(config, places)
    config["launch"] |= {"node_rank": job.rank, "nnodes": len(job.hosts), "endpoint": job.meeting_point}
    return config


def _moved(value: Any, places: dict[str, str]) -> Any:
    """A value with every path below one of `places` put where that is."""
    if isinstance(value, dict):
        return {key: _moved(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, places) for item in value]
    for place, there in places.items():
        if isinstance(value, str) and (value == place or value.startswith(f"{place}/")):
            return there + value[len(place) :]
    return value


def _variables(job: Job) -> dict[str, str]:
    """What SageMaker's own containers tell user code (https://github.com/aws/sagemaker-training-toolkit/blob/master/ENVIRONMENT_VARIABLES.md)."""
    paths, resources = job.paths, job.resources
    hyperparameters, channels = paths.read("hyperparameters.json"), paths.read("inputdataconfig.json")
    told: dict[str, Any] = {
        "hosts": job.hosts, "current_host": job.host, "network_interface_name": resources.get("network_interface_name", ""),
        "current_instance_type": resources.get("current_instance_type", ""),
        "current_instance_group": resources.get("current_group_name", ""),
        "num_gpus": len([p for p in Path("/dev").glob("nvidia*") if p.name[6:].isdigit()]), "num_cpus": os.cpu_count() or 1,
        "hps": hyperparameters, "channels": sorted(channels),
        "input_dir": str(paths.root / "input"), "input_config_dir": str(paths.config), "model_dir": str(paths.model),
        "output_dir": str(paths.output), "output_data_dir": str(paths.output / "data"),
        "input_data_config": channels, "resource_config": resources,
    }  # fmt: skip
    folders = {f"channel_{name}": str(paths.data / name) for name in channels}
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (told | folders).items()}
    values["training_env"] = json.dumps(told | {"channel_input_dirs": {name: str(paths.data / name) for name in channels}})
    values |= {f"hp_{name}": str(value) for name, value in hyperparameters.items()}
    return {f"SM_{key.upper()}": value for key, value in values.items()}


def _wait_for_hosts(job: Job) -> None:
    """Return when every other host's name leads somewhere: they do not come up at the same moment."""
    deadline = time.monotonic() + _HOSTS_SECONDS
    waiting = [] if job.is_portable else [name for name in job.hosts if name != job.host]
    while waiting:
        try:
            socket.getaddrinfo(waiting[0], None)
            waiting.pop(0)
        except OSError as error:
            if time.monotonic() > deadline:
                raise JobError(f"the name of host {waiting[0]} leads nowhere after {_HOSTS_SECONDS} s ({error})") from error
            time.sleep(1)


# After it


def _hand_over(directory: Path, paths: Paths, finished: bool) -> None:
    """Put the model where SageMaker takes it from, and what tells of the run beside it."""
    if finished:
        shutil.copytree(directory / "model", paths.model, dirs_exist_ok=True)
    for entry in directory.iterdir():
        if entry.is_dir() and entry.name not in ("checkpoints", "model"):
            shutil.copytree(entry, paths.output / "data" / entry.name, dirs_exist_ok=True)
        elif entry.is_file() and not entry.name.startswith("."):
            (paths.output / "data").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry, paths.output / "data" / entry.name)


def _write_failure(paths: Paths, text: str) -> None:
    """Say why the job failed, in as many characters as are shown; nothing where there is nothing to say."""
    if text.strip():
        paths.output.mkdir(parents=True, exist_ok=True)
        (paths.output / "failure").write_text(text.strip()[:LONGEST_FAILURE], encoding="utf-8")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
