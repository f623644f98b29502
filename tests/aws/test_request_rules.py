"""Everything that is wrong with a job is found before it costs: each broken request and config has its message."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from botocore.loaders import create_loader

from gpt.aws.cross_rules import Problem
from gpt.aws.request_rules import problems_of
from gpt.aws.service_model import python_pattern, violations
from gpt.config import RunConfig
from gpt.errors import UserError
from scripts.golden import JOBS
from tests.aws.request_builder import ACCOUNT, COMMIT, IMAGE, NOW, REGION, TOKEN, job_config, plan_job

KEY = "1234abcd-12ab-34cd-56ef-1234567890ab"
TOKEN_OF_GITHUB = "ghp_abcdefghijklmnopqrstuvwxyz0123456789"
GONE = object()
"""In place of a value: the field is taken out."""


@cache
def good_request() -> dict[str, Any]:
    return plan_job(job_config(), NOW, TOKEN, REGION, COMMIT).request


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The good request with other values at dotted places; parts that are not there are made."""
    request = copy.deepcopy(good_request())
    for place, value in changes.items():
        *path, last = place.split(".")
        part: Any = request
        for name in path:
            part = part[int(name)] if isinstance(part, list) else part.setdefault(name, {})
        if value is GONE:
            del part[last]
        else:
            part[int(last) if isinstance(part, list) else last] = value
    return request


def texts(problems: list[Problem]) -> list[str]:
    return [str(problem) for problem in problems]


@pytest.mark.parametrize("preset", [name for name in JOBS if name != "trn2"])
def test_the_request_of_a_preset_is_good(preset):
    image, more = IMAGE, []
    if preset == "secure":  # with traffic between machines to encrypt
        image, more = IMAGE.replace(":cuda", ":cpu"), ["launch.instance_count=2", "parallel=ddp"]
    settings = [re.sub(r"key/[0-9a-f]{8}$", f"key/{KEY}", setting) for setting in JOBS[preset]]
    config = job_config(*settings, *more, f"launch.image_uri={image}", "data=text", "data.paths=[LICENSE]", "run.id=good")
    assert texts(problems_of(plan_job(config, NOW, TOKEN, REGION, COMMIT).request, config, REGION)) == []


def test_the_request_for_trainium_is_good():
    image = IMAGE.replace(":cuda", ":neuron")
    config = job_config(*JOBS["trn2"], f"launch.image_uri={image}")
    assert texts(problems_of(plan_job(config, NOW, TOKEN, REGION, COMMIT).request, config, REGION)) == []


