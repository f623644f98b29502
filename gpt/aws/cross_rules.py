"""What the service's model cannot say of a job: limits that stand in the documentation only, and settings that do not go together.

Sources: the API reference of CreateTrainingJob, StoppingCondition, ResourceConfig and OutputDataConfig; the developer guide on managed
spot training, warm pools and network isolation; the rules for bucket names and for tags.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from gpt.arguments import expanded
from gpt.aws.images import image_of
from gpt.aws.instances import Instance, find_instance
from gpt.aws.pricing import duration
from gpt.aws.service_model import regions
from gpt.aws.training_job import NO_IMAGE
from gpt.aws.validation import wrong
from gpt.config import RunConfig, parse_span
from gpt.errors import UserError
from gpt.typed import nearest, shown

LONGEST_RUN = 28 * 24 * 3600
"""Seconds, StoppingCondition."""
DOCUMENTED_WARM_POOL = 3600
"""Seconds: what the documentation allows; the service's model allows six times as much."""
_ECR = re.compile(r"(?P<account>\d{12})\.dkr\.ecr(?:-fips)?\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(?:\.cn)?/(?P<name>.+)")
_BUCKET = re.compile(r"(?!xn--|sthree-)[a-z0-9](?:[a-z0-9-]|\.(?!\.)){1,61}[a-z0-9]")
_KEY_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]{32}"
_KMS = re.compile(rf"(?:{_KEY_ID})|alias/[\w/-]+|arn:aws[a-z-]*:kms:(?P<region>[a-z0-9-]+):\d{{12}}:(?:key/(?:{_KEY_ID})|alias/[\w/-]+)")
_OF_CHANNELS = {
    "code": "launch.output", "init": "init", "tokenizer": "tokenizer.path", "teacher": "distill.teacher", "dataset": "data.name",
    "train": "data.paths",
}  # fmt: skip
_OFFLINE_WANDB = ("offline", "disabled", "dryrun")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a job."""

    key: str
    """Of the config, such as launch.max_wait."""
    text: str
    """The key, the value, what is wrong and the remedy, in a sentence."""
    fatal: bool = True
    """Whether the job is not submitted; else it is a warning."""

    def __str__(self) -> str:
        return self.text


def broken_rules(request: dict[str, Any], region: str | None, given: Collection[str] = ()) -> Iterator[Problem]:
    """What a request has that does not go together, or is beyond a limit that only the documentation knows.

    Args:
        request: of CreateTrainingJob; parts that are missing or of a wrong type are told elsewhere.
        region: where the job would run; None: not known.
        given: names of the channels in launch.channels.
    """
    resources, stopping = _part(request, "ResourceConfig"), _part(request, "StoppingCondition")
    image = _part(request, "AlgorithmSpecification").get("TrainingImage")
    instance: Instance | None = None
    try:
        instance = find_instance(str(resources.get("InstanceType")))
    except UserError as error:
        yield Problem("launch.instance_type", str(error))
    if region and region not in (known := regions()):
        near = nearest(region, sorted(known))
        yield Problem("launch.region", f"launch.region={region}: SageMaker has no such region{near or '; give one such as us-east-1'}")
    yield from _times(request, stopping, resources)
    yield from _machines(request, resources, instance)
    yield from _image(image, region, instance, _part(request, "AlgorithmSpecification").get("TrainingImageConfig"))
    yield from _keys(request, region, instance)
    yield from _places(request, given)
    yield from _names(request)


def broken_wishes(config: RunConfig, region: str | None) -> Iterator[Problem]:
    """What a config wants that its job cannot have, or should not."""
    for text in wrong(config):
        yield Problem(re.split("[=:]", text)[0], text)
    launch = config.launch
    if not launch.image_uri:
        try:
            image_of(launch, region or "us-east-1")
        except UserError as error:
            yield Problem("launch.image_uri", str(error))
    if launch.upload_kms_key and "upload_kms_key" not in launch.left_open():
        yield from _kms("launch.upload_kms_key", launch.upload_kms_key, region, aliases=True)
    budget, runtime = parse_span("train.budget", config.train.budget), parse_span("launch.max_runtime", launch.max_runtime, ("seconds",))
    if budget.unit == "seconds" and budget.amount >= runtime.amount:
        yield Problem(
            "launch.max_runtime",
            f"launch.max_runtime={launch.max_runtime}: the job stops before train.budget={config.train.budget} is over, since starting "
            "takes time too; raise it, or continue the run with another job",
            fatal=False,
        )
    if launch.network_isolation:
        yield from _downloads(config)


def _part(request: dict[str, Any], name: str) -> dict[str, Any]:
    part = request.get(name)
    return part if isinstance(part, dict) else {}


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _times(request: dict[str, Any], stopping: dict[str, Any], resources: dict[str, Any]) -> Iterator[Problem]:
    spot = request.get("EnableManagedSpotTraining")
    wait, runtime = stopping.get("MaxWaitTimeInSeconds"), stopping.get("MaxRuntimeInSeconds")
    keep = _number(resources.get("KeepAlivePeriodInSeconds"))
    if _number(runtime) > LONGEST_RUN:
        yield Problem(
            "launch.max_runtime",
            f"launch.max_runtime={duration(_number(runtime))}: a job runs at most {duration(LONGEST_RUN)} (28 days); lower it, and "
            "continue the run with another job",
        )
    if runtime is None:
        yield Problem("launch.max_runtime", "launch.max_runtime: without it a job may run for a day; give it, such as 2h")
    if spot and not request.get("CheckpointConfig"):
        yield Problem(
            "launch.spot",
            "launch.spot=true: the request has no CheckpointConfig, so an interruption would lose everything; give launch.output, "
            "below which checkpoints go, or leave spot out",
        )
    if spot and wait is None:
        yield Problem("launch.max_wait", "launch.max_wait: spot needs it, waiting and running together; give at least launch.max_runtime")
    if spot and wait is not None and _number(wait) < _number(runtime):
        yield Problem(
            "launch.max_wait",
            f"launch.max_wait={duration(_number(wait))}: must be at least launch.max_runtime={duration(_number(runtime))}, which is "
            "part of it; raise it, or leave it out",
        )
    if wait is not None and not spot:
        yield Problem(
            "launch.max_wait", f"launch.max_wait={duration(_number(wait))} is of spot machines; add launch.spot=true, or leave it out"
        )
    if keep and spot:
        yield Problem(
            "launch.keep_alive", f"launch.keep_alive={duration(keep)}: spot machines cannot be kept; leave it out, or launch.spot"
        )
    if keep > DOCUMENTED_WARM_POOL:
        yield Problem(
            "launch.keep_alive",
            f"launch.keep_alive={duration(keep)}: the documentation allows {duration(DOCUMENTED_WARM_POOL)}, and the service may refuse "
            "more; lower it",
            fatal=False,
        )


def _machines(request: dict[str, Any], resources: dict[str, Any], instance: Instance | None) -> Iterator[Problem]:
    count, volume = resources.get("InstanceCount"), resources.get("VolumeSizeInGB")
    for key, value in (("launch.instance_count", count), ("launch.volume_gb", volume)):
        if isinstance(value, int) and value < 1:
            yield Problem(key, f"{key}={value} must be at least 1")
    if request.get("EnableInterContainerTrafficEncryption") and count == 1:
        yield Problem(
            "launch.encrypt_traffic", "launch.encrypt_traffic=true: one machine has no traffic to encrypt; leave it out", fatal=False
        )
    if instance is not None and 1 < instance.local_gb < _number(volume):
        yield Problem(
            "launch.volume_gb", f"launch.volume_gb={volume}: the disks of {instance.type} have {instance.local_gb} GB; ask for no more"
        )


def _image(image: Any, region: str | None, instance: Instance | None, access: Any) -> Iterator[Problem]:
    key, remedy = "launch.image_uri", "give <account>.dkr.ecr.<region>.amazonaws.com/<repository>:<tag>"
    if not isinstance(image, str) or not image:
        yield Problem(key, f"{key}: the job needs a container's image; {remedy}")
        return
    if image == NO_IMAGE:
        return  # stands for one that the config does not name, which is told of the config
    match = _ECR.fullmatch(image)
    if match is None and access is None:
        yield Problem(key, f"{key}={shown(image)}: SageMaker takes images from ECR only; push it there, and {remedy}")
    elif match and region and match["region"] != region:
        yield Problem(
            key,
            f"{key}={shown(image)}: is in {match['region']}, and the job runs in {region}; push it to ECR there, or give "
            f"launch.region={match['region']}",
        )
    made_for, has = _made_for(match["name"] if match else image), _computes_on(instance)
    if made_for == has or not made_for or not has:
        return
    if made_for == "GPU" and has == "CPU":
        yield Problem(key, f"{key}={shown(image)}: is for GPUs, and {_type(instance)} has none; a CPU image starts sooner", fatal=False)
        return
    yield Problem(
        key,
        f"{key}={shown(image)}: is for {made_for}, and launch.instance_type={_type(instance)} computes on {has}; give an image for {has}, "
        f"or another machine, launch/instance={'trn2' if made_for == 'Trainium' else 'gpu'}",
    )


def _type(instance: Instance | None) -> str:
    return instance.type if instance else ""


_IMAGES = {"Trainium": r"neuron[a-z]*", "GPU": r"gpu|cuda\d*|cu\d{2,3}", "CPU": r"cpu"}  # words of their names


def _made_for(name: str) -> str:
    """CPU, GPU or Trainium, where the repository or the tag says so: pytorch-training-neuronx, 2.13-gpu-py312-cu128, gpt:cpu."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((kind for kind, pattern in _IMAGES.items() if any(re.fullmatch(pattern, word) for word in words)), "")


