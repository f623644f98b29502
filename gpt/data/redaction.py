"""Secrets and personal data in text, replaced by their kind in brackets: "write to [EMAIL]".

Patterns find candidates in time linear in the text (bounded or possessive repeats only), and what has a check digit or a structure
is checked before it is replaced. What looks like a secret and is not costs a word; what is missed stays in the model: where in doubt,
it is replaced."""

from __future__ import annotations

import base64
import ipaddress
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.data.sources import Row

# Characters of an IBAN by country (SWIFT IBAN registry, release 99).
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BI": 27, "BR": 29, "BY": 28, "CH": 21,
    "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FK": 18, "FO": 18,
    "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HN": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23,
    "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27,
    "MD": 24, "ME": 22, "MK": 19, "MN": 20, "MR": 27, "MT": 31, "MU": 30, "NI": 28, "NL": 18, "NO": 15, "OM": 23, "PK": 24, "PL": 28,
    "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24, "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27,
    "SO": 23, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20, "YE": 30,
}  # fmt: skip
_CARDS = re.compile(r"4|5[1-5]|2[2-7]|3[0-9]|6(?:011|2|4[4-9]|5)")  # the first digits that networks have
_PLACEHOLDERS = "[{<$%("  # of a template, not a secret; or replaced already


def _all(candidate: str) -> int:
    return len(candidate)


def _ipv4(candidate: str) -> int:
    try:
        ipaddress.IPv4Address(candidate)
    except ValueError:
        return 0
    return len(candidate)


def _ipv6(candidate: str) -> int:
    """With fewer than three groups, as in `a[1::2]`, it is hardly an address of anyone."""
    found = candidate.rstrip(".:") if not candidate.endswith("::") else candidate
    if len([group for group in found.split(":") if group]) < 3:
        return 0
    try:
        ipaddress.IPv6Address(found)
    except ValueError:
        return 0
    return len(found)


def _luhn(candidate: str) -> int:
    digits = [int(c) for c in candidate if c.isdigit()]
    doubled = sum(sum(divmod(2 * d, 10)) for d in digits[-2::-2])
    known = len(digits) >= 13 and _CARDS.match("".join(map(str, digits)))
    return len(candidate) if known and (doubled + sum(digits[::-2])) % 10 == 0 else 0


def _iban(candidate: str) -> int:
    """The candidate may run on into the next word; the country tells the length."""
    wanted = _IBAN_LENGTHS.get(candidate[:2], 0)
    places = [i for i, c in enumerate(candidate) if c != " "]
    if not wanted or len(places) < wanted:
        return 0
    length = places[wanted - 1] + 1
    if candidate[length : length + 1].isalnum():
        return 0
    plain = candidate[:length].replace(" ", "")
    return length if int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1 else 0


def _jwt(candidate: str) -> int:
    head = candidate.partition(".")[0]
    try:
        header = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except ValueError:
        return 0
    return len(candidate) if isinstance(header, dict) and "alg" in header else 0


def _random(candidate: str) -> int:
    """Keys have letters and digits; names of settings have no digits."""
    return len(candidate) if re.search(r"\d", candidate) and re.search(r"[A-Za-z]", candidate) else 0


def _literal(candidate: str) -> int:
    return 0 if candidate[0] in _PLACEHOLDERS else len(candidate)


@dataclass(frozen=True)
class _Rule:
    """`pattern`'s group that took part, or all of it, is replaced as far as `check` says; texts without any of `hints` need no search."""

    kind: str
    pattern: re.Pattern[str]
    check: Callable[[str], int] = _all
    hints: tuple[str, ...] = ()


