"""data.holdout_by: what belongs together is held out together, or not at all."""

import json
from dataclasses import asdict, replace

import pyarrow
import pyarrow.parquet
import pytest

from gpt.data.config import DataConfig, PartConfig, SourceConfig, validate_data
from gpt.data.embedded import PACKAGES
from gpt.data.examples import ExampleSettings
from gpt.data.plan import _source_key, hash_of
from gpt.data.sources import OnError, ReadReport, open_source
from gpt.data.survey import name_hash, survey
from gpt.errors import UserError
from tests.data.workshop import documents_of

BOOKS = [{"text": f"{author} wrote this, number {number}", "author": author} for author in map(str, range(40)) for number in range(4)]


def written(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def authors(texts):
    return {text.split()[0] for text in texts}


def rows_of(config, on_error: OnError = "raise"):
    report = ReadReport()
    return list(open_source(config, on_error).rows(report)), report


class TestTheSplit:
    def split(self, workshop, tmp_path, rows, holdout=0.3, **settings):
        paths = [written(tmp_path, rows)]
        workshop.data = DataConfig("jsonl", paths, holdout=holdout, holdout_by="author", cache_dir=str(workshop.cache), **settings)
        made = workshop.prepare(16)
        return authors(documents_of(made, "train")), authors(documents_of(made, "held_out")), made

    def test_no_group_is_on_both_sides_and_its_hash_decides(self, workshop, tmp_path):
        train, held_out, made = self.split(workshop, tmp_path, BOOKS)
        assert held_out == {str(n) for n in range(40) if name_hash(str(n)) < 0.3}
        assert train == {str(n) for n in range(40)} - held_out
        assert made.manifest["sources"][0]["prepared"]["holdout_by"] == "author"
        again = self.split(workshop, tmp_path, [{"text": "41 came later, before all", "author": 41}, *BOOKS])
        assert (again[0] - {"41"}, again[1] - {"41"}) == (train, held_out)

    def test_of_few_groups_whole_ones_are_held_out_by_the_order_of_hashes(self, workshop, tmp_path):
        few = [row for row in BOOKS if int(row["author"]) < 5]
        train, held_out, _ = self.split(workshop, tmp_path, few, holdout=0.2)
        assert held_out == {min(map(str, range(5)), key=name_hash)}
        assert train == set(map(str, range(5))) - held_out

    def test_examples_of_a_class_too(self, workshop, tmp_path):
        rows = [row | {"label": "odd" if int(row["author"]) % 2 else "even"} for row in BOOKS]
        workshop.data = DataConfig("jsonl", [written(tmp_path, rows)], holdout=0.3, holdout_by="author", cache_dir=str(workshop.cache))
        made = workshop.prepare(64, ExampleSettings(context_length=64))
        held = sum(4 for n in range(40) if name_hash(str(n)) < 0.3)
        assert made.parts[0].index.documents == {"train": 160 - held, "held_out": held}

    def test_what_is_kept_of_other_data_stays(self):
        config = SourceConfig("jsonl", ["a.jsonl"])
        fields = {name: theirs for name, theirs in asdict(config.fields).items() if name not in ("answers", "test")}
        assert _source_key(config, "rows") == hash_of(["jsonl", None, "train", fields, "rows"])
        assert _source_key(replace(config, holdout_by="author"), "rows") != _source_key(config, "rows")


class TestRows:
    def test_a_row_that_does_not_say_what_it_belongs_to(self, tmp_path):
        rows = [BOOKS[0], {"text": "by nobody"}, {"text": "by many", "author": ["a", "b"]}, BOOKS[4]]
        config = SourceConfig("jsonl", [written(tmp_path, rows)], holdout_by="author")
        with pytest.raises(UserError, match=r"line 2 has no such field; data\.holdout_by=author asks every row what it belongs to"):
            rows_of(config)
        kept, report = rows_of(config, "skip")
        assert [row.group for row in kept] == ["0", "1"]
        assert report.skipped_rows == 2
        config.paths = [written(tmp_path, rows[2:])]
        with pytest.raises(UserError, match=r'line 1 has .*"?a"?.* there, which is no text or number; data\.holdout_by=author'):
            rows_of(config)

    def test_a_table_without_the_column(self, tmp_path):
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(BOOKS), path)
        config = SourceConfig("parquet", [str(path)], holdout_by="author")
        found, _ = rows_of(config)
        assert [(row.group, row.values) for row in found[:5]] == [(row["author"], {"text": row["text"]}) for row in BOOKS[:5]]
        with pytest.raises(UserError, match=r"^data\.holdout_by=autor: .*rows\.parquet has no such column.*author"):
            rows_of(replace(config, holdout_by="autor"))


