"""The digest of a job: time, money, places; of a failure the reason, the lines that tell of it and what to do."""

from __future__ import annotations

import pytest

from gpt.aws.digest import cost_of, digest, exit_code, failing_host, state_of, summary
from gpt.aws.hints import hint_for
from tests.aws.job_standins import JOB, described, submission


def text(description, tails=None, metrics=None, **of_submission) -> str:
    return "\n".join(digest(description, submission(**of_submission), "kmqz", tails or {}, metrics or {}))


def test_a_job_that_has_done_its_work():
    said = text(
        described(
            "Completed",
            TrainingTimeInSeconds=7980,
            BillableTimeInSeconds=7980,
            FinalMetricDataList=[{"MetricName": "train:loss", "Value": 3.25}],
        )
    )
    assert said.splitlines() == [
        "",
        f"{JOB}: Completed (1 x ml.g6.2xlarge, us-east-1)",
        "  time:    2h 13min of training, 2h 13min billed",
        "  cost:    about 2.77 USD (1 x 1.25 USD an hour; storage and transfer are not in it)",
        "  metrics: train:loss=3.25",
        "  run:     s3://bucket/gpt/kmqz/checkpoints/",
        f"  output:  s3://bucket/gpt/kmqz/jobs/{JOB}/output/",
        "bring the model and the report home: gpt jobs fetch kmqz",
    ]


def test_the_saving_of_spot_and_the_price_of_several_machines():
    spot = described("Completed", TrainingTimeInSeconds=10_000, BillableTimeInSeconds=3_000)
    said = text(spot, spot=True, instance_count=4, price=2.0)
    assert "  time:    2h 46min 40s of training, 50min billed (70% saved by spot)\n" in said
    assert "(4 x ml.g6.2xlarge, spot, us-east-1)" in said
    assert "cost:    about 6.67 USD (4 x 2 USD an hour" in said
    assert cost_of(spot, submission(instance_count=4, price=2.0)) == pytest.approx(3000 / 3600 * 4 * 2)


def test_what_is_not_known_is_said_to_be_unknown():
    billed = described("Completed", TrainingTimeInSeconds=60, BillableTimeInSeconds=60)
    assert "cost:    unknown; no price of ml.g6.2xlarge was known (launch.prices.ml.g6.2xlarge=<USD per hour>)" in text(billed, price=None)
    assert "cost" not in text(described("Completed"))
    assert cost_of(described(), submission()) is None


def test_a_warm_pool_is_on_top():
    warm = {"Status": "Available", "ResourceRetainedBillableTimeInSeconds": 900}
    assert "the warm pool's 15min come on top" in text(described("Completed", BillableTimeInSeconds=60, WarmPoolStatus=warm))


def test_metrics_of_the_log_stand_in_where_sagemaker_tells_none():
    assert "  metrics: train:loss=2.5 validation:loss=3" in text(
        described("Completed"), metrics={"train:loss": 2.5, "validation:loss": 3.0}
    )
    told = described("Completed", FinalMetricDataList=[{"MetricName": "a", "Value": 1.0}])
    assert "train:loss" not in text(told, metrics={"train:loss": 2.5})


def test_where_a_job_stands():
    assert state_of(described("InProgress", "Downloading")) == "InProgress, Downloading"
    assert summary(described("InProgress", "Starting"), submission())[0].startswith(f"{JOB}: InProgress, Starting (")


# Failures

REASON = "AlgorithmError: gpt: data.paths: no file matches '/opt/ml/input/data/train/*.txt', exit code: 2"
TAILS = {
    "algo-1": ["all is well", "  ", "process of another machine has gone"],
    "algo-2": [*(f"line {number}" for number in range(30)), "gpt: data.paths: no file matches '/opt/ml/input/data/train/*.txt'"],
}


def test_a_failure_has_its_reason_and_the_last_lines_of_the_host_it_is_of():
    lines = text(described("Failed", FailureReason=REASON), TAILS).splitlines()
    at = lines.index(f"reason: {REASON}")
    assert lines[at + 1] == "last lines of algo-2:"
    assert lines[at + 2 :] == [f"  {line}" for line in TAILS["algo-2"][-15:]]