_LABEL = r"[^\W_](?:[\w-]{0,61}[^\W_])?"
# In the order in which they are applied: what holds others first (a password in a URL looks like an email address).
_RULES = (
    _Rule("private_key", re.compile(
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----[^-]*+(?:-(?!----)[^-]*+)*+"
        r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    ), hints=("-----BEGIN",)),
    _Rule("jwt", re.compile(r"(?<![\w-])eyJ[\w-]{10,4000}+\.eyJ[\w-]{10,8000}+\.[\w-]{10,1000}+", re.ASCII), _jwt, ("eyJ",)),
    _Rule("github_token", re.compile(r"(?<!\w)(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59})(?!\w)"),
          hints=("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_")),
    _Rule("aws_key", re.compile(r"(?<![A-Za-z0-9])(?:A3T[A-Z0-9]|AKIA|ASIA|AGPA|AIDA|AROA|ANPA|ANVA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
          hints=("A3T", "AKIA", "ASIA", "AGPA", "AIDA", "AROA", "ANPA", "ANVA", "ABIA", "ACCA")),
    _Rule("aws_key", re.compile(r"(?i:secret_?access_?key)[\"']?\s{0,5}[=:]\s{0,5}[\"']?([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+])"),
          hints=("ccess", "CCESS")),
    _Rule("api_key", re.compile(
        r"(?<![\w-])(?:sk-[\w-]{20,200}|AIza[\w-]{35}|xox[abeprs]-[A-Za-z0-9-]{10,200}|[srp]k_(?:live|test)_[A-Za-z0-9]{16,200}|hf_[A-Za-z0-9]{30,40}"
        r"|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,250}|SG\.[\w-]{22}\.[\w-]{43}|glpat-[\w-]{20,50})", re.ASCII
    ), _random, ("sk-", "AIza", "xox", "k_live", "k_test", "hf_", "npm_", "pypi-", "SG.", "glpat-")),
    _Rule("api_key", re.compile(
        r"(?i:api_?-?key|(?:access|auth)[_-]?token|secret[_-]?key|client[_-]?secret)[\"']?\s{0,5}(?:[=:]|:=|=>)\s{0,5}[\"']?"
        r"([\w./+=-]{16,256})(?![\w./+=-])", re.ASCII
    ), _random, ("ey", "EY", "oken", "OKEN", "ecret", "ECRET")),
    _Rule("password", re.compile(
        r"(?i:passw(?:or)?d|pwd|passphrase)[\"']?\s{0,5}(?:[=:]|:=|=>)\s{0,5}(?:\"([^\"\n]{4,128})\"|'([^'\n]{4,128})')"
    ), _literal, ("ass", "ASS", "wd", "WD")),
    _Rule("password", re.compile(r"(?m)PASSW(?:OR)?D=([^\s\"']{4,128})$"), _literal, ("PASSW",)),
    _Rule("password", re.compile(r"://[^\s:/@\"']{1,64}:([^\s/@\"']{1,128})@"), _literal, ("://",)),
    _Rule("email", re.compile(
        rf"(?<![\w.%+-])[\w.!#$%&'*+/=?^`{{|}}~-]{{1,64}}@(?:{_LABEL}\.){{1,10}}[^\W\d_]{{2,24}}(?![\w@])"
    ), hints=("@",)),
    _Rule("iban", re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?"), _iban),
    _Rule("credit_card", re.compile(
        r"(?<![\w.-])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{4,5}|\d{13,19})(?!\w|\.\d)", re.ASCII
    ), _luhn),
    _Rule("ip", re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{1,40}+(?:\.\d{1,3}){0,3}(?!\w)", re.ASCII), _ipv6, (":",)),
    _Rule("ip", re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)", re.ASCII), _ipv4, (".",)),
    _Rule("phone", re.compile(r"(?<![\w+])\+[1-9](?:[ .()/-]{0,2}\d){6,14}(?!\d)", re.ASCII), hints=("+",)),
    _Rule("phone", re.compile(r"(?<![\w.+-])(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[.-])[2-9]\d{2}[.-]\d{4}(?!\w|[.-]\d)", re.ASCII)),
)  # fmt: skip
_WHOLE_MATCH = {"credit_card"}  # whose groups only tell the separators apart


class Redactor:
    """Replaces kinds of secrets and personal data in texts.

    Args:
        kinds: of gpt.data.config.REDACTIONS.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = frozenset(kinds)

    def text(self, text: str, counts: Counter[str]) -> str:
        """The text with what was found replaced; `counts` grows by `redacted_<kind>`."""
        for rule in _RULES:
            if rule.kind in self.kinds and (not rule.hints or any(hint in text for hint in rule.hints)):
                text = _apply(rule, text, counts)
        return text

    def row(self, row: Row, counts: Counter[str]) -> Row:
        """The row with all its texts redacted; labels, tags and roles are left as they are."""
        values = {key: value if key in ("label", "tags") else self._value(value, counts) for key, value in row.values.items()}
        return replace(row, values=values)

    def _value(self, value: Any, counts: Counter[str]) -> Any:
        if isinstance(value, str):
            return self.text(value, counts)
        if isinstance(value, list):
            return [self._value(v, counts) for v in value]
        if isinstance(value, dict):
            return {k: v if k == "role" else self._value(v, counts) for k, v in value.items()}
        return value


def _apply(rule: _Rule, text: str, counts: Counter[str]) -> str:
    parts: list[str] = []
    done = 0
    for match in rule.pattern.finditer(text):
        group = 0 if rule.kind in _WHOLE_MATCH else match.lastindex or 0
        start = match.start(group)
        if length := rule.check(match[group]):
            parts += (text[done:start], f"[{rule.kind.upper()}]")
            done = start + length
            counts[f"redacted_{rule.kind}"] += 1
    return "".join((*parts, text[done:])) if parts else text