@pytest.fixture(scope="module")
def names():
    return {by: rows_of(SourceConfig("stdlib_packages", holdout_by=by))[0] for by in ("", "file", "class")}


class TestOutOfTheStandardLibrary:
    def test_a_function_belongs_to_its_file_or_its_outermost_class(self, names):
        assert {row.group for row in names[""]} == {None}
        for by in ("file", "class"):
            assert [row.name for row in names[by]] == [row.name for row in names[""]]
        for plain, of_class in zip(names["file"], names["class"], strict=True):
            file, _, function = plain.name.partition(":")
            assert plain.group == file
            assert of_class.group == (f"{file}:{function.split('.')[0]}" if "." in function else file)

    def test_a_package_is_a_folder_or_a_module(self):
        grouped = rows_of(SourceConfig("stdlib_exceptions", holdout_by="package"))[0]
        files = {row.name.partition(":")[0]: row.group for row in grouped}
        assert files["json/decoder.py"] == "json"
        assert files["xml/dom/minidom.py"] == "xml"
        assert files["argparse.py"] == "argparse"
        assert {group for file, group in files.items() if "/" not in file} <= {file.removesuffix(".py") for file in files}

    def test_no_package_is_on_both_sides(self):
        source = open_source(SourceConfig("stdlib_exceptions", holdout_by="package"), "raise")
        hold_out = survey(source, 0.2, 0, examples=True).hold_out
        sides: dict[bool, set[str]] = {False: set(), True: set()}
        grouped = rows_of(SourceConfig("stdlib_exceptions", holdout_by="package"))[0]
        for row in grouped:
            sides[hold_out(row.held_out_key)].add(row.name.partition(":")[0].partition("/")[0])
        assert not sides[False] & sides[True]
        assert len(sides[True]) > 10
        assert len({row.values["label"] for row in grouped if hold_out(row.held_out_key)}) == 10

    def test_no_class_of_python_is_on_both_sides(self, names):
        source = open_source(SourceConfig("stdlib_packages", holdout_by="class"), "raise")
        hold_out = survey(source, 0.2, 0, examples=True).hold_out
        sides = {row.group: set() for row in names["class"]}
        for row in names["class"]:
            sides[row.group].add(hold_out(row.held_out_key))
        assert all(len(side) == 1 for side in sides.values())
        held_out = [row for row in names["class"] if hold_out(row.held_out_key)]
        assert 0.1 < len(held_out) / len(names["class"]) < 0.3
        assert len({row.values["label"] for row in held_out}) > len(PACKAGES) // 2


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (DataConfig("text", ["a.txt"], holdout_by="file"), r"^data\.holdout_by=file: data=text has whole texts, which have no fields"),
        (DataConfig("stdlib_packages", holdout_by="klass"), r"^data\.holdout_by=klass: data=stdlib_packages has no such field.*class"),
        (
            DataConfig("mixture", parts=[PartConfig("stdlib"), PartConfig("stdlib_topics")], holdout_by="author"),
            r"^data\.holdout_by=author: it is of each part; set it there",
        ),
    ],
    ids=["texts", "another field", "mixture"],
)
def test_where_there_are_no_such_fields(data, says):
    with pytest.raises(UserError, match=says):
        validate_data(data)
