"""Which training jobs a run has had: `job.json` in its directory, a list with one entry per submission, and the same read from AWS.

Imports nothing heavy: listings of runs and sweeps read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gpt.errors import UserError

FILE = "job.json"
ENDED = ("Completed", "Failed", "Stopped")
RUN_TAG = "gpt:run"


@dataclass(frozen=True)
class Submission:
    """A training job of a run, as job.json keeps it."""

    name: str
    arn: str
    region: str
    time: str
    """In UTC, as ISO 8601: when it was submitted."""
    instance_type: str
    instance_count: int
    spot: bool
    price: float | None
    """USD per hour of one instance, on demand, as it was known when it was submitted; None: it was not."""
    checkpoints: str
    """S3 uri of what the job keeps of its run while it runs: below it lies `<run id>/`, the run directory."""
    output: str
    """S3 uri below which its own artifacts lie: `<output>/<name>/output/`."""
    status: str = "InProgress"
    """TrainingJobStatus, when it was last looked at."""

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ENDED


def read_submissions(directory: Path) -> list[Submission]:
    """The jobs of a run, the oldest first; none where it has had none.

    Raises:
        UserError: job.json cannot be read.
    """
    path = directory / FILE
    names = {f.name for f in fields(Submission)}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [Submission(**{name: value for name, value in entry.items() if name in names}) for entry in entries]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or name the job itself: gpt jobs list") from error


def keep_submission(directory: Path, submission: Submission) -> None:
    """Write a job into job.json: in the place of its name if it is there, else as the last.

    Raises:
        UserError: it cannot be written.
    """
    others = read_submissions(directory)
    names = [other.name for other in others]
    place = names.index(submission.name) if submission.name in names else len(others)
    write_aside(directory / FILE, json.dumps([asdict(one) for one in (*others[:place], submission, *others[place + 1 :])], indent=1) + "\n")


def write_aside(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error
    finally:
        if aside.exists():
            aside.unlink()


def has_completed(directory: Path) -> bool:
    """Whether the last job of a run has trained it to its end, so that it is finished although its weights may not be here."""
    try:
        submissions = read_submissions(directory)
    except UserError:
        return False
    return bool(submissions) and submissions[-1].status == "Completed"


def submission_of(description: Mapping[str, Any], price: float | None) -> Submission:
    """What DescribeTrainingJob tells of a job, or the request of one that was submitted, with its arn.

    Args:
        description: of a job that `gpt` submitted.
        price: USD per hour of one instance.

    Raises:
        UserError: it keeps no checkpoints, so it is none of ours.
    """
    name, resources = description["TrainingJobName"], description["ResourceConfig"]
    checkpoints = (description.get("CheckpointConfig") or {}).get("S3Uri")
    if not checkpoints:
        raise UserError(f"{name}: this job keeps no checkpoints in S3; gpt did not submit it")
    arn = description["TrainingJobArn"]
    created = description.get("CreationTime")
    return Submission(
        name=name, arn=arn, region=arn.split(":")[3], time=created.isoformat(timespec="seconds") if created else "",
        instance_type=resources["InstanceType"], instance_count=int(resources["InstanceCount"]),
        spot=bool(description.get("EnableManagedSpotTraining")), price=price, checkpoints=checkpoints.rstrip("/"),
        output=description["OutputDataConfig"]["S3OutputPath"].rstrip("/"), status=description.get("TrainingJobStatus", "InProgress"),
    )  # fmt: skip


def local_runs(folder: Path) -> dict[str, Path]:
    """Id -> directory of the runs in a folder, and in its folders that are none themselves, that have had jobs; by id."""
    found = [*folder.glob(f"*/{FILE}"), *folder.glob(f"*/*/{FILE}")]
    return {path.parent.name: path.parent for path in sorted(found)}


def seen(directory: Path | None, submission: Submission, status: str) -> Submission:
    """A submission with the status that it has now, kept in job.json if that is news and the run is one of this machine."""
    if status == submission.status:
        return submission
    now = replace(submission, status=status)
    if directory is not None and (directory / FILE).is_file():
        keep_submission(directory, now)
    return now


def newest_first(submissions: Sequence[Submission]) -> list[Submission]:
    """By the time of submission."""
    return sorted(submissions, key=lambda one: one.time, reverse=True)
