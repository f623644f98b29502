"""A config becomes a request: what follows from which setting, and that nothing but the config decides."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from gpt.aws.training_job import CHECKPOINTS, job_name, plan_job, region_of
from gpt.compose import compose_run, load_config
from gpt.errors import UserError
from tests.aws.request_builder import COMMIT, NOW, REGION, TOKEN, channels_of, container_config, job_config, planned


def test_everything_of_a_run_is_below_its_output():
    job = planned("run.id=r1", "launch.output=s3://bucket/a/b/")
    assert job.request["OutputDataConfig"] == {"S3OutputPath": "s3://bucket/a/b/r1/jobs", "CompressionType": "NONE"}
    assert job.request["CheckpointConfig"] == {"S3Uri": "s3://bucket/a/b/r1/checkpoints", "LocalPath": CHECKPOINTS}
    assert {re.sub("[0-9a-f]{16}", "#", upload.uri).rpartition("/")[0] for upload in job.uploads} == {"s3://bucket/a/b/r1/code/#"}
    config = container_config(job)
    assert config["run"] == {"id": "r1", "dir": CHECKPOINTS}
    assert config["resume"] == "auto"


def test_the_next_job_of_a_run_has_another_name_and_the_same_checkpoints():
    first, second = planned("run.id=r1"), planned("run.id=r1", token="wxyz")
    assert first.name != second.name
    assert first.request["CheckpointConfig"] == second.request["CheckpointConfig"]
    later = plan_job(job_config("run.id=r1"), NOW + timedelta(milliseconds=1), TOKEN, REGION, COMMIT)
    assert later.name != first.name


def test_a_run_without_a_name_gets_one_of_the_time_and_the_token():
    job = planned()
    assert job.run_id == "pretrain-20261122-033000-abcd"
    assert job.request["CheckpointConfig"]["S3Uri"].endswith(f"/{job.run_id}/checkpoints")
    assert planned(token="wxyz").run_id != job.run_id


@pytest.mark.parametrize("run_id", ["a", "A_b.c", "x" * 200, "a-" * 60, "9..9", "run_" * 12 + "-"])
def test_names_of_jobs_are_such_as_sagemaker_takes(run_id):
    name = job_name(run_id, NOW, TOKEN)
    assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", name)
    assert name.endswith(f"-{int(NOW.timestamp() * 1000)}-{TOKEN}")
    assert len(name) <= 63


def test_what_is_not_asked_for_is_not_in_the_request():
    request = planned().request
    assert not {"VpcConfig", "RetryStrategy", "TensorBoardOutputConfig", "Environment"} & request.keys()
    assert request["EnableManagedSpotTraining"] is False
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 86400}
    assert request["ResourceConfig"].keys() == {"InstanceType", "InstanceCount", "VolumeSizeInGB"}
    assert "KmsKeyId" not in request["OutputDataConfig"]
    assert request["ProfilerConfig"] == {"DisableProfiler": True}


def test_spot_waits_an_hour_more_where_nothing_is_said():
    assert planned("launch.spot=true", "launch.max_runtime=2h").request["StoppingCondition"] == {
        "MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 10800,
    }  # fmt: skip
    limits = planned("launch.spot=true", "launch.max_runtime=90min", "launch.max_wait=5h").request["StoppingCondition"]
    assert limits == {"MaxRuntimeInSeconds": 5400, "MaxWaitTimeInSeconds": 18000}


def test_tags_and_environment():
    request = planned("launch.tags.team=nlp", "launch.environment.NCCL_DEBUG=WARN", "run.id=r").request
    tags = {tag["Key"]: tag["Value"] for tag in request["Tags"]}
    assert tags == {"gpt:run": "r", "gpt:commit": COMMIT, "team": "nlp"}
    assert request["Environment"] == {"NCCL_DEBUG": "WARN"}
    assert plan_job(job_config(), NOW, TOKEN, REGION, None).request["Tags"][1] == {"Key": "gpt:commit", "Value": "unknown"}


def test_an_isolated_container_does_not_look_for_the_hub():
    assert planned("launch.network_isolation=true").request["Environment"] == {"HF_HUB_OFFLINE": "1"}


def test_tensorboards_files_are_looked_for_where_the_run_writes_them():
    output = planned("tracking=tensorboard", "launch.tensorboard=true", "run.id=r").request["TensorBoardOutputConfig"]
    assert output == {"LocalPath": f"{CHECKPOINTS}/r/tensorboard", "S3OutputPath": "s3://bucket/prefix/r/tensorboard"}


@pytest.mark.parametrize(
    ("settings", "nproc", "nnodes", "device"),
    [
        (["launch/instance=gpu"], 1, 1, "cuda"),
        (["launch/instance=h100", "parallel=ddp"], 8, 1, "cuda"),
        (["launch.instance_type=ml.g5.12xlarge", "parallel=ddp", "launch.instance_count=3"], 4, 3, "cuda"),
        (["launch/instance=trn2", "parallel=fsdp"], 64, 1, "neuron"),
        (["launch.instance_type=ml.c7i.4xlarge"], 1, 1, "cpu"),
        (["launch.instance_type=ml.c7i.4xlarge", "parallel=ddp", "launch.nproc=4"], 4, 1, "cpu"),
        (["launch.instance_type=ml.c7i.4xlarge", "device=neuron_sim"], 1, 1, "neuron_sim"),
        (["launch.instance_type=ml.g7.12xlarge", "parallel=ddp", "device=cuda", "launch.nproc=2"], 2, 1, "cuda"),
    ],
)
def test_processes_and_device_follow_from_the_machine(settings, nproc, nnodes, device):
    config = container_config(planned(*settings))
    assert config["launch"] == {"name": "local", "nproc": nproc, "nnodes": nnodes, "max_restarts": 0, "timeout": None}
    assert config["device"]["name"] == device


def test_a_rehearsal_takes_what_is_here_and_needs_no_account():
    config = compose_run("pretrain", ["launch=emulated", "launch/instance=h100", "parallel=ddp", "launch.instance_count=2"])
    job = plan_job(config, NOW, TOKEN, REGION, COMMIT)
    inside = container_config(job)
    assert inside["launch"]["nproc"] == "auto"
    assert inside["launch"]["nnodes"] == 2
    assert inside["device"]["name"] == "auto"
    assert "not-named" in job.request["RoleArn"]
    assert "not-named" in job.request["OutputDataConfig"]["S3OutputPath"]


ODD = {
    "quotes": """it's "so" `said`""",
    "blanks": "  two  spaces ",
    "equals": "a=b==c",
    "dollar": "${HOME} $(id) %s \\n",
    "unicode": "Grüße, 世界 🤖",
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_in_a_setting_arrives_as_it_is(name, tmp_path):
    text = ODD[name]
    job = planned(f"data.licence={text}", f"tracking.project={text}", "optimizer.eps=1e-12", "train.sample_prompts=['a, b', \"c'd\"]")
    file = tmp_path / "config.json"
    (content,) = [upload.source for upload in job.uploads if upload.uri.endswith("config.json")]
    file.write_bytes(content)
    config = load_config(file)
    assert config.data.licence == config.tracking.project == text
    assert config.optimizer.eps == 1e-12
    assert config.train.sample_prompts == ["a, b", "c'd"]
    file.write_text(json.dumps(json.loads(content)), encoding="utf-8")  # escapes for what is not ASCII, as who adds to it may write it
    assert load_config(file) == config


