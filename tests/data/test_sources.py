import gzip
import itertools
import json
import random
import re
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from going_on import check_going_on
from hypothesis import given
from hypothesis import strategies as st

from gpt.data import sources
from gpt.data.config import DataConfig, SourceConfig
from gpt.data.sources import ReadReport, Row, Source, open_source
from gpt.data.tokenizer_training import train_bpe
from gpt.errors import UserError


def text_source(*paths: Path | str, on_error="auto") -> Source:
    return open_source(SourceConfig(source="text", paths=[str(p) for p in paths]), on_error)


def read(*paths: Path | str, on_error="auto") -> tuple[list[Row], ReadReport]:
    report = ReadReport()
    return list(text_source(*paths, on_error=on_error).rows(report)), report


def texts(rows: list[Row]) -> dict[str, str]:
    """File -> its pieces, joined."""
    return {name: "".join(r.values["text"] for r in group) for name, group in itertools.groupby(rows, lambda r: r.name)}


class TestStdlib:
    def test_is_about_twelve_megabytes_of_python_without_tests(self):
        source = open_source(DataConfig(), "auto")
        rows = list(source.rows(ReadReport()))
        assert source.size is not None
        assert 5e6 < source.size < 30e6
        assert 0.9 < sum(len(r.values["text"]) for r in rows) / source.size <= 1
        assert all(r.name.endswith(".py") for r in rows)
        folders = {part for r in rows for part in r.name.split("/")[:-1]}
        assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
        assert {"json", "asyncio", "email"} <= folders
        assert {"os.py", "json/decoder.py"} <= {r.name for r in rows}

    def test_is_sorted_and_the_same_every_time(self):
        source, again, report = open_source(DataConfig(), "auto"), open_source(DataConfig(), "auto"), ReadReport()
        rows = list(source.rows(report))
        assert [r.name for r in rows] == sorted({r.name for r in rows})
        assert list(again.rows(ReadReport())) == rows
        assert source.fingerprint() == again.fingerprint()
        assert report.files == len(rows) > 300
        assert report == ReadReport(files=len(rows), empty_files=report.empty_files)

    def test_what_it_says_of_itself(self):
        source = open_source(DataConfig(licence="mine"), "auto")
        assert source.name == "stdlib"
        assert source.describe()["licence"] == "mine"
        described = open_source(DataConfig(), "auto").describe()
        assert described["licence"] == "PSF-2.0"
        assert described["files"] > 300
        assert described["bytes"] == source.size
        json.dumps(described)


