"""The policies of docs/aws are valid, each of their actions has a reason in docs/sagemaker.md, and what the code calls is allowed."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import botocore
import botocore.loaders
import pytest

ROOT = Path(__file__).parents[2]
POLICIES = ("submitter-policy", "job-role-policy")
# What a method of a boto3 client needs; those of S3's transfer are named as boto3 calls them.
NEEDS = {
    "create_training_job": {"sagemaker:CreateTrainingJob", "sagemaker:AddTags", "iam:PassRole"},
    "describe_training_job": {"sagemaker:DescribeTrainingJob"},
    "stop_training_job": {"sagemaker:StopTrainingJob"},
    "list_training_jobs": {"sagemaker:ListTrainingJobs"},
    "list_tags": {"sagemaker:ListTags"},
    "describe_log_streams": {"logs:DescribeLogStreams"},
    "get_log_events": {"logs:GetLogEvents"},
    "list_objects_v2": {"s3:ListBucket"},
    "head_object": {"s3:GetObject"},
    "get_object": {"s3:GetObject"},
    "download_fileobj": {"s3:GetObject"},
    "upload_file": {"s3:PutObject", "s3:AbortMultipartUpload"},
    "upload_fileobj": {"s3:PutObject", "s3:AbortMultipartUpload"},
    "put_object": {"s3:PutObject"},
}


def statements(name: str) -> list[dict]:
    policy = json.loads((ROOT / f"docs/aws/{name}.json").read_text(encoding="utf-8"))
    assert policy["Version"] == "2012-10-17"
    return policy["Statement"]


def actions(name: str) -> set[str]:
    return {action for statement in statements(name) for action in statement["Action"]}


@pytest.mark.parametrize("name", POLICIES)
def test_every_action_has_a_reason_and_none_is_a_wildcard(name):
    table = (ROOT / "docs/sagemaker.md").read_text(encoding="utf-8").partition(f"[{name}.json]")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+:\w+)`", table)) == actions(name)
    assert not any("*" in action for action in actions(name))
    assert len({statement["Sid"] for statement in statements(name)}) == len(statements(name))


def test_the_submitter_may_do_what_the_code_does_and_no_more():
    loader = botocore.loaders.Loader()
    operations = {
        botocore.xform_name(operation)
        for name in ("sagemaker", "s3", "logs")
        for operation in loader.load_service_model(name, "service-2")["operations"]
    } | {"download_fileobj", "upload_file", "upload_fileobj"}
    operations.remove("search")  # which `re` has too
    called = set()
    for file in (ROOT / "gpt/aws").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in operations:
                called.add(node.attr)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get_paginator":
                assert isinstance(node.args[0], ast.Constant)
                called.add(str(node.args[0].value))
    needed = set().union(*(NEEDS[name] for name in called))
    assert needed | {"kms:GenerateDataKey", "kms:Decrypt"} == actions("submitter-policy"), called


def test_only_sagemaker_of_this_account_takes_the_role():
    (trust,) = json.loads((ROOT / "docs/aws/job-role-trust.json").read_text(encoding="utf-8"))["Statement"]
    assert trust["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    assert "aws:SourceAccount" in trust["Condition"]["StringEquals"]
