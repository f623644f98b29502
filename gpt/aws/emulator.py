"""launch=emulated: the training job of launch=sagemaker on this machine, without AWS and without Docker.

The same request is planned and carried out: files go to a folder that stands for S3, each host gets its /opt/ml from there and runs the
job's own entrypoint, checkpoints are kept in step with S3, and spot interruptions and the end of max_runtime come as SageMaker brings them.
What S3 would hold, the log and the request stay in `<run.dir>/<run id>/emulated/`; the run itself is in `<run.dir>/<run id>/`, as a local
one.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import string
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from gpt.aws.emulated_hosts import Host, Hosts, find_isolation
from gpt.aws.emulated_storage import CheckpointSync, Storage
from gpt.aws.training_job import TrainingJob, plan_job, region_of, seconds
from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.runtime.environment import git_commit
from gpt.runtime.signals import StopRequest

_POLL_SECONDS = 0.1
_AFTER_FAILURE = 20.0
"""Seconds that hosts have to end by themselves when one has failed."""
Status = Literal["Completed", "Failed", "Interrupted", "Stopped", "MaxRuntimeExceeded"]


@dataclass
class _Attempt:
    """One start of the hosts, and how it ended."""

    status: Status
    seconds: float
    codes: list[int] = field(default_factory=list)
    reason: str = ""
    """Of a failure."""


def emulate(config: RunConfig) -> int:
    """Carry out the training job of a run on this machine; returns the exit code, as that of a local run.

    Raises:
        UserError: the job cannot be planned, or its run directory is in use or holds a local run.
    """
    now, token = datetime.now(UTC), "".join(random.SystemRandom().choices(string.ascii_lowercase, k=4))
    if config.launch.emulated.interrupt_after:
        config.launch.spot = True  # only such machines are taken away
    job = plan_job(config, now, token, region_of(config), git_commit())
    config.run.id = job.run_id
    home = Path(config.run.dir).expanduser() / job.run_id
    is_new = not home.exists()
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home / ".lock")
        lock.acquire(timeout=0.5)  # `gpt runs` holds it for a moment to see whether it is held
    except Timeout as error:
        raise UserError(f"run.id={job.run_id}: another process is working in {home}; wait for it or choose another id") from error
    except OSError as error:
        raise UserError(f"run.dir={config.run.dir}: cannot write {home} ({error.strerror})") from error
    with lock:
        try:
            return _Emulation(config, job, home).run()
        except UserError:
            if is_new:  # as a local run that could not begin leaves nothing
                shutil.rmtree(home, ignore_errors=True)
            raise


class _Emulation:
    """A job that is carried out here.

    Args:
        config: of the run.
        job: to carry out.
        home: the run's directory.
    """

    def __init__(self, config: RunConfig, job: TrainingJob, home: Path) -> None:
        self.config, self.job, self.home = config, job, home
        self.settings = config.launch.emulated
        self.notice = seconds("launch.emulated.notice", self.settings.notice)
        self.area = home.absolute() / "emulated"
        self.folder = self.area / job.name
        self.storage = Storage(self.area / "s3")
        self._printing = threading.Lock()

    def run(self) -> int:
        """The whole job."""
        self._refuse_other_run()
        isolation = find_isolation(self.settings.isolation)
        request = self.job.request
        self._upload()
        for left in self.area.glob("*/hosts"):  # of an emulation that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.folder.mkdir(parents=True)
        _write_json(self.folder / "request.json", request)
        self._write_config()
        count, kind = request["ResourceConfig"]["InstanceCount"], request["ResourceConfig"]["InstanceType"]
        network = "no network" if request["EnableNetworkIsolation"] and isolation == "namespaces" else "this machine's network"
        self._say(f"starting {count} host{'s' * (count > 1)} in place of {kind} ({isolation}, {network})")
        if request["EnableNetworkIsolation"] and isolation == "portable":
            self._say("note: launch.network_isolation=true is not rehearsed: without namespaces nothing keeps a host from the network")
        began, attempts = time.monotonic(), []
        with StopRequest() as stop:
            while True:
                shutil.rmtree(self.folder / "hosts", ignore_errors=True)
                hosts = Hosts(request, self.folder / "hosts", self.storage, isolation, _free_port(), self._show)
                hosts.lay_out()
                attempts.append(self._attempt(hosts, stop, attempts))
                if attempts[-1].status != "Interrupted":
                    break
                self._say("starting again from the last checkpoint in S3, on fresh machines")
        last = attempts[-1]
        self._collect(hosts, last)
        self._describe(attempts, time.monotonic() - began)
        return self._end(last, stop)

    def _refuse_other_run(self) -> None:
        """Raises UserError for a run directory in which a run has trained on this machine, or goes on beyond what S3 has."""
        there = self.storage.path(self.job.request["CheckpointConfig"]["S3Uri"]) / self.job.run_id / "checkpoints"
        ours = {path.name for path in (self.home / "checkpoints").glob("step-*")}
        if ours - {path.name for path in there.glob("step-*")} or ((self.home / "config.yaml").is_file() and not self.area.is_dir()):
            raise UserError(
                f"run.id={self.job.run_id}: {self.home} holds a run that trained without launch=emulated; choose another run.id, or go on "
                f"with it here: resume={self.home} launch.name=local"
            )

    # Phases

    def _upload(self) -> None:
        new = [upload for upload in self.job.uploads if self.storage.upload(upload)]
        size = sum(upload.size for upload in new) / 1e6
        known = len(self.job.uploads) - len(new)
        self._say(f"uploaded {len(new)} files, {size:.1f} MB{f' ({known} were there)' if known else ''}; S3 is {self.storage.root}")
        for channel in self.job.request["InputDataConfig"]:
            uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
            if not self.storage.path(uri).exists():
                raise UserError(
                    f"launch=emulated: the channel {channel['ChannelName']} is {uri}, which a rehearsal cannot read; give a local folder, "
                    f"or put the files into {self.storage.path(uri)}"
                )

    def _attempt(self, hosts: Hosts, stop: StopRequest, before: list[_Attempt]) -> _Attempt:
        """Run the hosts until they have ended, or are ended."""
        settings, limit = self.settings, self.job.request["StoppingCondition"]["MaxRuntimeInSeconds"]
        left = limit - sum(attempt.seconds for attempt in before)
        interrupt_at = None
        if settings.interrupt_after is not None and len(before) < settings.interruptions:
            interrupt_at = seconds("launch.emulated.interrupt_after", settings.interrupt_after)
        checkpoints = self.job.request["CheckpointConfig"]["S3Uri"]
        status: Status | None = None
        terminate_at = kill_at = None
        killed = False
        # Made before a host can have written anything: what is there now is taken for known.
        sync = CheckpointSync(self.storage, checkpoints, hosts.checkpoints, self._say)
        with hosts, sync:
            began = time.monotonic()
            while hosts.running():
                now = time.monotonic() - began
                if status is None:
                    why = ""
                    if stop.signal is not None:
                        status, why = "Stopped", f"{signal.Signals(stop.signal).name}, once more ends it at once"
                    elif interrupt_at is not None and now >= interrupt_at:
                        status, why = "Interrupted", f"spot interruption {len(before) + 1} of {settings.interruptions} after {now:.0f} s"
                    elif now >= left:
                        status, why = "MaxRuntimeExceeded", f"launch.max_runtime={self.config.launch.max_runtime} is over"
                    elif any(host.code for host in hosts.all):
                        status, terminate_at = "Failed", now + _AFTER_FAILURE
                    if why:
                        self._say(f"{why}: SIGTERM to every host, SIGKILL after {self.notice} s")
                        terminate_at = now
                if terminate_at is not None and now >= terminate_at:
                    hosts.send(signal.SIGTERM)
                    terminate_at, kill_at = None, now + self.notice
                if kill_at is not None and now >= kill_at:
                    self._say(f"SIGKILL to {', '.join(host.name for host in hosts.running())}")
                    hosts.send(signal.SIGKILL)
                    kill_at, killed = None, True
                time.sleep(_POLL_SECONDS)
            spent = time.monotonic() - began
        if not killed:  # with a machine that is gone goes what it had not copied yet
            sync.once()
        codes = [host.code or 0 for host in hosts.all]
        if not any(codes):
            return _Attempt("Completed", spent, codes)
        return _Attempt(status or "Failed", spent, codes, _reason(hosts.all) if status in (None, "Failed") else "")

    def _collect(self, hosts: Hosts, last: _Attempt) -> None:
        """What S3 would hold of it, and the run directory, as a local run leaves it."""
        output = f"{self.job.request['OutputDataConfig']['S3OutputPath']}/{self.job.name}/output"
        artifacts = 0
        for host in hosts.all:
            artifacts += self.storage.collect(host.root / "model", f"{output}/model") if last.status != "Failed" else 0
            self.storage.collect(host.root / "output" / "data", f"{output}/data")
        if artifacts:
            self._say(f"collected the model, {artifacts} files: {output}/model")
        shutil.rmtree(self.folder / "hosts", ignore_errors=True)
        self._bring_home(self.storage.path(self.job.request["CheckpointConfig"]["S3Uri"]) / self.job.run_id)

    def _bring_home(self, run: Path) -> None:
        """Copy the run directory that S3 has to where a local run would have written it."""
        for entry in sorted(run.iterdir()) if run.is_dir() else []:
            if entry.name == "config.yaml":
                self._write_config(yaml.safe_load(entry.read_text(encoding="utf-8"))["model"])
            elif not entry.name.startswith("."):
                target = self.home / entry.name
                if entry.is_dir():
                    shutil.rmtree(target, ignore_errors=True)
                    shutil.copytree(entry, target, ignore=shutil.ignore_patterns(".*"))  # of a checkpoint that was being written
                else:
                    shutil.copyfile(entry, target)

    def _write_config(self, model: dict[str, Any] | None = None) -> None:
        """The run's config.yaml: the config as it was composed here, with paths of this machine; `model`: with what the data has added."""
        values = self.config.to_dict()
        values["model"] = model or values["model"]
        (self.home / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def _describe(self, attempts: list[_Attempt], wall: float) -> None:
        """Write what DescribeTrainingJob would say of it."""
        last = attempts[-1]
        running = sum(attempt.seconds for attempt in attempts)
        status = "Stopped" if last.status == "MaxRuntimeExceeded" else last.status
        said: dict[str, Any] = {
            "TrainingJobName": self.job.name, "TrainingJobStatus": status, "SecondaryStatus": last.status,
            "TrainingTimeInSeconds": round(wall), "BillableTimeInSeconds": round(running), "Interruptions": len(attempts) - 1,
        }  # fmt: skip
        if last.status == "Failed":
            said["FailureReason"] = f"AlgorithmError: {last.reason or 'no host says why'}, exit code: {_code(last)}"
        _write_json(self.folder / "description.json", said)

    def _end(self, last: _Attempt, stop: StopRequest) -> int:
        """Say how it ended; the exit code."""
        go_on = f"gpt {self.config.command} resume={self.home}"
        if last.status == "Completed":
            self._say(f"Completed; the run is {self.home}, and beside it in emulated/ its log, its request and what S3 would hold")
            return 0
        if last.status == "Failed":
            self._say(f"Failed with exit code {_code(last)}: {last.reason or 'no host says why'}")
            return _code(last)
        self._say(f"{last.status}; continue with: {go_on}")
        return 128 + (stop.signal or signal.SIGTERM)

    # Talking

    def _say(self, text: str) -> None:
        with self._printing:
            print(f"emulated: {text}", file=sys.stderr, flush=True)

    def _show(self, host: str, line: str) -> None:
        """A line of a host's log: on the terminal with the host's name, and in its own file."""
        with self._printing:
            print(f"{host} | {line}", file=sys.stderr, flush=True)
            with (self.folder / f"{host}.log").open("a", encoding="utf-8") as log:
                log.write(f"{line}\n")


def _reason(hosts: list[Host]) -> str:
    """Why the job failed: what the first host to end with an error has written, or the first that has written anything."""
    failed = sorted((host for host in hosts if host.code), key=lambda host: host.ended)
    return next((text for host in failed if (text := host.failure())), "")


def _code(attempt: _Attempt) -> int:
    """2 for the user's mistake, and 1 for all else, as a local run ends."""
    return 2 if 2 in attempt.codes else 1


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
