"""`-m`: a run for each combination of values, one after the other (jobs of SageMaker: several at once), and one table and one page of all.

Every combination is composed before the first run starts, and each run is a process that is handed its resolved config. How a run
ended is read from its directory, so the same command goes on with a sweep that was stopped. Imports no torch.
"""

from __future__ import annotations

import codecs
import datetime
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gpt.arguments import MOST_RUNS, groups, sweep_values
from gpt.aws.records import has_completed
from gpt.compose import compose_run
from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.runtime.signals import StopRequest
from gpt.typed import shown

if TYPE_CHECKING:
    from gpt.runs.listing import RunRow

_ORDER = ("finished", "interrupted", "failed", "not run")  # in the table
_MAY_CHANGE = ("run.id", "run.dir", "resume", "launch.max_cost", "launch.max_parallel")  # from one command of a sweep to the next
_TAIL = 16384  # characters of a failed run's messages that are kept
_NOTE = 120  # characters of the last of them in the table


@dataclass
class SweptRun:
    """One run of a sweep."""

    path: Path
    """Its run directory, `<run.dir>/<sweep id>-<number>-<label>`."""
    settings: dict[str, str]
    """The swept keys, each with its value here."""
    config: RunConfig | None = None
    """Resolved; None: the sweep has it from earlier, and this command does not run it."""

    @property
    def state(self) -> str:
        """How it ended, as its directory says: `finished`, `interrupted`, `failed` or `not run`."""
        marks = {"model/config.json": "finished", "error.txt": "failed", "config.yaml": "interrupted"}
        if has_completed(self.path):  # a job, whose weights may still be in S3
            return "finished"
        return next((state for file, state in marks.items() if (self.path / file).is_file()), "not run")

    @property
    def note(self) -> str:
        """Why it failed, in a line."""
        if self.state != "failed":
            return ""
        lines = (self.path / "error.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        last = re.sub(r"^(gpt|(\w+\.)*\w*Error): ", "", lines[-1] if lines else "")
        return last if len(last) <= _NOTE else f"{last[:_NOTE]}..."


@dataclass
class Sweep:
    """The runs of a sweep, and the files that speak of all of them: `<folder>/<id>.json`, `.txt` and `.html`."""

    command: str
    id: str
    folder: Path
    fixed: dict[str, str]
    """Settings that are the same for all."""
    runs: list[SweptRun] = field(default_factory=list)
    kind: str = "sweep"
    """What it is called: a `sweep`, or a `search`, whose runs do not all set the same keys."""

    def file(self, suffix: str) -> Path:
        """`<folder>/<id><suffix>`."""
        return self.folder / f"{self.id}{suffix}"

    def to_dict(self) -> dict[str, Any]:
        """What the next command needs to go on."""
        runs = [{"id": run.path.name, "settings": run.settings} for run in self.runs]
        return {"command": self.command, "settings": self.fixed, "runs": runs}


def sweep(command: str, arguments: Sequence[str], config_dir: Path | None = None, show: bool = False) -> int:
    """Run every combination of the values in `arguments`.

    Args:
        command: pretrain or finetune.
        arguments: `key=value`, `key=a,b,c` and whatever else `sweep_values` reads.
        config_dir: a folder of the user's own options.
        show: print the combinations and stop.

    Returns:
        0: every run finished; 1: some did not; 128 plus the signal that stopped the sweep.

    Raises:
        UserError: nothing was started: there is nothing to sweep, a combination is impossible, or it is not the sweep that has its id.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError("-m: a sweep starts the processes of its runs itself; start it once, with launch.nproc=... for several processes")
    fixed, swept = _read(command, arguments, config_dir)
    plan = _compose(command, fixed, swept, config_dir)
    if show:
        width = len(str(len(plan.runs)))
        print("\n".join(f"{number:>{width}}  {_line(run.settings)}" for number, run in enumerate(plan.runs, 1)))
        return 0
    if all(run.config and run.config.launch.dry_run and run.config.launch.name == "sagemaker" for run in plan.runs):
        return _rehearse(plan)
    with held(plan):
        join_earlier(plan)
        stopped_by = run_all(plan)
        _report(plan)
        return conclude(plan, ["gpt", command, "-m", *arguments], config_dir, stopped_by)


# Before the first run


def _read(command: str, arguments: Sequence[str], config_dir: Path | None) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The arguments as key -> value for what is the same in all runs, and as key -> values for what is swept, in the order given."""
    fixed: dict[str, str] = {}
    swept: dict[str, list[str]] = {}
    for argument in arguments:
        written = sweep_values(argument, config_dir)
        key = argument.partition("=")[0]
        for earlier in (fixed, swept):
            earlier.pop(key, None)  # given twice: the last counts
        if len(written) == 1:
            fixed[key] = written[0]
        else:
            swept[key] = [one.partition("=")[2] for one in written]
    if not swept:
        compose_run(command, list(fixed.values()), config_dir)  # a slip in what may have been meant as one is said first
        raise UserError("-m: nothing to sweep; give a key several values, such as optimizer.lr=0.003,0.01, or leave out -m")
    if math.prod(map(len, swept.values())) > MOST_RUNS:
        raise UserError(f"-m: these are more than {MOST_RUNS} combinations; give fewer values")
    if (resume := fixed.get("resume", "resume=auto").partition("=")[2]) not in ("auto", "never"):
        raise UserError(
            f"resume={shown(resume)}: a sweep is continued by the same command with its run.id; leave resume out, or give never"
        )
    return fixed, swept


def combinations(swept: dict[str, list[str]]) -> Iterator[dict[str, str]]:
    """Key -> value for each combination; the last key changes fastest, as in Hydra."""
    return (dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values()))