def _computes_on(instance: Instance | None) -> str:
    if instance is None:
        return ""
    return "Trainium" if instance.needs_own_image else "GPU" if instance.chip else "CPU"


def _keys(request: dict[str, Any], region: str | None, instance: Instance | None) -> Iterator[Problem]:
    volume, output = _part(request, "ResourceConfig").get("VolumeKmsKeyId"), _part(request, "OutputDataConfig").get("KmsKeyId")
    if isinstance(volume, str):
        yield from _kms("launch.volume_kms_key", volume, region, aliases=False)
        if instance is not None and instance.local_gb:
            yield Problem(
                "launch.volume_kms_key",
                f"launch.volume_kms_key={shown(volume)}: {instance.type} has disks of its own, whose hardware encrypts them with a key "
                "that nobody can name; leave it out",
            )
    if isinstance(output, str):
        yield from _kms("launch.output_kms_key", output, region, aliases=True)


def _kms(key: str, value: str, region: str | None, aliases: bool) -> Iterator[Problem]:
    match = _KMS.fullmatch(value)
    given = "a key's ARN, arn:aws:kms:<region>:<account>:key/<id>, or its id"
    if match is None:
        yield Problem(key, f"{key}={shown(value)}: must be {given}{', or an alias, alias/<name>' if aliases else ''}")
    elif "alias/" in value and not aliases:
        yield Problem(key, f"{key}={shown(value)}: a volume takes no alias; give {given}")
    elif match["region"] and region and match["region"] != region:
        yield Problem(key, f"{key}={shown(value)}: the key is in {match['region']}, and the job runs in {region}; give a key of {region}")


