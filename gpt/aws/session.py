"""How AWS is asked: clients of one region, and what an error of theirs means to the user. boto3 is imported when it is needed.

Nothing that is said of an error quotes a secret.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpt.errors import UserError

INSTALL = "pip install 'gpt-trainer[aws]'"
LOG_IN = "aws configure sso, then aws sso login; or set AWS_PROFILE to a profile of ~/.aws/config"
_EXPIRED = frozenset({
    "ExpiredToken", "ExpiredTokenException", "RequestExpired", "InvalidToken", "InvalidClientTokenId", "UnrecognizedClientException",
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSignatureException", "AuthFailure", "MissingAuthenticationToken",
})  # fmt: skip
_THROTTLED = frozenset({
    "Throttling", "ThrottlingException", "ThrottledException", "TooManyRequestsException", "RequestLimitExceeded", "SlowDown",
    "RequestThrottled", "RequestThrottledException", "LimitExceededException", "ServiceUnavailable", "ServiceUnavailableException",
})  # fmt: skip


class Aws:
    """Clients of one region, made when first asked for.

    Args:
        region: null: that of the environment or of ~/.aws/config.
        key: what the user calls `region`.
        session: of boto3; None: a new one.

    Raises:
        UserError: boto3 is missing, no region is set, or there are no credentials.
    """

    def __init__(self, region: str | None, key: str = "launch.region", session: Any = None) -> None:
        self._asked, self._clients = region, dict[str, Any]()
        self.session = session or self._new_session()
        name = region or self.session.region_name
        if not name:
            raise UserError(f"{key}: no region is set; give {key}=us-east-1 or another, or export AWS_DEFAULT_REGION=us-east-1")
        self.region = str(name)
        with explained("AWS credentials", self.session):
            if self.session.get_credentials() is None:
                raise UserError(f"AWS credentials: there are none; {LOG_IN}")

    def _new_session(self) -> Any:
        try:
            import boto3  # pyright: ignore[reportMissingImports]  # of the extra aws
        except ImportError as error:
            raise UserError(f"boto3, which asks AWS, is not installed; {INSTALL}") from error
        with explained("AWS"):
            return boto3.Session(region_name=self._asked)

    def client(self, service: str) -> Any:
        """Of a service, such as `sagemaker`, `logs` or `s3`; may be used by several threads."""
        if service not in self._clients:
            from botocore.config import Config  # pyright: ignore[reportMissingImports]  # comes with boto3

            patience = Config(
                connect_timeout=10, read_timeout=60, retries={"mode": "standard", "total_max_attempts": 5}, tcp_keepalive=True
            )
            self._clients[service] = self.session.client(service, region_name=self.region, config=patience)
        return self._clients[service]

    def renew(self) -> None:
        """Read the credentials again, after they have expired and the user has logged in anew."""
        self.session = self._new_session()
        self._clients.clear()


def code_of(error: BaseException) -> str:
    """AWS's short name of what went wrong, such as ExpiredToken, or nothing."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def message_of(error: BaseException) -> str:
    """What AWS says of an error, or what Python does."""
    response = getattr(error, "response", None)
    said = response.get("Error", {}).get("Message") if isinstance(response, dict) else None
    return " ".join(str(said or error).split())


def needs_login(error: BaseException) -> bool:
    """Whether credentials are missing, wrong or have expired."""
    kind = type(error).__name__
    return code_of(error) in _EXPIRED or (not code_of(error) and any(word in kind for word in ("Credential", "Token", "LoginRefresh")))


def is_transient(error: BaseException) -> bool:
    """Whether the same question may well be answered later: too many were asked, AWS is in trouble, or the network is."""
    from botocore import exceptions  # pyright: ignore[reportMissingImports]

    response = getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(response, dict) else 0
    network = (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
    return code_of(error) in _THROTTLED or status >= 500 or isinstance(error, network)


def trouble(error: BaseException, session: Any) -> tuple[str, str]:
    """What an error says, without a secret, and what mends it.

    Args:
        error: of boto3 or of what it stands on.
        session: whose credentials are cut out of what is said; None: there is none yet.
    """
    if code := code_of(error):
        return f"AWS refuses: {code}", f"log in again: {LOG_IN}"
    text, kind = without_secrets(error, session), type(error).__name__
    if needs_login(error):
        return text, LOG_IN
    if kind == "ProfileNotFound":
        return text, "unset AWS_PROFILE, or make the profile: aws configure sso --profile <name>"
    return f"AWS cannot be asked: {text}", "see that AWS can be reached (proxy, VPC endpoint), and ~/.aws/config"


def without_secrets(error: BaseException, session: Any, most: int = 300) -> str:
    """An error in a line, from which every part of the credentials is cut, should it be quoted there."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    secrets = [os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")]
    credentials = None
    with contextlib.suppress(Exception):  # they may be what is wrong; then there is nothing to hide
        credentials = session.get_credentials()
    secrets += [getattr(credentials, name, None) for name in ("access_key", "secret_key", "token")]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text if len(text) <= most else f"{text[: most - 3]}..."


@contextmanager
def explained(doing: str, session: Any = None) -> Iterator[None]:
    """Turn an error of AWS, or on the way to it, into one line that names what was being done and what mends it.

    Args:
        doing: such as `launch.output=s3://bucket: upload`.
        session: see `trouble`.

    Raises:
        UserError: that line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a family of libraries, each with errors of its own
        from botocore.exceptions import BotoCoreError, ClientError  # pyright: ignore[reportMissingImports]

        if not isinstance(error, (BotoCoreError, ClientError)):
            raise
        raise UserError(f"{doing}: {explanation(error, session)}") from error


def explanation(error: BaseException, session: Any = None) -> str:
    """An error of AWS in a line, with what mends it where that is known."""
    if code_of(error) and not needs_login(error):
        from gpt.aws.hints import hint_for

        said = f"{code_of(error)}: {message_of(error)}"
        hint = hint_for(said)
        return f"{said.rstrip('.')}{f'. {hint}' if hint else ''}"
    return "; ".join(trouble(error, session))
