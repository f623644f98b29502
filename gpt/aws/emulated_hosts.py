"""The hosts of an emulated training job: each one's /opt/ml as SageMaker lays it out, and its entrypoint, which runs in it.

In namespaces a host has the true /opt/ml, a name, and the entrypoint as process 1; elsewhere the environment names another root.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from gpt.aws.emulated_storage import Storage
from gpt.aws.inputs import ROOT
from gpt.errors import UserError

Isolation = Literal["namespaces", "portable"]
NAMESPACE = Path(__file__).with_name("emulated_namespace.py")
_GROUP = "homogeneousCluster"
# Of this machine's environment, what a container's image would have, or what says where things are on this machine; no credentials.
_KEPT = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
    "CC", "CXX", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy",
    "no_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "TORCHINDUCTOR_CACHE_DIR", "GPT_DEBUG",
)  # fmt: skip


class Host:
    """One host of the job.

    Attributes:
        name: such as algo-1.
        root: what is its /opt/ml.
        code: exit code, when it has ended; 137 if it was killed.
        ended: when, on the monotonic clock.
    """

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root
        self.code: int | None = None
        self.ended = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def failure(self) -> str:
        """What it says of its failure."""
        file = self.root / "output" / "failure"
        return file.read_text(encoding="utf-8") if file.is_file() else ""


class Hosts:
    """All hosts of a job, from their layout to their end; leaving the context ends what still runs, at once.

    Args:
        request: of CreateTrainingJob.
        folder: for what the hosts have on their disks.
        storage: S3.
        isolation: how they are kept apart.
        port: where they meet.
        show: takes each line of a host, with its name.
    """

    def __init__(
        self, request: Mapping[str, Any], folder: Path, storage: Storage, isolation: Isolation, port: int, show: Callable[[str, str], None]
    ) -> None:
        self._request, self._folder, self._storage = request, folder, storage
        self._isolation: Isolation = isolation
        self._port, self._show = port, show
        names = [f"algo-{number}" for number in range(1, request["ResourceConfig"]["InstanceCount"] + 1)]
        self.all = [Host(name, folder / name) for name in names]
        self._temporary = [Path(tempfile.mkdtemp(prefix=f"gpt-{name}-")) for name in names]
        self._network: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []

    @property
    def checkpoints(self) -> list[Path]:
        """Each host's folder of checkpoints."""
        return [host.root / _inside(self._request["CheckpointConfig"]["LocalPath"]) for host in self.all]

    def lay_out(self) -> None:
        """Make each host's disk: what is known of the job, its input channels, its checkpoints so far."""
        request = self._request
        names, kind = [host.name for host in self.all], request["ResourceConfig"]["InstanceType"]
        for host, checkpoints in zip(self.all, self.checkpoints, strict=True):
            files = {
                "resourceconfig": {
                    "current_host": host.name, "current_instance_type": kind, "current_group_name": _GROUP, "hosts": names,
                    "instance_groups": [{"instance_group_name": _GROUP, "instance_type": kind, "hosts": names}],
                    "network_interface_name": "lo" if sys.platform == "linux" else "lo0",
                },
                "hyperparameters": request.get("HyperParameters", {}),
                "inputdataconfig": {
                    channel["ChannelName"]: {
                        "TrainingInputMode": channel["InputMode"], "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None",
                    }
                    for channel in request["InputDataConfig"]
                },
                "checkpointconfig": request["CheckpointConfig"],
            }  # fmt: skip
            config = host.root / "input" / "config"
            config.mkdir(parents=True)
            for name, content in files.items():
                (config / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
            for channel in request["InputDataConfig"]:
                uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
                self._storage.download(uri, host.root / "input" / "data" / channel["ChannelName"])
            self._storage.download(request["CheckpointConfig"]["S3Uri"], checkpoints)
            for name in ("model", "output/data"):
                (host.root / name).mkdir(parents=True)

    def __enter__(self) -> Hosts:
        isolated = self._isolation == "namespaces" and self._request["EnableNetworkIsolation"]
        if isolated:
            command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, str(NAMESPACE), "loopback"]
            self._network = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            assert self._network.stdout is not None
            self._network.stdout.readline()
        hosts_file = self._folder / "etc-hosts"
        hosts_file.write_text(f"127.0.0.1 localhost {' '.join(host.name for host in self.all)}\n", encoding="utf-8")
        cores = _shares(len(self.all))
        for number, (host, temporary) in enumerate(zip(self.all, self._temporary, strict=True)):
            entrypoint = list(self._request["AlgorithmSpecification"]["ContainerEntrypoint"])
            if entrypoint[0] == "python3":  # the image's is the one that this runs in
                entrypoint[0] = sys.executable
            environment = self._environment(temporary)
            if self._isolation == "namespaces":
                entrypoint = [*_unshare(host.name, host.root, hosts_file, self._network), *entrypoint]
            else:
                environment["GPT_ML_ROOT"] = str(host.root)
                entrypoint = [_moved(word, host.root) for word in entrypoint]
            host.process = subprocess.Popen(
                entrypoint, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=temporary,
                start_new_session=True, preexec_fn=_before_start(self._isolation, cores[number]),
            )  # fmt: skip
            thread = threading.Thread(target=self._pump, args=(host,), name=host.name)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.send(signal.SIGKILL)
            for host in self.all:
                if host.process is not None:
                    host.process.wait()
            self.running()
            for thread in self._threads:
                thread.join()
        finally:
            if self._network is not None:
                self._network.communicate()
            for folder in self._temporary:
                shutil.rmtree(folder, ignore_errors=True)

    def running(self) -> list[Host]:
        """Those that have not ended."""
        for host in self.all:
            if host.code is None and host.process is not None and (code := host.process.poll()) is not None:
                host.code, host.ended = (code if code >= 0 else 128 - code), time.monotonic()
        return [host for host in self.all if host.code is None]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the entrypoint of each host that runs; SIGKILL ends all that runs on it."""
        for host in self.running():
            assert host.process is not None
            first = host.process.pid
            if self._isolation == "namespaces":  # `unshare` itself passes nothing on
                file = Path(f"/proc/{first}/task/{first}/children")
                with contextlib.suppress(OSError, IndexError):
                    first = int(file.read_text().split()[0])
            doomed = _tree(first) if number == signal.SIGKILL and self._isolation == "portable" else [first]
            for pid in doomed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _environment(self, temporary: Path) -> dict[str, str]:
        """As a container has it, and what a rehearsal adds: a folder for temporary files, a free port, no installing."""
        request = self._request
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        several = {"CUDA_VISIBLE_DEVICES": ""} if len(self.all) > 1 else {}  # hosts have no device in common
        return {
            **kept, **several, "TMPDIR": str(temporary), "GPT_ML_PORT": str(self._port), "PIP_NO_INDEX": "1",
            "TRAINING_JOB_NAME": request["TrainingJobName"], **request.get("Environment", {}),
        }  # fmt: skip

    def _pump(self, host: Host) -> None:
        assert host.process is not None
        assert host.process.stdout is not None
        for line in host.process.stdout:
            self._show(host.name, line.decode(errors="replace").rstrip("\n"))


def find_isolation(setting: Literal["auto", "namespaces", "portable"]) -> Isolation:
    """How hosts are kept apart on this machine.

    Raises:
        UserError: namespaces are asked for, and not allowed.
    """
    if setting == "portable":
        return setting
    problem = namespaces_problem()
    if problem and setting == "namespaces":
        raise UserError(f"launch.emulated.isolation=namespaces: this machine does not allow them ({problem}); leave it out")
    return "portable" if problem else "namespaces"


def namespaces_problem() -> str | None:
    """Why a host cannot have namespaces of its own here, or None."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return "there is no unshare"
    with tempfile.TemporaryDirectory(prefix="gpt-namespaces-") as folder:
        root, hosts = Path(folder, "ml"), Path(folder, "hosts")
        root.mkdir()
        hosts.write_text("127.0.0.1 localhost algo-1\n", encoding="utf-8")
        tried = subprocess.run([*_unshare("algo-1", root, hosts, None), "true"], capture_output=True, text=True, check=False)
    lines = tried.stderr.strip().splitlines()
    return None if tried.returncode == 0 else lines[-1] if lines else f"unshare ended with {tried.returncode}"


