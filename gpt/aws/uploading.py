"""Files to S3, once: what lies there already, with this content, is not sent again.

An uploaded object carries the SHA-256 of its content as metadata, which the next upload compares. S3 checks what arrives against a
checksum that is made while it is sent.
"""

from __future__ import annotations

import base64
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpt.aws.dry_run import size
from gpt.aws.session import Aws, code_of, explanation
from gpt.aws.shipping import Upload
from gpt.errors import UserError

_AT_ONCE = 8  # objects; boto3 sends the parts of a large one at the same time besides
_HASH = "sha256"


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://<bucket>/<key>` -> bucket and key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def upload(aws: Aws, uploads: Iterable[Upload], kms_key: str | None, say: Callable[[str], None]) -> int:
    """Send what is not in S3 yet.

    Args:
        aws: the clients.
        uploads: what must lie there.
        kms_key: that S3 encrypts it with; None: as the bucket does by itself.
        say: prints a line for people.

    Returns:
        Bytes that were sent.

    Raises:
        UserError: something cannot be written there, or has changed since it was looked at.
    """
    every = {one.uri: one for one in uploads}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        there = list(pool.map(lambda one: _is_there(aws, one), every.values()))
    missing = [one for one, known in zip(every.values(), there, strict=True) if not known]
    total = sum(one.size for one in missing)
    if not missing:
        say(f"upload: nothing, all {len(every)} are there already")
        return 0
    say(f"upload: {len(missing)} of {len(every)}, {size(total)}")
    with Bar("upload", total) as bar, ThreadPoolExecutor(_AT_ONCE) as pool:
        futures = [pool.submit(_send, aws, one, kms_key, bar.advance) for one in missing]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return total


def _is_there(aws: Aws, one: Upload) -> bool:
    bucket, key = split_uri(one.uri)
    try:
        head = aws.client("s3").head_object(Bucket=bucket, Key=key)
    except Exception as error:  # boto3 makes the classes of its errors at run time
        if code_of(error) in ("404", "NoSuchKey", "403"):  # 403: who may not list a bucket is not told that something is missing
            return False
        raise _refused(one, error, aws) from error
    return head["ContentLength"] == one.size and head.get("Metadata", {}).get(_HASH) == one.sha256


def _send(aws: Aws, one: Upload, kms_key: str | None, sent: Callable[[int], None]) -> None:
    bucket, key = split_uri(one.uri)
    extra: dict[str, Any] = {"Metadata": {_HASH: one.sha256}}
    extra |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
    client = aws.client("s3")
    try:
        if isinstance(one.source, bytes):
            checksum = base64.b64encode(bytes.fromhex(one.sha256)).decode()
            client.put_object(Bucket=bucket, Key=key, Body=one.source, ChecksumSHA256=checksum, **extra)
            sent(one.size)
        else:
            client.upload_file(str(one.source), bucket, key, ExtraArgs={"ChecksumAlgorithm": "SHA256", **extra}, Callback=sent)
        arrived = client.head_object(Bucket=bucket, Key=key)["ContentLength"]
    except OSError as error:
        raise UserError(f"{one.source} cannot be read for the upload ({error.strerror or error})") from error
    except Exception as error:  # boto3 makes the classes of its errors at run time
        raise _refused(one, error, aws) from error
    if arrived != one.size:
        raise UserError(f"{one.source} changed while it was uploaded: {one.size:,} bytes before, {arrived:,} in S3; start again")


def _refused(one: Upload, error: Exception, aws: Aws) -> UserError:
    """What to say of an object that cannot be written, or looked for."""
    bucket, _ = split_uri(one.uri)
    cause = error.__cause__ or error  # boto3's transfer wraps what S3 says into an error of its own
    cause = next((e for e in (error, cause, error.__context__) if e is not None and code_of(e)), error)
    code = code_of(cause)
    if code in ("NoSuchBucket", "404"):
        return UserError(f"launch.output: there is no bucket {bucket}; make it in {aws.region}, or name another")
    if code in ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "400"):
        return UserError(f"launch.output: the bucket {bucket} is not in {aws.region}; name one that is, or its region as launch.region")
    if code in ("AccessDenied", "403", "AllAccessDisabled") and "kms" not in str(cause).lower():
        return UserError(
            f"launch.output: you may not write {one.uri} (AccessDenied); have the bucket's owner allow you s3:PutObject, s3:GetObject and "
            f"s3:ListBucket on {bucket} (docs/sagemaker.md)"
        )
    return UserError(f"launch.output: {one.uri} cannot be written: {explanation(cause, aws.session)}")


class Bar:
    """Bytes on their way: a bar on a terminal, nothing elsewhere. `advance` may be called by several threads."""

    def __init__(self, what: str, total: int) -> None:
        self._bar: Any = None
        self._lock = threading.Lock()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

            columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, number: int) -> None:
        """So many bytes more."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(self._task, advance=number)
