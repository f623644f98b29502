"""How AWS is asked, and what its errors mean."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from botocore.exceptions import ClientError, NoCredentialsError, ReadTimeoutError

from gpt.aws.session import Aws, explained, is_transient, needs_login
from gpt.errors import UserError
from tests.aws.job_standins import EXPIRED, THROTTLED, UNREACHABLE, refusal

SECRET = "wJalrXUtnFEMI/K7MDENG"


def test_without_boto3_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UserError, match=r"boto3, which asks AWS, is not installed; pip install 'gpt-trainer\[aws\]'"):
        Aws("us-east-1")


def test_without_a_region_its_key_is_named(no_account):
    with pytest.raises(UserError, match=r"^region: no region is set; give region=us-east-1"):
        Aws(None, "region")


def test_without_credentials_the_login_is_named(no_account):
    with pytest.raises(UserError, match=r"^AWS credentials: there are none; aws configure sso"):
        Aws("us-east-1")


def test_a_profile_that_is_not_there(no_account, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nope")
    with pytest.raises(UserError, match=r"ProfileNotFound: .*nope.*; unset AWS_PROFILE, or make the profile"):
        Aws("us-east-1")


def test_the_region_of_the_environment(aws, monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert Aws(None).region == "eu-west-1"
    assert Aws("us-west-2").region == "us-west-2"


def test_clients_are_made_once_until_they_are_renewed(aws):
    first = aws.client("s3")
    assert aws.client("s3") is first
    aws.renew()
    assert aws.client("s3") is not first


@pytest.mark.parametrize(
    ("error", "transient", "login"),
    [
        (refusal(THROTTLED), True, False),
        (refusal(UNREACHABLE), True, False),
        (ReadTimeoutError(endpoint_url="https://x"), True, False),
        (ClientError({"Error": {"Code": "Odd"}, "ResponseMetadata": {"HTTPStatusCode": 503}}, "Ask"), True, False),
        (refusal(EXPIRED), False, True),
        (NoCredentialsError(), False, True),
        (refusal("AccessDenied"), False, False),
        (ValueError("a mistake of ours"), False, False),
    ],
)
def test_what_can_be_asked_again(error, transient, login):
    assert (is_transient(error), needs_login(error)) == (transient, login)


def test_an_error_is_one_line_without_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    session = SimpleNamespace(get_credentials=lambda: SimpleNamespace(access_key="AKIA", secret_key=SECRET, token="the-token"))
    from botocore.exceptions import EndpointConnectionError

    with pytest.raises(UserError) as caught, explained("doing this", session):
        raise EndpointConnectionError(endpoint_url=f"https://x/{SECRET}/the-token")
    assert SECRET not in str(caught.value)
    assert "the-token" not in str(caught.value)
    assert str(caught.value).startswith("doing this: AWS cannot be asked: EndpointConnectionError: ")
    with (
        pytest.raises(UserError, match=r"^doing this: ResourceLimitExceeded: no\. The quota of this account is used up"),
        explained("doing this"),
    ):
        raise refusal("ResourceLimitExceeded")


def test_mistakes_of_ours_are_not_dressed_up():
    with pytest.raises(ValueError, match="ours"), explained("doing this"):
        raise ValueError("ours")
    with pytest.raises(UserError, match=r"^as it was$"), explained("doing this"):
        raise UserError("as it was")
