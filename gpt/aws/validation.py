"""What is wrong with the job that a run asks for, as far as the config tells; what the request's own rules are, others check.

Everything is found at once, since each thing that is not costs a try.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from gpt.aws.instances import Instance, find_instance, has_own_disks
from gpt.config import LaunchConfig, RunConfig, at_least, parse_span
from gpt.errors import UserError
from gpt.typed import shown

_ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+")
_OUTPUT = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s?#]*)?")


def validate_launch(config: RunConfig) -> None:
    """Check the section `launch` of a run that is sent away, or rehearsed. A dry run tells of what is `wrong` beside
    all else that it finds, so it is refused only for what no request can be made of.

    Raises:
        UserError: whatever is wrong with it; of several things each is a note.
    """
    problems = list(_unreadable(config))
    if problems or not config.launch.dry_run:
        problems += wrong(config)
    if len(problems) > 1:
        error = UserError(f"{len(problems)} things are wrong with the job")
        for problem in problems:
            error.add_note(problem)
        raise error
    if problems:
        raise UserError(problems[0])


def wrong(config: RunConfig) -> list[str]:
    """What a request can be made of but no job, a sentence each: what does not go together, and what is missing."""
    return [*_contradictions(config), *(missing(config) if config.launch.name == "sagemaker" else ())]


def missing(config: RunConfig) -> list[str]:
    """What a job cannot do without and the config does not say, a sentence each."""
    found = []
    if not config.launch.role:
        found.append("launch.role=null: name the role that the job runs as, launch.role=arn:aws:iam::<account>:role/<name>")
    if not config.launch.output:
        found.append("launch.output=null: name the place in S3 for everything of the run, launch.output=s3://<bucket>/<prefix>")
    for key in config.launch.left_open():
        nothing = "[]" if isinstance(getattr(config.launch, key), list) else "null"
        if key != "volume_kms_key" or not has_own_disks(config.launch.instance_type):
            found.append(f"launch.{key}: launch/security=secure leaves it to you; give it, or launch.{key}={nothing} to do without")
    return found


def _unreadable(config: RunConfig) -> Iterator[str]:
    """Values that are none, a sentence each."""
    launch = config.launch
    yield from _lengths(launch)
    for key, low in (("instance_count", 1), ("volume_gb", 1), ("max_retries", 0), ("max_parallel", 1)):
        yield from _said(at_least, f"launch.{key}", getattr(launch, key), low)
    yield from _said(at_least, "launch.emulated.interruptions", launch.emulated.interruptions, 1)
    if launch.max_cost is not None and not launch.max_cost > 0:
        yield f"launch.max_cost={shown(launch.max_cost)} must be greater than 0, in USD"
    for name, price in launch.prices.items():
        if not price >= 0:
            yield f"launch.prices.{name}={shown(price)} must be at least 0, in USD per hour"
    if launch.output and not _OUTPUT.fullmatch(launch.output):
        yield f"launch.output={shown(launch.output)}: must be a place in S3, s3://<bucket>/<prefix>"
    if launch.name == "sagemaker":
        yield from _said(find_instance, launch.instance_type)


def _contradictions(config: RunConfig) -> Iterator[str]:
    """What does not go together, a sentence each."""
    launch = config.launch
    if launch.role and not _ROLE.fullmatch(launch.role):
        yield f"launch.role={shown(launch.role)}: must be the ARN of a role, arn:aws:iam::<account>:role/<name>"
    for key in ("nnodes", "node_rank", "endpoint"):
        if getattr(launch, key) != getattr(LaunchConfig(), key):
            yield f"launch.{key}={shown(getattr(launch, key))}: the job finds that out itself; give launch.instance_count=<machines>"
    if launch.tensorboard and config.tracking.name != "tensorboard":
        yield f"launch.tensorboard=true: keeps what tracking=tensorboard writes, and this is tracking={config.tracking.name}; add it"
    for key in launch.tags:
        if key.startswith("gpt:"):
            yield f"launch.tags.{key}: tags that begin with gpt: are set for you; call it something else"
    yield from _spot(launch)
    yield from _machine(config)


def _lengths(launch: LaunchConfig) -> Iterator[str]:
    """Times that are none."""
    emulated = launch.emulated
    for key, text in (
        ("max_runtime", launch.max_runtime), ("max_wait", launch.max_wait), ("keep_alive", launch.keep_alive),
        ("emulated.interrupt_after", emulated.interrupt_after), ("emulated.notice", emulated.notice),
    ):  # fmt: skip
        if text is not None:
            yield from _said(parse_span, f"launch.{key}", text, ("seconds",))


def _spot(launch: LaunchConfig) -> Iterator[str]:
    """What only spot has, and what it cannot have."""
    if launch.max_wait is not None and not launch.spot:
        yield f"launch.max_wait={launch.max_wait} is of spot machines; add launch.spot=true, or leave it out"
    if launch.keep_alive is not None and launch.spot:
        yield f"launch.keep_alive={launch.keep_alive}: spot machines cannot be kept; leave it out, or launch.spot"


def _machine(config: RunConfig) -> Iterator[str]:
    """Whether the run and its machine are made for each other."""
    launch = config.launch
    instance = None
    if launch.name == "sagemaker":
        try:
            instance = find_instance(launch.instance_type)
        except UserError:
            return  # which `_unreadable` tells
        if instance is None and (config.device.name == "auto" or launch.nproc == "auto"):
            yield (
                f"launch.instance_type={launch.instance_type}: what it computes on is not known here; say it, with device=... and "
                "launch.nproc=<its devices>"
            )
    if instance is not None:
        yield from _devices(config, instance)
    elif config.parallel.name == "none" and launch.instance_count > 1:
        yield _alone(f"launch.instance_count={launch.instance_count}", "one process on one machine")


def _devices(config: RunConfig, instance: Instance) -> Iterator[str]:
    launch = config.launch
    if not instance.has(config.device.name):
        yield (
            f"device={config.device.name}: {instance.type} has {instance.devices}; leave device out, or take another machine, "
            "such as launch/instance=gpu"
        )
    elif config.parallel.name == "none" and instance.processes * launch.instance_count > 1:
        count = f"{launch.instance_count} machines" if launch.instance_count > 1 else f"{instance.devices}"
        yield _alone(f"launch.instance_type={instance.type}", f"one of {count}")
    if launch.nproc != "auto" and instance.chip and launch.nproc > instance.processes:
        yield f"launch.nproc={launch.nproc}: {instance.type} has {instance.devices}; leave it out, which takes them all"


def _alone(what: str, uses: str) -> str:
    return f"{what}: parallel=none uses {uses}; add parallel=ddp, or parallel=fsdp for a model that one device cannot hold"


def _said(check: Callable[..., object], *arguments: object) -> Iterator[str]:
    """What a check raises."""
    try:
        check(*arguments)
    except UserError as error:
        yield str(error)


def with_channels(config: RunConfig) -> RunConfig:
    """The config with data.paths as the job has them: input channels called `train`, or `train.<name>`, are among them."""
    given = [f"channel://{name}" for name in config.launch.channels if name.partition(".")[0] == "train"]
    paths = [*config.data.paths, *(uri for uri in given if uri not in config.data.paths)]
    return replace(config, data=replace(config.data, paths=paths)) if given else config
