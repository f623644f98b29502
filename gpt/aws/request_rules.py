"""Everything that is wrong with a job before it costs anything: botocore's model, the service's limits, rules across settings, secrets.

Nothing is asked of AWS. Every problem is found, not the first only, and told by the config's key, the value and the remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from gpt.aws.cross_rules import Problem, broken_rules, broken_wishes, channel_key
from gpt.aws.instances import find_instance
from gpt.aws.pricing import duration
from gpt.aws.secret_scan import secret_in, secret_in_text, texts_of
from gpt.aws.service_model import Violation, version, violations
from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.typed import nearest, shown

HIDDEN = "***"
"""What stands for a secret wherever something is printed."""
_LONG = 8  # characters of a secret that is no word of something else
_UUID = "1234abcd-12ab-34cd-56ef-1234567890ab"
# Where a field of the request comes from, and what it must be. The longest beginning of a field's path counts.
_FIELDS = {
    "TrainingJobName": ("run.id", "a job's name is letters, digits and single dashes between them"),
    "RoleArn": ("launch.role", "must be the ARN of a role, arn:aws:iam::<account>:role/<name>"),
    "AlgorithmSpecification.TrainingImage": ("launch.image_uri", "give <account>.dkr.ecr.<region>.amazonaws.com/<repository>:<tag>"),
    "CheckpointConfig": ("launch.output", "must be a place in S3, s3://<bucket>/<prefix>"),
    "OutputDataConfig.S3OutputPath": ("launch.output", "must be a place in S3, s3://<bucket>/<prefix>"),
    "TensorBoardOutputConfig": ("launch.output", "must be a place in S3, s3://<bucket>/<prefix>"),
    "OutputDataConfig.KmsKeyId": ("launch.output_kms_key", f"must be a key's ARN or id, such as {_UUID}"),
    "ResourceConfig.InstanceType": ("launch.instance_type", "must be a type of training instance, such as ml.g6.2xlarge"),
    "ResourceConfig.InstanceCount": ("launch.instance_count", "must be a whole number, at least 1"),
    "ResourceConfig.VolumeSizeInGB": ("launch.volume_gb", "must be a whole number of GB, at least 1"),
    "ResourceConfig.VolumeKmsKeyId": ("launch.volume_kms_key", f"must be a key's ARN or id, such as {_UUID}"),
    "ResourceConfig.KeepAlivePeriodInSeconds": ("launch.keep_alive", "give a length such as 30min"),
    "StoppingCondition.MaxRuntimeInSeconds": ("launch.max_runtime", "give a length such as 2h"),
    "StoppingCondition.MaxWaitTimeInSeconds": ("launch.max_wait", "give a length such as 3h"),
    "RetryStrategy.MaximumRetryAttempts": ("launch.max_retries", ""),
    "EnableManagedSpotTraining": ("launch.spot", ""),
    "EnableNetworkIsolation": ("launch.network_isolation", ""),
    "EnableInterContainerTrafficEncryption": ("launch.encrypt_traffic", ""),
    "VpcConfig.Subnets": ("launch.subnets", "a VPC is subnets (subnet-0a1b2c3d4e5f67890) and security groups; give both"),
    "VpcConfig.SecurityGroupIds": ("launch.security_groups", "a VPC is security groups (sg-0a1b2c3d4e5f67890) and subnets; give both"),
    "InputDataConfig": ("launch.channels", "names of channels are letters, digits, '.', '-' and '_'"),
    "Environment": ("launch.environment", "names of variables are letters, digits and '_', and do not begin with a digit"),
    "Tags": ("launch.tags", "tags are letters, digits, spaces and . _ : / = + - @"),
    "HyperParameters": ("request.HyperParameters", "must be text in one line"),
}  # fmt: skip
_TIMES = {"launch.max_runtime", "launch.max_wait", "launch.keep_alive"}
_TYPES = {"str": "text", "int": "a whole number", "bool": "true or false", "dict": "names with values", "list": "a list"}


def problems_of(request: dict[str, Any], config: RunConfig | None = None, region: str | None = None) -> list[Problem]:
    """Everything that is wrong with a job, what forbids it first. No text of it has a secret in it.

    Args:
        request: of CreateTrainingJob.
        config: that the request was made of; None: the request alone is looked at.
        region: where it would run; None: not known.

    Raises:
        UserError: botocore is not installed.
    """
    secrets = secrets_of(request, config)
    given = config.launch.channels.keys() if config is not None else ()
    found = [*_of_model(request, given), *broken_rules(request, region, given)]
    found += broken_wishes(config, region) if config is not None else []
    found += [_of_secret(key, kind) for key, kind in secrets.values()]
    found = [replace(problem, text=_hidden(problem.text, secrets)) for problem in found]
    return sorted(dict.fromkeys(found), key=lambda problem: not problem.fatal)


def secrets_of(request: dict[str, Any], config: RunConfig | None = None) -> dict[str, tuple[str, str]]:
    """Secrets in plain text in what everybody may read who may describe the job: text -> the key it is under, and what it is."""
    named: list[tuple[str, str, str]] = []  # key, name, text
    if config is not None:
        for section in ("environment", "tags"):
            named += [(f"launch.{section}.{name}", name, text) for name, text in getattr(config.launch, section).items()]
    environment, tags = request.get("Environment"), request.get("Tags")
    if isinstance(environment, dict):
        named += [(f"launch.environment.{name}", str(name), str(text)) for name, text in environment.items()]
    for tag in tags if isinstance(tags, list) else []:
        if isinstance(tag, dict):
            named.append((f"launch.tags.{tag.get('Key')}", str(tag.get("Key")), str(tag.get("Value"))))
    found: dict[str, tuple[str, str]] = {}
    for key, name, text in named:
        if text not in found and (kind := secret_in(name, text)):
            found[text] = (key, kind)
    for key, text in [*texts_of(config.to_dict() if config is not None else {}), *texts_of(request, "request")]:
        rest = _hidden(text, [known for known in found if len(known) >= _LONG])  # what is known already is told once
        if text not in found and (kind := secret_in_text(rest)):
            found[text] = (key, kind)
    return found


def without_secrets(value: Any, secrets: dict[str, tuple[str, str]]) -> Any:
    """A plain value with every text that is a secret hidden."""
    if isinstance(value, str):
        return HIDDEN if value in secrets else _hidden(value, [secret for secret in secrets if len(secret) >= _LONG])
    if isinstance(value, dict):
        return {name: without_secrets(item, secrets) for name, item in value.items()}
    return [without_secrets(item, secrets) for item in value] if isinstance(value, list) else value


def _hidden(text: str, secrets: Iterable[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _of_secret(key: str, kind: str) -> Problem:
    return Problem(
        key,
        f"{key}: looks like {kind}, and everybody who may describe the job could read it; take it out, and keep it in AWS Secrets Manager, "
        "from which what runs in the job can fetch it as launch.role",
    )


def _of_model(request: dict[str, Any], given: Collection[str]) -> Iterator[Problem]:
    """What botocore's model forbids, in the words of the config."""
    for violation in violations(request):
        key, must = _whence(violation.path, request, given)
        if violation.kind == "choice" and key == "launch.instance_type" and not _is_type(str(violation.value)):
            continue  # told by what knows the machines
        yield Problem(key, _told(violation, key, must))


