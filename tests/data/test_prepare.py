import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from gpt.data import shards
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.examples import ExampleSettings
from gpt.data.sources import ReadReport, open_source
from gpt.data.survey import HoldOut, survey
from gpt.errors import UserError
from tests.data.workshop import Workshop, documents_of, ids_of


class TestCache:
    def test_a_hit_builds_nothing(self, workshop):
        first = workshop.prepare()
        assert workshop.built
        (folder,) = workshop.folders()
        before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
        assert set(before) == {
            "index.json", "manifest.json", "tokenizer.json", "verified.json",
            "train-00000.bin", "train-documents.bin", "held_out-00000.bin", "held_out-documents.bin",
        }  # fmt: skip
        second = workshop.prepare()
        assert f"tokens from the cache: {folder}" in workshop.said
        assert not workshop.built
        assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
        assert first.fingerprint == second.fingerprint
        assert first.manifest == second.manifest
        assert any("there are few texts" in line for line in workshop.said)  # the notes are said every time

    @pytest.mark.parametrize(
        "change",
        [
            lambda w: setattr(w.tokenizer, "vocab_size", 301),
            lambda w: setattr(w.tokenizer, "name", "byte"),
            lambda w: setattr(w.data, "holdout", 0.06),
            lambda w: (w.text / "new.txt").write_text("one more file\n"),
            lambda w: next(w.text.iterdir()).unlink(),
            lambda w: (lambda p: p.write_text(p.read_text().replace("e", "E", 1)))(next(w.text.iterdir())),
        ],
        ids=["vocab_size", "tokenizer", "holdout", "file added", "file removed", "a letter"],
    )  # fmt: skip
    def test_any_change_builds_anew_beside_the_old(self, workshop, change):
        workshop.tokenizer = TokenizerConfig(vocab_size=300)
        before = workshop.prepare()
        old = workshop.folders()
        change(workshop)
        after = workshop.prepare()
        assert workshop.built
        assert len(workshop.folders()) == 2
        assert workshop.folders() > old
        assert before.fingerprint != after.fingerprint

    @pytest.mark.parametrize(
        "change", [{"deduplicate": "exact"}, {"min_characters": 100}, {"redact": ["email"]}], ids=lambda change: next(iter(change))
    )  # fmt: skip
    def test_what_is_filtered_has_a_cache_of_its_own(self, workshop, change):
        (workshop.text / "b.txt").write_text("me@example.com")
        (workshop.text / "c.txt").write_text("me@example.com")
        before = workshop.prepare()
        for key, value in change.items():
            setattr(workshop.data, key, value)
        assert workshop.prepare().fingerprint != before.fingerprint
        assert len(workshop.folders()) == 2

    def test_the_same_text_elsewhere_is_a_hit(self, workshop, tmp_path):
        first = workshop.prepare()
        workshop.text.rename(tmp_path / "moved")
        workshop.data.paths = [str(tmp_path / "moved")]
        for path in (tmp_path / "moved").iterdir():
            os.utime(path, (1, 1))
        assert workshop.prepare().fingerprint == first.fingerprint
        assert not workshop.built

    def test_the_fingerprint_is_of_the_tokens_not_of_the_place(self, workshop, tmp_path):
        first = workshop.prepare()
        workshop.text.rename(tmp_path / "moved")
        workshop.data.paths, workshop.data.cache_dir = [str(tmp_path / "moved" / "*")], str(tmp_path / "another")
        workshop.data.licence = "CC0"
        second = workshop.prepare()
        assert workshop.built
        assert second.fingerprint == first.fingerprint
        assert second.manifest["sources"][0]["licence"] == "CC0"

    def test_a_licence_that_is_given_later_is_in_the_manifest(self, workshop):
        workshop.prepare()
        workshop.data.licence = "MIT"
        made = workshop.prepare()
        assert not workshop.built
        assert made.manifest["sources"][0]["licence"] == "MIT"

    def test_a_pretrained_tokenizer_counts_by_its_content(self, workshop, tmp_path):
        workshop.tokenizer = TokenizerConfig(vocab_size=300)
        made = workshop.prepare().tokenizer
        made.save(tmp_path / "tokenizer.json")
        workshop.tokenizer = TokenizerConfig(name="pretrained", path=str(tmp_path / "tokenizer.json"))
        first = workshop.prepare()
        assert first.tokenizer.fingerprint() == made.fingerprint()
        workshop.tokenizer = TokenizerConfig(vocab_size=310)
        workshop.prepare().tokenizer.save(tmp_path / "tokenizer.json")
        workshop.tokenizer = TokenizerConfig(name="pretrained", path=str(tmp_path / "tokenizer.json"))
        assert workshop.prepare().tokenizer.vocab_size == 310

    def test_what_stands_beside_a_pretrained_tokenizer_comes_along(self, workshop, tmp_path):
        workshop.prepare().tokenizer.save(tmp_path / "tokenizer.json")
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
        workshop.tokenizer = TokenizerConfig(name="pretrained", path=str(tmp_path))
        made = workshop.prepare().tokenizer
        assert (made.chat_template, made.special_tokens) == ("{{ messages }}", {"eos_token": "<|endoftext|>"})

    @pytest.mark.parametrize("name", ["train-00000.bin", "tokenizer.json", "manifest.json", "held_out-documents.bin"])
    def test_a_damaged_cache_says_what_to_delete(self, workshop, name):
        whole = workshop.prepare().fingerprint
        (folder,) = workshop.folders()
        content = (folder / name).read_bytes()
        for damaged in (content[: len(content) // 2], content[:9] + bytes([content[9] ^ 1]) + content[10:]):
            (folder / name).write_bytes(damaged)
            with pytest.raises(UserError, match=str(folder / name)) as error:
                workshop.prepare()
            assert "\n" not in str(error.value)
            assert f"delete {folder} and it is made again" in str(error.value)
        shutil.rmtree(folder)
        assert workshop.prepare().fingerprint == whole

    @pytest.mark.parametrize(
        ("name", "damaged"),
        [("plan.json", lambda t: t[:50]), ("tokenizer.json", lambda t: t[:50]), ("tokenizer.json", lambda t: t.replace('"a"', '"b"'))],
    )
    def test_a_damaged_plan_says_what_to_delete(self, workshop, name, damaged):
        workshop.tokenizer = TokenizerConfig(vocab_size=300)
        workshop.prepare()
        (plan,) = (p for p in (workshop.cache / "tokenizers").iterdir() if p.is_dir())
        (plan / name).write_text(damaged((plan / name).read_text()))
        with pytest.raises(UserError, match=rf"^{plan}.* is damaged; delete ({plan}|it) and it is made again"):
            workshop.prepare()

    def test_an_index_of_another_version_is_made_again(self, workshop):
        whole = workshop.prepare().fingerprint
        (folder,) = workshop.folders()
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(index | {"version": 2}))
        assert workshop.prepare().fingerprint == whole
        assert workshop.built

    def test_a_cache_that_cannot_be(self, workshop, tmp_path):
        (tmp_path / "file").write_text("")
        for place in (str(tmp_path / "file"), "~nobody-by-this-name/cache"):
            workshop.data.cache_dir = place
            with pytest.raises(UserError, match=r"^data\.cache_dir") as error:
                workshop.prepare()
            assert place in str(error.value)


class TestTooLittle:
    def test_shorter_than_a_context(self, workshop):
        held_out = len(workshop.prepare(32).parts[0].held_out.tokens)
        assert len(workshop.prepare(held_out - 1).parts[0].held_out.tokens) == held_out
        with pytest.raises(UserError, match=rf"the held-out text has {held_out} tokens, fewer than model\.context_length={held_out}"):
            workshop.prepare(held_out)

    @pytest.mark.parametrize("name", ["byte", "bpe"])
    @pytest.mark.parametrize("text", ["a", "é", "ab", "a\n", "\n\n\na"])
    def test_a_text_of_next_to_nothing(self, workshop, tmp_path, text, name):
        (tmp_path / "a.txt").write_text(text)
        workshop.data.paths = [str(tmp_path / "a.txt")]
        workshop.tokenizer = TokenizerConfig(name=name)
        with pytest.raises(UserError, match="vocab_size" if name == "bpe" else "more text or a shorter context"):
            workshop.prepare()

    def test_no_text_at_all(self, workshop, tmp_path):
        folder = tmp_path / "nothing"
        folder.mkdir()
        for name, content in (("a", b""), ("b", b"\n"), ("c.png", b"\x89PNG\0")):
            (folder / name).write_bytes(content)
        workshop.data.paths = [str(folder)]
        with pytest.raises(UserError, match=r"^data: there is no text in text: 3 files \(.*nothing\) \(2 empty, 1 binary\)$"):
            workshop.prepare()
        assert workshop.folders() == set()

    def test_nothing_left_when_all_is_filtered(self, workshop):
        workshop.data.min_characters = 1_000_000
        with pytest.raises(UserError, match="the training text has 0 tokens"):
            workshop.prepare()

    def test_a_row_without_a_text_to_train_on(self, workshop, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "a b c"}\n{"prompt": "x"}\n')
        workshop.data = DataConfig(source="jsonl", paths=[str(tmp_path / "a.jsonl")], cache_dir=str(workshop.cache))
        with pytest.raises(UserError, match=r"a\.jsonl, line 2.*data\.fields\.text"):
            workshop.prepare()
        assert workshop.folders() == set()


class TestSkipping:
    def test_rows_without_a_text_are_left_out_and_counted(self, workshop, tmp_path):
        rows = [json.dumps({"text": f"line {n} " * 20}) for n in range(10)]
        (tmp_path / "a.jsonl").write_text("\n".join([*rows[:5], '{"prompt": "x"}', *rows[5:]]))
        paths = [str(tmp_path / "a.jsonl")]
        workshop.data = DataConfig(source="jsonl", paths=paths, cache_dir=str(workshop.cache), on_error="skip")
        made = workshop.prepare()
        assert made.manifest["sources"][0]["counts"]["skipped_rows"] == 1
        assert made.parts[0].index.documents == {"train": 10, "held_out": 10}
        assert any("1 rows were left out, e.g. " in line and "line 6" in line for line in workshop.said)

    def test_examples_of_another_format_are_left_out_and_counted(self, workshop, tmp_path):
        rows = [json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) for n in range(150)]
        others = ['{"messages": [{"role": "user", "content": "x"}]}', '{"prompt": "x", "completion": 7}']
        (tmp_path / "a.jsonl").write_text("\n".join(rows + others))
        paths = [str(tmp_path / "a.jsonl")]
        workshop.data = DataConfig(source="jsonl", paths=paths, cache_dir=str(workshop.cache))
        with pytest.raises(UserError, match="line 151"):
            workshop.prepare(32, ExampleSettings(context_length=32))
        workshop.data.on_error = "skip"
        made = workshop.prepare(32, ExampleSettings(context_length=32))
        assert sum(made.parts[0].index.documents.values()) == 150
        assert made.manifest["sources"][0]["counts"]["skipped_rows"] == 2
        assert any("2 rows were left out" in line for line in workshop.said)