def test_the_container_takes_nothing_along_that_only_the_request_needs():
    text = json.dumps(container_config(planned("launch.tags.team=secretive", "launch.environment.X=y", "launch.max_cost=7")))
    assert "secretive" not in text
    assert "arn:aws" not in text


def test_the_console_is_not_told_where_things_lie_here(tmp_path):
    (tmp_path / "somebody" / "m").mkdir(parents=True)
    for name, content in {"config.json": "{}", "tokenizer.json": "{}"}.items():
        (tmp_path / "somebody" / "m" / name).write_text(content)
    config = replace(job_config(), init=str(tmp_path / "somebody" / "m"))
    job = plan_job(config, NOW, TOKEN, REGION, COMMIT)
    assert job.request["HyperParameters"]["init"] == "m"
    assert str(tmp_path) not in json.dumps(job.request)


def test_planning_asks_neither_the_network_nor_the_clock(monkeypatch):
    config = job_config("data=text", f"data.paths=[{Path(__file__)}]")

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("not a pure function")

    for module, name in ((socket, "socket"), (socket, "create_connection"), (socket, "getaddrinfo"), (subprocess, "Popen")):
        monkeypatch.setattr(module, name, forbidden)
    for name in ("time", "time_ns", "monotonic", "localtime", "gmtime"):
        monkeypatch.setattr(time, name, forbidden)
    first, second = (plan_job(config, NOW, TOKEN, REGION, COMMIT) for _ in range(2))
    assert first == second


def test_planning_loads_nothing_heavy():
    code = (
        "import sys; from gpt.compose import compose_run; import gpt.aws.training_job as t, datetime\n"
        "c = compose_run('pretrain', ['launch=sagemaker', 'launch.role=arn:aws:iam::123456789012:role/r', 'launch.output=s3://bucket/p',"
        " 'launch.image_uri=i', 'data=text', 'data.paths=[README.md]'])\n"
        "t.plan_job(c, datetime.datetime.now(), 'abcd', t.region_of(c), None)\n"
        "print(*sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={"PATH": "", "AWS_REGION": "eu-west-1", "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    loaded = done.stdout.split()
    assert "gpt.aws.training_job" in loaded
    assert not {"torch", "numpy", "boto3", "sagemaker"} & set(loaded)


def test_the_region_is_the_configs_or_the_environments_or_that_of_a_file(monkeypatch, tmp_path):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "config"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))
    with pytest.raises(UserError, match=r"launch\.region=null: .* launch\.region=us-east-1"):
        region_of(job_config())
    assert region_of(compose_run("pretrain", ["launch=emulated"]))
    file.write_text("[default]\nregion = ap-south-1\n")
    assert region_of(job_config()) == "ap-south-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert region_of(job_config()) == "us-west-2"
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert region_of(job_config()) == "eu-north-1"
    assert region_of(job_config("launch.region=eu-west-3")) == "eu-west-3"


def test_given_channels_reach_the_run_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    job = planned("data=text", "launch.channels.train=s3://corpora/books", f"launch.channels.extra={tmp_path}")
    assert channels_of(job)["train"] == "s3://corpora/books/"
    assert channels_of(job)["extra"].startswith("s3://bucket/prefix/inputs/")
    assert container_config(job)["data"]["paths"] == ["/opt/ml/input/data/train"]
