import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gpt.data import prepare as module
from gpt.data import shards
from gpt.data.config import DataConfig, PartConfig, TokenizerConfig
from gpt.data.examples import ExampleSettings
from gpt.data.prepare import Corpus, prepare_corpus
from gpt.data.shards import Split
from gpt.data.sources import ReadReport, open_source
from gpt.data.survey import HoldOut, survey
from gpt.errors import UserError


class Workshop:
    """A copy of the corpus, a cache of its own, and what was said while preparing."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.text, self.cache = folder / "text", folder / "cache"
        shutil.copytree(corpus, self.text)
        self.data = DataConfig(source="text", paths=[str(self.text)], cache_dir=str(self.cache))
        self.tokenizer = TokenizerConfig(name="byte")
        self.said: list[str] = []

    def prepare(self, context_length: int = 32, examples: ExampleSettings | None = None) -> Corpus:
        self.said.clear()
        return prepare_corpus(self.data, self.tokenizer, context_length, self.said.append, examples)

    def folders(self) -> set[Path]:
        place = self.cache / "data"
        return {p for p in place.iterdir() if p.is_dir()} if place.is_dir() else set()

    @property
    def built(self) -> bool:
        return any(line.startswith("encoding") for line in self.said)

    def texts(self) -> dict[str, str]:
        return {p.name: p.read_text(encoding="utf-8") for p in sorted(self.text.iterdir())}

    def counts(self) -> dict[str, int]:
        return self.prepare().manifest["sources"][0]["counts"]


@pytest.fixture(autouse=True)
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fast encoder, by the slow one, which would take most of the time."""
    monkeypatch.setattr("gpt.data.survey.CHECK_CHARACTERS", 2000)


@pytest.fixture
def workshop(corpus: Path, tmp_path: Path) -> Workshop:
    return Workshop(corpus, tmp_path)


def ids_of(split: Split) -> np.ndarray:
    return split.tokens.windows(np.array([0]), len(split.tokens))[0]


def documents_of(made: Corpus, split: str) -> list[str]:
    """The texts of a split of the only part, without what stands before each."""
    part = made.parts[0]
    side = part.train if split == "train" else part.held_out
    ids, borders = ids_of(side), side.documents.astype(int)
    assert (ids[borders[:-1]] == made.tokenizer.end_of_text).all()
    return [made.tokenizer.decode(ids[start + 1 : end]) for start, end in pairwise(borders)]


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


class TestMixture:
    def mixture(self, workshop: Workshop, tmp_path: Path) -> Corpus:
        workshop.tokenizer = TokenizerConfig(vocab_size=300)
        topics = tmp_path / "topics"
        topics.mkdir(exist_ok=True)
        for number in range(30):
            (topics / f"{number}.txt").write_text(f"number {number} says: hello world, how are you?\n" * 40)
        parts = [
            PartConfig(source="text", paths=[str(workshop.text)], weight=3.0, licence="PSF"),
            PartConfig(source="text", paths=[str(topics)], licence="CC0"),
        ]
        workshop.data = DataConfig(source="mixture", parts=parts, holdout=0.4, cache_dir=str(workshop.cache))
        return workshop.prepare()

    def test_each_part_has_its_own_folder_and_all_have_one_tokenizer(self, workshop, tmp_path):
        made = self.mixture(workshop, tmp_path)
        assert [part.weight for part in made.parts] == [3.0, 1.0]
        assert len(workshop.folders()) == 2
        assert {part.index.tokenizer for part in made.parts} == {made.tokenizer.fingerprint()}
        assert [s["licence"] for s in made.manifest["sources"]] == ["PSF", "CC0"]
        assert "hello" in made.tokenizer.decode(ids_of(made.parts[1].train))
        vocabulary = made.tokenizer.backend.to_str()
        assert "hello" in vocabulary or "ello" in vocabulary  # a sample of every part
        assert self.mixture(workshop, tmp_path).fingerprint == made.fingerprint
        assert not workshop.built

    def test_a_part_that_is_damaged_is_made_again_alone(self, workshop, tmp_path):
        made = self.mixture(workshop, tmp_path)
        shutil.rmtree(sorted(workshop.folders())[0])
        assert self.mixture(workshop, tmp_path).fingerprint == made.fingerprint
        assert sum(line.startswith("encoding") for line in workshop.said) == 1

    def test_a_part_that_is_too_small(self, workshop, tmp_path):
        self.mixture(workshop, tmp_path)
        with pytest.raises(UserError, match=r"fewer than model\.context_length"):
            workshop.prepare(1_000_000)


