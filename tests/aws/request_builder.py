"""Jobs to test with: composed as the command line does it, and planned at a time that does not pass."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from gpt.aws.training_job import TrainingJob, plan_job
from gpt.compose import compose_run
from gpt.config import RunConfig

NOW = datetime(2026, 11, 22, 3, 30, 0, 123000, tzinfo=UTC)
TOKEN = "abcd"
REGION = "eu-west-1"
COMMIT = "0123456789ab"
ACCOUNT = "123456789012"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/training"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/gpt:cuda"
OUTPUT = "s3://bucket/prefix"
NEEDED = (f"launch.role={ROLE}", f"launch.output={OUTPUT}", f"launch.image_uri={IMAGE}")
"""What each job needs that is to be sent."""


def job_config(*settings: str, command: str = "pretrain", launch: str = "sagemaker") -> RunConfig:
    """The config of a job that has what each needs; later settings count."""
    return compose_run(command, [f"launch={launch}", *NEEDED, *settings])


def planned(*settings: str, command: str = "pretrain", launch: str = "sagemaker", token: str = TOKEN) -> TrainingJob:
    """The job that these settings make."""
    return plan_job(job_config(*settings, command=command, launch=launch), NOW, token, REGION, COMMIT)


def content_of(job: TrainingJob, name: str) -> bytes:
    """What is uploaded as a file of the job's code."""
    (found,) = [upload.source for upload in job.uploads if "/code/" in upload.uri and upload.uri.endswith(f"/{name}")]
    return found if isinstance(found, bytes) else found.read_bytes()


def container_config(job: TrainingJob) -> dict[str, Any]:
    """The config that the job takes along."""
    return json.loads(content_of(job, "config.json"))


def channels_of(job: TrainingJob) -> dict[str, str]:
    """Channel -> s3 uri, without that of the code."""
    uris = {one["ChannelName"]: one["DataSource"]["S3DataSource"]["S3Uri"] for one in job.request["InputDataConfig"]}
    assert uris.pop("code")
    return uris