@pytest.mark.parametrize(
    ("reason", "tails", "host"),
    [
        (REASON, TAILS, "algo-2"),
        ("AlgorithmError: , exit code: 1", {"algo-1": ["fine"], "algo-2": ["Traceback (most recent call last):"]}, "algo-2"),
        ("AlgorithmError: , exit code: 1", {"algo-10": ["RuntimeError: a"], "algo-2": ["ValueError: b"]}, "algo-2"),
        ("InternalServerError: sorry", {"algo-2": ["b"], "algo-1": ["a"]}, "algo-1"),
        ("", {}, ""),
    ],
)
def test_the_host_that_failed(reason, tails, host):
    assert failing_host(reason, tails) == host


def test_a_failure_without_a_log_or_a_reason():
    said = text(described("Failed"))
    assert "reason: no reason is given" in said
    assert "last lines" not in said
    assert "hint" not in said


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [
        ("Completed", None, 0),
        ("Failed", REASON, 2),
        ("Failed", "AlgorithmError: boom, exit code: 1", 1),
        ("Failed", "AlgorithmError: boom, exit code: 12", 1),
        ("Failed", "ClientError: Data download failed: no such key", 2),
        ("Failed", "InternalServerError: sorry", 1),
        ("Failed", None, 1),
        ("Stopped", None, 143),
    ],
)
def test_exit_codes(status, reason, code):
    assert exit_code(described(status, **({"FailureReason": reason} if reason else {}))) == code


HINTS = {
    "ResourceLimitExceeded: The account-level service limit 'ml.p5.48xlarge for training job usage' is 0 Instances, with current "
    "utilization of 0 Instances and a request delta of 1 Instances.": "(ml.p5.48xlarge for training job usage)",
    "CapacityError: Unable to provision requested ML compute capacity. Please retry using another type.": "none of these machines",
    "MaxWaitTimeExceeded": "launch.max_wait",
    "AccessDeniedException: User: arn:aws:iam::1:user/me is not authorized to perform: iam:PassRole on resource: role/r": "iam:PassRole on",
    "ValidationException: Could not assume role arn:aws:iam::1:role/r. Please ensure that the role exists and allows principal "
    "'sagemaker.amazonaws.com' to assume the role.": "Trust relationships",
    "ClientError: Cannot find the requested image 1.dkr.ecr.us-east-1.amazonaws.com/gpt:x": "launch.image_uri exists",
    "AlgorithmError: Failed to pull image 1.dkr.ecr.us-east-1.amazonaws.com/gpt:neuron": "ecr:BatchGetImage",
    "AlgorithmError: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB, exit code: 1": "train.micro_batch",
    "AlgorithmError: , exit code: 137": "ran out of memory",
    "ClientError: The KMS key arn:aws:kms:us-east-1:1:key/k is not accessible": "kms:CreateGrant",
    "AlgorithmError: OSError: [Errno 28] No space left on device, exit code: 1": "launch.volume_gb",
    "ValidationException: No S3 objects found under S3 URL 's3://b/p'. Please ensure that the bucket exists": "s3:GetObject",
    "ClientError: NoSuchBucket: The specified bucket does not exist": "bucket of launch.output exists",
    "ClientError: Data download failed: Failed to download data. AccessDenied (403): Access denied": "s3:ListBucket",
    "MaxRuntimeExceeded": "launch.max_runtime",
    "Interrupted": "spot machines back",
    "AccessDeniedException: not authorized to perform: sagemaker:CreateTrainingJob": "docs/sagemaker.md",
}


@pytest.mark.parametrize("said", HINTS)
def test_each_common_error_has_a_hint(said):
    assert HINTS[said] in hint_for(said)
    assert "{" not in hint_for(said)


@pytest.mark.parametrize("said", ["", "AlgorithmError: ValueError: data.paths, exit code: 2", "Completed", "Stopped", "Training"])
def test_what_is_not_known_has_none(said):
    assert hint_for(said) == ""


def test_the_hint_of_a_failure_is_of_the_reason_or_else_of_the_log():
    assert "hint: It ran out of memory" in text(described("Failed", FailureReason="AlgorithmError: , exit code: 137"))
    tails = {"algo-1": ["torch.OutOfMemoryError: CUDA out of memory."]}
    assert "hint: It ran out of memory" in text(described("Failed", FailureReason="AlgorithmError: , exit code: 1"), tails)


def test_a_job_stopped_at_a_limit_says_which():
    assert "hint: It reached launch.max_runtime" in text(described("Stopped", "MaxRuntimeExceeded"))
    assert "hint: AWS took the spot machines back" in text(described("Stopped", "Interrupted"))
    assert "hint" not in text(described("Stopped", "Stopped"))
