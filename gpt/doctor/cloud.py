"""What is elsewhere: the Hugging Face hub with its folder here, and AWS (only with aws=true). Nothing secret is ever returned."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from gpt.aws.session import INSTALL, LOG_IN, code_of, trouble
from gpt.commands import DoctorConfig
from gpt.doctor.result import Result, gib, nearest_folder

_PLENTY_FREE = 5 << 30  # bytes; a model of 1B parameters has 2e9 to 4e9


def hugging_face(config: DoctorConfig) -> Result:
    """The folder that downloads of the hub are kept in: whether it can be written to, its room, and whether the hub may be asked at all."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    elsewhere = "export HF_HOME=<a folder that you can write to>"
    kept = [path for kind in ("models", "datasets") for path in folder.glob(f"{kind}--*")] if folder.is_dir() else []
    offline = bool(constants.HF_HUB_OFFLINE)
    try:
        existing = nearest_folder(folder)
        tempfile.TemporaryFile(dir=existing).close()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Result("warning", f"{folder} cannot be written to: {error.strerror}; nothing can be downloaded", elsewhere)
    found = f"{folder}: {len(kept)} repositor{'y' if len(kept) == 1 else 'ies'}, {gib(free)} free; {'offline' if offline else 'online'}"
    if offline and not kept:
        online = "unset HF_HUB_OFFLINE" if "HF_HUB_OFFLINE" in os.environ else "unset TRANSFORMERS_OFFLINE"
        return Result("warning", f"{found}, so no hub id can be used", f"{online}; or give folders instead of hub ids")
    if free < _PLENTY_FREE and not offline:
        return Result("warning", found, f"hf cache prune, or {elsewhere.replace('that you can write to', 'on a larger disk')}")
    return Result("ok", found)


def aws_credentials(config: DoctorConfig) -> Result:
    """Who AWS takes this machine for."""
    return _asking(_identity)


def _identity(session: Any) -> Result:
    credentials = session.get_credentials()
    if credentials is None:
        return Result("problem", "there are none", LOG_IN)
    return Result("ok", f"{_client(session, 'sts').get_caller_identity()['Arn']} (from {credentials.method})")


def aws_region(config: DoctorConfig) -> Result:
    """The region that jobs would run in."""
    return _asking(_region)


def _region(session: Any) -> Result:
    region = session.region_name
    if not region:
        return Result("problem", "no region is set", "export AWS_DEFAULT_REGION=us-east-1 (or aws configure set region us-east-1)")
    known = [name for part in session.get_available_partitions() for name in session.get_available_regions("sagemaker", part)]
    if region not in known:
        return Result("problem", f"{region}: SageMaker has no such region", "export AWS_DEFAULT_REGION=us-east-1, or another region")
    return Result("ok", region)


def aws_role(config: DoctorConfig) -> Result:
    """Whether the role that jobs would run as exists and lets SageMaker take it."""
    if not config.role:
        return Result("warning", "none named; a SageMaker job needs one", "gpt doctor aws=true role=<name or ARN>, to have it checked")
    return _asking(partial(_role, name=config.role.rpartition("/")[2]))


def _role(session: Any, name: str) -> Result:
    try:
        role = _client(session, "iam").get_role(RoleName=name)["Role"]
    except Exception as error:  # boto3 makes the classes of its errors at run time
        if code_of(error) == "NoSuchEntity":
            return Result("problem", f"there is no role {name} in this account", "role=<one that aws iam list-roles names>")
        if code_of(error).startswith("AccessDenied"):
            return Result("warning", f"you may not look {name} up, so it is not checked", "allow iam:GetRole, or ask the account's owner")
        raise
    policy = role["AssumeRolePolicyDocument"]
    if "sagemaker.amazonaws.com" not in (unquote(policy) if isinstance(policy, str) else json.dumps(policy)):
        fix = "let sagemaker.amazonaws.com assume it: IAM, the role, Trust relationships"
        return Result("problem", f"{role['Arn']} does not let SageMaker take it", fix)
    return Result("ok", str(role["Arn"]))


def _asking(ask: Callable[[Any], Result]) -> Result:
    """What a check finds with a session of boto3; whatever it raises is reported without a secret."""
    try:
        import boto3  # pyright: ignore[reportMissingImports]  # of the extra aws
    except ImportError:
        return Result("problem", "boto3 is not installed", INSTALL)
    session: Any = None
    try:
        session = boto3.Session()
        return ask(session)
    except Exception as error:  # a family of libraries, each with errors of its own
        return Result("problem", *trouble(error, session))


def _client(session: Any, name: str) -> Any:
    from botocore.config import Config  # pyright: ignore[reportMissingImports]  # comes with boto3

    patience = Config(connect_timeout=4, read_timeout=6, retries={"total_max_attempts": 1})
    return session.client(name, region_name=session.region_name or "us-east-1", config=patience)