# What is changed in a good request -> the key of the problem, and what its text has.
BROKEN_REQUESTS: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    # names, types and what is missing
    ({"RoleArn": GONE}, "launch.role", ("is needed", "arn:aws:iam::<account>:role/<name>")),
    ({"OutputDataConfig": GONE}, "request.OutputDataConfig", ("is needed",)),
    ({"AlgorithmSpecification.TrainingInputMode": GONE}, "request.AlgorithmSpecification.TrainingInputMode", ("is needed",)),
    ({"ResourceConfig.InstanceCounts": 1}, "request.ResourceConfig.InstanceCounts", ("no such field", "upgrade boto3")),
    ({"InstanceType": "ml.g6.2xlarge"}, "request.InstanceType", ("no such field",)),
    ({"ResourceConfig.InstanceCount": "two"}, "launch.instance_count", ("=two", "whole number")),
    ({"EnableManagedSpotTraining": "yes"}, "launch.spot", ("=yes", "true or false")),
    ({"HyperParameters.seed": 3}, "request.HyperParameters.seed", ("=3", "text")),
    # choices, patterns and limits, which botocore leaves to the service
    ({"ResourceConfig.InstanceType": "ml.g6.2xlrge"}, "launch.instance_type", ("=ml.g6.2xlrge", "ml.g6.2xlarge?")),
    ({"ResourceConfig.InstanceType": "ml.m5.96xlarge"}, "launch.instance_type", ("=ml.m5.96xlarge", "no such type", "ml.m")),
    ({"AlgorithmSpecification.TrainingInputMode": "Stream"}, "request.AlgorithmSpecification.TrainingInputMode", ("Pipe, File, FastFile",)),
    ({"TrainingJobName": "my_job"}, "run.id", ("=my_job", "letters, digits and single dashes")),
    ({"TrainingJobName": "x" * 64}, "run.id", ("64 characters", "at most 63")),
    ({"RoleArn": "SageMakerExecutionRole"}, "launch.role", ("=SageMakerExecutionRole", "arn:aws:iam::<account>:role/<name>")),
    ({"HyperParameters.note": "x" * 2501}, "request.HyperParameters.note", ("2501 characters", "at most 2500")),
    ({"HyperParameters.note": "two\nlines"}, "request.HyperParameters.note", ("text in one line",)),
    ({"HyperParameters": {f"key{n}": "1" for n in range(101)}}, "request.HyperParameters", ("there are 101", "at most 100", "take 1 out")),
    ({"Environment": {f"KEY{n}": "1" for n in range(103)}}, "launch.environment", ("there are 103", "at most 100", "take 3 out")),
    ({"Environment.NOTE": "x" * 513}, "launch.environment.NOTE", ("513 characters", "at most 512")),
    ({"Environment.1ST": "x"}, "launch.environment.1ST", ("do not begin with a digit",)),
    (
        {"AlgorithmSpecification.MetricDefinitions": [{"Name": f"m{n}", "Regex": "x"} for n in range(41)]},
        "request.AlgorithmSpecification.MetricDefinitions", ("there are 41", "at most 40"),
    ),
    ({"AlgorithmSpecification.MetricDefinitions": [{"Name": "m", "Regex": "("}]}, "request", ("the pattern of m is none",)),
    ({"AlgorithmSpecification.ContainerEntrypoint": ["x" * 257]}, "request.AlgorithmSpecification.ContainerEntrypoint", ("at most 256",)),
    ({"RetryStrategy": {"MaximumRetryAttempts": 31}}, "launch.max_retries", ("=31", "at most 30")),
    ({"ResourceConfig.KeepAlivePeriodInSeconds": 7 * 3600}, "launch.keep_alive", ("=7h", "at most 6h")),
    ({"StoppingCondition.MaxRuntimeInSeconds": 0}, "launch.max_runtime", ("=0s", "at least 1s")),
    ({"Tags": [{"Key": f"k{n}", "Value": "v"} for n in range(51)]}, "launch.tags", ("there are 51", "gpt:run", "at most 50", "take 1 out")),
    ({"Tags.0.Value": "a&b"}, "launch.tags.gpt:run", ("=a&b", ". _ : / = + - @")),
    ({"Tags.1": {"Key": "k" * 129, "Value": "v"}}, "launch.tags.k", ("129 characters", "at most 128")),
    ({"InputDataConfig.0.ChannelName": "my data"}, "launch.channels.my data", ("=my data", "letters, digits")),
    ({"InputDataConfig": []}, "launch.channels", ("names of channels",)),
    ({"VpcConfig": {"Subnets": ["subnet-1"], "SecurityGroupIds": []}}, "launch.security_groups", ("=[]", "give both")),
    ({"VpcConfig": {"SecurityGroupIds": ["sg-1"]}}, "launch.subnets", ("is needed", "give both")),
    ({"VpcConfig": {"Subnets": ["subnet_1"], "SecurityGroupIds": ["sg-1"]}}, "launch.subnets[0]", ("=subnet_1", "subnet-0a1b")),
    # limits that only the documentation has
    ({"StoppingCondition.MaxRuntimeInSeconds": 29 * 86400}, "launch.max_runtime", ("=696h", "at most 672h (28 days)")),
    ({"StoppingCondition": {}}, "launch.max_runtime", ("may run for a day",)),
    ({"ResourceConfig.InstanceCount": 0}, "launch.instance_count", ("=0 must be at least 1",)),
    ({"ResourceConfig.VolumeSizeInGB": 0}, "launch.volume_gb", ("=0 must be at least 1",)),
    ({"ResourceConfig.VolumeSizeInGB": 1000}, "launch.volume_gb", ("=1000", "ml.g6.2xlarge have 450 GB")),
    ({"Tags.0.Key": "aws:team"}, "launch.tags.aws:team", ("AWS's own",)),
    ({"Tags.0.Key": "gpt:commit"}, "launch.tags.gpt:commit", ("2 tags of that name",)),
    ({"InputDataConfig": 2 * good_request()["InputDataConfig"]}, "launch.channels", ("2 input channels of that name",)),
    ({"OutputDataConfig.S3OutputPath": "s3://My_Bucket/x"}, "launch.output", ("My_Bucket is no name of a bucket",)),
    ({"CheckpointConfig.S3Uri": "https://s3.amazonaws.com/b"}, "launch.output", ("write it as s3://",)),
    ({"OutputDataConfig.S3OutputPath": "bucket/x"}, "launch.output", ("=bucket/x", "s3://<bucket>/<prefix>")),
    # settings that do not go together
    ({"EnableManagedSpotTraining": True}, "launch.max_wait", ("spot needs it", "at least launch.max_runtime")),
    (
        {"EnableManagedSpotTraining": True, "StoppingCondition.MaxWaitTimeInSeconds": 3600}, "launch.max_wait",
        ("=1h", "at least launch.max_runtime=24h", "leave it out"),
    ),
    (
        {"EnableManagedSpotTraining": True, "StoppingCondition.MaxWaitTimeInSeconds": 90000, "CheckpointConfig": GONE}, "launch.spot",
        ("no CheckpointConfig", "launch.output"),
    ),
    ({"StoppingCondition.MaxWaitTimeInSeconds": 90000}, "launch.max_wait", ("=25h", "launch.spot=true")),
    (
        {"EnableManagedSpotTraining": True, "StoppingCondition.MaxWaitTimeInSeconds": 90000, "ResourceConfig.KeepAlivePeriodInSeconds": 60},
        "launch.keep_alive", ("=1min", "spot machines cannot be kept"),
    ),
    ({"ResourceConfig.InstanceType": "ml.trn1.32xlarge"}, "launch.instance_type", ("=ml.trn1.32xlarge", "ml.trn2.48xlarge")),
    ({"ResourceConfig.InstanceType": "ml.trn2.48xlarge"}, "launch.image_uri",
     ("is for GPU", "computes on Trainium", "an image for Trainium")),
    (
        {"AlgorithmSpecification.TrainingImage": IMAGE.replace("gpt:cuda", "pytorch-training-neuronx:2.13-neuronx-py312")},
        "launch.image_uri", ("is for Trainium", "computes on GPU", "launch/instance=trn2"),
    ),
    (
        {"AlgorithmSpecification.TrainingImage": IMAGE.replace("gpt:cuda", "pytorch-training:2.13-cpu-py312")}, "launch.image_uri",
        ("is for CPU", "computes on GPU"),
    ),
    ({"AlgorithmSpecification.TrainingImage": IMAGE.replace(REGION, "us-west-2")}, "launch.image_uri", ("is in us-west-2", REGION)),
    ({"AlgorithmSpecification.TrainingImage": "docker.io/me/gpt:cuda"}, "launch.image_uri", ("=docker.io/me/gpt:cuda", "ECR only")),
    ({"AlgorithmSpecification.TrainingImage": GONE}, "launch.image_uri", ("needs a container's image", "dkr.ecr")),
    ({"ResourceConfig.VolumeKmsKeyId": KEY}, "launch.volume_kms_key", ("ml.g6.2xlarge has disks of its own", "leave it out")),
    ({"ResourceConfig.VolumeKmsKeyId": "alias/mine"}, "launch.volume_kms_key", ("=alias/mine", "takes no alias")),
    ({"OutputDataConfig.KmsKeyId": f"key/{KEY}"}, "launch.output_kms_key", (f"=key/{KEY}", "arn:aws:kms")),
    ({"OutputDataConfig.KmsKeyId": "my-key"}, "launch.output_kms_key", ("=my-key", "arn:aws:kms", "alias/<name>")),
    ({"OutputDataConfig.KmsKeyId": f"arn:aws:kms:us-east-1:{ACCOUNT}:key/{KEY}"}, "launch.output_kms_key", ("is in us-east-1", REGION)),
    ({"OutputDataConfig.KmsKeyId": "my key"}, "launch.output_kms_key", ("=my key", "ARN or id")),
    # secrets
    ({"Environment.WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}, "launch.environment.WANDB_API_KEY", ("Secrets Manager",)),
    ({"AlgorithmSpecification.ContainerArguments": ["AKIAIOSFODNN7EXAMPLE"]}, "ContainerArguments[0]", ("AWS access key",)),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "key", "parts"), BROKEN_REQUESTS, ids=[key for _, key, _ in BROKEN_REQUESTS])
