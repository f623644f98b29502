"""A run's config -> the CreateTrainingJob request that carries it, and the files that must lie in S3 before: one pure function.

It reads the files that it ships, but no network, no clock and no credentials. Layout in S3, below `<launch.output>/<run id>/`: `code/`,
`checkpoints/`, `jobs/<job name>/output/`, `tensorboard/`; inputs, which runs share, are below `<launch.output>/inputs/`.
Reference: https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateTrainingJob.html
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from gpt.arguments import expanded
from gpt.aws.config import TrainingJobConfig
from gpt.aws.images import image_of
from gpt.aws.inputs import CHANNELS, CODE, ROOT, read_inputs
from gpt.aws.instances import find_instance
from gpt.aws.shipping import Upload, build_wheel, uploads_below
from gpt.config import LaunchConfig, RunConfig, parse_span
from gpt.errors import UserError

ENTRYPOINT = "container.py"
CONFIG = "config.json"
ENTRYPOINT_COMMAND = ["python3", "-u", f"{CHANNELS}/{CODE}/{ENTRYPOINT}"]
"""The container's first process."""
CHECKPOINTS = f"{ROOT}/checkpoints"
CACHES = "/tmp/gpt"
"""In the container, of what is made anew on each machine."""
LONGEST_NAME = 63
SPARE_WAIT = 3600
"""Seconds that a spot job waits, at most, beyond its max_runtime, where launch.max_wait says nothing."""
# What a plan has where the config says nothing, for a rehearsal that sends nothing.
NO_ROLE = "arn:aws:iam::000000000000:role/not-named"
NO_OUTPUT = "s3://not-named"
NO_REGION = "launch.region=null: no region is set; give launch.region=us-east-1, or set AWS_DEFAULT_REGION"
NO_IMAGE = "000000000000.dkr.ecr.us-east-1.amazonaws.com/not-named:latest"
_NUMBER = "([0-9.]+)"
_LINE = "step [0-9]+  loss [0-9.]+"
METRICS = {
    "train:loss": f"step [0-9]+  loss {_NUMBER}",
    "train:tokens_per_second": f"{_LINE}.*  {_NUMBER} tokens/s",
    "train:mfu_percent": f"{_LINE}.*  mfu {_NUMBER}%",
    "validation:loss": f"{_LINE}  val {_NUMBER}",
    "validation:bits_per_byte": f"{_LINE}  val [0-9.]+  {_NUMBER} bits/byte",
    "validation:accuracy": f"{_LINE}  val [0-9.]+  accuracy {_NUMBER}",
    "final:best_validation_loss": f"validation: best {_NUMBER}",
    "final:bits_per_byte": f"held-out [a-z]+ \\([0-9,]+ bytes\\): {_NUMBER} bits per byte",
}
"""Name -> pattern of what rank 0 prints (`gpt.training.progress`, `gpt.training.results`)."""


@dataclass(frozen=True)
class TrainingJob:
    """What is sent, and what must be in S3 before."""

    name: str
    """Of the job; another one each time."""
    run_id: str
    """Of the run; a job of the same run goes on from its checkpoints."""
    region: str
    """Where it runs."""
    request: dict[str, Any]
    """Of CreateTrainingJob."""
    uploads: tuple[Upload, ...]
    """The code and the inputs that are on this machine."""


