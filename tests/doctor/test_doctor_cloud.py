"""The hub's folder, and AWS through a stand-in of boto3 that answers as its environment says."""

from __future__ import annotations

import sys

import pytest
from doctor_standins import in_child, package

from gpt.commands import DoctorConfig
from gpt.doctor import cloud

AWS = DoctorConfig(aws=True)
ARN = "arn:aws:iam::123456789012:role/Training"
SECRET = "wJalrXUtnFEMI/K7MDENG"
# Answers what the checks ask; ASK_<service> is the code of the error that a service gives instead.
BOTO3 = """
    import os
    from types import SimpleNamespace

    class ClientError(Exception):
        def __init__(self, code):
            super().__init__(f"An error occurred ({code}), with {os.environ.get('AWS_SECRET_ACCESS_KEY')}")
            self.response = {"Error": {"Code": code}}

    class ProfileNotFound(Exception):
        pass

    class NoCredentialsError(Exception):
        pass

    def answer(service, value):
        wrong = os.environ.get(f"ASK_{service}")
        if wrong == "unknown":
            raise NoCredentialsError("Unable to locate credentials")
        if wrong == "unreachable":
            raise OSError(f"no connection for {os.environ['AWS_SECRET_ACCESS_KEY']} and token-of-the-session")
        if wrong:
            raise ClientError(wrong)
        return value

    class Session:
        region_name = os.environ.get("AWS_DEFAULT_REGION")
        def __init__(self):
            if profile := os.environ.get("AWS_PROFILE"):
                raise ProfileNotFound(f"The config profile ({profile}) could not be found")
        def get_credentials(self):
            secret = os.environ.get("AWS_SECRET_ACCESS_KEY")
            return secret and SimpleNamespace(method="env", access_key="AKIA", secret_key=secret, token="token-of-the-session")
        def get_available_partitions(self):
            return ["aws", "aws-cn"]
        def get_available_regions(self, service, partition):
            return {"aws": ["us-east-1", "eu-west-1"], "aws-cn": ["cn-north-1"]}[partition]
        def client(self, service, region_name, config):
            trusted = os.environ.get("TRUSTED", "sagemaker.amazonaws.com")
            policy = {"Statement": [{"Principal": {"Service": trusted}, "Action": "sts:AssumeRole"}]}
            role = {"Role": {"Arn": "arn:aws:iam::123456789012:role/Training", "AssumeRolePolicyDocument": policy}}
            return SimpleNamespace(
                get_caller_identity=lambda: answer("sts", {"Arn": "arn:aws:iam::123456789012:user/me"}),
                get_role=lambda RoleName: answer("iam", role),
            )
"""


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """A check in a process of its own that has the stand-in and these variables, and no others of AWS."""
    package(tmp_path, "boto3", BOTO3)
    (package(tmp_path, "botocore") / "botocore" / "config.py").write_text("def Config(**settings): return settings\n")
    for name in ("AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def ask(check, config=AWS, **variables):
        result = in_child(check, config, path=tmp_path, **variables)
        for secret in (SECRET, "token-of-the-session"):
            assert secret not in result.found + result.fix
        return result

    return ask


# The hub


def test_the_hub_s_folder(tmp_path):
    (tmp_path / "hub" / "models--gpt2").mkdir(parents=True)
    result = in_child(
        cloud.hugging_face,
        before="import gpt.doctor.cloud as c; c._PLENTY_FREE = 0",
        HF_HUB_CACHE=str(tmp_path / "hub"),
        HF_HUB_OFFLINE="0",
    )
    assert result.state == "ok"
    assert result.found.startswith(f"{tmp_path / 'hub'}: 1 repository, ")
    assert result.found.endswith(" free; online")


def test_a_folder_that_takes_nothing(tmp_path):
    (tmp_path / "file").touch()
    result = in_child(cloud.hugging_face, HF_HUB_CACHE=str(tmp_path / "file" / "hub"))
    assert (result.state, result.fix) == ("warning", "export HF_HOME=<a folder that you can write to>")
    assert "cannot be written to: Not a directory; nothing can be downloaded" in result.found


def test_offline_with_nothing_kept(tmp_path):
    result = in_child(cloud.hugging_face, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert (result.state, result.fix) == ("warning", "unset HF_HUB_OFFLINE; or give folders instead of hub ids")
    assert result.found.endswith("offline, so no hub id can be used")
    (tmp_path / "models--gpt2").mkdir()
    assert in_child(cloud.hugging_face, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1").state == "ok"


def test_little_room_for_models(tmp_path):
    small = "import shutil; shutil.disk_usage = lambda path: __import__('types').SimpleNamespace(free=1 << 30)"
    result = in_child(cloud.hugging_face, before=small, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="0")
    assert (result.state, "1.0 GiB free" in result.found, "hf cache" in result.fix) == ("warning", True, True)


# AWS


def test_without_boto3_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    credentials, region = cloud.aws_credentials(AWS), cloud.aws_region(AWS)
    role = cloud.aws_role(DoctorConfig(aws=True, role="Training"))
    assert {credentials.found, region.found, role.found} == {"boto3 is not installed"}
    assert {credentials.fix, region.fix, role.fix} == {"pip install 'gpt-trainer[aws]'"}


def test_who_one_is(ask):
    result = ask(cloud.aws_credentials, AWS_SECRET_ACCESS_KEY=SECRET)
    assert (result.state, result.found) == ("ok", "arn:aws:iam::123456789012:user/me (from env)")


def test_no_credentials(ask):
    result = ask(cloud.aws_credentials)
    assert (result.state, result.found) == ("problem", "there are none")
    assert result.fix.startswith("aws configure sso")


def test_credentials_that_are_refused_are_not_shown(ask):
    result = ask(cloud.aws_credentials, AWS_SECRET_ACCESS_KEY=SECRET, ASK_sts="ExpiredToken")
    assert (result.state, result.found) == ("problem", "AWS refuses: ExpiredToken")
    result = ask(cloud.aws_credentials, AWS_SECRET_ACCESS_KEY=SECRET, ASK_sts="unreachable")
    assert (result.state, result.found) == ("problem", "AWS cannot be asked: OSError: no connection for *** and ***")
    assert "proxy" in result.fix


def test_a_profile_that_is_not_there(ask):
    for check in (cloud.aws_credentials, cloud.aws_region):
        result = ask(check, AWS_PROFILE="nope")
        assert (result.state, result.found) == ("problem", "ProfileNotFound: The config profile (nope) could not be found")
        assert result.fix.startswith("unset AWS_PROFILE")


def test_the_region(ask):
    assert ask(cloud.aws_region, AWS_DEFAULT_REGION="cn-north-1").state == "ok"
    none, wrong = ask(cloud.aws_region), ask(cloud.aws_region, AWS_DEFAULT_REGION="eu-wst-1")
    assert (none.state, none.found) == ("problem", "no region is set")
    assert (wrong.state, wrong.found) == ("problem", "eu-wst-1: SageMaker has no such region")
    assert none.fix.startswith("export AWS_DEFAULT_REGION=")


def test_the_role(ask):
    named = DoctorConfig(aws=True, role=ARN)
    assert ask(cloud.aws_role, named).found == ARN
    assert ask(cloud.aws_role).state == "warning", "none is named"
    for variables, state, said in (
        ({"ASK_iam": "NoSuchEntity"}, "problem", "there is no role Training in this account"),
        ({"ASK_iam": "AccessDenied"}, "warning", "you may not look Training up"),
        ({"ASK_iam": "unknown"}, "problem", "NoCredentialsError: Unable to locate credentials"),
        ({"ASK_iam": "Throttling"}, "problem", "AWS refuses: Throttling"),
        ({"ASK_iam": "unreachable", "AWS_SECRET_ACCESS_KEY": SECRET}, "problem", "no connection for *** and ***"),
        ({"TRUSTED": "ec2.amazonaws.com"}, "problem", f"{ARN} does not let SageMaker take it"),
    ):
        result = ask(cloud.aws_role, named, **variables)
        assert (result.state, said in result.found) == (state, True), result
