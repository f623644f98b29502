"""Training jobs as moto has them, with states that a test sets: moto itself completes each at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from moto.sagemaker.models import sagemaker_backends

from gpt.aws import jobs
from gpt.cli import main
from tests.aws.conftest import BUCKET
from tests.aws.request_builder import ROLE

IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/gpt:cuda"
SETTINGS = (
    "launch=sagemaker", f"launch.role={ROLE}", f"launch.output=s3://{BUCKET}/gpt", f"launch.image_uri={IMAGE}", "data=text",
    "data.paths=[book.txt]", "launch.prices.ml.g6.2xlarge=1.25",
)  # fmt: skip
Call = Callable[..., tuple[int, str, str]]


def every_job(region: str = "us-east-1") -> list[Any]:
    return list(sagemaker_backends["123456789012"][region].training_jobs.values())


def force(status: str, *of: Any, **other: Any) -> None:
    """What AWS says of jobs from here on."""
    for job in of or every_job():
        job.training_job_status = job.secondary_status = status
        for name, value in other.items():
            setattr(job, name, value)


def write_log(aws: Any, job: str, *lines: str, host: int = 1) -> None:
    """Lines of a host's log."""
    logs, group, stream = aws.client("logs"), "/aws/sagemaker/TrainingJobs", f"{job}/algo-{host}-1"
    if not logs.describe_log_groups(logGroupNamePrefix=group)["logGroups"]:
        logs.create_log_group(logGroupName=group)
    logs.create_log_stream(logGroupName=group, logStreamName=stream)
    events = [{"timestamp": 1_795_000_000_000 + number, "message": text} for number, text in enumerate(lines)]
    logs.put_log_events(logGroupName=group, logStreamName=stream, logEvents=events)


def command_line(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`gpt <command> ...` in a folder of its own that holds book.txt: exit code, stdout, stderr. No time passes."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(jobs, "follow", functools.partial(jobs.follow, pause=lambda seconds: None))
    Path("book.txt").write_text("A text that is long enough to be split.\n" * 50)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        return code, *capsys.readouterr()

    return call