def test_a_broken_request_has_its_message(changes, key, parts):
    assert problems_of(good_request(), region=REGION) == []
    found = problems_of(changed(changes), region=REGION)
    fitting = [p for p in found if p.fatal and key in p.key and p.text.startswith(p.key) and all(part in p.text for part in parts)]
    assert len(fitting) == 1, texts(found)


# Settings -> the key of the problem, and what its text has. The settings can be composed; what cannot is told there.
BROKEN_CONFIGS: list[tuple[tuple[str, ...], str, tuple[str, ...]]] = [
    (("launch.network_isolation=true", "data=hf", "data.name=me/texts"), "data.name", ("=me/texts", "reach no network", "data=jsonl")),
    (
        ("launch.network_isolation=true", "data=mixture", "data.parts=[{source: stdlib}, {source: hf, name: me/texts}]"),
        "data.parts[1].name", ("data.parts[1].name=me/texts", "reach no network"),
    ),
    (
        ("launch.network_isolation=true", "data=text", "data.paths=[https://example.com/a.txt]"), "data.paths",
        ("=https://example.com/a.txt", "fetched while the job runs"),
    ),
    (
        ("launch.network_isolation=true", "tokenizer=pretrained", "tokenizer.path=me/tokenizer"), "tokenizer.path",
        ("=me/tokenizer", "from the hub", "hf download"),
    ),
    (("launch.network_isolation=true", "tracking=wandb"), "tracking", ("tracking=wandb", "WANDB_MODE=offline")),
    (
        ("launch.network_isolation=true", "tracking=mlflow", "launch.environment.MLFLOW_TRACKING_URI=https://mlflow.example.com"),
        "launch.environment.MLFLOW_TRACKING_URI", ("is a server", "leave it out"),
    ),
    (("launch.upload_kms_key=key",), "launch.upload_kms_key", ("=key", "arn:aws:kms")),
    (("launch.output_kms_key=" + f"arn:aws:kms:us-east-1:{ACCOUNT}:key/{KEY}",), "launch.output_kms_key", ("is in us-east-1",)),
    (("launch.subnets=[subnet-1]",), "launch.security_groups", ("give both",)),
    (("launch.security_groups=[sg-1]",), "launch.subnets", ("give both",)),
    (("launch.max_runtime=800h",), "launch.max_runtime", ("=800h", "28 days")),
    (("launch.spot=true", "launch.max_wait=1h"), "launch.max_wait", ("=1h", "launch.max_runtime=24h")),
    (("launch.max_retries=99",), "launch.max_retries", ("=99", "at most 30")),
    (("launch.tags.team=R&D",), "launch.tags.team", ("=R&D",)),
    (("launch.environment.MY-VAR=1",), "launch.environment.MY-VAR", ("letters, digits and '_'",)),
    (("launch.channels={a b: s3://bucket/x}",), "launch.channels.a b", ("letters, digits",)),
    (("launch.channels.more=s3://Bad_Bucket/x",), "launch.channels.more", ("Bad_Bucket is no name",)),
    (("data=text", "data.paths=[s3://Bad_Bucket/x]"), "data.paths", ("data.paths=s3://Bad_Bucket/x", "Bad_Bucket is no name")),
    (
        ("data=mixture", "data.parts=[{source: stdlib}, {source: text, paths: [s3://Bad_Bucket/x]}]"), "data.parts[1].paths",
        ("Bad_Bucket is no name",),
    ),
    (("launch.environment.HF_TOKEN=hf_" + "aB" * 17,), "launch.environment.HF_TOKEN", ("a Hugging Face token",)),
    (("launch.environment.AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",), "launch.environment.AWS_SECRET_ACCESS_KEY",
     ("looks like",)),
    (("launch.tags.password=hunter2",), "launch.tags.password", ("password",)),
    ((f"train.sample_prompts=[key {TOKEN_OF_GITHUB}]",), "train.sample_prompts[0]", ("a GitHub token",)),
]  # fmt: skip


