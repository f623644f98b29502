"""Mixtures of sources, and examples, on the way into the shards."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gpt.data.config import DataConfig, PartConfig, TokenizerConfig
from gpt.data.examples import ExampleSettings
from gpt.data.prepare import Corpus
from gpt.errors import UserError
from tests.data.workshop import Workshop, ids_of


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
