import gzip
import json
import logging
import random
import socket
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from going_on import check_going_on
from hypothesis import given
from hypothesis import strategies as st

from gpt.data import hub, rows
from gpt.data.config import FieldNames, SourceConfig
from gpt.data.sources import ReadReport, Row, Source, open_source
from gpt.errors import UserError


def source_of(kind: str, *paths: Path | str, on_error="auto", **fields: str) -> Source:
    return open_source(SourceConfig(source=kind, paths=[str(p) for p in paths], fields=FieldNames(**fields)), on_error)


def jsonl(path: Path, content: str | bytes, on_error="auto", **fields: str) -> tuple[list[Row], ReadReport]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    report = ReadReport()
    return list(source_of("jsonl", path, on_error=on_error, **fields).rows(report)), report


def parquet(path: Path, table: pa.Table | dict[str, Any], on_error="auto", **fields: str) -> tuple[list[Row], ReadReport]:
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path)
    report = ReadReport()
    return list(source_of("parquet", path, on_error=on_error, **fields).rows(report)), report


def values(found: tuple[list[Row], ReadReport]) -> list[dict[str, Any]]:
    return [row.values for row in found[0]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


# A line that is no row -> what is said of it.
BAD = {
    '{"text": "a",}': "is not JSON at column 14",
    "plain text": "is not JSON at column 1",
    '{"text": "a"} {"text": "b"}': "is not JSON at column 15",
    '"a text"': "is a text, not an object",
    "3.5": "is a number, not an object",
    "null": "is null, not an object",
    "[1, 2]": "is a list, not an object",
    '{"body": "a", "id": 3}': "tokens, tags; it has [body, id]",
    "{}": "has none of the fields",
    "[" * 100_000: "nested too deep",
    '{"messages": ' + "[" * 60 + "]" * 60 + "}": "nested more than 50 deep",
    '{"label": ' + "9" * 5000 + "}": "digits",
}


class TestJsonl:
    def test_a_line_is_a_row(self, file):
        found, report = jsonl(file, '{"text": "one"}\n{"text": "zwei", "label": 3, "other": 1}\n')
        assert found == [
            Row("rows.jsonl:1", f"{file}, line 1", {"text": "one"}),
            Row("rows.jsonl:2", f"{file}, line 2", {"text": "zwei", "label": 3}),
        ]
        assert report == ReadReport(files=1)

    def test_fields_come_under_our_names(self, file):
        line = '{"instruction": "q", "output": "a", "text": "no", "prompt": "no"}'
        assert values(jsonl(file, line, prompt="instruction", completion="output", text="body")) == [{"prompt": "q", "completion": "a"}]

    def test_a_mark_at_the_start_blank_lines_line_ends_and_an_open_last_line(self, file):
        found, report = jsonl(file, b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n\n{"text": "b"}\r\n\t\n{"text": "c\\n"}')
        assert [(r.name, r.values["text"]) for r in found] == [("rows.jsonl:1", "a"), ("rows.jsonl:5", "b"), ("rows.jsonl:7", "c\n")]
        assert report == ReadReport(files=1)

    def test_a_field_may_be_of_another_kind_in_every_row(self, file):
        lines = [{"text": "a", "label": 1}, {"text": "b", "label": "1"}, {"text": "c", "label": True}, {"text": "d"}]
        found = values(jsonl(file, "\n".join(map(json.dumps, lines))))
        assert found == lines
        assert [type(v.get("label")) for v in found] == [int, str, bool, type(None)]

    def test_files_without_rows_are_counted(self, tmp_path):
        for name, text in (("a.jsonl", ""), ("b.jsonl", "\n \n"), ("c.jsonl", '{"text": "x"}')):
            (tmp_path / name).write_text(text)
        report = ReadReport()
        assert len(list(source_of("jsonl", tmp_path).rows(report))) == 1
        assert report == ReadReport(files=1, empty_files=2)

    @pytest.mark.parametrize("line", BAD, ids=lambda line: line[:20])
    def test_a_bad_line_is_named_or_left_out(self, file, line):
        content = f'{{"text": "good"}}\n\n{line}\n{{"text": "good too"}}\n'
        for on_error in ("auto", "raise"):
            with pytest.raises(UserError) as error:
                jsonl(file, content, on_error)
            message = str(error.value)
            assert message.startswith(f"data.paths: {file}, line 3")
            assert BAD[line] in message
            assert "data.on_error=skip" in message
            assert "\n" not in message
        found, report = jsonl(file, content, "skip")
        assert [r.values["text"] for r in found] == ["good", "good too"]
        assert (report.skipped_rows, report.files) == (1, 1)
        assert f"{file}, line 3" in report.warnings()[0]

    def test_bytes_that_are_not_utf8(self, file):
        content = b'{"text": "a"}\n{"text": "d\xe9j\xe0"}\n'
        with pytest.raises(UserError, match=r"line 2: is not UTF-8 at byte 11"):
            jsonl(file, content)
        assert jsonl(file, content, "skip")[1].skipped_rows == 1

    def test_half_a_character_is_replaced_and_counted(self, file):
        """Texts cut after so many UTF-16 units end like this; as they are no tokenizer takes them."""
        content = r'{"messages": [{"role": "user", "content": "ok \ud83e\udd16 cut \ud83e"}]}'
        for on_error in ("auto", "skip"):
            found, report = jsonl(file, content, on_error)
            assert found[0].values["messages"][0]["content"] == "ok 🤖 cut \ufffd"
            assert (report.invalid_utf8_files, report.invalid_utf8_characters, report.first_invalid) == (1, 1, "rows.jsonl:1")
        with pytest.raises(UserError, match=r"line 1 has characters that are no Unicode text"):
            jsonl(file, content, "raise")

    @pytest.mark.parametrize("on_error", ["auto", "raise", "skip"])
    @pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": "b"}]', '\n[\n  {"text": "a"}\n]\n', "\ufeff [1]"])
    def test_an_array_is_refused_with_its_remedy(self, file, content, on_error):
        with pytest.raises(UserError, match=r"rows\.jsonl is a JSON array; write one object a line$"):
            jsonl(file, content, on_error)

    def test_a_binary_file(self, file):
        content = b"PAR1\x00\x00\x15\x04\n\x00\x01"
        with pytest.raises(UserError, match=r"rows\.jsonl is a binary file, not lines of JSON"):
            jsonl(file, content)
        found, report = jsonl(file, content, "skip")
        assert (found, report) == ([], ReadReport(binary_files=1, first_binary="rows.jsonl"))

    def test_a_line_of_gigabytes_is_refused_before_it_fills_the_memory(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rows, "LINE_BYTES", 1 << 22)
        path = tmp_path / "rows.jsonl.gz"
        with gzip.open(path, "wb", 1) as stream:
            stream.write(b'{"text": "a"}\n{"text": "')
            for _ in range(60):
                stream.write(b"x" * (1 << 20))
            stream.write(b'"}\n{"text": "b"}\n')
        with pytest.raises(UserError, match=r"line 2: is longer than 4 MiB; write one object a line"):
            list(source_of("jsonl", path).rows(ReadReport()))
        report = ReadReport()
        tracemalloc.start()
        found = list(source_of("jsonl", path, on_error="skip").rows(report))
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
        tracemalloc.stop()
        assert [r.name for r in found] == ["rows.jsonl:1", "rows.jsonl:3"]
        assert report.skipped_rows == 1

    @given(
        st.lists(st.sampled_from(["", " ", '{"text": "é"}', '{"text": "a", "label": 1}', "bad", '{"other": 1}', "[1]"]), max_size=12),
        st.sampled_from(["\n", "\r\n"]), st.booleans(), st.randoms(use_true_random=False),
    )  # fmt: skip
    def test_going_on_from_anywhere_gives_the_rest(self, tmp_path_factory, lines, ending, compressed, chance):
        folder = tmp_path_factory.mktemp("rows")
        for number in range(3):
            content = ending.join(['{"text": "first"}', *lines[number:]]).encode()
            (folder / f"{number}.jsonl{'.gz' * compressed}").write_bytes(gzip.compress(content) if compressed else content)
        check_going_on(source_of("jsonl", folder, on_error="skip"), chance)

    def test_going_on_in_a_file_of_many_blocks(self, tmp_path):
        content = "".join(json.dumps({"text": f"row {i} é" * 30}) + "\n" for i in range(8000)).encode()
        (tmp_path / "a.jsonl").write_bytes(content)
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content, 1))
        check_going_on(source_of("jsonl", tmp_path), random.Random(1))


