"""Secrets in settings are found; hashes, paths, names and prose are not taken for one."""

from __future__ import annotations

import re

import pytest

from gpt.aws.secret_scan import secret_in, secret_in_text, texts_of
from gpt.config import RunConfig

HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("AKIAIOSFODNN7EXAMPLE", "an AWS access key"),
        ("keys: ASIAY34FZKBOKMUTVV7A.", "an AWS access key"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "a secret"),
        ("hf_" + "aBcDeFgHiJkLmNoPq" * 2, "a Hugging Face token"),
        ("ghp_" + "a1" * 18, "a GitHub token"),
        ("https://github_pat_" + "A1" * 11 + "_" + "b2" * 29 + "c@github.com", "a GitHub token"),
        ("glpat-" + "x1" * 10, "a GitLab token"),
        ("wandb_v1_" + "aB3_" * 10, "a Weights & Biases key"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE", "a private key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N", "a signed token (JWT)"),
        ("sk-proj-" + "Ab3_" * 12, "an API key"),
        ("AIza" + "Sy0-_" * 7, "an API key"),
        ("postgresql://me:s3cr3t@db.example.com/runs", "a password in a URL"),
        ("api_key=9f8e7d6c5b4a39281706abcd", "a secret"),
    ],
)
def test_what_only_a_key_looks_like(text, kind):
    assert secret_in_text(text) == kind
    assert secret_in("note", text) == kind


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_API_KEY", HEX), ("wandb_api_key", HEX), ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
        ("AWS_SESSION_TOKEN", "IQoJb3JpZ2luX2VjEJr+/wEaCXVz"), ("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE"),
        ("HF_TOKEN", "abcdefghijklmnop"),
        ("DB_PASSWORD", "hunter2"), ("password", "correct horse battery staple"), ("MLFLOW_TRACKING_PASSWORD", "x9"),
        ("CLIENT_SECRET", "shh-not-this"), ("myApiKey", "a1b2c3d4e5f6g7h8"), ("SSH_PRIVATE_KEY", "b3BlbnNzaC1rZXktdjEAAAAA"),
        ("SERVICE_CREDENTIALS", "user=a pass=b"), ("COMET_APIKEY", "a1b2c3d4e5f6"),
    ],
)  # fmt: skip
def test_a_name_that_says_so_with_a_value_that_can_be(name, value):
    assert secret_in(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # names that only sound like it
        ("TOKENIZERS_PARALLELISM", "false"), ("MAX_TOKENS", "100000000000"), ("PAD_TOKEN", "this_is_the_padding"),
        ("EOS_TOKEN", "<|endoftext|>"),
        ("TOKEN_COUNT", "123456789012345"), ("SECRET_NAME", "prod/training/wandb"), ("API_KEY_FILE", "/opt/ml/input/data/keys/wandb"),
        ("WANDB_API_KEY_SECRET_ARN", "arn:aws:secretsmanager:eu-west-1:123456789012:secret:wandb-AbCdEf"), ("PASSWORD_LENGTH", "16"),
        ("KEYBOARD", "qwertzuiopasdfgh"), ("NCCL_DEBUG", "INFO"), ("PARTITION_KEY", "customer-number-2026"), ("MONKEY", "abcdefghijklmnop"),
        ("PRIMARY_KEY", "identifier_of_row"), ("KEY", "value-of-something"), ("SECRETARY", "Frau Schmidt"), ("passwordless", "ssh-login"),
        # values that are none
        ("API_KEY", ""), ("USE_AUTH_TOKEN", "true"), ("HF_TOKEN", "${HF_TOKEN}"), ("HF_TOKEN", "<your token>"), ("DB_PASSWORD", "***"),
        ("WANDB_API_KEY", "none"), ("GOOGLE_APPLICATION_CREDENTIALS", "/opt/ml/input/data/gcp.json"), ("A_SECRET", "s3://bucket/key"),
        ("A_SECRET", "arn:aws:secretsmanager:eu-west-1:123456789012:secret:x"),
        # texts
        ("GIT_COMMIT", HEX), ("SHA256", HEX + HEX[:24]), ("run", "pretrain-20261122-033000-abcd"),
        ("MODEL", "hf-internal-testing/tiny-random-gpt2"),
        ("MODEL", "hf_internal_testing_tiny_random_llama_for_causal"), ("LOWER", "hf_" + "abcdefghij" * 4),
        ("region", "ASIAPACIFIC"), ("name", "XAKIAIOSFODNN7EXAMPLE"), ("name", "AKIAIOSFODNN7EXAMPLEX"),
        ("name", "sk-learn-model-for-classification-2"),
        ("name", "task-0123456789ABCDEF0123456789abcdef"), ("note", "the password is in the vault"),
        ("note", "set api_key=<your key> first"),
        ("prompt", "def login(user, password=get_password_from_environment()):"), ("prompt", "token = tokenizer.encode(text)"),
        ("prompt", "api_key = os.environ.get('OPENAI_API_KEY')"), ("prompt", "-----BEGIN CERTIFICATE-----"),
        ("prompt", "-----BEGIN PUBLIC KEY-----"), ("url", "https://example.com:8080/a@b"), ("url", "https://user@example.com/repository"),
        ("url", "postgresql://me:${PASSWORD}@db/runs"), ("uri", "s3://bucket/eyJhbGciOiJIUzI1NiJ9/data"),
        ("image", "123456789012.dkr.ecr.eu-west-1.amazonaws.com/gpt@sha256:" + HEX + HEX[:24]),
        ("subnet", "subnet-0a1b2c3d4e5f67890"), ("kms", "arn:aws:kms:eu-west-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"),
    ],
)  # fmt: skip
def test_what_is_no_secret(name, value):
    assert secret_in(name, value) is None


def test_the_default_config_and_the_sources_of_the_package_have_none():
    from pathlib import Path

    import gpt

    assert [text for _, text in texts_of(RunConfig().to_dict()) if secret_in_text(text)] == []
    sources = [path for path in Path(gpt.__file__).parent.rglob("*.py") if path.name not in ("secret_scan.py", "redaction.py")]
    assert len(sources) > 100
    found = {path.name: secret_in_text(path.read_text(encoding="utf-8")) for path in sources}
    assert {name: kind for name, kind in found.items() if kind} == {}


def test_the_code_of_the_standard_library_has_none(stdlib_files):
    found = [path.name for path in stdlib_files if secret_in_text(path.read_text(encoding="utf-8"))]
    assert len(stdlib_files) > 50
    assert found == []


def test_every_text_has_its_key():
    value = {"launch": {"tags": {"team": "nlp"}, "subnets": ["a", "b"]}, "seed": 1, "init": None}
    assert dict(texts_of(value)) == {"launch.tags.team": "nlp", "launch.subnets[0]": "a", "launch.subnets[1]": "b"}


def test_a_long_text_takes_no_time():
    text = "password=" + "a" * 200_000 + "://" + "x:" * 100_000 + "eyJ" * 50_000
    assert secret_in_text(text) is None
    assert re.search("eyJ", text)
