"""Stand-ins for what a machine may have or lack: executables on PATH, packages, and a process with conditions of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from gpt.commands import DoctorConfig
from gpt.doctor.result import Result


def executable(folder: Path, name: str, script: str) -> Path:
    """A shell script of that name."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def package(folder: Path, name: str, source: str = "", version: str = "", metadata: str = "") -> Path:
    """A Python package of one file, with the metadata of an installed one if it has a version; returns the folder to import it from."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(textwrap.dedent(source))
    if version:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n{metadata}")
    return folder


def in_child(
    check: Callable[[DoctorConfig], Result],
    config: DoctorConfig | None = None,
    *,
    before: str = "",
    path: Path | None = None,
    within: tuple[str, ...] = (),
    **environment: str,
) -> Result:
    """What a check returns in a process of its own.

    `before` is done there first, `path` comes first on its import path, `within` is a command that runs it, `environment` is added.
    """
    config = config or DoctorConfig()
    script = (
        f"{textwrap.dedent(before)}\nimport json, {check.__module__} as module\nfrom gpt.commands import DoctorConfig\n"
        f"print(json.dumps(vars(module.{check.__name__}(DoctorConfig(**{vars(config)!r})))))"
    )
    known = [str(path)] if path else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*known, *filter(None, sys.path)]), **environment}
    done = subprocess.run([*within, sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return Result(**json.loads(done.stdout.splitlines()[-1]))