def _compose(command: str, fixed: dict[str, str], swept: dict[str, list[str]], config_dir: Path | None) -> Sweep:
    """Compose and validate every combination.

    Raises:
        UserError: the first one that is impossible, with its values.
    """
    plan = None
    every = list(combinations(swept))
    for number, settings in enumerate(every, 1):
        try:
            config = compose_run(command, [*fixed.values(), *(f"{key}={value}" for key, value in settings.items())], config_dir)
        except UserError as error:
            raise UserError(f"{error} (combination {number} of {len(every)}: {_line(settings)}; nothing was started)") from error
        if config.launch.nnodes > 1:
            raise UserError(f"launch.nnodes={config.launch.nnodes}: a sweep runs on one machine; leave it out, or start each run by itself")
        if config.freeze.name == "search":
            raise UserError("-m: freeze=search is a sweep over plans by itself; leave out -m, or sweep over plans: freeze=none,first_n")
        if plan is None:
            same = {key: argument.partition("=")[2] for key, argument in fixed.items() if key not in _MAY_CHANGE}
            plan = Sweep(command, config.run.id or new_id("sweep"), Path(config.run.dir).expanduser(), same)
        config.run.id, config.run.dir = "", str(plan.folder)  # the number follows, once it is known which runs there are
        plan.runs.append(SweptRun(Path(), settings, config))
    assert plan is not None, "there are two combinations at least"
    return plan


def new_id(kind: str) -> str:
    """`<kind>-<time>-<4 letters>`."""
    letters = "".join(random.SystemRandom().choices(string.ascii_lowercase, k=4))
    return f"{kind}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{letters}"


@contextmanager
def held(plan: Sweep) -> Iterator[None]:
    """The sweep's files, for this process alone."""
    from filelock import FileLock, Timeout

    lock = FileLock(plan.folder / f".{plan.id}.lock")
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"run.id={plan.id}: another process is working on this {plan.kind}; wait for it or choose another id") from error
    except OSError as error:
        raise UserError(f"run.dir={plan.folder}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def join_earlier(plan: Sweep) -> None:
    """Give every run its directory: that which it has in the sweep of this id, or the next number; and write down which runs there are.

    Raises:
        UserError: the sweep of this id is another one.
    """
    path = plan.file(".json")
    earlier = _earlier(plan, path) if path.is_file() else []
    waiting, plan.runs = plan.runs, earlier
    for run in waiting:
        known = next((other for other in earlier if other.settings == run.settings and other.config is None), None)
        if known is not None:
            known.config = run.config
        else:
            run.path = _directory(plan, len(plan.runs) + 1, run.settings, len(waiting))
            plan.runs.append(run)
    for run in plan.runs:
        if run.config is not None:
            run.config.run.id = run.path.name
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(plan.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"run.dir={plan.folder}: {path} cannot be written ({error.strerror})") from error


def _directory(plan: Sweep, number: int, settings: dict[str, str], of: int) -> Path:
    return plan.folder / f"{plan.id}-{number:0{max(2, len(str(of)))}}{_label(settings)}"


def _rehearse(plan: Sweep) -> int:
    """launch.dry_run=true: every combination as it would be submitted; nothing is written."""
    from gpt.aws.sweeping import rehearse_jobs

    runs = []
    for number, run in enumerate(plan.runs, 1):
        assert run.config is not None
        run.config.run.id = _directory(plan, number, run.settings, len(plan.runs)).name
        runs.append((f"[{number}/{len(plan.runs)}] {_line(run.settings)}", run.config))
    return rehearse_jobs(runs)


def _earlier(plan: Sweep, path: Path) -> list[SweptRun]:
    """The runs that the sweep has from earlier commands.

    Raises:
        UserError: it had another command, other settings or other swept keys, or must not exist.
    """
    if plan.runs[0].config is not None and plan.runs[0].config.resume == "never":
        raise UserError(f"run.id={plan.id}: {path} exists, and resume=never; choose another run.id")
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        runs = [SweptRun(plan.folder / run["id"], dict(run["settings"])) for run in before["runs"]]
        then = {"the command": before["command"], **before["settings"], "the swept keys": ", ".join(sorted(runs[0].settings))}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"run.id={plan.id}: {path} cannot be read as a {plan.kind} ({error!r}); choose another run.id") from error
    now = {"the command": plan.command, **plan.fixed, "the swept keys": ", ".join(sorted(plan.runs[0].settings))}
    for key in {**then, **now}:
        if now.get(key) != then.get(key) and not (key == "the swept keys" and plan.kind == "search"):
            a, b = (f"{key}={shown(values[key])}" if key in values else f"no {key}" for values in (now, then))
            raise UserError(f"{a}: the {plan.kind} {plan.id} was started with {b}; set it so, or choose another run.id")
    return runs


