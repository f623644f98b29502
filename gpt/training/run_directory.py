"""A run's folder: its name, its lock, what was run and where."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import string
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from gpt.config import RunConfig
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.finetuning.trainable import TableRow
from gpt.runtime.device import Device
from gpt.runtime.environment import git_commit
from gpt.training.freezing_figure import TRAINABLE


def new_run_id(command: str) -> str:
    """`<command>-<time>-<4 letters>`; the letters keep apart runs that start in the same second."""
    letters = "".join(random.SystemRandom().choices(string.ascii_lowercase, k=4))
    return f"{command}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{letters}"


class RunDirectory:
    """The folder `<run.dir>/<run.id>`, made and locked.

    Args:
        config: the run.
        owned: whether this process makes and locks it; of several processes of a run one does, and the others only know where it is.

    Raises:
        UserError: it cannot be written, or another process is working in it.
    """

    def __init__(self, config: RunConfig, owned: bool = True) -> None:
        self.path = Path(config.run.dir).expanduser() / config.run.id
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.model = self.path / "model"
        self._lock: FileLock | None = None
        self._locked: int | None = None
        self._described: tuple[RunConfig, Device, Tokenizer] | None = None
        if owned:
            self._claim(config)

    def _claim(self, config: RunConfig) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")
            self._lock.acquire(timeout=0.5)  # `gpt runs` holds it for a moment to see whether it is held
            (self.path / ".lock").touch()
            self._locked = self._inode()
        except Timeout as error:
            raise UserError(
                f"run.id={config.run.id}: another process is working in {self.path}; wait for it or choose another id"
            ) from error
        except OSError as error:
            raise UserError(f"run.dir={config.run.dir}: cannot write {self.path} ({error.strerror})") from error

    def describe(self, config: RunConfig, device: Device, tokenizer: Tokenizer) -> None:
        """Write what tells of the run, and suffices to repeat it: the resolved config.yaml, environment.json and tokenizer.json."""
        self._described = config, device, tokenizer
        self._write("config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
        self._write("environment.json", json.dumps(describe_environment(device), indent=1))
        tokenizer.save(self.path / "tokenizer.json")

    def keep_table(self, rows: Sequence[TableRow]) -> None:
        """Write what trains, module by module, for the report."""
        self._write(TRAINABLE, json.dumps([asdict(row) for row in rows], indent=1))

    def restored(self) -> bool:
        """Whether the folder had been removed, or its lock, and is there again, locked and described.

        Raises:
            UserError: it cannot be made, or another process has made it meanwhile.
        """
        if self._lock is None or self._described is None or self._inode() == self._locked:
            return False
        self._lock.release()
        self._claim(self._described[0])
        self.describe(*self._described)
        return True

    def release(self) -> None:
        """Let other processes have it; a folder in which nothing came to be written is removed."""
        if self._lock is None:
            return
        if self.path.is_dir() and [p.name for p in self.path.iterdir()] == [".lock"]:
            (self.path / ".lock").unlink()
            self.path.rmdir()
        self._lock.release()

    def _inode(self) -> int | None:
        """Of the lock's file; None if there is none."""
        try:
            return os.stat(self.path / ".lock").st_ino
        except FileNotFoundError:
            return None

    def _write(self, name: str, text: str) -> None:
        aside = self.path / f".{name}.{os.getpid()}"
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave an empty file under the new name
            os.replace(aside, self.path / name)
        finally:
            aside.unlink(missing_ok=True)


def describe_environment(device: Device) -> dict[str, Any]:
    """Versions, machine, commit and command line."""
    from importlib.metadata import PackageNotFoundError, version

    from gpt import __version__

    packages = {}
    for name in ("torch", "transformers", "tokenizers", "tiktoken", "safetensors", "numpy", "hydra-core"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "gpt": __version__,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "device": device.description,
        "precision": str(device.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        **packages,
    }