class TestSplit:
    @pytest.mark.parametrize("settings", [{"name": "bpe", "vocab_size": 300}, {"name": "byte"}, {"name": "char"}], ids=lambda s: s["name"])
    @pytest.mark.parametrize("holdout", [0.05, 0.4], ids=["within files", "by file"])
    def test_the_tokens_are_the_documents(self, workshop, settings, holdout):
        for number in range(10):
            (workshop.text / f"{number}.txt").write_text("naïve café, 30 €\n" * 20, encoding="utf-8")
        workshop.tokenizer, workshop.data.holdout = TokenizerConfig(**settings), holdout
        made = workshop.prepare()
        index = made.parts[0].index
        rule = HoldOut(holdout, holdout == 0.05, holdout)
        if rule.within:
            cut = [rule.cut(text) for text in workshop.texts().values()]
            expected = {"train": [a for a, _ in cut if a], "held_out": [b for _, b in cut if b]}
        else:
            expected = {split: [t for n, t in workshop.texts().items() if rule(n) == (split == "held_out")] for split in shards.SPLITS}
        for split, texts in expected.items():
            assert documents_of(made, split) == texts
            ids = ids_of(made.parts[0].train if split == "train" else made.parts[0].held_out)
            assert ids.max() < made.tokenizer.vocab_size == index.vocab_size
            assert index.documents[split] == len(texts)
            assert index.bytes[split] == sum(len(t.encode()) for t in texts) == made.tokenizer.byte_lengths()[ids].sum()

    def test_adding_a_file_moves_none_across_the_border(self, workshop):
        workshop.data.holdout = 0.4
        before = documents_of(workshop.prepare(), "held_out")
        (workshop.text / "new.txt").write_text("one more file\n" * 10)
        after = documents_of(workshop.prepare(), "held_out")
        assert [t for t in after if not t.startswith("one more")] == before

    @pytest.mark.parametrize("holdout", [0.05, 0.5], ids=["within", "by file"])
    def test_a_large_file_in_pieces_is_the_same_document(self, workshop, holdout, monkeypatch):
        workshop.data.holdout = holdout
        for number in range(20):
            (workshop.text / f"{number}.txt").write_text("a line of text\n" * 3000)
        whole = workshop.prepare()
        monkeypatch.setattr("gpt.data.sources.PIECE_BYTES", 5000)
        workshop.data.cache_dir = str(workshop.cache / "pieces")
        pieces = workshop.prepare()
        if holdout == 0.5:
            assert pieces.fingerprint == whole.fingerprint
        else:  # the end of each piece is held out
            assert pieces.parts[0].index.bytes["held_out"] == pytest.approx(whole.parts[0].index.bytes["held_out"], rel=0.05)
            assert sum(pieces.parts[0].index.bytes.values()) == sum(whole.parts[0].index.bytes.values())

    def test_learning_the_vocabulary_sees_nothing_held_out(self, workshop: Workshop):
        workshop.tokenizer = TokenizerConfig(vocab_size=300)
        before = workshop.prepare()
        name, text = next(iter(workshop.texts().items()))
        head, end = HoldOut(0.05, True, 0).cut(text)
        (workshop.text / name).write_text(head + "".join("ZQJ"[i % 3] for i in range(len(end))), encoding="utf-8")
        after = workshop.prepare()
        assert workshop.built
        assert after.tokenizer.fingerprint() == before.tokenizer.fingerprint()
        assert after.fingerprint != before.fingerprint

    def test_the_sample_is_every_second_document_of_a_corpus_too_large(self, workshop):
        source = open_source(workshop.data, "auto")
        rule = HoldOut(0.4, False, 0.4)
        texts = [text for name, text in workshop.texts().items() if not rule(name)]
        total = sum(map(len, texts))
        for limit, stride in ((total, 1), (total - 1, 2), (total // 2 + 3000, 2), (total // 4 + 6000, 4), (1, 32)):
            found = survey(source, 0.4, limit)
            assert not found.hold_out.within
            assert found.sample.texts == texts[::stride]
        assert found.sample.check == "".join(texts)[:2000]

    def test_a_survey_ends_where_nothing_more_is_needed(self, workshop, monkeypatch):
        monkeypatch.setattr("gpt.data.survey.CHECK_CHARACTERS", 1000)
        source = open_source(workshop.data, "auto")
        assert not survey(source, 0.4, 0).whole
        assert survey(source, 0.4, 1000).whole
        monkeypatch.setattr("gpt.data.survey.SURVEY_CHARACTERS", 10_000)
        cut = survey(source, 0.4, 1_000_000)
        assert not cut.whole
        assert not cut.hold_out.within  # four files of forty were read, and their share of the bytes tells how many there are
        monkeypatch.setattr(source, "size", None)
        assert survey(source, 0.4, 1_000_000).hold_out.within
        assert 0 < sum(map(len, cut.sample.texts)) <= 13_000


class TestFilters:
    def test_duplicates_and_near_empty_documents_are_left_out_and_counted(self, workshop):
        for name, text in {"x1.txt": "the same\n", "x2.txt": "the same\n", "x3.txt": "the same \n", "y.txt": "  tiny  \n"}.items():
            (workshop.text / name).write_text(text)
        workshop.data.holdout, workshop.data.deduplicate, workshop.data.min_characters = 0.3, "exact", 5
        made = workshop.prepare()
        texts = documents_of(made, "train") + documents_of(made, "held_out")
        assert Counter(texts) == Counter(workshop.texts().values()) - Counter(["the same\n", "  tiny  \n"])
        counts = made.manifest["sources"][0]["counts"]
        assert (counts["duplicates"], counts["near_empty"]) == (1, 1)
        assert any("; left out: 1 duplicates, 1 near-empty" in line for line in workshop.said)

    def test_nothing_is_left_out_unless_asked_for(self, workshop):
        (workshop.text / "x1.txt").write_text("x")
        (workshop.text / "x2.txt").write_text("x")
        assert not {"duplicates", "near_empty"} & set(workshop.counts())

    def test_bytes_are_those_after_redaction(self, workshop):
        (workshop.text / "mail.txt").write_text("write to someone.with.a.long.name@example.com\n" * 100)
        workshop.data.holdout, workshop.data.redact = 0.3, ["email", "ip"]
        made = workshop.prepare()
        documents = documents_of(made, "train") + documents_of(made, "held_out")
        assert "write to [EMAIL]\n" * 100 in documents
        assert sum(made.parts[0].index.bytes.values()) == sum(len(d.encode()) for d in documents)
        assert made.manifest["sources"][0]["counts"]["redacted_email"] >= 100
        assert any("redacted: " in line and " email" in line for line in workshop.said)
        (plan,) = (workshop.cache / "tokenizers").glob("*/plan.json")
        assert "someone.with" not in plan.read_text()

    def test_the_vocabulary_is_learned_from_redacted_text(self, workshop):
        workshop.tokenizer = TokenizerConfig(vocab_size=300)
        (workshop.text / "mail.txt").write_text("zzyzzyva@example.com\n" * 2000)
        assert "zzyz" in workshop.prepare().tokenizer.backend.to_str()
        workshop.data.redact = ["email"]
        assert "zzyz" not in workshop.prepare().tokenizer.backend.to_str()

    def test_notes_tell_what_was_met(self, workshop: Workshop):
        (workshop.text / "latin.txt").write_bytes("café\n".encode("latin-1") * 50)
        (workshop.text / "data.bin").write_bytes(b"\0\1")
        made = workshop.prepare()
        notes = [line for line in workshop.said if line.startswith("note: ")]
        assert any("1 binary files were left out, e.g. data.bin" in n for n in notes)
        assert any("50 characters replaced, e.g. in latin.txt" in n for n in notes)
        counts = made.manifest["sources"][0]["counts"]
        assert (counts["files"], counts["binary_files"], counts["invalid_utf8_characters"]) == (41, 1, 50)
        workshop.data.on_error = "raise"
        with pytest.raises(UserError, match=r"data\.bin is a binary file"):
            workshop.prepare()


def test_it_is_fast_where_it_can_be(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    """The ids on disk are those of the tokenizer that is saved, whichever encoder made them."""
    workshop.tokenizer = TokenizerConfig(vocab_size=300)
    made = workshop.prepare()
    assert "encoding in bulk" in workshop.said
    monkeypatch.setattr("gpt.data.tokenizer.find_bulk_encoder", lambda backend, check: None)
    workshop.data.cache_dir = str(workshop.cache / "slow")
    slow = workshop.prepare()
    assert "encoding with tokenizers" in workshop.said
    assert slow.fingerprint == made.fingerprint
    assert np.array_equal(ids_of(slow.parts[0].train), ids_of(made.parts[0].train))


def test_preparing_loads_no_torch(corpus, tmp_path):
    code = (
        "import sys; from gpt.data.config import *; from gpt.data.prepare import prepare_corpus; "
        f"data = DataConfig(source='text', paths=[{str(corpus)!r}], cache_dir={str(tmp_path)!r}); "
        "prepare_corpus(data, TokenizerConfig(name='byte'), 8, print); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_report_of_a_hit_is_that_of_the_build(workshop):
    first = workshop.prepare().manifest
    assert workshop.prepare().manifest == first
    assert ReadReport(files=40, split_within_files=True).warnings()[0] in first["sources"][0]["notes"]