def _label(settings: dict[str, str]) -> str:
    """What the name of a run's directory says of its values: `-lr_0.003-nano`."""
    options = groups()
    said = []
    for key, value in settings.items():
        short = re.sub(r"[^A-Za-z0-9._-]+", " ", value.rstrip("/").rpartition("/")[2]).strip().replace(" ", "-")[:24]
        said.append(short if key in options else f"{key.rpartition('.')[2]}_{short}")
    return "".join(f"-{one}" for one in said)[:80]


# The runs


def run_all(plan: Sweep) -> int | None:
    """Run what is not finished; return the signal that stopped the sweep, if one did."""
    valid = [run for run in plan.runs if run.config is not None]
    say(f"{plan.kind} {plan.id}: {len(valid)} runs in {plan.folder}")
    with StopRequest() as stop:
        jobs = []
        for number, run in enumerate(valid, 1):
            assert run.config is not None
            head = f"[{number}/{len(valid)}] {_line(run.settings)}"
            if run.state == "finished":
                say(f"\n{head}: finished before")
                continue
            if run.config.launch.name == "sagemaker":
                jobs.append((head, run.config))
                continue
            say(f"\n{head}")
            code = _run_one(run, stop)
            if stop.signal:
                break
            if code:
                say(f"{head}: failed; {run.note or 'see above'}")
        if jobs and not stop.signal:
            from gpt.aws.sweeping import run_jobs

            run_jobs(jobs, stop)
    return stop.signal


