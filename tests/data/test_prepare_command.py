import json
import os
import shutil
from pathlib import Path

import pytest

from gpt.commands import PrepareConfig
from gpt.data.command import prepare
from gpt.data.config import DataConfig, PartConfig, TokenizerConfig
from gpt.errors import UserError


def config(folder: Path, **settings) -> PrepareConfig:
    data = DataConfig(source="text", paths=[str(folder / "text")], cache_dir=str(folder / "cache"), licence="PSF-2.0")
    return PrepareConfig(**({"data": data, "tokenizer": TokenizerConfig(name="byte"), "context_length": 32} | settings))


@pytest.fixture(autouse=True)
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fast encoder, by the slow one, which would take most of the time."""
    monkeypatch.setattr("gpt.data.survey.CHECK_CHARACTERS", 2000)


@pytest.fixture
def place(corpus: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus, tmp_path / "text")
    return tmp_path


def only_folder(place: Path) -> Path:
    (folder,) = (p for p in (place / "cache" / "data").iterdir() if p.is_dir())
    return folder


def test_preparing_says_what_it_does_and_where_the_tokens_are(place, capsys):
    assert prepare(config(place)) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"tokens kept in {only_folder(place)}\n" in printed.err
    assert "MB in 40 documents -> " in printed.err
    assert prepare(config(place)) == 0
    assert f"tokens from the cache: {only_folder(place)}\n" in capsys.readouterr().err


def test_preparing_examples(place, capsys):
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"yes, {n}"}) + "\n" for n in range(300)))
    data = DataConfig(source="jsonl", paths=[str(rows)], cache_dir=str(place / "cache"))
    assert prepare(config(place, data=data, finetune=True, loss_on="all")) == 0
    assert "rows of prompt_completion; learned: all" in capsys.readouterr().err
    assert prepare(PrepareConfig(inspect=str(only_folder(place)), samples=1)) == 0
    printed = capsys.readouterr().out
    assert "learned tokens" in printed
    assert "learned: " in printed
    assert "yes, " in printed


def test_what_finetune_takes_for_text_is_prepared_as_text(place, capsys):
    assert prepare(config(place, finetune=True)) == 0
    assert "MB in 40 documents -> " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "finetune", "loss_on", "message"),
    [
        (DataConfig(source="stdlib_docstrings"), False, "auto", r"^data=stdlib_docstrings: holds examples .* gpt prepare finetune=true"),
        (DataConfig(source="stdlib_topics", format="messages"), True, "auto", r"^data\.format=messages is of examples"),
        (DataConfig(source="stdlib_topics"), True, "assistant", r"^loss_on=assistant is of examples"),
        (DataConfig(source="stdlib_docstrings", document_mask=True), True, "auto", r"^data\.document_mask=true is of text"),
        (
            DataConfig(source="mixture", parts=[PartConfig(source="stdlib_docstrings"), PartConfig(source="stdlib_topics")]),
            True, "auto", r"^data\.parts: stdlib_docstrings holds examples and stdlib_topics text",
        ),
    ],
)  # fmt: skip
def test_what_no_run_would_take_is_not_prepared(data, finetune, loss_on, message):
    with pytest.raises(UserError, match=message):
        prepare(PrepareConfig(data=data, finetune=finetune, loss_on=loss_on))


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ("", {}, r"^data: there are no rows in jsonl: 1 file \(.*rows\.jsonl\); give"),
        ("\n", {"format": "messages"}, r"^data: there are no rows in jsonl: 1 file \(.*rows\.jsonl\); give"),
        ("a,b\n", {"on_error": "skip"}, r"no rows in .*rows\.jsonl\) \(1 left out, e\.g\. .*rows\.jsonl, line 1: is not JSON"),
        ('{"prompt": "a", "completion": ""}\n' * 9, {}, r"no training examples: 9 are without a completion"),
        (
            '{"prompt": "a", "completion": "b"}\n' * 9,
            {"too_long": "drop"},
            r"no training examples: 9 are longer than a row; set data\.too_long",
        ),
    ],
)
def test_why_there_are_no_examples_is_said(place, rows, settings, message):
    (place / "rows.jsonl").write_text(rows)
    data = DataConfig(source="jsonl", paths=[str(place / "rows.jsonl")], cache_dir=str(place / "cache"), **settings)
    with pytest.raises(UserError, match=message):
        prepare(config(place, data=data, finetune=True, context_length=2))


@pytest.mark.parametrize("bad", ['{"prompt": "a"}', '{"messages": [{"role": "user", "content": "a"}]}', '{"prompt": "a", "completion": 3}'])
def test_rows_of_another_format_are_left_out_if_asked_for(place, capsys, bad):
    (place / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20 + bad + "\n")
    data = DataConfig(source="jsonl", paths=[str(place / "rows.jsonl")], cache_dir=str(place / "cache"), on_error="skip")
    assert prepare(config(place, data=data, finetune=True)) == 0
    printed = capsys.readouterr().err
    assert "20 examples -> " in printed
    assert "note: 1 rows were left out" in printed


class TestInspect:
    def test_it_prints_what_is_there(self, place, capsys):
        (place / "text" / "mail.txt").write_text("a@example.com and b@example.com\n" * 3)
        (place / "text" / "tiny.txt").write_text("x")
        settings = config(place)
        settings.data.redact, settings.data.min_characters = ["email"], 2
        prepare(settings)
        folder = only_folder(place)
        index = json.loads((folder / "index.json").read_text())
        emails = json.loads((folder / "manifest.json").read_text())["counts"]["redacted_email"]
        assert emails >= 6
        capsys.readouterr()
        assert prepare(PrepareConfig(inspect=str(folder), samples=2)) == 0
        printed = capsys.readouterr().out
        assert "all checksums are right" in printed
        for expected in (
            f"{index['tokens']['train'][0]:,}", f"{index['bytes']['held_out']:,}", f"{index['documents']['train']:,}", "bytes per token",
            "licence: PSF-2.0", "1 near empty", f"{emails} redacted email", "note: there are few texts", "kind: text",
        ):  # fmt: skip
            assert expected in printed, expected
        first = min((place / "text").iterdir()).read_text()
        assert first[:80] in printed
        assert printed.count("--- training document") == 2

    def test_a_bit_that_turned_is_found_though_size_and_time_are_as_they_were(self, place):
        prepare(config(place))
        victim = only_folder(place) / "held_out-00000.bin"
        stat, content = victim.stat(), victim.read_bytes()
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 128]))
        os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(UserError, match=rf"{victim} is damaged \(its checksum.*delete"):
            prepare(PrepareConfig(inspect=str(only_folder(place))))

    def test_a_folder_that_holds_no_tokens(self, place):
        data = DataConfig(cache_dir=str(place / "cache"))
        with pytest.raises(UserError, match=r"is not a folder of prepared tokens .*there are none in .*cache/data yet"):
            prepare(PrepareConfig(data=data, inspect=str(place)))
        prepare(config(place))
        for other in (place, place / "cache" / "data", place / "nowhere"):
            with pytest.raises(UserError, match=rf"^inspect={other} is not a folder.*the newest is {only_folder(place)}$"):
                prepare(PrepareConfig(data=data, inspect=str(other)))

    def test_an_index_of_another_version_or_damaged(self, place):
        prepare(config(place))
        folder = only_folder(place)
        index = folder / "index.json"
        whole = json.loads(index.read_text())
        index.write_text(json.dumps(whole | {"version": 2}))
        with pytest.raises(UserError, match=r"another version of gpt \(index version 2, this one reads 3\)"):
            prepare(PrepareConfig(inspect=str(folder)))
        index.write_text(json.dumps(whole | {"unknown": 2}))
        with pytest.raises(UserError, match=rf"{index} is damaged; delete {folder}"):
            prepare(PrepareConfig(inspect=str(folder)))
