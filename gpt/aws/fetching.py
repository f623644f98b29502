"""A run's files from S3 to this machine: what is here already is not brought again, what broke off goes on, and each file is checked.

A file on its way is `.<name>.<ETag>.part` beside its place, which it takes once it is whole and its checksum is right. S3 has one of
CRC32 or SHA-256, if it was given one on upload, of the whole or of each part; or else an ETag that is an MD5, unless KMS encrypts it
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html). Where it has neither, the size must do.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.aws.dry_run import size
from gpt.aws.session import Aws, code_of, explained, is_transient
from gpt.aws.uploading import Bar, split_uri
from gpt.errors import UserError

SMALL = ("metrics.jsonl", "environment.json", "report.html")
"""What tables and pages of runs are made of."""
_AT_ONCE = 4
_BLOCK = 1 << 20  # bytes
_TRIES = 5  # of a file whose connection breaks
_OURS = ("config.yaml", "job.json")  # of the run on this machine, and not to be replaced


@dataclass(frozen=True)
class Remote:
    """An object in S3 that belongs here."""

    bucket: str
    key: str
    size: int
    etag: str
    """Without quotes."""
    modified: float
    """Seconds since 1970."""
    path: Path
    """Its place on this machine."""


@dataclass(frozen=True)
class Fetched:
    """What `fetch` has done."""

    brought: int
    """Files."""
    bytes: int
    """Of those."""
    unchanged: int
    """Files that were here already."""
    by_size: int
    """Files for which S3 has no checksum that can be compared."""


def fetch(aws: Aws, uri: str, directory: Path, wanted: Callable[[str], bool], say: Callable[[str], None]) -> Fetched:
    """Bring the files of a run directory home.

    Args:
        aws: the clients.
        uri: of the run directory in S3, `s3://bucket/.../<run id>`.
        directory: of the run on this machine.
        wanted: whether a file is, by its name from the run directory on.
        say: prints a line for people.

    Raises:
        UserError: S3 refuses, the disk is full, or a file does not arrive as it lies there.
    """
    with explained(f"gpt jobs fetch: {uri}", aws.session):
        every = [one for one in _listed(aws, uri, directory) if wanted(one.path.relative_to(directory).as_posix())]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            here = list(pool.map(lambda one: _is_here(aws, one), every))
        missing = [one for one, known in zip(every, here, strict=True) if not known]
        _refuse_too_much(missing, directory)
        total = sum(one.size for one in missing)
        if len(missing) > len(SMALL):
            say(f"fetch: {len(missing)} of {len(every)}, {size(total)}, into {directory}")
        with Bar("fetch", total) as bar, ThreadPoolExecutor(_AT_ONCE) as pool:
            futures = [pool.submit(_bring, aws, one, bar.advance) for one in missing]
            try:
                checked = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return Fetched(len(missing), total, len(every) - len(missing), checked.count(False))


def weights_and_report(name: str) -> bool:
    """Whether a file of a run directory is what a run leaves, as against what it goes on from."""
    return not name.startswith("checkpoints/")


def _listed(aws: Aws, uri: str, directory: Path) -> Iterator[Remote]:
    """The objects below a run directory in S3 that are whole files of it."""
    bucket, prefix = split_uri(f"{uri.rstrip('/')}/")
    for page in aws.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            parts = entry["Key"][len(prefix) :].split("/")
            if "" in parts or any(part.startswith(".") for part in parts):  # a folder's mark; a lock, a file aside; never `..`
                continue
            path = directory.joinpath(*parts)
            if not (len(parts) == 1 and parts[0] in _OURS and path.exists()):
                yield Remote(bucket, entry["Key"], entry["Size"], entry["ETag"].strip('"'), entry["LastModified"].timestamp(), path)


def _refuse_too_much(missing: Sequence[Remote], directory: Path) -> None:
    """Raises UserError if the disk has no room for all."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    need = sum(max(0, one.size - _size(_part(one))) for one in missing)
    if need > (free := shutil.disk_usage(existing).free):
        raise UserError(
            f"{directory}: {size(need)} are to come, and the disk has {size(free)} free; make room, or fetch with "
            "dir=<folder on another disk>"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _part(one: Remote) -> Path:
    """Where a file is while it is not whole: another place for another content."""
    return one.path.with_name(f".{one.path.name}.{re.sub(r'[^A-Za-z0-9]+', '-', one.etag)}.part")


def _is_here(aws: Aws, one: Remote) -> bool:
    """Whether the file is here with the content that S3 has; where no checksum tells, with the time that `_bring` gave it."""
    if not one.path.is_file() or _size(one.path) != one.size:
        return False
    right = checks(aws, one, one.path)
    return one.path.stat().st_mtime == one.modified if right is None else right


def _bring(aws: Aws, one: Remote, came: Callable[[int], None]) -> bool:
    """Download a file, going on where an earlier attempt broke off; returns whether a checksum was compared."""
    part = _part(one)
    try:
        one.path.parent.mkdir(parents=True, exist_ok=True)
        for stale in one.path.parent.glob(f".{_literal(one.path.name)}.*.part"):
            if stale != part:
                stale.unlink()
        for attempt in range(_TRIES):
            came(_size(part) if attempt == 0 else 0)
            try:
                _append(aws, one, part, came)
            except Exception as error:  # boto3 makes the classes of its errors at run time
                if attempt == _TRIES - 1 or not is_transient(error):
                    raise
                continue
            right = checks(aws, one, part)
            if _size(part) == one.size and right is not False:
                os.utime(part, (one.modified, one.modified))
                os.replace(part, one.path)
                return right is True
            part.unlink()  # it was cut or changed on its way: once more from the beginning
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{one.path}: the disk is full; make room and call gpt jobs fetch again, which goes on where it is") from error
        raise UserError(f"{one.path} cannot be written ({error.strerror or error})") from error
    raise UserError(f"s3://{one.bucket}/{one.key}: what arrives is not what lies there ({_TRIES} times); try again later")


def _literal(name: str) -> str:
    """A name as a pattern that only it matches."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _append(aws: Aws, one: Remote, part: Path, came: Callable[[int], None]) -> None:
    have = _size(part)
    if have > one.size:
        part.unlink()
        have = 0
    if have == one.size:
        part.touch()
        return
    try:
        answer = aws.client("s3").get_object(Bucket=one.bucket, Key=one.key, Range=f"bytes={have}-", IfMatch=f'"{one.etag}"')
    except Exception as error:  # boto3 makes the classes of its errors at run time
        if code_of(error) in ("412", "PreconditionFailed", "404", "NoSuchKey"):
            raise UserError(f"s3://{one.bucket}/{one.key} changed while it was fetched, as of a run that goes on; fetch again") from error
        raise
    with part.open("ab") as file:
        for block in answer["Body"].iter_chunks(_BLOCK):
            file.write(block)
            came(len(block))
        file.flush()
        os.fsync(file.fileno())


def checks(aws: Aws, one: Remote, path: Path) -> bool | None:
    """Whether a file has the content that S3 has; None: S3 has no checksum of a kind that is compared here."""
    client = aws.client("s3")
    head = client.head_object(Bucket=one.bucket, Key=one.key, ChecksumMode="ENABLED")
    encrypted = str(head.get("ServerSideEncryption", "")).startswith("aws:kms")
    for expected, digest in (
        (head.get("ChecksumSHA256"), _sha256),
        (head.get("ChecksumCRC32"), _crc32),
        (None if encrypted or head.get("SSECustomerAlgorithm") else one.etag, _md5),
    ):
        if not expected:
            continue
        whole, _, parts = expected.partition("-")
        if not parts:
            return digest([_blocks(path, 0, one.size)], True) == expected
        if head.get("ChecksumType") == "FULL_OBJECT" and digest is not _md5:
            return digest([_blocks(path, 0, one.size)], True) == whole
        part = client.head_object(Bucket=one.bucket, Key=one.key, PartNumber=1)["ContentLength"]
        if part and -(-one.size // part) == int(parts):  # parts of one size, as every common client makes them
            pieces = [_blocks(path, start, min(part, one.size - start)) for start in range(0, one.size, part)]
            return digest(pieces, False) == whole
    return None


def _blocks(path: Path, start: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while length and (block := file.read(min(_BLOCK, length))):
            length -= len(block)
            yield block


def _hashed(new: Callable[[], Any], pieces: Sequence[Iterator[bytes]], whole: bool) -> bytes:
    """The digest of one piece, or that of the digests of several."""
    digests = []
    for piece in pieces:
        digest = new()
        for block in piece:
            digest.update(block)
        digests.append(digest.digest())
    if whole:
        return digests[0]
    outer = new()
    outer.update(b"".join(digests))
    return outer.digest()


class _Crc32:
    """zlib's, as hashlib has its digests."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, block: bytes) -> None:
        self._value = zlib.crc32(block, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


def _sha256(pieces: Sequence[Iterator[bytes]], whole: bool) -> str:
    return base64.b64encode(_hashed(hashlib.sha256, pieces, whole)).decode()


def _crc32(pieces: Sequence[Iterator[bytes]], whole: bool) -> str:
    return base64.b64encode(_hashed(_Crc32, pieces, whole)).decode()


def _md5(pieces: Sequence[Iterator[bytes]], whole: bool) -> str:
    return _hashed(lambda: hashlib.md5(usedforsecurity=False), pieces, whole).hex()
