import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt.config import DataConfig, TokenizerConfig
from gpt.data.prepare import Corpus, prepare_corpus
from gpt.data.sources import ReadReport, find_files, read_documents
from gpt.errors import UserError


class Workshop:
    """A copy of the corpus, a cache of its own, and what was said while preparing."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.text, self.cache = folder / "text", folder / "cache"
        shutil.copytree(corpus, self.text)
        self.data = DataConfig(source="text", paths=[str(self.text)], cache_dir=str(self.cache))
        self.tokenizer = TokenizerConfig(vocab_size=300)
        self.said: list[str] = []

    def prepare(self, context_length: int = 32) -> Corpus:
        self.said.clear()
        return prepare_corpus(self.data, self.tokenizer, context_length, self.said.append)

    def folders(self) -> set[Path]:
        return {p for p in (self.cache / "data").iterdir() if p.is_dir()}

    @property
    def built(self) -> bool:
        return any(line.startswith("reading") for line in self.said)


@pytest.fixture
def workshop(corpus: Path, tmp_path: Path) -> Workshop:
    return Workshop(corpus, tmp_path)


class TestCache:
    def test_a_hit_builds_nothing(self, workshop):
        first = workshop.prepare()
        assert workshop.built
        (folder,) = workshop.folders()
        before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
        second = workshop.prepare()
        assert f"tokens from the cache: {folder}" in workshop.said
        assert not workshop.built
        assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
        assert first.fingerprint == second.fingerprint
        assert any("only 40 files" in line for line in workshop.said)  # the notes are said every time

    @pytest.mark.parametrize(
        "change",
        [
            lambda w: setattr(w.tokenizer, "vocab_size", 301),
            lambda w: setattr(w.tokenizer, "name", "byte"),
            lambda w: setattr(w.data, "holdout", 0.06),
            lambda w: (w.text / "new.txt").write_text("one more file\n"),
            lambda w: next(w.text.iterdir()).unlink(),
            lambda w: (lambda p: p.write_text(p.read_text().replace("e", "E", 1)))(next(w.text.iterdir())),
            lambda w: (lambda p: p.rename(p.with_suffix(".text")))(next(w.text.iterdir())),
        ],
        ids=["vocab_size", "tokenizer", "holdout", "file added", "file removed", "a letter", "a name"],
    )  # fmt: skip
    def test_any_change_builds_anew_beside_the_old(self, workshop, change):
        before = workshop.prepare()
        old = workshop.folders()
        change(workshop)
        after = workshop.prepare()
        assert workshop.built
        assert len(workshop.folders()) == 2
        assert workshop.folders() > old
        assert before.fingerprint != after.fingerprint

    def test_the_same_text_elsewhere_is_a_hit(self, workshop, tmp_path):
        first = workshop.prepare()
        workshop.text.rename(tmp_path / "moved")
        workshop.data.paths = [str(tmp_path / "moved")]
        assert workshop.prepare().fingerprint == first.fingerprint
        assert not workshop.built

    def test_a_pretrained_tokenizer_counts_by_its_content(self, workshop, tmp_path):
        made = workshop.prepare().tokenizer
        made.save(tmp_path / "tokenizer.json")
        workshop.tokenizer = TokenizerConfig(name="pretrained", path=str(tmp_path / "tokenizer.json"))
        first = workshop.prepare()
        assert first.tokenizer.fingerprint() == made.fingerprint()
        workshop.tokenizer = TokenizerConfig(vocab_size=310)
        workshop.prepare().tokenizer.save(tmp_path / "tokenizer.json")
        workshop.tokenizer = TokenizerConfig(name="pretrained", path=str(tmp_path / "tokenizer.json"))
        assert workshop.prepare().tokenizer.vocab_size == 310
        assert workshop.built

    def test_a_damaged_cache_says_what_to_delete(self, workshop):
        workshop.prepare()
        (folder,) = workshop.folders()
        for name in ("train-00000.bin", "tokenizer.json"):
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: len(content) // 2])
            with pytest.raises(UserError, match=str(folder / name)) as error:
                workshop.prepare()
            assert "\n" not in str(error.value)
            (folder / name).write_bytes(content)
        assert workshop.prepare()

    def test_a_cache_that_cannot_be(self, workshop, tmp_path):
        (tmp_path / "file").write_text("")
        for place in (str(tmp_path / "file"), "~nobody-by-this-name/cache"):
            workshop.data.cache_dir = place
            with pytest.raises(UserError, match=r"^data\.cache_dir") as error:
                workshop.prepare()
            assert place in str(error.value)


class TestTooLittle:
    def test_shorter_than_a_context(self, workshop):
        held_out = len(workshop.prepare(32).held_out)
        assert len(workshop.prepare(held_out - 1).held_out) == held_out
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
        with pytest.raises(UserError, match=r"^data: there is no text in the corpus \(2 empty files, 1 binary\)$"):
            workshop.prepare()
        assert workshop.folders() == set()


@pytest.mark.parametrize("settings", [{"name": "bpe", "vocab_size": 300}, {"name": "byte"}], ids=["bpe", "byte"])
@pytest.mark.parametrize("holdout", [0.05, 0.4], ids=["within files", "by file"])
def test_the_tokens_are_the_documents(workshop, settings, holdout):
    for number in range(10):
        (workshop.text / f"{number}.txt").write_text("naïve café, 30 €\n" * 20, encoding="utf-8")
    workshop.tokenizer, workshop.data.holdout = TokenizerConfig(**settings), holdout
    made = workshop.prepare()
    documents = read_documents(find_files(workshop.data), workshop.data, report := ReadReport())
    assert report.split_within_files == (holdout == 0.05)
    end = made.tokenizer.end_of_text
    for split, array in (("train", made.train), ("held_out", made.held_out)):
        ids = array.windows(np.array([0]), len(array))[0]
        assert ids.max() < made.tokenizer.vocab_size == made.index.vocab_size
        borders = np.flatnonzero(ids == end)
        assert borders[0] == 0  # every document has one before it
        texts = [made.tokenizer.decode(part[1:]) for part in np.split(ids, borders[1:])]
        assert texts == [d.text for d in documents if d.held_out == (split == "held_out")]
        assert made.index.documents[split] == len(texts)
        assert made.index.bytes[split] == sum(len(t.encode()) for t in texts) == made.tokenizer.byte_lengths()[ids].sum()


def test_learning_the_vocabulary_sees_nothing_held_out(workshop: Workshop):
    before = workshop.prepare()
    held_out = [d for d in read_documents(find_files(workshop.data), workshop.data, ReadReport()) if d.held_out]
    file = workshop.text / held_out[0].name.removesuffix(" (end)")
    text = file.read_text(encoding="utf-8").removesuffix(held_out[0].text)
    file.write_text(text + "".join("ZQJ"[i % 3] for i in range(len(held_out[0].text))), encoding="utf-8")
    after = workshop.prepare()
    assert workshop.built
    assert after.tokenizer.fingerprint() == before.tokenizer.fingerprint()
    assert after.fingerprint != before.fingerprint


def test_notes_tell_what_was_met(workshop: Workshop, tmp_path: Path):
    (workshop.text / "latin.txt").write_bytes("café\n".encode("latin-1") * 50)
    (workshop.text / "data.bin").write_bytes(b"\0\1")
    workshop.prepare()
    notes = [line for line in workshop.said if line.startswith("note: ")]
    assert any("1 binary files were left out, e.g. data.bin" in n for n in notes)
    assert any("50 characters replaced, most in latin.txt" in n for n in notes)
    workshop.data.on_error = "raise"
    with pytest.raises(UserError, match=r"data\.bin is a binary file"):
        workshop.prepare()


def test_it_is_fast_where_it_can_be(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    """The ids on disk are those of the tokenizer that is saved, whichever encoder made them."""
    made = workshop.prepare()
    assert "encoding with tiktoken" in workshop.said
    monkeypatch.setattr("gpt.data.tokenizer._tiktoken_of", lambda backend, check: None)
    workshop.data.cache_dir = str(workshop.cache / "slow")
    slow = workshop.prepare()
    assert "encoding with tokenizers" in workshop.said
    assert slow.fingerprint == made.fingerprint
    whole: Callable[[Corpus], np.ndarray] = lambda c: c.train.windows(np.array([0]), len(c.train))  # noqa: E731
    assert np.array_equal(whole(slow), whole(made))