def _unshare(name: str, root: Path, hosts: Path, network: subprocess.Popen[bytes] | None) -> list[str]:
    """The words before a command that is to run as process 1 of a host."""
    user = ["unshare", "--user", "--map-root-user"]
    if network is not None:
        user = ["nsenter", "--target", str(network.pid), "--user", "--net", "--preserve-credentials", "unshare"]
    spaces = ["--mount", "--pid", "--uts", "--fork", "--kill-child"]
    return [*user, *spaces, sys.executable, str(NAMESPACE), name, str(root), str(hosts)]


def _before_start(isolation: Isolation, cores: set[int]) -> Callable[[], None]:
    """For the child, between fork and exec: its cores, and an end when this process is gone (Linux)."""
    if sys.platform != "linux":
        return lambda: None
    import ctypes

    library, set_parent_death_signal = ctypes.CDLL(None), 1  # prctl(2), PR_SET_PDEATHSIG
    number = signal.SIGKILL if isolation == "namespaces" else signal.SIGTERM  # unshare takes all of its namespace along

    def prepare() -> None:
        library.prctl(set_parent_death_signal, number)
        os.sched_setaffinity(0, cores)

    return prepare


def _shares(hosts: int) -> list[set[int]]:
    """This machine's cores, divided among the hosts; all of them for each where there are fewer than hosts."""
    if sys.platform != "linux":
        return [set()] * hosts
    cores = sorted(os.sched_getaffinity(0))
    size = len(cores) // hosts
    return [set(cores[number * size : (number + 1) * size]) if size else set(cores) for number in range(hosts)]


def _tree(pid: int) -> list[int]:
    """A process and all below it, the lowest first, so that none is left to start others."""
    below: Sequence[str] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            below = [*below, *file.read_text().split()]
    return [*(found for child in below for found in _tree(int(child))), pid]


def _inside(path: str) -> str:
    """A path of the container, from /opt/ml on."""
    return os.path.relpath(path, ROOT)


def _moved(word: str, root: Path) -> str:
    return str(root / _inside(word)) if word.startswith(f"{ROOT}/") else word