class TestParquet:
    def test_a_row_is_a_row(self, tmp_path):
        path = tmp_path / "a.parquet"
        found, report = parquet(path, {"text": ["one", "two"], "label": [1, None], "other": [0.5, 0.5]})
        assert found == [
            Row("a.parquet:1", f"{path}, row 1", {"text": "one", "label": 1}),
            Row("a.parquet:2", f"{path}, row 2", {"text": "two"}),
        ]
        assert report == ReadReport(files=1)

    def test_lists_conversations_and_columns_of_other_names(self, tmp_path):
        chat = [{"role": "user", "content": "hé"}]
        table = {"words": [["a", "b"]], "tags": [[0, 1]], "talk": [chat]}
        assert values(parquet(tmp_path / "a", table, tokens="words", messages="talk")) == [
            {"tokens": ["a", "b"], "tags": [0, 1], "messages": chat}
        ]

    def test_text_written_as_bytes(self, tmp_path):
        found, report = parquet(tmp_path / "a", {"text": pa.array(["é".encode(), b"d\xe9j"], pa.binary())})
        assert [r.values["text"] for r in found] == ["é", "d\ufffdj"]
        assert report.invalid_utf8_characters == 1

    def test_text_that_is_not_utf8(self, tmp_path):
        text = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe"))
        assert values(parquet(tmp_path / "a", {"text": text})) == [{"text": "ok"}, {"text": "\ufffd\ufffd"}]

    def test_a_missing_column_is_named_with_those_there_are(self, tmp_path):
        path = tmp_path / "a.parquet"
        with pytest.raises(UserError, match=r"a\.parquet has none of the columns text, .*; it has \[body, id\]; name yours, .*<column>$"):
            parquet(path, {"body": ["x"], "id": [1]})
        with pytest.raises(UserError, match=r"^data\.fields\.text=bdy: .* no such column. Did you mean body\? There are: \[body, text\]$"):
            parquet(path, {"body": ["x"], "text": ["x"]}, text="bdy")

    def test_a_row_without_anything(self, tmp_path):
        with pytest.raises(UserError, match=r"row 2 has none of the fields"):
            parquet(tmp_path / "a", {"text": ["x", None]})
        found, report = parquet(tmp_path / "a", {"text": ["x", None, "y"]}, "skip")
        assert [r.name for r in found] == ["a:1", "a:3"]
        assert report.skipped_rows == 1

    @pytest.mark.parametrize("content", [b"x", b'{"text": "a"}\n' * 20, b"PAR1" + b"\0" * 50 + b"PAR1", b"PAR1\xff\xff\xff\xffPAR1"])
    def test_what_is_no_parquet_is_one_sentence(self, tmp_path, content):
        (tmp_path / "a.parquet").write_bytes(content)
        for on_error in ("auto", "skip"):
            with pytest.raises(UserError, match=r"^data\.paths: .*a\.parquet is not a Parquet file, or damaged: [^\n]+$"):
                list(source_of("parquet", tmp_path, on_error=on_error).rows(ReadReport()))

    def test_empty_ones_are_counted(self, tmp_path):
        (tmp_path / "_SUCCESS").write_bytes(b"")
        _, report = parquet(tmp_path / "a.parquet", pa.table({"text": pa.array([], pa.string())}))
        assert report == ReadReport(empty_files=1)
        assert list(source_of("parquet", tmp_path).rows(report := ReadReport())) == []
        assert report == ReadReport(empty_files=2)

    def test_a_url(self):
        import fsspec

        with fsspec.open("memory://rows/a.parquet", "wb") as stream:
            pq.write_table(pa.table({"text": ["one"]}), stream)
        (row,) = source_of("parquet", "memory://rows").rows(ReadReport())
        assert (row.name, row.place) == ("a.parquet:1", "memory:///rows/a.parquet, row 1")

    def test_going_on_from_anywhere_gives_the_rest(self, tmp_path):
        for number, (count, group) in enumerate([(1000, 130), (0, 1), (7, 2), (5000, 5000)]):
            text = [None if i % 11 == 3 else f"row {i}" for i in range(count)]
            pq.write_table(pa.table({"text": pa.array(text, pa.string())}), tmp_path / f"{number}.parquet", row_group_size=group)
        for seed in range(6):
            check_going_on(source_of("parquet", tmp_path, on_error="skip"), random.Random(seed))

    def test_memory_does_not_grow_with_the_file(self, tmp_path):
        """One row group of 200 MB, as writers make them that were not told otherwise."""
        chance = random.Random(0)
        words = [f"{chance.getrandbits(64):x}" for _ in range(2000)]
        with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())]), use_dictionary=False) as writer:
            texts = [" ".join(chance.choices(words, k=600)) for _ in range(500)]
            writer.write_table(pa.table({"text": [texts[i % 500] + str(i) for i in range(20_000)]}), row_group_size=20_000)
        before, peak, size = pa.total_allocated_bytes(), 0, 0
        tracemalloc.start()
        for row in source_of("parquet", tmp_path).rows(ReadReport()):
            peak, size = max(peak, pa.total_allocated_bytes() - before), size + len(row.values["text"])
        peak += tracemalloc.get_traced_memory()[1]  # what is read for Arrow from a file of Python's
        tracemalloc.stop()
        assert size > 190e6
        assert peak < 80e6


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    """What `datasets` writes while it reads must not lie in the user's own folder."""
    from datasets import config

    before, config.HF_DATASETS_CACHE = config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("hub")
    yield
    config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset as `datasets` reads it from a folder: two splits, one of them of several files."""
    folder = tmp_path_factory.mktemp("a_dataset")
    for number in range(3):
        lines = [{"text": f"row {i}", "label": i % 2, "id": i} for i in range(number * 400, (number + 1) * 400)]
        (folder / f"train-{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "test.jsonl").write_text('{"text": "a test"}\n')
    return folder


@pytest.mark.usefixtures("hub_cache")
class TestHub:
    def open(self, folder: Path | str, streaming=False, on_error="auto", **settings: Any) -> Source:
        return open_source(SourceConfig(source="hf", name=str(folder), **settings), on_error, streaming)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows_are_those_of_the_split(self, folder, streaming):
        source, report = self.open(folder, streaming), ReadReport()
        found = list(source.rows(report))
        assert [r.values for r in found] == [{"text": f"row {i}", "label": i % 2} for i in range(1200)]
        assert (found[4].name, found[4].place) == (f"{folder.name}/train:5", f"{folder} (train), row 5")
        assert report == ReadReport(files=1)
        assert source.name == f"{folder} (train)"
        assert [r.values for r in self.open(folder, streaming, split="test").rows(ReadReport())] == [{"text": "a test"}]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_going_on_from_anywhere_gives_the_rest(self, folder, streaming):
        for seed in range(3):
            check_going_on(self.open(folder, streaming), random.Random(seed))

    def test_two_streams_do_not_disturb_each_other(self, folder):
        source = self.open(folder, streaming=True)
        one, two = source.rows(ReadReport()), source.rows(ReadReport())
        for _ in range(500):
            next(one)
        assert next(two).values["text"] == "row 0"
        assert next(one).values["text"] == "row 500"

    def test_a_stream_is_opened_in_a_thread_as_batches_are(self, folder):
        source = self.open(folder, streaming=True)
        assert next(source.rows(ReadReport())).values["text"] == "row 0"
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(lambda: [row.values["text"] for row in source.rows(ReadReport())]).result()
        assert found == [f"row {i}" for i in range(1200)]

    def test_a_part_of_a_split(self, folder):
        assert len(list(self.open(folder, split="train[:10]").rows(ReadReport()))) == 10

    def test_what_it_says_of_itself(self, folder):
        source = self.open(folder, licence="CC0-1.0")
        assert source.describe() == {
            "source": "hf", "name": str(folder), "config": None, "split": "train", "revision": None, "bytes": source.size,
            "licence": "CC0-1.0",
        }  # fmt: skip
        assert source.fingerprint() == self.open(folder).fingerprint()
        assert source.fingerprint() == self.open(folder, streaming=True).fingerprint()
        assert source.fingerprint() != self.open(folder, split="test").fingerprint()

    @pytest.mark.parametrize("streaming", [False, True])
    def test_classes_come_by_their_names(self, tmp_path, streaming):
        features = datasets.Features(
            {
                "tokens": datasets.List(datasets.Value("string")),
                "tags": datasets.List(datasets.ClassLabel(names=["O", "PER"])),
                "label": datasets.ClassLabel(names=["bad", "good"]),
            }
        )
        table = {"tokens": [["Ann", "ran"], ["x"]], "tags": [[1, 0], [0]], "label": [1, -1]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
        assert [r.values for r in self.open(tmp_path, streaming).rows(ReadReport())] == [
            {"tokens": ["Ann", "ran"], "tags": ["PER", "O"], "label": "good"},
            {"tokens": ["x"], "tags": ["O"], "label": -1},
        ]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_what_is_not_there_is_named_with_what_is(self, folder, streaming, tmp_path):
        with pytest.raises(UserError, match=r"^data\.split=trian: .* no such split. Did you mean train\? There are: train, test$"):
            self.open(folder, streaming, split="trian")
        with pytest.raises(UserError, match=r"^data\.config=en: .* no such configuration. There are: default$"):
            self.open(folder, streaming, config="en")
        with pytest.raises(UserError, match=r"^data\.name=.*, data\.split=train: cannot be read: [^\n]+$"):
            self.open(tmp_path, streaming)

    def test_a_dataset_without_our_columns(self, tmp_path):
        (tmp_path / "train.jsonl").write_text('{"body": "x", "id": 1}\n')
        with pytest.raises(UserError, match=r"^data\.name: .* has none of the columns text, .*; it has \[body, id\]"):
            self.open(tmp_path)
        assert [r.values for r in self.open(tmp_path, fields=FieldNames(text="body")).rows(ReadReport())] == [{"text": "x"}]

    def test_a_damaged_one_is_one_sentence(self, tmp_path):
        logged: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: logged.append(record.getMessage())
        logging.getLogger("datasets").addHandler(handler)
        (tmp_path / "train.jsonl").write_text('{"text": "x"}\n{bad\n')
        with pytest.raises(UserError, match=r"^data\.name=.*cannot be read: [^\n]*JSON parse error[^\n]*$"):
            self.open(tmp_path)
        with pytest.raises(UserError, match=r"^data\.name=.*cannot be read: [^\n]*JSON parse error[^\n]*$"):
            list(self.open(tmp_path, streaming=True).rows(ReadReport()))
        logging.getLogger("datasets").removeHandler(handler)
        assert logged == []

    @pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "not an id/x", "a/b/c", "https://x.y/z", "\0", "é"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_without_a_network_it_fails_in_seconds(self, name, streaming):
        start = time.monotonic()
        with pytest.raises(UserError, match=r"^data\.(name|split)=[^\n]+$"):
            self.open(name, streaming)
        assert time.monotonic() - start < 5

    def test_without_a_network_though_nobody_said_so(self, monkeypatch):
        """`datasets` alone tries for 23 seconds."""
        import huggingface_hub.constants
        from datasets import config

        def unreachable(*_, **__):
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(socket, "getaddrinfo", unreachable)
        start = time.monotonic()
        for streaming in (False, True):
            with pytest.raises(UserError, match=r"^data\.name=nobody/nothing: the hub cannot be reached, .* is there a network\?$"):
                self.open("nobody/nothing", streaming)
        assert time.monotonic() - start < 5
        assert config.HF_HUB_OFFLINE is False

    @pytest.mark.parametrize(("error", "said"), [("RepositoryNotFoundError", "no such dataset"), ("GatedRepoError", "consent")])
    def test_what_the_hub_refuses(self, monkeypatch, error, said):
        import huggingface_hub
        import huggingface_hub.constants
        from huggingface_hub import errors

        def refuse(*_, **__):
            kind = getattr(errors, error)
            raise kind.__new__(kind)

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
        with pytest.raises(UserError, match=rf"^data\.name=nobody/nothing: the hub .*{said}.*HF_TOKEN$"):
            self.open("nobody/nothing")

    def test_the_revision_that_the_hub_has_is_the_one_that_is_read(self, monkeypatch, folder):
        import huggingface_hub
        import huggingface_hub.constants

        opened = {}

        def load(path, name, **settings):
            opened.update(settings, path=path)
            return real(str(folder), split=settings["split"])

        real = datasets.load_dataset
        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: huggingface_hub.DatasetInfo(id="a/b", sha="c0ffee"))
        source = self.open("a/b")
        assert (opened["path"], opened["revision"]) == ("a/b", "c0ffee")
        assert source.describe()["revision"] == "c0ffee"
        assert [r.name for r in source.rows(ReadReport())][:2] == ["a/b/train:1", "a/b/train:2"]
        monkeypatch.setattr(hub, "_revision", lambda _: ("beef", False))
        assert self.open("a/b").fingerprint() != source.fingerprint()
