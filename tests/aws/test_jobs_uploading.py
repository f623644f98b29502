"""Uploads: once, with the hash of what was sent, and what is said when S3 refuses."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from boto3.exceptions import S3UploadFailedError

from gpt.aws.shipping import Upload
from gpt.aws.uploading import split_uri, upload
from gpt.errors import UserError
from tests.aws.conftest import BUCKET
from tests.aws.job_standins import refusal

KEY_ARN = "arn:aws:kms:us-east-1:123456789012:key/11111111-2222-3333-4444-555555555555"


def source(name: str, content: bytes | Path) -> Upload:
    data = content if isinstance(content, bytes) else content.read_bytes()
    return Upload(f"s3://{BUCKET}/inputs/{name}", content, hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture
def files(tmp_path) -> list[Upload]:
    """One that is sent in parts, one that is not, an empty one, and bytes."""
    contents = {"large.bin": bytes(range(256)) * 70_000, "small é.txt": b"text", "empty": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return [*(source(name, tmp_path / name) for name in contents), source("wheel.whl", b"a wheel")]


def body(aws, upload: Upload) -> bytes:
    return aws.client("s3").get_object(Bucket=BUCKET, Key=upload.uri.partition(f"{BUCKET}/")[2])["Body"].read()


def test_what_is_there_is_not_sent_again(aws, files):
    said: list[str] = []
    assert upload(aws, files, None, said.append) == sum(one.size for one in files)
    assert [body(aws, one) for one in files] == [one.source if isinstance(one.source, bytes) else one.source.read_bytes() for one in files]
    assert said == ["upload: 4 of 4, 17.9 MB"]
    sent = aws.client("s3").list_objects_v2(Bucket=BUCKET)["Contents"]
    assert upload(aws, files, None, said.append) == 0
    assert said[1:] == ["upload: nothing, all 4 are there already"]
    again = aws.client("s3").list_objects_v2(Bucket=BUCKET)["Contents"]
    assert [one["LastModified"] for one in sent] == [one["LastModified"] for one in again]
    assert upload(aws, [*files, source("more", b"more")], None, said.append) == 4
    assert said[2:] == ["upload: 1 of 5, 4 B"]


def test_other_content_of_the_same_size_is_sent(aws):
    upload(aws, [source("config.yaml", b"lr: 1")], None, print)
    assert upload(aws, [source("config.yaml", b"lr: 2")], None, print) == 5
    assert body(aws, source("config.yaml", b"lr: 2")) == b"lr: 2"


def test_an_object_without_our_hash_is_not_trusted(aws):
    one = source("config.yaml", b"lr: 1")
    aws.client("s3").put_object(Bucket=BUCKET, Key="inputs/config.yaml", Body=b"lr: 7")
    assert upload(aws, [one], None, print) == 5


def test_the_same_uri_twice_is_sent_once(aws):
    assert upload(aws, [source("a", b"text"), source("a", b"text")], None, print) == 4


def test_the_key_of_uploads_encrypts_each(aws, files):
    upload(aws, files, KEY_ARN, print)
    for one in files:
        head = aws.client("s3").head_object(Bucket=BUCKET, Key=one.uri.partition(f"{BUCKET}/")[2])
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", KEY_ARN)


def test_a_file_that_changes_while_it_is_sent_is_refused_and_sent_again(aws, tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(b"before")
    one = source("data.txt", path)
    path.write_bytes(b"and now more")
    with pytest.raises(UserError, match=r"data\.txt changed while it was uploaded: 6 bytes before, 12 in S3"):
        upload(aws, [one], None, print)
    path.write_bytes(b"before")
    upload(aws, [one], None, print)
    assert aws.client("s3").get_object(Bucket=BUCKET, Key=split_uri(one.uri)[1])["Body"].read() == b"before"


def test_a_file_that_has_gone_is_named(aws, tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(b"before")
    one = source("data.txt", path)
    path.unlink()
    with pytest.raises(UserError, match=r"data\.txt cannot be read for the upload \(No such file"):
        upload(aws, [one], None, print)


def test_a_bucket_that_is_not_there(aws):
    other = Upload("s3://no-such-bucket/a", b"a", hashlib.sha256(b"a").hexdigest(), 1)
    with pytest.raises(UserError, match=r"^launch\.output: there is no bucket no-such-bucket; make it in us-east-1"):
        upload(aws, [other], None, print)


@pytest.mark.parametrize(
    ("code", "message", "said"),
    [
        ("AccessDenied", "Access Denied", r"you may not write s3://training-bucket/inputs/a \(AccessDenied\).*s3:PutObject"),
        ("AccessDenied", "not authorized to perform: kms:GenerateDataKey", r"cannot be written: AccessDenied: .*kms:GenerateDataKey and"),
        (
            "KMS.DisabledException",
            "the key is disabled",
            r"cannot be written: KMS\.DisabledException: the key is disabled\. A KMS key refuses",
        ),
        ("PermanentRedirect", "elsewhere", r"the bucket training-bucket is not in us-east-1"),
        ("QuotaExceeded", "The bucket is full", r"cannot be written: QuotaExceeded: The bucket is full"),
        ("ExpiredToken", "expired", r"ExpiredToken; log in again: aws configure sso"),
    ],
)
@pytest.mark.parametrize("parts", [True, False])
def test_what_is_said_when_s3_refuses(code, message, said, parts, tmp_path):
    (tmp_path / "a").write_bytes(b"a")

    def refuse(*_, **__):
        raise refusal(code, message)

    def refuse_transfer(*_, **__):
        try:
            refuse()
        except Exception as error:
            raise S3UploadFailedError(f"Failed to upload: {error}")  # noqa: B904 - as boto3 does

    def missing(*_, **__):
        raise refusal("404")

    client = SimpleNamespace(head_object=missing, put_object=refuse, upload_file=refuse_transfer)
    aws = SimpleNamespace(client=lambda _: client, region="us-east-1", session=None)
    one = source("a", tmp_path / "a" if parts else b"a")
    with pytest.raises(UserError, match=rf"^launch\.output: .*{said}"):
        upload(aws, [one], None, print)  # pyright: ignore[reportArgumentType]


def test_who_may_not_look_still_uploads(aws, monkeypatch):
    client = aws.client("s3")
    head, seen = client.head_object, []

    def refused_at_first(**asked):
        seen.append(asked)
        if len(seen) == 1:
            raise refusal("403", "Forbidden")
        return head(**asked)

    monkeypatch.setattr(client, "head_object", refused_at_first)
    assert upload(aws, [source("a", b"text")], None, print) == 4
