import base64
import json
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data.config import REDACTIONS
from gpt.data.redaction import Redactor
from gpt.data.sources import Row


def redact(text: str, *kinds: str) -> tuple[str, dict[str, int]]:
    counts: Counter[str] = Counter()
    return Redactor(kinds or REDACTIONS).text(text, counts), {name.removeprefix("redacted_"): n for name, n in counts.items()}


def b64(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


JWT = f"{b64({'alg': 'HS256', 'typ': 'JWT'})}.{b64({'sub': '1234567890'})}.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV"
KEY = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEowIBAAKCAQEAx+/=\nabc-def\n-----END RSA PRIVATE KEY-----"
# Assembled here, so that nothing that scans this repository takes them for real ones.
GITHUB, AWS = "ghp_" + "a1B2" * 9, "AKIA" + "IOSFODNN7EXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY"

FOUND = [
    ("email", "write to jane.doe+x@mail.example.co.uk, soon", "write to [EMAIL], soon"),
    ("email", "<a@b.de>", "<[EMAIL]>"),
    ("email", "müller@bücher.example", "[EMAIL]"),
    ("ip", "from 192.168.0.1.", "from [IP]."),
    ("ip", "10.0.0.255:8080", "[IP]:8080"),
    ("ip", "at 2001:db8:85a3::8a2e:370:7334, ok", "at [IP], ok"),
    ("ip", "2001:0db8:0000:0000:0000:ff00:0042:8329", "[IP]"),
    ("ip", "::ffff:c000:280: an address", "[IP]: an address"),
    ("ip", "64:ff9b:1::192.0.2.33", "[IP]"),
    ("phone", "call +49 30 901820 now", "call [PHONE] now"),
    ("phone", "+1 (555) 123-4567", "[PHONE]"),
    ("phone", "(555) 234-5678 or 555-234-5678", "[PHONE] or [PHONE]"),
    ("credit_card", "4111 1111 1111 1111", "[CREDIT_CARD]"),
    ("credit_card", "12 5500-0000-0000-0004;", "12 [CREDIT_CARD];"),
    ("credit_card", "378282246310005", "[CREDIT_CARD]"),
    ("credit_card", "3782 822463 10005", "[CREDIT_CARD]"),
    ("iban", "DE89 3704 0044 0532 0130 00 AND MORE", "[IBAN] AND MORE"),
    ("iban", "GB82WEST12345698765432.", "[IBAN]."),
    ("iban", "NO93 8601 1117 947", "[IBAN]"),
    ("aws_key", f"id={AWS}", "id=[AWS_KEY]"),
    ("aws_key", f'"SecretAccessKey": "{SECRET}"', '"SecretAccessKey": "[AWS_KEY]"'),
    ("aws_key", f"aws_secret_access_key = {SECRET}\n", "aws_secret_access_key = [AWS_KEY]\n"),
    ("github_token", f"token {GITHUB}!", "token [GITHUB_TOKEN]!"),
    ("api_key", "sk-" + "abc123DEF" * 4, "[API_KEY]"),
    ("api_key", "API_KEY = 'f00ba4f00ba4f00ba4'", "API_KEY = '[API_KEY]'"),
    ("api_key", '"access_token": "a1b2c3d4e5f6g7h8"', '"access_token": "[API_KEY]"'),
    ("private_key", f"x\n{KEY}\ny", "x\n[PRIVATE_KEY]\ny"),
    ("jwt", f"Bearer {JWT}\n", "Bearer [JWT]\n"),
    ("password", 'password = "hunter22"', 'password = "[PASSWORD]"'),
    ("password", "{'db_passwd': 'hunter22'}", "{'db_passwd': '[PASSWORD]'}"),
    ("password", "export DB_PASSWORD=hunter22\n", "export DB_PASSWORD=[PASSWORD]\n"),
    ("password", "postgres://me:s3cret@host/db", "postgres://me:[PASSWORD]@host/db"),
]
LEFT = [
    ("email", "@functools.wraps(f)\nuser@host x@y.z a@b..de @ home.de"),
    ("ip", "1.2.3 1.2.3.4.5 300.1.2.3 01.2.3.4 v1.2.3.4x"),
    ("ip", "a[::2] a[1::2] 12:30:45 std::vector<int> 00:1B:44:11:3A:B7 dict: {1:2} ::1 x::y::z a:b:c:d:e"),
    ("phone", "12345678 2024-01-31 555-1234 1.5e+10 x+15551234567890123456 111-234-5678"),
    ("credit_card", "4111 1111 1111 1112 0.4111111111111111 1234567890123456 41111111111111111111111 x4111111111111111"),
    ("iban", "DE89 3704 0044 0532 0130 01 XX89370400440532013000 DE89370400440532013000123 ABCD"),
    ("aws_key", "AKIAIOSFODNN7 XAKIAIOSFODNN7EXAMPLE secret_access_key = config.get('secret')"),
    ("github_token", "ghp_short gh_token " + "x" + GITHUB),
    ("api_key", "api_key = get_key_from_the_environment  api_key: str  task-force-of-many-people-in-the-field-1"),
    ("private_key", '"-----BEGIN PRIVATE KEY-----" starts a key, and -----END PUBLIC KEY----- no'),
    ("jwt", "eyJhbGciOi.eyJzdWIiOiIx.abc eyJub3QgYSBqd3QK.eyJub3QgYSBqd3QK.SflKxwRJSMeKKF2QT4"),
    ("password", "password: str = \"\" password = '${PASSWORD}' passwords are 'secret' https://example.com:80/a@b"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "expected"), FOUND, ids=lambda v: v[:24])
def test_what_is_found_is_replaced_and_counted(kind, text, expected):
    redacted, counts = redact(text, kind)
    assert redacted == expected
    assert counts == {kind: expected.count(f"[{kind.upper()}]")}


@pytest.mark.parametrize(("kind", "text"), LEFT, ids=lambda v: v[:24])
def test_what_only_looks_like_it_is_left(kind, text):
    assert redact(text, kind) == (text, {})


def test_only_the_kinds_that_are_asked_for():
    text = " ".join(text for _, text, _ in FOUND)
    for kind in REDACTIONS:
        assert set(redact(text, kind)[1]) == {kind}
    assert redact(text, *[k for k in REDACTIONS if k != "email"])[1].get("email") is None


def test_what_holds_another_kind_counts_as_the_whole():
    assert redact("https://me:s3cret@example.com/x") == ("https://me:[PASSWORD]@example.com/x", {"password": 1})


@pytest.mark.parametrize(("kind", "text", "expected"), FOUND, ids=lambda v: v[:24])
def test_a_second_time_finds_nothing(kind, text, expected):
    assert redact(expected) == (expected, {})


@given(st.text(alphabet="aA1.@:-+ []()/=\"'\n_kpwdé%", max_size=200))
def test_any_text_gets_an_answer_and_only_what_was_found_changes(text):
    redacted, counts = redact(text)
    if not counts:
        assert redacted == text
    assert sum(counts.values()) <= sum(redacted.count(f"[{kind.upper()}]") for kind in REDACTIONS)


@given(st.integers(0, 10**15 - 1), st.sampled_from("45"))
def test_of_ten_check_digits_one_makes_a_card(number, first):
    stem = f"{first}{first if first == '5' else 0}{number % 10**13:013d}"
    assert sum(redact(f"{stem}{digit}", "credit_card")[1].get("credit_card", 0) for digit in range(10)) == 1


@pytest.mark.parametrize("kind", REDACTIONS)
def test_the_time_is_linear_in_the_text(kind):
    """Runs that make a careless expression look again at what it has seen: eight times the text takes about eight times as long."""
    begin = "-----BEGIN PRIVATE KEY-----"
    hard = [
        "a", "a.", "a@", "@a.", "1", "1 ", "1.", "1:", "::", "f:", "-", begin, f"{begin}a-", "eyJ", "eyJa.eyJ", "password='", "password=",
        "://a:", "api_key=a", "sk-", "AKIA", "+1 ", "+", "DE89 3704 ", "A", "ghp_a", " ", "secret_access_key=", "a@a.a-", "PASSWORD=a",
        "[", "4111 1111 ",
    ]  # fmt: skip
    redactor = Redactor([kind])
    for piece in hard:
        short, long = piece * (20_000 // len(piece)), piece * (160_000 // len(piece))
        started = time.thread_time()
        redactor.text(short, Counter())
        between = time.thread_time()
        redactor.text(long, Counter())
        assert time.thread_time() - between < 0.15 + 24 * (between - started), piece
        assert time.thread_time() - between < 1.5, piece


def test_rows_of_examples_keep_their_labels_roles_and_lengths():
    values = {"messages": [{"role": "user", "content": "I am a@b.de"}], "tokens": ["me", "a@b.de"], "tags": ["O", "a@b.de"]}
    row = Row("n", "p", {**values, "label": "a@b.de", "prompt": "a@b.de"})
    counts: Counter[str] = Counter()
    values = Redactor(["email"]).row(row, counts).values
    assert values["messages"] == [{"role": "user", "content": "I am [EMAIL]"}]
    assert values["tokens"] == ["me", "[EMAIL]"]
    assert (values["tags"], values["label"], values["prompt"]) == (["O", "a@b.de"], "a@b.de", "[EMAIL]")
    assert counts == {"redacted_email": 3}
