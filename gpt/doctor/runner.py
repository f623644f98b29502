"""Carry out checks one after the other, in a process that may hang, crash or be killed without taking the doctor with it.

Libraries that are broken do not only raise: an import may end the process (an instruction that the CPU lacks), a driver may never answer.
So the checks run in a second process, which is replaced when that happens; it imports torch once for all of them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from gpt.commands import DoctorConfig
from gpt.doctor.result import Check, Result, one_line


@dataclass(frozen=True)
class Row:
    """A check that has been carried out: its name, what it returned, and the seconds it took."""

    name: str
    result: Result
    seconds: float


def run_checks(checks: Sequence[Check], config: DoctorConfig, announce: Callable[[Check], None] = lambda check: None) -> list[Row]:
    """Carry out all of them, whatever happens in one; `announce` hears of each before it starts."""
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(_Worker())
        for check in checks:
            if any(row.name == check.needs and row.result.state == "problem" for row in rows):
                skipped = Result("warning", f"not checked, for want of {check.needs}", f"mend {check.needs} first")
                rows.append(Row(check.name, skipped, 0.0))
                continue
            announce(check)
            started = time.perf_counter()
            result = worker.ask(check, config)
            rows.append(Row(check.name, result, time.perf_counter() - started))
            if check.lets_go:
                worker.end()
    return rows


class _Worker:
    """The second process; started when it is first asked, and again when it has ended."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"  # what libraries write to the terminal goes there

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._folder.cleanup()

    def ask(self, check: Check, config: DoctorConfig) -> Result:
        """What the check returns; a problem if it raises, takes too long or ends the process."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._connection is not None
        try:
            self._connection.send((check.run, config))
            if not self._connection.poll(check.seconds):
                self.end()
                return Result("problem", f"no answer within {check.seconds:g} s", check.if_stuck)
            result, trace = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            how = _ending(self._process.exitcode)
            self.end()
            return Result("problem", f"the check's process {how}{self._last_words()}", check.if_stuck)
        if trace and os.environ.get("GPT_DEBUG") == "1":
            print(trace, file=sys.stderr)
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._log.write_bytes(b"")
        process = context.Process(target=_work, args=(theirs, self._log), daemon=True)
        process.start()
        self._process = process
        theirs.close()

    def end(self) -> None:
        """End it, with all processes that it has started."""
        if self._process is not None and self._process.pid is not None:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended; or had no time yet for a group of its own
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f": {one_line(lines[-1], 160)}" if lines else ""


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        hint = {"SIGILL": ", an instruction that this processor lacks", "SIGKILL": ", perhaps for want of memory"}.get(name, "")
        return f"was ended by {name}{hint}"
    return f"ended with exit code {code}"


def _work(connection: Connection, log: Path) -> None:
    """The second process: carry out what comes, until nobody is there any more."""
    if hasattr(os, "setsid"):
        os.setsid()  # so that it can be ended with all that it starts; Ctrl-C reaches the doctor alone, which ends it
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            run, config = connection.recv()
            connection.send(_result(run, config))


def _result(run: Callable[[DoctorConfig], Result], config: DoctorConfig) -> tuple[Result, str]:
    """What a check returns, or the problem that it raises, with the traceback."""
    try:
        return run(config), ""
    except BaseException as error:  # also SystemExit: a check has no business to end the process
        fix = "GPT_DEBUG=1 gpt doctor prints the traceback; please report it if nothing in it is of your own"
        return Result("problem", f"the check failed: {type(error).__name__}: {one_line(error)}".rstrip(": "), fix), traceback.format_exc()
