"""The same job through the SageMaker Python SDK: it sends what we would, but for the name. Skipped where the SDK is not installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from request_builder import REGION, job_config, planned  # not tests.aws: the SDK brings a package `tests`

import gpt.aws
from gpt.aws import images
from gpt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
needs_sdk = pytest.mark.skipif(importlib.util.find_spec("sagemaker") is None, reason="the SageMaker Python SDK is not installed")
KEY = f"arn:aws:kms:{REGION}:123456789012:key/0a1b2c3d-1234-1234-1234-0123456789ab"
JOBS = {
    "plain": [],
    "everything": [
        "launch.spot=true", "launch.max_wait=30h", "launch.max_retries=2", "launch.tags.team=nlp", "launch.environment.A=b",
        "launch.output_kms_key=" + KEY, "launch.volume_kms_key=" + KEY, "launch.subnets=[subnet-1]", "launch.security_groups=[sg-1]",
        "launch.network_isolation=true", "launch.encrypt_traffic=true", "tracking=tensorboard", "launch.tensorboard=true",
        "launch.instance_type=ml.m5.xlarge", "launch.instance_count=2", "parallel=ddp", "launch.channels.x=s3://corpora/x",
    ],
    "warm": ["launch.keep_alive=30min", "launch/instance=h100", "parallel=ddp", "run.id=" + "long-name_" * 9],
}  # fmt: skip


def test_importing_gpt_aws_and_all_its_modules_loads_nothing_heavy():
    modules = [f"gpt.aws.{path.stem}" for path in (ROOT / "gpt" / "aws").glob("*.py") if path.stem != "__init__"]
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "gpt.aws.model_trainer" in done.stdout.split()
    assert not {"torch", "boto3", "botocore", "sagemaker"} & loaded


def test_without_the_sdk_the_remedy_is_said(monkeypatch):
    for name in ("sagemaker", "sagemaker.core", "sagemaker.train"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'gpt-trainer\[sagemaker\]'"):
        gpt.aws.as_model_trainer(job_config())
    launch = job_config().launch
    launch.image_uri = None
    with pytest.raises(
        UserError, match=r"^launch\.image_uri=null: name the container's image, .* or pip install 'gpt-trainer\[sagemaker\]'"
    ):
        images.image_of(launch, REGION)


def test_it_is_of_jobs_only():
    with pytest.raises(UserError, match=r"^launch=emulated: a ModelTrainer is of launch=sagemaker"):
        gpt.aws.as_model_trainer(job_config(launch="emulated"))
    with pytest.raises(AttributeError):
        _ = gpt.aws.nothing  # type: ignore[attr-defined]


def test_trainiums_image_must_be_given():
    launch = job_config("launch/instance=trn2", "parallel=ddp").launch
    assert images.image_of(launch, REGION) == launch.image_uri
    launch.image_uri = None
    with pytest.raises(UserError, match=r"ml\.trn2\.48xlarge needs an image of yours; make docker-neuron builds it, docs/containers\.md"):
        images.image_of(launch, REGION)


@needs_sdk
@pytest.mark.parametrize(
    ("machine", "kind"), [("ml.g6.2xlarge", "cu"), ("ml.p5.48xlarge", "cu"), ("ml.c7i.4xlarge", "cpu"), ("ml.m5.large", "cpu")]
)
def test_an_image_is_looked_up_for_this_torch(machine, kind, monkeypatch):
    launch = job_config().launch
    launch.image_uri, launch.instance_type = None, machine
    monkeypatch.setattr(images, "version", lambda _: "2.13.0+cpu")
    found = images.image_of(launch, REGION)
    assert f".dkr.ecr.{REGION}.amazonaws.com/pytorch:2.13-{kind}" in found
    monkeypatch.setattr(images, "version", lambda _: "2.99.0")
    with pytest.raises(UserError, match=rf"^launch\.image_uri=null: there is no image of AWS's for torch 2\.99 on {machine} in {REGION}"):
        images.image_of(launch, REGION)


class CapturedError(Exception):
    """Raised instead of sending."""


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    """Sessions of the SDK that send nothing, by class, and what they would have sent."""
    import boto3
    from sagemaker.train.defaults import TrainDefaults

    sent: dict[str, Any] = {"uploads": []}
    boto = boto3.Session("id", "secret", region_name=REGION)

    def capture(request: Any, event_name: str, **_: Any) -> None:
        assert event_name == "before-send.sagemaker.CreateTrainingJob", f"asked AWS: {request.url}"
        sent["request"] = json.loads(request.body)
        raise CapturedError

    def put(_: Any, uploads: Any, kms_key: str | None, __: Any) -> None:
        sent["uploads"], sent["key"] = list(uploads), kms_key

    boto.events.register("before-send.*.*", capture)
    monkeypatch.setattr("gpt.aws.uploading.upload", put)
    monkeypatch.setattr(TrainDefaults, "get_role", staticmethod(lambda role=None, sagemaker_session=None: role))
    monkeypatch.setattr("sagemaker.core.resources.Base.get_sagemaker_client", lambda *_, **__: boto.client("sagemaker"))
    return boto, sent


@needs_sdk
@pytest.mark.parametrize("name", JOBS)
def test_the_sdk_sends_the_same_request(name, sessions):
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.train import ModelTrainer

    boto, sent = sessions
    settings = [*JOBS[name], "launch.upload_kms_key=" + KEY]
    settings += [] if any(setting.startswith("run.id=") for setting in settings) else ["run.id=r1"]
    trainer = gpt.aws.as_model_trainer(job_config(*settings), Session(boto_session=boto))
    assert isinstance(trainer, ModelTrainer)
    with pytest.raises(CapturedError):
        trainer.train(wait=False)
    ours, theirs = planned(*settings), sent["request"]
    job = dict(ours.request)
    assert theirs.pop("TrainingJobName") != job.pop("TrainingJobName")
    for request in (theirs, job):
        request["Tags"] = {tag["Key"]: tag["Value"] for tag in request["Tags"] if tag["Key"] != "gpt:commit"}
    assert theirs == job
    assert [upload.uri for upload in sent["uploads"]] == [upload.uri for upload in ours.uploads]
    assert sent["key"] == KEY


@needs_sdk
def test_names_of_its_jobs_are_ours_and_no_two_the_same(sessions):
    from sagemaker.core.helper.session_helper import Session

    boto, sent = sessions
    trainer = gpt.aws.as_model_trainer(job_config("run.id=" + "x_" * 60), Session(boto_session=boto))
    names = set()
    for _ in range(2):
        with pytest.raises(CapturedError):
            trainer.train(wait=False)
        names.add(sent["request"]["TrainingJobName"])
    assert len(names) == 2
    assert all(len(name) <= 63 and name.startswith("x-x-") for name in names)


@needs_sdk
def test_a_pipelines_step_has_our_entrypoint(sessions):
    from sagemaker.core.workflow.pipeline_context import PipelineSession

    boto, _ = sessions
    session = PipelineSession(boto_session=boto)
    trainer = gpt.aws.as_model_trainer(job_config("run.id=r1"), session)
    arguments = trainer._create_training_job_args()
    job = dict(planned("run.id=r1").request)
    assert arguments["AlgorithmSpecification"] == job["AlgorithmSpecification"]
    assert arguments["ProfilerConfig"] == job["ProfilerConfig"]
    assert arguments["InputDataConfig"] == job["InputDataConfig"]
    assert "TrainingJobName" not in arguments
