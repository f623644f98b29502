"""Stand-ins for AWS that play a script: a training job with its states, CloudWatch with streams that grow, errors at chosen moments."""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from botocore.exceptions import ClientError, EndpointConnectionError

from gpt.aws.records import Submission

JOB = "pretrain-20261120-101112-kmqz-1763633472000-abcd"
ARN = f"arn:aws:sagemaker:us-east-1:123456789012:training-job/{JOB}"
START = datetime.datetime(2026, 11, 20, 10, 11, 12, tzinfo=datetime.UTC)
THROTTLED, UNREACHABLE, EXPIRED, DENIED = "ThrottlingException", "unreachable", "ExpiredTokenException", "AccessDeniedException"


def refusal(code: str, message: str = "no", operation: str = "Ask") -> Exception:
    """What boto3 raises."""
    if code == UNREACHABLE:
        return EndpointConnectionError(endpoint_url="https://logs.us-east-1.amazonaws.com/")
    return ClientError({"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": 400}}, operation)


def submission(**other: Any) -> Submission:
    return Submission(**{
        "name": JOB, "arn": ARN, "region": "us-east-1", "time": "2026-11-20T10:11:12+00:00", "instance_type": "ml.g6.2xlarge",
        "instance_count": 1, "spot": False, "price": 1.25, "checkpoints": "s3://bucket/gpt/kmqz/checkpoints",
        "output": "s3://bucket/gpt/kmqz/jobs", **other,
    })  # fmt: skip


def described(status: str = "InProgress", secondary: str = "", **other: Any) -> dict[str, Any]:
    """An answer of DescribeTrainingJob."""
    return {
        "TrainingJobName": JOB, "TrainingJobArn": ARN, "TrainingJobStatus": status, "SecondaryStatus": secondary or status,
        "CreationTime": START, "ResourceConfig": {"InstanceType": "ml.g6.2xlarge", "InstanceCount": 1},
        "CheckpointConfig": {"S3Uri": "s3://bucket/gpt/kmqz/checkpoints"}, "OutputDataConfig": {"S3OutputPath": "s3://bucket/gpt/kmqz/jobs"},
        **other,
    }  # fmt: skip


def transition(status: str, minute: int, message: str = "") -> dict[str, Any]:
    return {"Status": status, "StartTime": START + datetime.timedelta(minutes=minute), "StatusMessage": message}


class Script:
    """`gpt.aws.session.Aws` without AWS.

    Args:
        states: answers of DescribeTrainingJob, one per look; the last one stays.
        page: lines that a page of a log holds.
    """

    region = "us-east-1"

    def __init__(self, *states: dict[str, Any], page: int = 10_000) -> None:
        self.states, self.page = deque(states), page
        self.session = SimpleNamespace(get_credentials=lambda: None)
        self.streams: dict[str, list[tuple[int, str]]] = {}
        self.errors: dict[str, deque[str | None]] = {}
        self.asked: list[str] = []
        self.renewed = 0
        self.paused: list[float] = []
        self.at_pause: list[Any] = []

    def client(self, service: str) -> Script:
        return self

    def renew(self) -> None:
        self.renewed += 1

    def pause(self, seconds: float) -> None:
        """Time passes, and with it what the script has next."""
        self.paused.append(seconds)
        assert len(self.paused) < 500, "it waits for ever"
        if self.at_pause:
            self.at_pause.pop(0)()

    def fails(self, operation: str, *codes: str | None) -> None:
        """The next answers of an operation: errors, or None for one that is right."""
        self.errors.setdefault(operation, deque()).extend(codes)

    def write(self, stream: str, *lines: str, at: int = 0) -> None:
        """Lines of the log, a millisecond apart."""
        self.streams.setdefault(stream, []).extend((at + number, line) for number, line in enumerate(lines))

    def _answer(self, operation: str) -> None:
        self.asked.append(operation)
        if (script := self.errors.get(operation)) and (code := script.popleft()):
            raise refusal(code)

    # What is asked

    def describe_training_job(self, TrainingJobName: str) -> dict[str, Any]:
        self._answer("describe_training_job")
        assert TrainingJobName == JOB
        return self.states.popleft() if len(self.states) > 1 else self.states[0]

    def get_paginator(self, operation: str) -> Any:
        assert operation == "describe_log_streams"
        return SimpleNamespace(paginate=self._streams)

    def _streams(self, logGroupName: str, logStreamNamePrefix: str) -> Iterator[dict[str, Any]]:
        self._answer("describe_log_streams")
        assert (logGroupName, logStreamNamePrefix) == ("/aws/sagemaker/TrainingJobs", f"{JOB}/")
        if not self.streams:
            raise refusal("ResourceNotFoundException")
        for stream in self.streams:  # a page each
            yield {"logStreams": [{"logStreamName": f"{JOB}/{stream}"}]}

    def get_log_events(self, logGroupName: str, logStreamName: str, startFromHead: bool, nextToken: str = "", limit: int = 10_000) -> Any:
        self._answer("get_log_events")
        lines = self.streams[logStreamName.removeprefix(f"{JOB}/")]
        begin = int(nextToken.removeprefix("f/")) if nextToken else 0 if startFromHead else max(0, len(lines) - limit)
        assert startFromHead or not nextToken, "CloudWatch wants true with a token that goes forward"
        events = [{"timestamp": time, "message": text} for time, text in lines[begin : begin + min(limit, self.page)]]
        return {"events": events, "nextForwardToken": f"f/{begin + len(events)}"}