class TestText:
    def test_rows_are_the_files_in_order_of_their_names(self, tmp_path):
        for name in ("b.txt", "a.md", "deep/c.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f"text of {name}\n")
        rows, report = read(tmp_path)
        assert rows == [
            Row(name, str(tmp_path / name), {"text": f"text of {name}\n"}) for name in ("a.md", "b.txt", "deep/c.txt")
        ]  # fmt: skip
        assert report == ReadReport(files=3)

    def test_what_it_says_of_itself(self, tmp_path):
        (tmp_path / "a.txt").write_text("text\n")
        source = text_source(tmp_path)
        assert source.name == "text: 1 file"
        assert source.describe() == {"source": "text", "paths": [str(tmp_path)], "files": 1, "bytes": 5, "licence": ""}
        (tmp_path / "b.txt").write_text("text\n")
        assert text_source(tmp_path).name == "text: 2 files"
        assert text_source(tmp_path).fingerprint() != source.fingerprint()

    def test_empty_files_are_counted_and_left_out(self, tmp_path):
        for name, text in (("a.txt", ""), ("b.txt", " \n\t\n"), ("c.txt", "text\nmore\n"), ("d.txt", "\n" * 3_000_000)):
            (tmp_path / name).write_text(text)
        rows, report = read(tmp_path)
        assert [r.name for r in rows] == ["c.txt"]
        assert (report.empty_files, report.files) == (3, 1)

    def test_a_binary_file_is_left_out_and_said(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\0\0\0\rIHDR")
        (tmp_path / "b.txt").write_text("text\nmore\n")
        rows, report = read(tmp_path)
        assert texts(rows) == {"b.txt": "text\nmore\n"}
        assert (report.binary_files, report.first_binary) == (1, "a.png")
        assert report.warnings() == ["1 binary files were left out, e.g. a.png"]

    def test_a_binary_file_is_refused_if_asked(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\0")
        with pytest.raises(UserError, match=r"a\.png is a binary file .*data\.on_error=skip"):
            read(tmp_path, on_error="raise")

    def test_invalid_utf8_is_replaced_and_counted(self, tmp_path):
        (tmp_path / "latin.txt").write_bytes("déjà vu, ".encode("latin-1") + "a real \ufffd\n".encode())
        rows, report = read(tmp_path)
        assert texts(rows) == {"latin.txt": "d\ufffdj\ufffd vu, a real \ufffd\n"}
        assert (report.invalid_utf8_files, report.invalid_utf8_characters, report.first_invalid) == (1, 2, "latin.txt")
        assert report.warnings() == ["invalid UTF-8 in 1 files or rows, 2 characters replaced, e.g. in latin.txt"]

    def test_invalid_utf8_is_refused_if_asked(self, tmp_path):
        (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
        with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 at byte 1 .*data\.on_error=skip"):
            read(tmp_path, on_error="raise")

    def test_a_file_that_goes_while_it_is_read(self, tmp_path):
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text("text\n")
        stream = text_source(tmp_path).rows(ReadReport())
        next(stream)
        (tmp_path / "b.txt").unlink()
        with pytest.raises(UserError, match=r"^data\.paths: .*b\.txt cannot be read: No such file"):
            next(stream)


class TestPieces:
    @pytest.fixture
    def small_pieces(self, monkeypatch):
        monkeypatch.setattr(sources, "PIECE_BYTES", 2000)
        monkeypatch.setattr(sources, "_CUT_WITHIN", 500)

    def pieces(self, path: Path, content: bytes) -> list[str]:
        path.write_bytes(content)
        rows, report = read(path)
        assert [r.piece for r in rows] == list(range(len(rows)))
        assert {r.name for r in rows} == {path.name}
        assert report.files == 1
        return [r.values["text"] for r in rows]

    def test_a_file_of_eight_megabytes_is_one_row_a_larger_one_several(self, tmp_path):
        line = b"a line of some text\n"
        whole = line * (sources.PIECE_BYTES // len(line))
        assert len(self.pieces(tmp_path / "a.txt", whole)) == 1
        pieces = self.pieces(tmp_path / "a.txt", whole * 2 + line)
        assert len(pieces) == 3
        assert "".join(pieces) == (whole * 2 + line).decode()

    @pytest.mark.usefixtures("small_pieces")
    def test_are_cut_at_lines_that_follow_each_other(self, tmp_path):
        paragraphs = "\n\n".join(f"First line {i}.\n    indented\nsecond line {i}\n\tand a tab" for i in range(500))
        pieces = self.pieces(tmp_path / "a.txt", paragraphs.encode())
        assert "".join(pieces) == paragraphs
        assert len(pieces) > 10
        assert all(1400 < len(p) <= 2000 for p in pieces[:-1])
        assert all(re.search(r"\S\n$", p) for p in pieces[:-1])
        assert all(re.match(r"\S", p) for p in pieces[1:])

    @pytest.mark.parametrize("split", ["gpt2", "gpt4", "digits"])
    @pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n", "\u2028\n", " "])
    def test_the_ids_are_those_of_the_whole(self, tmp_path, stdlib_files, monkeypatch, ending, split):
        monkeypatch.setattr(sources, "PIECE_BYTES", 10_000)
        monkeypatch.setattr(sources, "_CUT_WITHIN", 9_000)  # some tables have kilobytes of indented lines of one word
        lines = [line for path in stdlib_files[:9] for line in path.read_text(encoding="utf-8").splitlines()]
        text = ending.join(lines)
        encode = train_bpe([text], 600, split).encode_batch
        pieces = self.pieces(tmp_path / "a.txt", text.encode())
        assert len(pieces) > 5
        assert [i for ids in encode(pieces) for i in ids] == list(encode([text])[0])

    @pytest.mark.usefixtures("small_pieces")
    @pytest.mark.parametrize("unit", ["x", "é", "林", "🤖", "\n", " ", "\t\n \n", "a\u3000\n"])
    def test_a_text_without_a_good_place_is_cut_anyway_but_not_within_a_character(self, tmp_path, unit):
        text = "b" + unit * 5000 + "c"
        pieces = self.pieces(tmp_path / "a.txt", text.encode())
        assert "".join(pieces) == text
        assert all(1490 <= len(p.encode()) <= 2000 for p in pieces[:-1])

    @given(st.lists(st.one_of(st.binary(max_size=9), st.sampled_from([b"\n", b" ", b"a b\n", b"\xe2\x82", "é\n".encode()])), max_size=80))
    def test_any_bytes_are_what_they_are_without_cutting(self, parts):
        content = b"".join(parts).replace(b"\0", b"")
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            path = Path(folder, "a.txt")
            path.write_bytes(content)
            whole, once = read(path)
            patch.setattr(sources, "PIECE_BYTES", 20)
            patch.setattr(sources, "_CUT_WITHIN", 8)
            rows, report = read(path)
            assert texts(rows) == texts(whole)
            assert report == once
            assert all(len(r.values["text"]) <= 20 for r in rows)

    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_memory_does_not_grow_with_the_file(self, tmp_path, suffix):
        path = tmp_path / f"large.txt{suffix}"
        with gzip.open(path, "wb", 1) if suffix else path.open("wb") as stream:
            for _ in range(100):
                stream.write(b"some words of text in a line\n" * 36_000)
        tracemalloc.start()
        size = sum(len(r.values["text"]) for r in text_source(path).rows(ReadReport()))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert size == 100 * 36_000 * 29
        assert peak < 5 * sources.PIECE_BYTES < size / 2


class TestGoingOn:
    @given(
        contents=st.lists(st.one_of(st.binary(max_size=80), st.text(max_size=60).map(str.encode)), min_size=1, max_size=5),
        piece=st.integers(5, 40),
        compressed=st.booleans(),
        seed=st.randoms(use_true_random=False),
    )
    def test_from_anywhere_gives_the_rest(self, contents, piece, compressed, seed):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "PIECE_BYTES", piece)
            patch.setattr(sources, "_CUT_WITHIN", piece // 2)
            for number, content in enumerate(contents):
                Path(folder, f"{number}.txt{'.gz' * compressed}").write_bytes(gzip.compress(content) if compressed else content)
            check_going_on(text_source(folder), seed)

    def test_in_the_middle_of_a_large_file(self, tmp_path):
        lines = b"".join(b"line %d\n" % i for i in range(2_000_000))
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(lines, 1))
        (tmp_path / "b.txt").write_bytes(lines)
        check_going_on(text_source(tmp_path), random.Random(0))

    def test_in_the_standard_library(self):
        check_going_on(open_source(DataConfig(), "auto"), random.Random(0))


class TestAnyBytes:
    @given(contents=st.lists(st.one_of(st.binary(max_size=80), st.text(max_size=40).map(str.encode)), min_size=1, max_size=4))
    def test_are_read_or_refused_in_a_sentence(self, contents):
        with tempfile.TemporaryDirectory() as folder:
            for number, content in enumerate(contents):
                Path(folder, f"{number}.bin").write_bytes(content)
            rows, report = read(folder)
            kept = [c.decode("utf-8", "replace") for c in contents if c.strip() and b"\0" not in c]
            assert [r.values["text"] for r in rows] == kept
            assert report.files == len(kept)
            assert report.binary_files + report.empty_files + report.files == len(contents)
            assert (report.invalid_utf8_files > 0) == (report.invalid_utf8_characters > 0) == bool(report.first_invalid)
            if report.binary_files or report.invalid_utf8_files:
                with pytest.raises(UserError, match=r"\A[^\n]* is (a binary file|not UTF-8 at byte)[^\n]*\Z"):
                    read(folder, on_error="raise")
            else:
                assert read(folder, on_error="raise") == (rows, report)