def plan_job(config: RunConfig, now: datetime, token: str, region: str, commit: str | None) -> TrainingJob:
    """What to send for a run.

    Args:
        config: validated, with launch=sagemaker or launch=emulated.
        now: the time, which the job's name has in milliseconds.
        token: four letters that keep apart jobs of the same millisecond.
        region: such as us-east-1.
        commit: of this code, with `+` where files differ from it; None outside a checkout.

    Raises:
        UserError: something that the run reads is not there or cannot be shipped, or no image is known for the machine.
    """
    open_keys = {key: getattr(TrainingJobConfig(), key) for key in config.launch.left_open()}
    config = replace(config, launch=replace(config.launch, **open_keys))
    run_id = config.run.id or f"{config.command}-{now:%Y%m%d-%H%M%S}-{token}"
    name = job_name(run_id, now, token)
    output = (config.launch.output or NO_OUTPUT).rstrip("/")
    home = f"{output}/{run_id}"
    inputs, values = read_inputs(config, f"{output}/inputs")
    wheel, content = build_wheel()
    code: dict[str, Path | bytes] = {
        ENTRYPOINT: Path(__file__).with_name(ENTRYPOINT),
        wheel: content,
        CONFIG: json.dumps(_container_config(config, values, run_id), indent=1, ensure_ascii=False).encode(),
    }
    where, uploads = uploads_below(f"{home}/code", code, CODE)
    channels = {CODE: where, **inputs.channels}
    request = _request(config, name, run_id, home, region, channels, commit)
    return TrainingJob(name, run_id, region, request, (*uploads, *inputs.uploads))


def job_name(run_id: str, now: datetime, token: str) -> str:
    """A name for a job that no other has: of letters, digits and dashes, at most 63."""
    end = f"-{int(now.timestamp() * 1000)}-{token}"
    return re.sub(r"[^A-Za-z0-9]+", "-", run_id).strip("-")[: LONGEST_NAME - len(end)].rstrip("-") + end


def region_of(config: RunConfig) -> str:
    """The region of a job: that which is set, or for one that is not sent any.

    Raises:
        UserError: none is set.
    """
    region = set_region(config)
    if not region and config.launch.name == "sagemaker" and not config.launch.dry_run:
        raise UserError(NO_REGION)
    return region or "us-east-1"


def set_region(config: RunConfig) -> str | None:
    """The region that is set: that of the config, of the environment, or of ~/.aws/config."""
    if region := config.launch.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        return region
    try:
        from botocore.exceptions import ProfileNotFound  # pyright: ignore[reportMissingImports]  # of the extra aws
        from botocore.session import Session  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        return Session().get_config_variable("region")
    except ProfileNotFound:  # whoever calls AWS says so
        return None


def seconds(key: str, text: str) -> int:
    """A length of time in whole seconds.

    Raises:
        UserError: it is none.
    """
    return math.ceil(parse_span(key, text, ("seconds",)).amount)


def _container_config(config: RunConfig, values: dict[str, Any], run_id: str) -> dict[str, Any]:
    """The config of the run in the container, but for what each host adds: its rank, and where they meet."""
    launch = config.launch
    values["run"] = {"id": run_id, "dir": CHECKPOINTS}
    values["resume"] = "auto"  # after an interruption, and under the next job's name
    values["data"]["cache_dir"] = values["device"]["cache_dir"] = CACHES
    values["freeze"]["cache_dir"] = None  # in that of the data
    nproc = launch.nproc
    if launch.name == "sagemaker" and (instance := find_instance(launch.instance_type)) is not None:
        nproc = instance.processes if nproc == "auto" else nproc
        if config.device.name == "auto":  # on a GPU that cannot be used it would leave the run on the CPU, unnoticed
            values["device"]["name"] = instance.device
    values["launch"] = {
        "name": "local", "nproc": nproc, "nnodes": launch.instance_count,
        "max_restarts": launch.max_restarts, "timeout": launch.timeout,
    }  # fmt: skip
    return values