class TestExamples:
    def rows(self, workshop: Workshop, tmp_path: Path, rows: Sequence[dict], **data) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        workshop.data = DataConfig(source="jsonl", paths=[str(path)], cache_dir=str(workshop.cache), **data)
        workshop.tokenizer = TokenizerConfig(name="byte")

    def test_labels_stand_beside_the_ids(self, workshop, tmp_path):
        rows = [{"prompt": f"{number}?", "completion": f" {number}!"} for number in range(300)]
        self.rows(workshop, tmp_path, rows)
        made = workshop.prepare(32, ExampleSettings(context_length=32))
        assert (made.kind, made.classes) == ("language_model", [])
        assert "jsonl: 1 file: rows of prompt_completion; learned: the completion" in workshop.said
        part = made.parts[0]
        assert sum(part.index.documents.values()) == 300
        assert part.index.documents["held_out"] in range(5, 30)
        for split in (part.train, part.held_out):
            assert split.labels is not None
            ids, labels = ids_of(split), split.labels.windows(np.array([0]), len(split.labels))[0]
            learned = labels != -100
            assert (ids[learned] == labels[learned]).all()
            first = made.tokenizer.decode(labels[: int(split.documents[1])][learned[: int(split.documents[1])]])
            assert first.startswith(" ")
            assert first.endswith("!<|endoftext|>")

    def test_of_few_examples_the_smallest_hashes_are_held_out(self, workshop, tmp_path):
        self.rows(workshop, tmp_path, [{"text": f"example {number}"} for number in range(12)], holdout=0.2)
        made = workshop.prepare(32, ExampleSettings(context_length=32))
        assert made.parts[0].index.documents == {"train": 10, "held_out": 2}
        self.rows(workshop, tmp_path, [{"text": "example"}], holdout=0.2)
        with pytest.raises(UserError, match="has no training examples"):
            workshop.prepare(32, ExampleSettings(context_length=32))

    def test_classes_are_kept_with_the_corpus(self, workshop, tmp_path):
        self.rows(workshop, tmp_path, [{"text": f"t {n}", "label": "ab"[n % 2]} for n in range(30)])
        made = workshop.prepare(32, ExampleSettings(context_length=32))
        again = workshop.prepare(32, ExampleSettings(context_length=32))
        assert (made.kind, made.classes, again.classes) == ("text_label", ["a", "b"], ["a", "b"])
        assert not workshop.built
        assert made.parts[0].index.classes == ["a", "b"]
        other = workshop.prepare(32, ExampleSettings(context_length=32, labels=["b", "a"]))
        assert other.fingerprint != made.fingerprint

    def test_examples_are_filtered_redacted_and_counted(self, workshop, tmp_path):
        rows = [{"prompt": f"mail of {n}?", "completion": f"n{n}@example.com"} for n in range(40)]
        rows += [rows[0], {"prompt": "x", "completion": ""}, {"prompt": "long " * 30, "completion": "y"}]
        self.rows(workshop, tmp_path, rows, deduplicate="exact", redact=["email"], too_long="drop")
        made = workshop.prepare(64, ExampleSettings(context_length=64, too_long="drop"))
        counts = made.manifest["sources"][0]["counts"]
        assert (counts["duplicates"], counts["redacted_email"], counts["dropped_no_target"], counts["dropped_too_long"]) == (1, 40, 1, 1)
        assert sum(made.parts[0].index.documents.values()) == 40
        assert "@" not in made.tokenizer.decode(ids_of(made.parts[0].train))

    def test_parts_that_teach_different_things(self, workshop, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}\n')
        (tmp_path / "b.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
        parts = [PartConfig(source="jsonl", paths=[str(tmp_path / f"{name}.jsonl")]) for name in "ab"]
        workshop.data = DataConfig(source="mixture", parts=parts, cache_dir=str(workshop.cache))
        with pytest.raises(UserError, match="a model learns one of the two"):
            workshop.prepare(32, ExampleSettings(context_length=32))


# Prepares what a JSON file says; commits after every batch, dies by its own hand after so many, in the middle of what it was doing.
KILLED = """
import json, os, signal, sys
from gpt.data import encoding, prepare, shards
from gpt.data.config import DataConfig, TokenizerConfig

data, tokenizer, die_after, where = json.loads(sys.argv[1])
prepare.COMMIT_SECONDS, encoding.BATCH_BYTES, count = 0.0, 9000, 0

def dying(function, name):
    def call(*arguments):
        global count
        count += name == where
        if name == where and count > die_after:
            if name == "append":  # half of what should be written
                arguments = (arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                function(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call

shards.ShardWriter.append = dying(shards.ShardWriter.append, "append")
shards.ShardWriter.sync = dying(shards.ShardWriter.sync, "sync")
prepare.write_json = dying(prepare.write_json, "write_json")
prepare.write_index = dying(prepare.write_index, "write_index")
made = prepare.prepare_corpus(DataConfig(**data), TokenizerConfig(**tokenizer), 32, lambda text: print(text, flush=True))
print("fingerprint", made.fingerprint)
"""


class TestKill:
    @pytest.mark.parametrize(
        ("where", "die_after", "workers"),
        [
            ("append", 1, 0), ("append", 7, 0), ("sync", 9, 0), ("write_json", 0, 0), ("write_index", 0, 0), ("write_json", 5, 2),
        ],
    )  # fmt: skip
    def test_what_was_committed_is_kept_and_the_result_is_the_same(self, workshop, tmp_path, where, die_after, workers):
        for number in range(4):
            (workshop.text / f"copy{number}.txt").write_text("the same again\n" * 300)
        workshop.data.deduplicate, workshop.data.workers, workshop.data.redact = "exact", workers, ["email"]
        workshop.data.cache_dir = str(tmp_path / "whole")
        whole = workshop.prepare()
        workshop.data.cache_dir = str(workshop.cache)
        settings = {name: value for name, value in asdict(workshop.data).items() if name != "fields"}
        arguments = json.dumps([settings, asdict(workshop.tokenizer), die_after, where])
        victim = subprocess.run([sys.executable, "-c", KILLED, arguments], capture_output=True, text=True, check=False)
        assert victim.returncode == -signal.SIGKILL, victim.stderr
        again = workshop.prepare()
        went_on = [line for line in workshop.said if line.startswith("going on behind")]
        assert len(went_on) == ((where, die_after) not in (("append", 1), ("write_json", 0)))
        assert again.fingerprint == whole.fingerprint
        assert again.manifest == whole.manifest
        (one,), (other,) = ({p for p in Path(c, "data").iterdir() if p.is_dir()} for c in (tmp_path / "whole", workshop.cache))
        assert one.name == other.name
        names = {p.name for p in one.iterdir()}
        assert names == {p.name for p in other.iterdir()}
        for name in names - {"verified.json"}:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name

    def test_killed_when_all_but_the_name_was_done(self, workshop):
        whole = workshop.prepare().fingerprint
        (folder,) = workshop.folders()
        half = folder.with_name(f".{folder.name}.building")
        folder.rename(half)
        (half / "progress.json").write_text("{}")
        assert workshop.prepare().fingerprint == whole
        assert not workshop.built
        assert workshop.folders() == {folder}
        assert not (folder / "progress.json").exists()

    def test_a_half_that_is_damaged_itself_is_said_and_begun_anew(self, workshop, monkeypatch):
        whole = workshop.prepare().fingerprint
        (folder,) = workshop.folders()
        half = folder.with_name(f".{folder.name}.building")
        shutil.rmtree(folder)
        for progress in (
            "{",
            "{}",
            '{"splits": {"train": {"sizes": [9], "documents": 1, "bytes": 9, "files": {"train-00000.bin": {"bytes": 18}}}}}',
        ):
            half.mkdir()
            (half / "progress.json").write_text(progress)
            assert workshop.prepare().fingerprint == whole
            assert any("starting from the beginning" in line for line in workshop.said)
            shutil.rmtree(folder)

    def test_an_interrupt_keeps_what_is_done(self, workshop, monkeypatch):
        whole = workshop.prepare().fingerprint
        shutil.rmtree(workshop.cache / "data")
        monkeypatch.setattr(module, "COMMIT_SECONDS", 0.0)
        monkeypatch.setattr("gpt.data.encoding.BATCH_BYTES", 9000)
        append, calls = shards.ShardWriter.append, iter(range(100))

        def interrupted(*arguments):
            if next(calls) == 9:
                raise KeyboardInterrupt
            append(*arguments)

        monkeypatch.setattr(shards.ShardWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workshop.prepare()
        monkeypatch.setattr(shards.ShardWriter, "append", append)
        assert workshop.prepare().fingerprint == whole
        assert any(line.startswith("going on behind") for line in workshop.said)


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
