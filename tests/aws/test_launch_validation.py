"""What is wrong with a job is said before anything is sent, all of it, with what to do."""

from __future__ import annotations

import pytest
import yaml

from gpt.aws.dry_run import check_before
from gpt.aws.training_job import plan_job
from gpt.aws.validation import missing
from gpt.compose import compose_run
from gpt.errors import UserError
from tests.aws.request_builder import COMMIT, NEEDED, NOW, REGION, TOKEN, job_config

WRONG = {
    ("launch.role=training",): "launch.role=training: must be the ARN of a role, arn:aws:iam::<account>:role/<name>",
    ("launch.output=bucket/prefix",): "launch.output=bucket/prefix: must be a place in S3, s3://<bucket>/<prefix>",
    ("launch.output=s3://B",): "launch.output=s3://B: must be a place in S3, s3://<bucket>/<prefix>",
    ("launch.max_runtime=3x",): "launch.max_runtime=3x: must be a length such as 90s or 3min",
    ("launch.max_runtime=500steps",): "launch.max_runtime=500steps: must be a length such as 90s or 3min",
    ("launch.spot=true", "launch.max_wait=1day"): "launch.max_wait=1day: must be a length such as 90s or 3min",
    ("launch.keep_alive=30m",): "launch.keep_alive=30m: must be a length such as 90s or 3min. Did you mean 30min?",
    ("launch.emulated.notice=soon",): "launch.emulated.notice=soon: must be a length such as 90s or 3min",
    ("launch.max_wait=3h",): "launch.max_wait=3h is of spot machines; add launch.spot=true, or leave it out",
    ("launch.spot=true", "launch.keep_alive=1h"): "launch.keep_alive=1h: spot machines cannot be kept; leave it out, or launch.spot",
    ("launch.instance_count=0",): "launch.instance_count=0 must be at least 1",
    ("launch.volume_gb=0",): "launch.volume_gb=0 must be at least 1",
    ("launch.max_cost=0",): "launch.max_cost=0 must be greater than 0, in USD",
    ("launch.prices={ml.g6.2xlarge: -1}",): "launch.prices.ml.g6.2xlarge=-1 must be at least 0, in USD per hour",
    ("launch.nnodes=2", "launch.endpoint=a:1"): "launch.nnodes=2: the job finds that out itself; give launch.instance_count=<machines>",
    ("launch.tensorboard=true",): "launch.tensorboard=true: keeps what tracking=tensorboard writes, and this is tracking=none; add it",
    ("launch.tags.gpt:run=x",): "launch.tags.gpt:run: tags that begin with gpt: are set for you; call it something else",
    (
        "launch.instance_type=ml.trn1.32xlarge",
    ): "launch.instance_type=ml.trn1.32xlarge: only the XLA package runs on it, and that is out of "
    "support for training; take ml.trn2.48xlarge (launch/instance=trn2)",
    ("launch.instance_type=ml.g7.2xlarge",): "launch.instance_type=ml.g7.2xlarge: what it computes on is not known here; say it, with "
    "device=... and launch.nproc=<its devices>",
    (
        "launch/instance=h100",
    ): "launch.instance_type=ml.p5.48xlarge: parallel=none uses one of 8 H100; add parallel=ddp, or parallel=fsdp for "
    "a model that one device cannot hold",
    (
        "launch/instance=trn2",
    ): "launch.instance_type=ml.trn2.48xlarge: parallel=none uses one of 64 cores of Trainium2; add parallel=ddp, or "
    "parallel=fsdp for a model that one device cannot hold",
    ("launch.instance_count=2",): "launch.instance_type=ml.g6.2xlarge: parallel=none uses one of 2 machines; add parallel=ddp, or "
    "parallel=fsdp for a model that one device cannot hold",
    ("device=cpu",): "device=cpu: ml.g6.2xlarge has 1 L4; leave device out, or take another machine, such as launch/instance=gpu",
    ("device=neuron",): "device=neuron: ml.g6.2xlarge has 1 L4; leave device out, or take another machine, such as launch/instance=gpu",
    ("launch.instance_type=ml.m5.large", "device=cuda"): "device=cuda: ml.m5.large has a CPU; leave device out, or take another machine, "
    "such as launch/instance=gpu",
    ("parallel=ddp", "launch.nproc=2"): "launch.nproc=2: ml.g6.2xlarge has 1 L4; leave it out, which takes them all",
}


@pytest.mark.parametrize("settings", WRONG)
def test_what_is_wrong(settings):
    with pytest.raises(UserError) as error:
        job_config(*settings)
    assert WRONG[settings] in [str(error.value), *getattr(error.value, "__notes__", ())]


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError) as error:
        compose_run("pretrain", ["launch=sagemaker", "launch.max_runtime=x", "launch.instance_type=ml.p5.48xlarge"])
    assert str(error.value) == "4 things are wrong with the job"
    assert [line.partition("=")[0] for line in error.value.__notes__] == [
        "launch.max_runtime",
        "launch.instance_type",
        "launch.role",
        "launch.output",
    ]