def _request(
    config: RunConfig, name: str, run_id: str, home: str, region: str, channels: dict[str, str], commit: str | None
) -> dict[str, Any]:
    launch = config.launch
    runtime = seconds("launch.max_runtime", launch.max_runtime)
    request: dict[str, Any] = {
        "TrainingJobName": name,
        "HyperParameters": _hyperparameters(config),
        "AlgorithmSpecification": {
            "TrainingImage": _image(launch, region),
            "TrainingInputMode": "File",
            "ContainerEntrypoint": list(ENTRYPOINT_COMMAND),
            "MetricDefinitions": [{"Name": name, "Regex": pattern} for name, pattern in METRICS.items()],
            "EnableSageMakerMetricsTimeSeries": True,
        },
        "RoleArn": launch.role or NO_ROLE,
        "InputDataConfig": [_channel(name, uri) for name, uri in channels.items()],
        "OutputDataConfig": {"S3OutputPath": f"{home}/jobs", "CompressionType": "NONE"} | _some(KmsKeyId=launch.output_kms_key),
        "ResourceConfig": {
            "InstanceType": launch.instance_type,
            "InstanceCount": launch.instance_count,
            "VolumeSizeInGB": launch.volume_gb,
        }
        | _some(
            VolumeKmsKeyId=launch.volume_kms_key,
            KeepAlivePeriodInSeconds=seconds("launch.keep_alive", launch.keep_alive) if launch.keep_alive else None,
        ),
        "StoppingCondition": {"MaxRuntimeInSeconds": runtime},
        "CheckpointConfig": {"S3Uri": f"{home}/checkpoints", "LocalPath": CHECKPOINTS},
        "EnableManagedSpotTraining": launch.spot,
        "EnableNetworkIsolation": launch.network_isolation,
        "EnableInterContainerTrafficEncryption": launch.encrypt_traffic,
        "ProfilerConfig": {"DisableProfiler": True},
        "Tags": [{"Key": key, "Value": value} for key, value in _tags(launch, run_id, commit).items()],
    }
    if launch.spot:
        wait = runtime + SPARE_WAIT if launch.max_wait is None else seconds("launch.max_wait", launch.max_wait)
        request["StoppingCondition"]["MaxWaitTimeInSeconds"] = wait
    if launch.max_retries:
        request["RetryStrategy"] = {"MaximumRetryAttempts": launch.max_retries}
    if launch.subnets or launch.security_groups:
        request["VpcConfig"] = {"SecurityGroupIds": list(launch.security_groups), "Subnets": list(launch.subnets)}
    if launch.tensorboard:
        request["TensorBoardOutputConfig"] = {
            "LocalPath": f"{CHECKPOINTS}/{run_id}/tensorboard", "S3OutputPath": f"{home}/tensorboard",
        }  # fmt: skip
    if environment := _environment(launch):
        request["Environment"] = environment
    return request


def _image(launch: LaunchConfig, region: str) -> str:
    if launch.name == "emulated" and not launch.image_uri:
        return NO_IMAGE
    try:
        return image_of(launch, region)
    except UserError:
        if launch.dry_run:
            return NO_IMAGE  # which is told together with all else that is wrong
        raise


def _channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": "File", "CompressionType": "None"}


def _tags(launch: LaunchConfig, run_id: str, commit: str | None) -> dict[str, str]:
    return {"gpt:run": run_id, "gpt:commit": commit or "unknown", **launch.tags}


def _environment(launch: LaunchConfig) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1"} if launch.network_isolation else {}  # else each look at the hub waits for its timeout
    return {**offline, **launch.environment}


def _hyperparameters(config: RunConfig) -> dict[str, str]:
    """What the console is to show of the run; the job reads its config instead."""
    model = config.model
    shown = {
        "command": config.command, "n_layer": model.n_layer, "d_model": model.d_model, "n_head": model.n_head,
        "context_length": model.context_length, "data": config.data.source, "train.budget": config.train.budget,
        "train.batch_tokens": config.train.batch_tokens, "optimizer": config.optimizer.name, "optimizer.lr": config.optimizer.lr,
        "schedule": config.schedule.name, "parallel": config.parallel.name, "precision": config.precision, "seed": config.seed,
        "init": _called(config.init) if config.init else "random",
    }  # fmt: skip
    return {key: str(value)[:2500] for key, value in shown.items()}


def _called(path: str) -> str:
    """A hub id, or the last part of a path of this machine, whose other parts are nobody's business."""
    return expanded(path).name if os.path.exists(expanded(path)) else path


def _some(**values: Any) -> dict[str, Any]:
    """Those that are set."""
    return {key: value for key, value in values.items() if value is not None}
