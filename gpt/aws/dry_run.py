"""The last look at a job before it costs: `launch.dry_run=true` prints it, and submitting refuses what has a problem.

A dry run calls nobody and needs no credentials. On stdout stands the request of CreateTrainingJob as JSON and nothing else; on stderr
what would be uploaded, the most that it can cost, and everything that is wrong with it.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from gpt.aws.cross_rules import Problem
from gpt.aws.pricing import Cost, refusal, worst_cost
from gpt.aws.request_rules import problems_of, secrets_of, without_secrets
from gpt.aws.shipping import Upload
from gpt.aws.training_job import NO_REGION, TrainingJob, set_region
from gpt.config import RunConfig
from gpt.errors import UserError, one_line

_SHOWN_FILES = 3


@dataclass(frozen=True)
class Check:
    """What was found of a job."""

    problems: tuple[Problem, ...]
    """What forbids it first, then warnings."""
    cost: Cost
    """The most that it can cost."""

    @property
    def refused(self) -> tuple[Problem, ...]:
        """Why it is not submitted; empty: it may be."""
        return tuple(problem for problem in self.problems if problem.fatal)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What does not forbid it."""
        return tuple(problem for problem in self.problems if not problem.fatal)

    def refuse(self) -> None:
        """Let a job through, or not.

        Raises:
            UserError: there is something that forbids it; each is a note.
        """
        if not self.refused:
            return
        error = UserError(f"the job has {_counted(len(self.refused), 'problem')}, and nothing was sent")
        for problem in self.refused:
            error.add_note(str(problem))
        raise error


def check_before(job: TrainingJob, config: RunConfig) -> Check:
    """Look at everything of a job that can be known without AWS.

    Raises:
        UserError: botocore is not installed.
    """
    region = None if config.launch.dry_run and set_region(config) is None else job.region
    cost = worst_cost(job.request, region, config.launch.prices)
    problems = problems_of(job.request, config, region)
    if why := refusal(cost, config.launch.max_cost):
        problems.insert(0, Problem("launch.max_cost", why))
    if region is None:
        problems.insert(0, Problem("launch.region", NO_REGION))
    return Check(tuple(problems), cost)


def dry_run(job: TrainingJob, config: RunConfig) -> int:
    """Print a job instead of submitting it: the request on stdout, the rest on stderr. A secret in it is hidden.

    Returns:
        the exit code: 0 if it would be submitted, 2 if it has a problem.
    """
    check = check_before(job, config)
    print(json.dumps(without_secrets(job.request, secrets_of(job.request, config)), indent=2), flush=True)
    describe(job, check, sys.stderr)
    return 2 if check.refused else 0


def describe(job: TrainingJob, check: Check, stream: TextIO) -> None:
    """Write what of a job is not in its request: uploads, cost and problems. In a terminal long lines are wrapped."""
    where = "" if any(problem.text == NO_REGION for problem in check.refused) else f" in {job.region}"
    rows = [("run", job.run_id), ("job", f"{job.name}{where}"), *_uploads(job), ("cost", str(check.cost))]
    rows += [("warning", str(problem)) for problem in check.warnings]
    rows += [("problem", str(problem)) for problem in check.refused]
    for label, text in rows:
        print(_row(label, text, stream), file=stream)
    refused = f"{_counted(len(check.refused), 'problem')}: this would not be submitted." if check.refused else "This would be submitted."
    print(f"{refused} It is a dry run, and nothing was sent.", file=stream)


def _row(label: str, text: str, stream: TextIO) -> str:
    indent = 10
    line = f"{label:<{indent}}{one_line(text)}"
    if not label or not stream.isatty():
        return line
    columns = max(shutil.get_terminal_size((100, 24)).columns, 50)
    return textwrap.fill(line, columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _uploads(job: TrainingJob) -> Iterator[tuple[str, str]]:
    """What is sent from this machine: together, and for each channel how many files, how large, which and where to."""
    together = size(sum(upload.size for upload in job.uploads))
    yield "uploads", f"{_counted(len(job.uploads), 'file')}, {together}; what lies there already is not sent again"
    places = {one["DataSource"]["S3DataSource"]["S3Uri"]: one["ChannelName"] for one in job.request["InputDataConfig"]}
    groups: dict[str, list[Upload]] = {}
    for upload in job.uploads:
        folder = next((uri for uri in places if upload.uri.startswith(uri)), f"{upload.uri.rpartition('/')[0]}/")
        groups.setdefault(folder, []).append(upload)
    width = max((len(places.get(folder, "")) for folder in groups), default=0)
    for folder, uploads in groups.items():
        total = size(sum(upload.size for upload in uploads))
        yield "", f"{places.get(folder, ''):<{width}}  {_counted(len(uploads), 'file')}, {total}, to {folder}"
        yield "", f"{'':<{width}}  {_named(folder, uploads)}"


def _named(folder: str, uploads: list[Upload]) -> str:
    """The largest files of a group, by where they are here, or what they are called there."""
    largest = sorted(uploads, key=lambda upload: -upload.size)[:_SHOWN_FILES]
    names = [f"{_name(folder, upload)} {size(upload.size)}" for upload in largest]
    more = len(uploads) - len(names)
    return ", ".join([*names, *([f"and {more} more"] if more else [])])


def _name(folder: str, upload: Upload) -> str:
    if isinstance(upload.source, bytes):
        return upload.uri.removeprefix(folder)
    here = upload.source
    return str(here.relative_to(Path.cwd())) if here.is_absolute() and here.is_relative_to(Path.cwd()) else str(here)


def size(count: int) -> str:
    """Bytes, as people read them: `812 B`, `3.4 kB`, `1.2 GB`, in powers of 1000 as S3 bills them."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
