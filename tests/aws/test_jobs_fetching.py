"""Fetching a run: what is here is not brought again, what broke off goes on, and what arrives is checked."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import random
import shutil
import zlib
from types import SimpleNamespace

import pytest

from gpt.aws import fetching
from gpt.aws.fetching import Fetched, Remote, checks, fetch, weights_and_report
from gpt.errors import UserError
from tests.aws.conftest import BUCKET
from tests.aws.job_standins import refusal

RUN = f"s3://{BUCKET}/gpt/kmqz/checkpoints/kmqz"
PREFIX = "gpt/kmqz/checkpoints/kmqz/"
FILES = {
    "metrics.jsonl": b'{"step": 1}\n',
    "report.html": b"<html>",
    "empty": b"",
    "model/config.json": b"{}",
    "model/model.safetensors": random.Random(1).randbytes(3_000_000),
    "checkpoints/step-00000010/COMPLETE": b"{}",
}


@pytest.fixture
def there(aws):
    """A run in S3."""
    for name, content in FILES.items():
        aws.client("s3").put_object(Bucket=BUCKET, Key=PREFIX + name, Body=content)
    return aws


def everything(name: str) -> bool:
    return True


def names(directory) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def test_a_run_comes_home_and_is_not_brought_twice(there, tmp_path):
    done = fetch(there, RUN, tmp_path / "kmqz", everything, print)
    assert done == Fetched(6, sum(map(len, FILES.values())), 0, 0)
    assert names(tmp_path / "kmqz") == sorted(FILES)
    assert all((tmp_path / "kmqz" / name).read_bytes() == content for name, content in FILES.items())
    assert fetch(there, RUN, tmp_path / "kmqz", everything, print) == Fetched(0, 0, 6, 0)


def test_checkpoints_are_left_unless_wanted(there, tmp_path):
    assert fetch(there, RUN, tmp_path, weights_and_report, print).brought == 5
    assert not (tmp_path / "checkpoints").exists()


def test_what_has_changed_is_brought_again(there, tmp_path):
    fetch(there, RUN, tmp_path, everything, print)
    there.client("s3").put_object(Bucket=BUCKET, Key=PREFIX + "metrics.jsonl", Body=b'{"step": 2}\n')
    (tmp_path / "report.html").write_bytes(b"<HTML>")
    assert fetch(there, RUN, tmp_path, everything, print) == Fetched(2, 18, 4, 0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 2}\n'
    assert (tmp_path / "report.html").read_bytes() == b"<html>"


def test_the_config_of_this_machine_stays(there, tmp_path):
    for name in ("config.yaml", "job.json"):
        there.client("s3").put_object(Bucket=BUCKET, Key=PREFIX + name, Body=b"of the container")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.yaml").write_bytes(b"of this machine")
    fetch(there, RUN, tmp_path / "here", everything, print)
    assert (tmp_path / "here" / "config.yaml").read_bytes() == b"of this machine"
    fetch(there, RUN, tmp_path / "nothing here", everything, print)
    assert (tmp_path / "nothing here" / "config.yaml").read_bytes() == b"of the container"


@pytest.mark.parametrize("key", [".lock", ".metrics.jsonl.17", "model/.part", "../outside", "model/../../outside", "model/"])
def test_what_is_no_file_of_a_run_is_left(there, tmp_path, key):
    there.client("s3").put_object(Bucket=BUCKET, Key=PREFIX + key, Body=b"")
    assert fetch(there, RUN, tmp_path / "run", everything, print).brought == len(FILES)
    assert names(tmp_path) == sorted(f"run/{name}" for name in FILES)


def test_a_file_that_broke_off_goes_on_where_it_was(there, tmp_path, monkeypatch):
    content = FILES["model/model.safetensors"]
    client = there.client("s3")
    get, ranges = client.get_object, []

    def breaks(**asked):
        answer = get(**asked)
        ranges.append(asked["Range"])
        if len(ranges) == 1:
            blocks = [content[:1_000_000]]
            return {"Body": SimpleNamespace(iter_chunks=lambda size: broken(blocks))}
        return answer

    def broken(blocks):
        yield from blocks
        raise refusal("unreachable")

    monkeypatch.setattr(client, "get_object", breaks)
    fetch(there, RUN, tmp_path, lambda name: name.endswith(".safetensors"), print)
    assert ranges == ["bytes=0-", "bytes=1000000-"]
    assert (tmp_path / "model/model.safetensors").read_bytes() == content
    assert names(tmp_path) == ["model/model.safetensors"]


def test_an_interrupted_fetch_goes_on_in_the_next_call(there, tmp_path, monkeypatch):
    client = there.client("s3")
    get = client.get_object

    def interrupted(**asked):
        body = get(**asked)["Body"].read()

        def blocks(size):
            yield body[:1234]
            raise KeyboardInterrupt

        return {"Body": SimpleNamespace(iter_chunks=blocks)}

    monkeypatch.setattr(client, "get_object", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(there, RUN, tmp_path, lambda name: name.endswith(".safetensors"), print)
    (part,) = (tmp_path / "model").iterdir()
    assert part.stat().st_size == 1234
    ranges = []
    monkeypatch.setattr(client, "get_object", lambda **asked: ranges.append(asked["Range"]) or get(**asked))
    fetch(there, RUN, tmp_path, lambda name: name.endswith(".safetensors"), print)
    assert ranges == ["bytes=1234-"]
    assert (tmp_path / "model/model.safetensors").read_bytes() == FILES["model/model.safetensors"]


def test_a_part_of_other_content_is_not_gone_on_with(there, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".model.safetensors.0123-old.part").write_bytes(b"of an earlier model")
    fetch(there, RUN, tmp_path, everything, print)
    assert names(tmp_path) == sorted(FILES)


def test_a_damaged_part_is_thrown_away(there, tmp_path):
    (entry,) = there.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=PREFIX + "metrics")["Contents"]
    part = tmp_path / f".metrics.jsonl.{entry['ETag'].strip(chr(34))}.part"
    part.write_bytes(b'{"stop"')
    fetch(there, RUN, tmp_path, everything, print)
    assert (tmp_path / "metrics.jsonl").read_bytes() == FILES["metrics.jsonl"]


def test_what_never_arrives_whole_is_an_error(there, tmp_path, monkeypatch):
    monkeypatch.setattr(
        there.client("s3"), "get_object", lambda **_: {"Body": SimpleNamespace(iter_chunks=lambda size: [b"wrong content"])}
    )
    with pytest.raises(UserError, match=r"metrics\.jsonl: what arrives is not what lies there \(5 times\)"):
        fetch(there, RUN, tmp_path, lambda name: name == "metrics.jsonl", print)
    assert names(tmp_path) == []


def test_an_object_that_changes_under_way_is_said(there, tmp_path, monkeypatch):
    def changed(**_):
        raise refusal("PreconditionFailed")

    monkeypatch.setattr(there.client("s3"), "get_object", changed)
    with pytest.raises(UserError, match="changed while it was fetched, as of a run that goes on; fetch again"):
        fetch(there, RUN, tmp_path, everything, print)


def test_a_disk_without_room_is_said_before_anything_is_brought(there, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match=r"3\.0 MB are to come, and the disk has 1\.0 MB free; make room, or fetch with dir="):
        fetch(there, RUN, tmp_path / "run", everything, print)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_is_said_and_what_came_is_kept(there, tmp_path, monkeypatch):
    real = os.fsync

    def full(number):
        real(number)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching.os, "fsync", full)
    with pytest.raises(UserError, match=r"model\.safetensors: the disk is full; make room and call gpt jobs fetch again"):
        fetch(there, RUN, tmp_path, lambda name: name.endswith(".safetensors"), print)
    (part,) = (tmp_path / "model").iterdir()
    assert part.stat().st_size == 3_000_000


def test_a_refusal_is_one_line(there, tmp_path):
    with pytest.raises(UserError, match=r"^gpt jobs fetch: s3://no-such-bucket/run: NoSuchBucket: .*See that the bucket"):
        fetch(there, "s3://no-such-bucket/run", tmp_path, everything, print)


# Checksums

CONTENT = random.Random(2).randbytes(2_500_000)
PART = 1_000_000
PIECES = [CONTENT[start : start + PART] for start in range(0, len(CONTENT), PART)]


def b64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def crc(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "big")


@pytest.mark.parametrize(
    ("etag", "head", "known"),
    [
        (hashlib.md5(CONTENT).hexdigest(), {}, True),
        (f"{hashlib.md5(b''.join(hashlib.md5(piece).digest() for piece in PIECES)).hexdigest()}-3", {}, True),
        ("x", {"ChecksumSHA256": b64(hashlib.sha256(CONTENT).digest()), "ChecksumType": "FULL_OBJECT"}, True),
        ("x", {"ChecksumSHA256": b64(hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in PIECES)).digest()) + "-3"}, True),
        ("x", {"ChecksumCRC32": b64(crc(CONTENT)), "ChecksumType": "FULL_OBJECT"}, True),
        ("x", {"ChecksumCRC32": b64(crc(b"".join(map(crc, PIECES)))) + "-3", "ChecksumType": "COMPOSITE"}, True),
        ("x-3", {"ServerSideEncryption": "aws:kms", "ChecksumCRC32": b64(crc(CONTENT))}, True),
        (hashlib.md5(b"the encrypted bytes").hexdigest(), {"ServerSideEncryption": "aws:kms"}, None),
        ("x-7", {}, None),
    ],
)
def test_each_kind_of_checksum_tells_right_from_wrong(etag, head, known, tmp_path):
    def head_object(**asked):
        return {**head, "ContentLength": PART if "PartNumber" in asked else len(CONTENT)}

    aws = SimpleNamespace(client=lambda _: SimpleNamespace(head_object=head_object))
    path = tmp_path / "file"
    one = Remote(BUCKET, "key", len(CONTENT), etag, 0.0, path)
    path.write_bytes(CONTENT)
    assert checks(aws, one, path) is known
    wrong = bytearray(CONTENT)
    wrong[-1] ^= 1
    path.write_bytes(wrong)
    assert checks(aws, one, path) is (None if known is None else False)


def test_without_a_checksum_size_and_time_must_do(there, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "checks", lambda *_: None)
    assert fetch(there, RUN, tmp_path, everything, print).by_size == 6
    assert fetch(there, RUN, tmp_path, everything, print) == Fetched(0, 0, 6, 0)
    os.utime(tmp_path / "report.html", (1, 1))
    assert fetch(there, RUN, tmp_path, everything, print).brought == 1
