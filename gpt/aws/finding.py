"""Which run, and which job of it, a word of `gpt jobs` means: runs of this machine by their job.json, others by their tag at AWS."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.aws.pricing import price_of
from gpt.aws.records import RUN_TAG, Submission, local_runs, newest_first, read_submissions, submission_of
from gpt.aws.session import Aws, code_of, explained, message_of
from gpt.errors import UserError

# The end of a job's name that `gpt` gives: the time in milliseconds and four letters.
JOB_NAME = re.compile(r".+-\d{13}-[a-z0-9]{4}")
_MOST_LOOKED_AT = 100  # jobs whose names fit, each of which is asked for its tags


@dataclass(frozen=True)
class Target:
    """A job that a command speaks of."""

    run_id: str
    directory: Path
    """Of the run on this machine; it need not be there."""
    submission: Submission
    here: bool
    """Whether this machine has a record of it."""


class Clients:
    """`Aws` of each region, made once."""

    def __init__(self, region: str | None) -> None:
        self.region = region
        self._made: dict[str | None, Aws] = {}

    def of(self, region: str | None = None) -> Aws:
        """The clients of a region; None: of the one that was asked for, or of the environment."""
        region = region or self.region
        if region not in self._made:
            self._made[region] = Aws(region, "region")
        return self._made[region]


def find_job(word: str, folder: Path, job: str, clients: Clients) -> Target:
    """A job by its run's directory, id, or as much of the beginning or end of the id as no other run has; or by its own name.

    Args:
        word: what the user wrote.
        folder: of runs, in which ids are looked up.
        job: the name of one of the run's jobs; empty: the last.
        clients: to ask AWS with, where this machine knows no such run.

    Raises:
        UserError: there is none, or several.
    """
    path = Path(os.path.expanduser(word))
    runs = local_runs(folder)
    if os.path.isdir(path) and (path / "job.json").is_file():
        return _of_run(path.resolve(), job)
    if word in runs:
        return _of_run(runs[word], job)
    for directory in runs.values():
        if any(submission.name == word for submission in read_submissions(directory)):
            return _of_run(directory, word)
    close = [known for known in runs if known.startswith(word) or known.endswith(word)]
    if len(close) == 1:
        return _of_run(runs[close[0]], job)
    if close:
        raise UserError(f"runs: {word} may be {_some(close)}; write more of the name")
    if (target := _elsewhere(word, folder, job, clients)) is not None:
        return target
    near = difflib.get_close_matches(word, runs, 1, 0.6)
    hint = f". Did you mean {near[0]}?" if near else f". There are {_some(list(runs))}" if runs else ""
    raise UserError(f"runs: {word}: no run in {folder} that was submitted, and no job of such a run in {clients.of().region}{hint}")


def _of_run(directory: Path, job: str) -> Target:
    submissions = read_submissions(directory)
    if not submissions:
        raise UserError(f"runs: {directory.name}: its job.json names no job")
    chosen = [one for one in submissions if one.name == job] if job else submissions[-1:]
    if not chosen:
        raise UserError(f"job={job}: the run {directory.name} has no such job; it has {_some([one.name for one in submissions])}")
    return Target(directory.name, directory, chosen[-1], True)


def _elsewhere(word: str, folder: Path, job: str, clients: Clients) -> Target | None:
    """A job that another machine has submitted."""
    aws = clients.of()
    for name in filter(None, (job, word if JOB_NAME.fullmatch(word) else "")):
        description = describe(aws, name)
        if description is not None:
            run_id = run_of(aws, description["TrainingJobArn"])
            if run_id is None:
                raise UserError(f"{name}: this job has no tag {RUN_TAG}; gpt did not submit it")
            return Target(run_id, folder / run_id, submission_of(description, price_at(description)), False)
    found: dict[str, list[Submission]] = {}
    common = name_contains(word)
    for summary in jobs_at_aws(aws, common, most=_MOST_LOOKED_AT) if common else ():
        run_id = run_of(aws, summary["TrainingJobArn"])
        if run_id is not None and (run_id.startswith(word) or run_id.endswith(word)):
            if run_id in found:  # the newest comes first
                continue
            description = describe(aws, summary["TrainingJobName"])
            if description is not None:
                found[run_id] = [submission_of(description, price_at(description))]
    if len(found) > 1 and word not in found:
        raise UserError(f"runs: {word} may be {_some(list(found))}; write more of the name")
    run_id = word if word in found else next(iter(found), None)
    return Target(run_id, folder / run_id, newest_first(found[run_id])[0], False) if run_id else None


def name_contains(run_id: str) -> str:
    """What names of a run's jobs have in common: its id as far as a job's name can hold it."""
    return re.sub(r"[^A-Za-z0-9]+", "-", run_id).strip("-")[:40]


def jobs_at_aws(aws: Aws, contains: str = "", status: str = "", most: int = 1000) -> Iterator[dict[str, Any]]:
    """TrainingJobSummary of the region's jobs with a name of ours, the newest first.

    Raises:
        UserError: AWS cannot be asked.
    """
    filters = {"NameContains": contains} if contains else {}
    filters |= {"StatusEquals": status} if status else {}
    with explained("gpt jobs: sagemaker:ListTrainingJobs", aws.session):
        pages = aws.client("sagemaker").get_paginator("list_training_jobs")
        asked = pages.paginate(
            SortBy="CreationTime", SortOrder="Descending", PaginationConfig={"MaxItems": most, "PageSize": 100}, **filters
        )
        for page in asked:
            yield from (summary for summary in page["TrainingJobSummaries"] if JOB_NAME.fullmatch(summary["TrainingJobName"]))


def run_of(aws: Aws, arn: str) -> str | None:
    """The run whose job this is, as its tag says; None: it has none.

    Raises:
        UserError: AWS cannot be asked.
    """
    with explained("gpt jobs: sagemaker:ListTags", aws.session):
        tags = aws.client("sagemaker").list_tags(ResourceArn=arn)["Tags"]
    return next((tag["Value"] for tag in tags if tag["Key"] == RUN_TAG), None)


def describe(aws: Aws, name: str) -> dict[str, Any] | None:
    """DescribeTrainingJob; None: there is no such job.

    Raises:
        UserError: AWS cannot be asked.
    """
    with explained(f"gpt jobs: sagemaker:DescribeTrainingJob of {name}", aws.session):
        try:
            return aws.client("sagemaker").describe_training_job(TrainingJobName=name)
        except Exception as error:  # boto3 makes the classes of its errors at run time
            if is_unknown(error):
                return None
            raise


def is_unknown(error: BaseException) -> bool:
    """Whether an error says that there is no such job."""
    return code_of(error).startswith("Validation") and re.search(r"not found|not find|does not exist", message_of(error)) is not None


def price_at(description: dict[str, Any]) -> float | None:
    """USD per hour of one of a job's machines, for a job that this machine has no record of."""
    price, _ = price_of(description["ResourceConfig"]["InstanceType"], description["TrainingJobArn"].split(":")[3], {})
    return price


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