@pytest.mark.parametrize("key", ["role", "output"])
def test_a_dry_run_may_leave_out_what_a_job_needs(key):
    without = ["launch=sagemaker", *(setting for setting in NEEDED if not setting.startswith(f"launch.{key}="))]
    with pytest.raises(UserError, match=rf"^launch\.{key}=null: name the "):
        compose_run("pretrain", without)
    config = compose_run("pretrain", [*without, "launch.dry_run=true"])
    assert [line.partition("=")[0] for line in missing(config)] == [f"launch.{key}"]
    assert not missing(job_config())


def test_a_rehearsal_needs_no_account_and_looks_at_no_machine():
    config = compose_run("pretrain", ["launch=emulated", "launch/instance=h100", "launch/security=secure", "device=cpu"])
    assert config.launch.name == "emulated"
    with pytest.raises(UserError, match=r"^launch\.instance_count=2: parallel=none uses one process on one machine; add parallel=ddp"):
        compose_run("pretrain", ["launch=emulated", "launch.instance_count=2"])
    with pytest.raises(UserError, match=r"^launch\.emulated\.interrupt_after=20 ?: must be a length such as 90s"):
        compose_run("pretrain", ["launch=emulated", "launch.emulated.interrupt_after=20"])


def test_the_secure_preset_asks_for_what_only_the_user_can_name():
    with pytest.raises(UserError) as error:
        job_config("launch/security=secure")
    asked = [line.split(":")[0] for line in error.value.__notes__]
    assert asked == [f"launch.{key}" for key in ("output_kms_key", "upload_kms_key", "subnets", "security_groups")]
    assert error.value.__notes__[-1].endswith(
        "launch.security_groups: launch/security=secure leaves it to you; give it, or launch.security_groups=[] to do without"
    )
    with pytest.raises(UserError, match=r"launch\.volume_kms_key: launch/security=secure leaves it to you"):
        job_config("launch/security=secure", "launch.instance_type=ml.m5.large")
    done = ("output_kms_key=k", "upload_kms_key=null", "subnets=[s]", "security_groups=[g]")
    config = job_config("launch/security=secure", *(f"launch.{setting}" for setting in done))
    assert config.launch.network_isolation
    assert config.launch.encrypt_traffic


def test_a_run_here_is_not_asked_about_a_job():
    config = compose_run("pretrain", ["launch.role=x", "launch.spot=true", "launch/instance=h100", "launch.tags.a=b"])
    assert set(config.launch.unused()) == {f"launch.{key}" for key in ("role", "spot", "instance_type", "volume_gb", "tags")}
    assert not compose_run("pretrain", []).launch.unused()
    assert not job_config("launch.spot=true").launch.unused()


def test_channels_called_train_are_paths():
    assert job_config("data=text", "launch.channels.train=s3://b/x").data.paths == []
    with pytest.raises(UserError, match=r"data\.paths=\[\]: data=text needs files"):
        job_config("data=text", "launch.channels.other=s3://b/x")
    with pytest.raises(UserError, match=r"data\.paths=\[channel://train\] is not read by data=stdlib; add data=text"):
        job_config("launch.channels.train=s3://b/x")
    with pytest.raises(UserError, match=r"data\.paths=\[\]: data=text needs files"):
        compose_run("pretrain", ["data=text", "launch.channels.train=s3://b/x"])


def test_a_run_of_this_machine_may_be_continued_elsewhere(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(job_config("launch.name=local").to_dict()))
    settings = [f"resume={run}", "launch.name=sagemaker"]
    config = compose_run("pretrain", settings)
    assert (config.run.id, config.launch.name) == ("run", "sagemaker")


def test_a_dry_run_tells_of_the_config_and_of_the_request_together():
    settings = ["launch/instance=h100", "launch/security=secure", "launch.spot=true", "launch.max_wait=1h", "launch.keep_alive=30min"]
    settings += ["launch.volume_kms_key=k", "launch.volume_gb=100000"]
    config = job_config(
        *settings, "launch.subnets=[subnet-0a1b2c3d4e5f67890]", "launch.max_cost=10", "launch.dry_run=true", f"launch.region={REGION}"
    )
    check = check_before(plan_job(config, NOW, TOKEN, REGION, COMMIT), config)
    told = {problem.key for problem in check.refused}
    assert told == {
        "launch.max_cost", "launch.max_wait", "launch.keep_alive", "launch.instance_type", "launch.output_kms_key", "launch.upload_kms_key",
        "launch.security_groups", "launch.volume_kms_key", "launch.volume_gb",
    }  # fmt: skip