def problems_with(*settings: str) -> tuple[RunConfig, list[Problem]]:
    config = job_config(*settings)
    return config, problems_of(plan_job(config, NOW, TOKEN, REGION, COMMIT).request, config, REGION)


@pytest.mark.parametrize(("settings", "key", "parts"), BROKEN_CONFIGS, ids=[key for _, key, _ in BROKEN_CONFIGS])
def test_a_broken_config_has_its_message(settings, key, parts):
    _, found = problems_with(*settings)
    fitting = [p for p in found if p.fatal and p.key == key and all(part in p.text for part in parts)]
    assert len(fitting) == 1, texts(found)


def test_everything_is_found_at_once_and_once_only_what_forbids_it_first():
    _, found = problems_with(
        "launch.spot=true", "launch.max_wait=1h", "launch.max_runtime=800h", "launch.tags.team=R&D", "launch.subnets=[subnet-1]",
        "launch.encrypt_traffic=true", f"launch.environment.GITHUB_TOKEN={TOKEN_OF_GITHUB}", "launch.upload_kms_key=k",
    )  # fmt: skip
    assert len(set(found)) == len(found)
    assert [problem.key for problem in found if not problem.fatal] == ["launch.encrypt_traffic"]
    assert not found[-1].fatal
    assert sorted({problem.key for problem in found}) == [
        "launch.encrypt_traffic", "launch.environment.GITHUB_TOKEN", "launch.max_runtime", "launch.max_wait", "launch.security_groups",
        "launch.tags.team", "launch.upload_kms_key",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "key", "part"),
    [
        (("launch.encrypt_traffic=true",), "launch.encrypt_traffic", "one machine"),
        (("launch.keep_alive=90min",), "launch.keep_alive", "documentation allows 1h"),
        (("train.budget=48h",), "launch.max_runtime", "train.budget=48h"),
        (("launch.instance_type=ml.m5.xlarge",), "launch.image_uri", "is for GPUs"),
    ],
)
def test_what_is_only_needless_or_doubtful_warns(settings, key, part):
    _, (found,) = problems_with(*settings)
    assert (found.fatal, found.key) == (False, key)
    assert part in found.text


