"""Secrets in the settings of a job, which everybody who may describe the job can read. A secret found is named by its kind, never shown.

A job is refused for what is found: patterns are those that nothing but a key has, and a name such as API_KEY counts only with a value
that could be one. Hashes, paths, ARNs, model names and prose pass. (What is taken out of training texts is `gpt.data.redaction`'s.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

_KINDS = (
    ("an AWS access key", re.compile(r"(?<![A-Za-z0-9+])(?:AKIA|ASIA)[A-Z2-7]{16}(?![A-Za-z0-9+])")),
    ("a Hugging Face token", re.compile(r"(?<![A-Za-z0-9_])hf_(?=[a-z0-9]*[A-Z])(?=[A-Z0-9]*[a-z])[A-Za-z0-9]{30,40}(?![A-Za-z0-9_])")),
    ("a GitHub token", re.compile(r"(?<![A-Za-z0-9_])(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59})(?!\w)")),
    ("a GitLab token", re.compile(r"(?<![\w-])glpat-[\w-]{20,50}(?![\w-])")),
    ("a Weights & Biases key", re.compile(r"(?<![A-Za-z0-9_])wandb_v\d_[A-Za-z0-9_]{30,}")),
    ("a private key", re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")),
    ("a signed token (JWT)", re.compile(r"(?<![\w-])eyJ[\w-]{10,}+\.eyJ[\w-]{10,}+\.[\w-]{10,}")),
    ("an API key", re.compile(
        r"(?<![\w-])(?:sk-(?:proj-|ant-)?(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{32,200}|AIza[\w-]{35}|xox[abeprs]-\d[A-Za-z0-9-]{20,200}"
        r"|[srp]k_live_[A-Za-z0-9]{16,200}|npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{50,250})(?![\w-])"
    )),
    ("a password in a URL", re.compile(r"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{0,20}+://[^\s:/@\"']{1,64}:(?![*$<{])[^\s/@\"']{1,128}@[\w.-]+")),
    ("a secret", re.compile(
        r"(?i:(?:secret_?access_?key|api_?key|(?:access|auth)_?token|client_?secret|password)[\"']?\s{0,3}[=:]\s{0,3}[\"']?)"
        r"(?=[A-Za-z0-9/+_-]*\d)(?=[A-Za-z0-9/+_-]*[A-Za-z])[A-Za-z0-9/+_-]{16,}+(?![\w(.])"
    )),
)  # fmt: skip
_SAYS_SO = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey", "token"}
_KEYS = {"api", "access", "private", "secret", "auth", "signing", "encryption"}  # followed by `key`
_POINTS_ELSEWHERE = {"file", "path", "dir", "arn", "uri", "url", "name", "type", "format", "length", "limit", "count", "id", "ids"}
_OF_A_VOCABULARY = {"pad", "eos", "bos", "unk", "mask", "sep", "cls", "special", "image", "start", "end", "stop", "text"}  # before `token`
_NO_SECRET = re.compile(
    r"|\d{1,6}|(?i:true|false|yes|no|on|off|none|null|auto)|[<$%{*].*|\[.*\]|arn:.*|\w+://[^@]*|[~.]?/.*|<\|.*\|>", re.DOTALL
)


def secret_in(name: str, value: str) -> str | None:
    """What kind of secret a setting is, or None.

    Args:
        name: of the variable, the tag or the key.
        value: what it is set to.
    """
    if kind := secret_in_text(value):
        return kind
    words = [word for word in re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()) if word]
    if not words or words[-1] in _POINTS_ELSEWHERE or _NO_SECRET.fullmatch(value):
        return None
    named = _SAYS_SO & set(words)
    if words[-1] != "token" or _OF_A_VOCABULARY & set(words):
        named -= {"token"}
    if any(first in _KEYS and second == "key" for first, second in pairwise(words)):
        named |= {"key"}
    if "token" in named or "key" in named:
        return "a key or token" if re.fullmatch(r"[\w/+=.:~-]{12,}", value) else None
    return "a password or secret" if named else None


def secret_in_text(text: str) -> str | None:
    """What kind of secret stands in a text, or None."""
    return next((kind for kind, pattern in _KINDS if pattern.search(text)), None)


def texts_of(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text below a plain value, with its dotted key: `launch.tags.team`, `data.paths[0]`."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from texts_of(item, f"{path}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from texts_of(item, f"{path}[{number}]")
