"""Code that a model wrote, run against its tests: each program in a process of its own, with limits, away from the user's files and,
where Linux allows it, without a network.

This keeps accidents small. It is no sandbox: the programs run as the user, and what the user may read and change, they may.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from gpt.errors import UserError

MEMORY_BYTES = 1 << 30
"""Of address space for each program."""
_FILE_BYTES = 16 << 20  # of each file that it writes, what it prints among them
_SHOWN_BYTES = 2000  # of what it says on stderr
# Namespaces of its own: no network, and when the first process ends, all that it started end with it.
_ISOLATED = (
    ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"),
    ("unshare", "--net", "--pid", "--fork", "--kill-child"),
)
# Runs the program with limits that it cannot raise; the word that came on stdin goes out only if it ran to its end without an exception.
_START = """
import os, resource, sys
memory, files, seconds = map(int, sys.argv[2:])
word = sys.stdin.readline()
out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for limit, most in (
    (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, files), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)
):
    resource.setrlimit(limit, (most, most))
with open(sys.argv[1], encoding="utf-8") as file:
    code = file.read()
sys.argv = ["program.py"]
exec(compile(code, "program.py", "exec"), {"__name__": "__main__"})
os.write(out, word.encode())
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool
    problem: str = ""
    """The last line of its traceback, or that it took too long."""


def check_execution() -> None:
    """Raises UserError where the system cannot limit processes."""
    if os.name != "posix":
        raise UserError("metrics=[pass] needs the limits on processes that Linux and macOS have; run it there, or in a container")


@cache
def isolation() -> tuple[str, ...]:
    """The command in front of a program that takes the network away from it; empty where this system does not allow it."""
    for command in _ISOLATED:
        try:
            if subprocess.run([*command, "true"], capture_output=True, timeout=10, check=False).returncode == 0:
                return command
        except (OSError, subprocess.TimeoutExpired):
            continue
    return ()


def run_programs(programs: Sequence[str], seconds: float, advance: Callable[[int], None] = lambda done: None) -> list[Outcome]:
    """Run Python programs, as many at a time as there are cores.

    Each has an empty folder that is deleted behind it, no environment variables of this process, no stdin, MEMORY_BYTES, and no network
    where `isolation` says so. It passes if it comes to its end without an exception; `sys.exit` is one.

    Args:
        programs: the code.
        seconds: of wall time for each, after which it is killed with all that it started.
        advance: told of each that has ended.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    outcomes = []
    with ThreadPoolExecutor(cores, thread_name_prefix="execution") as pool:
        for outcome in pool.map(partial(_run, seconds=seconds), programs):
            outcomes.append(outcome)
            advance(1)
    return outcomes


def _run(program: str, seconds: float) -> Outcome:
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="gpt-execution-", ignore_cleanup_errors=True) as folder:
        work = Path(folder) / "work"
        work.mkdir()
        code, out, err = (Path(folder) / name for name in ("program.py", "out", "err"))
        code.write_text(program, encoding="utf-8", errors="replace")
        limits = [MEMORY_BYTES, _FILE_BYTES, int(seconds) + 1]
        command = [*isolation(), sys.executable, "-I", "-c", _START, str(code), *map(str, limits)]
        environment = {"PATH": os.defpath, "HOME": str(work), "TMPDIR": str(work), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out_file, stderr=err_file, cwd=work, env=environment, start_new_session=True
            )  # fmt: skip
            try:
                process.communicate(f"{word}\n".encode(), timeout=seconds)
            except subprocess.TimeoutExpired:
                return Outcome(False, f"took longer than {seconds:g} s")
            finally:
                _kill(process)
        if out.read_bytes()[:100].decode(errors="replace").strip() == word:
            return Outcome(True)
        said = err.read_bytes()[-_SHOWN_BYTES:].decode(errors="replace").strip()
        return Outcome(False, said.rpartition("\n")[2] or f"ended with exit code {process.returncode}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a program and what it started."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