def test_what_is_not_named_is_told():
    config = job_config()
    config = replace(config, launch=replace(config.launch, role=None, output=None, image_uri=None, dry_run=True))
    found = problems_of(plan_job(config, NOW, TOKEN, REGION, COMMIT).request, config, REGION)
    assert sorted(problem.key for problem in found) == ["launch.image_uri", "launch.output", "launch.role"]


def test_a_region_that_there_is_not():
    (found,) = [p for p in problems_of(good_request(), region="eu-wast-1") if p.key == "launch.region"]
    assert "eu-west-1?" in found.text


def test_isolation_leaves_alone_what_is_here_or_in_s3(corpus):
    _, found = problems_with(
        "launch.network_isolation=true", "data=text", f"data.paths=[{corpus}, s3://bucket/texts]", "tracking=wandb",
        "launch.environment.WANDB_MODE=offline",
    )  # fmt: skip
    assert found == []


def test_keys_in_forms_that_are_right():
    for value in (
        KEY,
        "mrk-" + "a" * 32,
        f"arn:aws:kms:{REGION}:{ACCOUNT}:key/{KEY}",
        "alias/mine",
        f"arn:aws:kms:{REGION}:{ACCOUNT}:alias/a",
    ):
        assert problems_of(changed({"OutputDataConfig.KmsKeyId": value}), region=REGION) == []


def test_a_secret_is_shown_nowhere():
    secret = TOKEN_OF_GITHUB
    found = problems_of(changed({"Tags.0.Value": f"&{secret}", "Environment.A_TOKEN": secret, "TrainingJobName": f"_{secret}"}))
    assert any("GitHub token" in problem.text for problem in found)
    assert len([problem for problem in found if "***" in problem.text]) == 2
    assert not any(secret in problem.text for problem in found)


def test_a_short_secret_does_not_hide_another():
    found = problems_of(changed({"Environment": {"A_PASSWORD": "a", "NOTE": "AKIAIOSFODNN7EXAMPLE", "MORE": f"a {TOKEN_OF_GITHUB}"}}))
    assert [problem.key for problem in found] == ["launch.environment.A_PASSWORD", "launch.environment.NOTE", "launch.environment.MORE"]


@pytest.mark.parametrize("value", [None, 7, "text", [], {"Nested": [1]}])
def test_a_request_of_anything_is_no_surprise(value):
    for name in good_request():
        assert problems_of({**good_request(), name: value}) or (name, value) in (("TrainingJobName", "text"), ("Tags", []))


def test_without_boto3_it_says_how_to_get_it(monkeypatch):
    import gpt.aws.service_model as model

    monkeypatch.setitem(__import__("sys").modules, "botocore.loaders", None)
    model._operation.cache_clear()
    with pytest.raises(UserError, match=re.escape("pip install 'gpt-trainer[aws]'")):
        violations({})
    model._operation.cache_clear()


def test_every_pattern_of_the_model_is_read():
    shapes = create_loader().load_service_model("sagemaker", "service-2")["shapes"]
    reached, waiting = set(), ["CreateTrainingJobRequest"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            shape = shapes[name]
            parts = (
                [*shape.get("members", {}).values()] if shape["type"] == "structure" else [shape.get(k) for k in ("member", "key", "value")]
            )
            waiting += [part["shape"] for part in parts if part]
    patterns = {shapes[name]["pattern"] for name in reached if "pattern" in shapes[name]}
    assert len(patterns) > 20
    assert all(python_pattern(pattern) for pattern in patterns)
    tags = python_pattern(shapes["TagValue"]["pattern"])
    assert tags.fullmatch("Grüße 東京 42 a_b:c/d=e+f-g@h")
    assert not tags.fullmatch("tab\there")
    assert not tags.fullmatch("a&b")
    assert python_pattern(r"\p{Greek}+") is None