def _places(request: dict[str, Any], given: Collection[str]) -> Iterator[Problem]:
    """S3 uris. Those that follow from launch.output are told once."""
    outputs = (
        _part(request, "OutputDataConfig").get("S3OutputPath"), _part(request, "CheckpointConfig").get("S3Uri"),
        _part(request, "TensorBoardOutputConfig").get("S3OutputPath"),
    )  # fmt: skip
    told: set[str] = set()
    for uri in outputs:
        for problem in _place("launch.output", uri):
            if (where := str(urlsplit(str(uri)).netloc)) not in told:
                told.add(where)
                yield problem
    for channel in _listed(request, "InputDataConfig"):
        source = _part(_part(channel, "DataSource"), "S3DataSource")
        yield from _place(channel_key(channel.get("ChannelName"), given), source.get("S3Uri"), told)


def _place(key: str, uri: Any, told: Any = ()) -> Iterator[Problem]:
    if not isinstance(uri, str):
        return
    parts = urlsplit(uri)
    if parts.scheme == "s3" and parts.netloc and not _BUCKET.fullmatch(parts.netloc) and parts.netloc not in told:
        yield Problem(
            key,
            f"{key}={shown(uri)}: {parts.netloc} is no name of a bucket, which has 3 to 63 lower-case letters, digits, dots and dashes",
        )
    elif parts.scheme == "https":
        yield Problem(key, f"{key}={shown(uri)}: write it as s3://<bucket>/<prefix>")