def _is_type(name: str) -> bool:
    """Whether `find_instance` has nothing against a type, so that it is the model that does not know it."""
    try:
        find_instance(name)
    except UserError:
        return False
    return True


def _whence(path: tuple[str | int, ...], request: dict[str, Any], given: Collection[str]) -> tuple[str, str]:
    """The key of the config behind a place in the request, and what must stand there."""
    members = [part for part in path if isinstance(part, str)]
    known = next((n for n in range(len(members), 0, -1) if ".".join(members[:n]) in _FIELDS), 0)
    if not known:
        return ".".join(["request", *members]), ""
    key, must = _FIELDS[".".join(members[:known])]
    if len(path) > 1 and isinstance(path[1], int) and path[0] in ("Tags", "InputDataConfig"):
        item = request[path[0]][path[1]]
        name = item.get("Key" if path[0] == "Tags" else "ChannelName") if isinstance(item, dict) else path[1]
        return (f"launch.tags.{name}" if path[0] == "Tags" else channel_key(name, given)), must
    rest = path[known:]
    return key + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest if key != "launch.output"), must


def _told(found: Violation, key: str, must: str) -> str:
    """A violation as a sentence."""
    value = duration(found.value) if key in _TIMES and isinstance(found.value, int) else shown(found.value)
    match found.kind:
        case "missing":
            return f"{key}: is needed{'; ' + must if must else ''}"
        case "unknown":
            return f"{key}: botocore {version()} knows no such field of CreateTrainingJob; pip install --upgrade boto3"
        case "type" if found.limit is None:
            return f"{key}: {value}"
        case "type":
            return f"{key}={value}: {must or 'must be ' + _types(found.limit)}"
        case "choice" if len(found.limit) > 20:
            near = nearest(str(found.value), found.limit)
            return f"{key}={value}: botocore {version()} knows no such type{near or '; pip install --upgrade boto3, or take another'}"
        case "choice":
            return f"{key}={value}: must be one of {', '.join(found.limit)}"
        case "pattern":
            return f"{key}{'' if found.of_name else '=' + value}: {must or f'must match {found.limit}'}"
        case "long":
            what = "the name has" if found.of_name else "has"
            return f"{key}: {what} {len(str(found.value))} characters, and at most {found.limit} are allowed; shorten it"
        case "short" | "few":
            least = f"must have at least {found.limit} {'characters' if found.kind == 'short' else 'entries'}"
            return f"{key}={'' if found.kind == 'short' else '[]' if not found.value else value}: {must or least}"
        case "many":
            ours = f" (with {_OURS[key]})" if key in _OURS else ""
            return f"{key}: there are {found.value}{ours}, and at most {found.limit} are allowed; take {found.value - found.limit} out"
        case "low" | "high":
            limit = duration(found.limit) if key in _TIMES else found.limit
            return f"{key}={value}: must be at {'least' if found.kind == 'low' else 'most'} {limit}"


_OURS = {
    "launch.tags": "gpt:run and gpt:commit, which are set for you",
    "launch.channels": "those of the code and of the config's own paths",
}


def _types(text: str | None) -> str:
    """`<class 'str'>, <class 'int'>` in words."""
    names = [part.strip().removeprefix("<class '").removesuffix("'>") for part in (text or "").split(",")]
    return " or ".join(_TYPES.get(name, name) for name in names)