def _run_one(run: SweptRun, stop: StopRequest) -> int:
    """Run one in a process of its own and keep what it said last if it fails; a signal to us is handed on. Returns its exit code."""
    import yaml

    assert run.config is not None
    (run.path / "error.txt").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpt-sweep-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(run.config.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        # A process group of its own: a Ctrl-C reaches the run once, from us, and a second one does not fall on it while it saves.
        process = subprocess.Popen(
            [sys.executable, "-m", "gpt.launch", str(file)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,
            env=os.environ | _terminal(),
        )
        tail: list[str] = []
        assert process.stderr is not None
        reader = threading.Thread(target=_pass_on, args=(process.stderr, tail), daemon=True)
        reader.start()
        try:
            code = _wait(process, stop)
        finally:
            if process.poll() is None:  # a second signal to us
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        reader.join(timeout=5)  # what outlives the run may hold its stderr open
    if code and not stop.signal:
        said = _lines("".join(tail)) or [f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"]
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            (run.path / "error.txt").write_text("\n".join(said) + "\n", encoding="utf-8")
        except OSError as error:
            say(f"warning: {run.path / 'error.txt'} could not be written ({error}); the others are run")
    return code


def _wait(process: subprocess.Popen[bytes], stop: StopRequest) -> int:
    """Wait for the end of a run, handing on the first signal that asks us to stop."""
    handed_on = False
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if stop.signal and not handed_on:
                process.send_signal(stop.signal)
                handed_on = True


def _terminal() -> dict[str, str]:
    """Has a run draw its bar although its stderr comes to us first, if ours is a terminal."""
    if not sys.stderr.isatty():
        return {}
    return {"FORCE_COLOR": "1", "COLUMNS": str(shutil.get_terminal_size().columns)}


def _pass_on(stream: IO[bytes], tail: list[str]) -> None:
    """Show what a run says, as it comes, and keep the last of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shows = True
    while data := os.read(stream.fileno(), 65536):
        text = decoder.decode(data)
        tail[:] = ["".join((*tail, text))[-_TAIL:]]
        try:
            if shows:
                sys.stderr.write(text)
                sys.stderr.flush()
        except OSError:  # our terminal is gone: the run must not wait for it
            shows = False
    stream.close()


def _lines(text: str) -> list[str]:
    """The lines of a terminal's output, without colours, cursor movements and bars that were drawn over."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line for line in (row.rpartition("\r")[2].rstrip() for row in plain.replace("\r\n", "\n").split("\n")) if line]


# After the last run


def ranked(plan: Sweep) -> list[tuple[SweptRun, RunRow | None]]:
    """The runs and what their directories say of them (None: nothing), by best validation loss; those that did not finish come last."""
    from gpt.runs.listing import describe_run

    described = [(run, describe_run(run.path) if (run.path / "config.yaml").is_file() else None) for run in plan.runs]

    def place(pair: tuple[SweptRun, RunRow | None]) -> tuple[int, float]:
        loss = pair[1].best_val_loss if pair[1] else None
        return _ORDER.index(pair[0].state), math.inf if loss is None or math.isnan(loss) else loss

    return sorted(described, key=place)


def format_table(plan: Sweep, rows: Sequence[tuple[SweptRun, RunRow | None]]) -> str:
    """A line per run: its number, its values, what came of it."""
    keys = list(dict.fromkeys(key for run in plan.runs for key in run.settings))
    lines = [["run", *keys, "val loss", "bits/byte", "steps", "seconds", "state", ""]]
    for run, row in rows:
        number = run.path.name.removeprefix(f"{plan.id}-").partition("-")[0]
        figures = (row.best_val_loss, row.val_bpb, row.step, row.seconds) if row else (None,) * 4
        shown_as = ("-" if f is None else f"{f:{form}}" for f, form in zip(figures, (".4f", ".4f", ",", ",.0f"), strict=True))
        lines.append([number, *(run.settings.get(key, "") for key in keys), *shown_as, run.state, run.note])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<", *">" * (len(widths) - 3), "<", "<"]
    return "\n".join("  ".join(map("{:{}{}}".format, line, sides, widths)).rstrip() for line in lines)


def conclude(plan: Sweep, arguments: Sequence[str], config_dir: Path | None, stopped_by: int | None) -> int:
    """Say how to go on with what did not finish, and return the exit code.

    Args:
        plan: after its runs.
        arguments: the command that was given.
        config_dir: a folder of the user's own options.
        stopped_by: the signal that stopped it, if one did.
    """
    again = [*(a for a in arguments if not a.startswith("run.id=")), f"run.id={plan.id}"]
    again += [f"--config-dir={config_dir}"] if config_dir else []
    asked = [run for run in plan.runs if run.config is not None]
    unfinished = sum(run.state != "finished" for run in asked)
    if not unfinished:
        return 0
    if stopped_by:
        say(f"interrupted; continue with: {shlex.join(again)}")
        return 128 + stopped_by
    say(f"{unfinished} of {len(asked)} runs did not finish; the same command tries them again: {shlex.join(again)}")
    return 1


def _report(plan: Sweep) -> None:
    """Print the table and keep it; make one page with the curves of all runs, the best first."""
    from gpt.runs.compare import write_comparison

    rows = ranked(plan)
    table = format_table(plan, rows)
    say("")
    print(table, flush=True)
    begun = [run.path for run, _ in rows if (run.path / "metrics.jsonl").is_file()]
    try:
        plan.file(".txt").write_text(table + "\n", encoding="utf-8")
        say(f"\ntable: {plan.file('.txt')}")
        if begun:
            title = f"{plan.id}: {', '.join(plan.runs[0].settings)}"
            say(f"page:  {write_comparison(begun, plan.file('.html'), title)}")
    except (OSError, UserError) as error:  # the runs are there, and `gpt runs` shows them
        say(f"warning: the table or the page could not be written ({error})")


def _line(settings: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def say(text: str) -> None:
    """Print a line for people."""
    print(text, file=sys.stderr, flush=True)
