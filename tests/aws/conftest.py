"""AWS as moto plays it, in this process and with credentials that are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BUCKET = "training-bucket"


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Nothing of the user's own AWS account is seen."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def aws(no_account: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`gpt.aws.session.Aws` of us-east-1, where moto has the bucket BUCKET."""
    from moto import mock_aws

    from gpt.aws.session import Aws

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    with mock_aws():
        clients = Aws("us-east-1")
        clients.client("s3").create_bucket(Bucket=BUCKET)
        yield clients


@pytest.fixture
def asked(aws: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Every (operation, arguments) that boto3 is to send."""
    from botocore.client import BaseClient

    real, seen = BaseClient._make_api_call, []

    def capture(self: Any, operation: str, arguments: dict[str, Any]) -> Any:
        seen.append((operation, arguments))
        return real(self, operation, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", capture)
    return seen


@pytest.fixture
def gpt(aws: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """See `moto_jobs.command_line`."""
    from moto_jobs import command_line

    return command_line(capsys, tmp_path, monkeypatch)