def _names(request: dict[str, Any]) -> Iterator[Problem]:
    """Names that must be there once, or are not ours to take."""
    for name, count in Counter(str(channel.get("ChannelName")) for channel in _listed(request, "InputDataConfig")).items():
        if count > 1:
            yield Problem("launch.channels", f"launch.channels.{name}: there are {count} input channels of that name; rename one")
    for name, count in Counter(str(tag.get("Key")) for tag in _listed(request, "Tags")).items():
        key = f"launch.tags.{name}"
        if count > 1:
            yield Problem(key, f"{key}: there are {count} tags of that name; take one out")
        if name.lower().startswith("aws:"):
            yield Problem(key, f"{key}: tags that begin with aws: are AWS's own; call it something else")
    definitions = _listed(_part(request, "AlgorithmSpecification"), "MetricDefinitions")
    for definition in definitions:
        try:
            re.compile(str(definition.get("Regex")))
        except re.error as error:
            yield Problem("request", f"request.MetricDefinitions: the pattern of {definition.get('Name')} is none: {error}")


def channel_key(name: Any, given: Collection[str]) -> str:
    """The key of the config that a channel comes from.

    Args:
        name: of the channel, as `gpt.aws.inputs` has called it.
        given: names of those in launch.channels.
    """
    first = str(name).partition(".")[0]
    if name not in given and (part := re.fullmatch(r"part(\d+)", first)):
        return f"data.parts[{part[1]}].paths"
    return f"launch.channels.{name}" if name in given else _OF_CHANNELS.get(first, f"launch.channels.{name}")


def _listed(request: dict[str, Any], name: str) -> list[dict[str, Any]]:
    items = request.get(name)
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _downloads(config: RunConfig) -> Iterator[Problem]:
    """What the container would have to fetch itself."""
    alone = "launch.network_isolation lets the container reach no network"
    told: set[str] = set()
    folder = "download it (hf download), and give the folder, which is shipped"
    for key, value in (
        ("init", config.init), ("tokenizer.path", config.tokenizer.path), ("distill.teacher", config.distill.teacher),
        ("adapt_tokenizer", None if config.adapt_tokenizer == "train" else config.adapt_tokenizer),
    ):  # fmt: skip
        if value and value not in told and not _is_here(value):
            told.add(value)  # the tokenizer comes with the weights
            yield Problem(key, f"{key}={shown(value)}: is fetched from the hub, and {alone}; {folder}")
    for key, source in (("data", config.data), *((f"data.parts[{number}]", part) for number, part in enumerate(config.data.parts))):
        if source.source == "hf" and not _is_here(source.name):
            yield Problem(
                f"{key}.name",
                f"{key}.name={shown(source.name)}: is fetched from the hub, and {alone}; write it to files, and give data=jsonl or "
                "data=parquet with data.paths, which are shipped",
            )
        for path in source.paths:
            if re.match(r"(?!s3:|channel:)[A-Za-z][A-Za-z0-9+.-]+://", path):
                yield Problem(
                    f"{key}.paths",
                    f"{key}.paths={shown(path)}: is fetched while the job runs, and {alone}; give s3://<bucket>/<prefix> or local files",
                )
    yield from _trackers(config, alone)


def _trackers(config: RunConfig, alone: str) -> Iterator[Problem]:
    environment, name = config.launch.environment, config.tracking.name
    if name == "wandb" and environment.get("WANDB_MODE") not in _OFFLINE_WANDB:
        yield Problem(
            "tracking",
            f"tracking=wandb: sends metrics to its server, and {alone}; add launch.environment.WANDB_MODE=offline and upload them "
            "later, or give tracking=tensorboard launch.tensorboard=true",
        )
    server = environment.get("MLFLOW_TRACKING_URI", "")
    if name == "mlflow" and re.match(r"https?://|databricks", server):
        yield Problem(
            "launch.environment.MLFLOW_TRACKING_URI",
            f"launch.environment.MLFLOW_TRACKING_URI: is a server, and {alone}; leave it out, and mlflow writes files",
        )


def _is_here(path: str) -> bool:
    """Whether something of the config is no id of the hub: a path of this machine, or of the container."""
    return path.startswith("/") or os.path.exists(expanded(path))
