"""Whatever a file holds, reading it gives rows or one sentence: never another error, never a hang."""

import bz2
import gzip
import io
import json
import lzma
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt.data.config import SourceConfig
from gpt.data.sources import ReadReport, Row, open_source
from gpt.errors import UserError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
OURS = {"text", "prompt", "completion", "messages", "label", "tokens", "tags"}
many = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(kind: str, name: str, content: bytes, on_error: str) -> list[Row] | None:
    """The rows of a file, or None where one sentence says why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        report, rows, refusal = ReadReport(), [], ""
        try:
            source = open_source(SourceConfig(source=kind, paths=[str(path)]), on_error)
            source.fingerprint()
            stream = source.rows(report)
            rows = list(stream)
            json.dumps(stream.state_dict())
        except UserError as error:
            refusal = str(error)
        if refusal:
            assert refusal.startswith("data.paths: ")
            assert str(path) in refusal
            assert len(refusal.splitlines()) == 1
            return None
        assert all(r.values and set(r.values) <= OURS for r in rows)
        assert all(text.encode() is not None for r in rows for text in texts_of(r.values))  # no tokenizer takes anything else
        assert all(len(w.splitlines()) == 1 for w in report.warnings())
        return rows


def texts_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in inner for text in texts_of(item)]


def valid(kind: str) -> bytes:
    if kind == "text":
        return "A text, déjà vu.\n".encode() * 3
    if kind == "jsonl":
        return b'{"text": "one", "label": 1}\n{"messages": [{"role": "user", "content": "hi"}]}\n'
    return parquet()


@cache
def parquet() -> bytes:
    stream = io.BytesIO()
    table = {"text": ["one", "two", None] * 9, "tokens": [["a", "b"], [], ["c"]] * 9, "label": list(range(27))}
    pq.write_table(pa.table(table), stream, row_group_size=10)
    return stream.getvalue()


damages = st.lists(st.tuples(st.floats(0, 1), st.one_of(st.binary(max_size=4), st.just(None))), max_size=4)


def damaged(content: bytes, damages: list[tuple[float, bytes | None]]) -> bytes:
    """Some bytes replaced, put in, or the end cut off."""
    for place, what in damages:
        at = int(place * len(content))
        content = content[:at] if what is None else content[:at] + what + content[at + len(what) :]
    return content


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
@pytest.mark.parametrize("suffix", COMPRESS)
@many
@given(content=st.binary(max_size=200), on_error=st.sampled_from(["auto", "raise", "skip"]))
def test_any_bytes(kind, suffix, content, on_error):
    read(kind, f"file{suffix}", content, on_error)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
@pytest.mark.parametrize("suffix", COMPRESS)
@many
@given(inner=damages, outer=damages, on_error=st.sampled_from(["auto", "raise", "skip"]))
def test_damaged_files(kind, suffix, inner, outer, on_error):
    if kind == "parquet" and suffix:
        inner, outer = [], [*inner, *outer]  # not read from within an archive
    rows = read(kind, f"file{suffix}", damaged(COMPRESS[suffix](damaged(valid(kind), inner)), outer), on_error)
    if not inner and not outer and not (kind == "parquet" and suffix):
        assert rows


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec=None), max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
    max_leaves=8,
)
json_rows = st.one_of(json_values, st.dictionaries(st.sampled_from([*sorted(OURS), "other", ""]), json_values, max_size=4))


@many
@given(rows=st.lists(json_rows, max_size=5), on_error=st.sampled_from(["auto", "raise", "skip"]), ascii_only=st.booleans())
def test_any_json_rows(rows, on_error, ascii_only):
    lines = [json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass") for row in rows]
    found = read("jsonl", "rows.jsonl", b"\n".join(lines), on_error)
    good = [r for r in rows if isinstance(r, dict) and OURS & set(r)]
    if on_error == "raise" and len(good) < len(rows):
        assert found is None
    elif found is not None and ascii_only:
        assert [set(r.values) for r in found] == [OURS & set(r) for r in good]
        assert len(good) == len(rows) or on_error == "skip"


def test_a_bomb_is_read_piece_by_piece(tmp_path):
    """A gigabyte of zeros from a few kilobytes: said to be binary without unpacking it."""
    zeros = zstandard.ZstdCompressor().compressobj()
    content = b"".join(zeros.compress(bytes(1 << 24)) for _ in range(64)) + zeros.flush()
    assert len(content) < 100_000
    assert read("text", "zeros.zst", content, "auto") == []
    assert read("jsonl", "zeros.zst", content, "auto") is None
