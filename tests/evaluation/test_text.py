import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.commands import EvaluateConfig
from gpt.data.config import DataConfig, PartConfig, TokenizerConfig
from gpt.data.prepare import prepare_corpus
from gpt.data.sources import ReadReport
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.evaluation import text as module
from gpt.evaluation.text import EncodedText, encode_texts, read_texts


def ids_of(encoded: EncodedText) -> list[int]:
    return np.concatenate(encoded.tokens.shards).tolist()


def read(folder: Path, part, **data) -> list[str]:
    config = EvaluateConfig(model="x", data=DataConfig(source="text", paths=[str(folder)], **data), part=part)
    return read_texts(config, ReadReport())


def without_separator() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_special_tokens(["<other>"])
    from tokenizers import Tokenizer as HFTokenizer

    return Tokenizer(HFTokenizer.from_str(tokenizer.backend.to_str().replace("<|endoftext|>", "<begin>")))


# What is read


FILTERS = {"deduplicate": "exact", "min_characters": 20, "redact": ["email"]}


@pytest.fixture(autouse=True)
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fast encoder, by the slow one, which would take most of the time."""
    monkeypatch.setattr("gpt.data.survey.CHECK_CHARACTERS", 2000)


@pytest.fixture
def mails(corpus, tmp_path) -> Path:
    """The corpus and some files that filters leave out or change."""
    folder = tmp_path / "mails"
    shutil.copytree(corpus, folder)
    for number in range(12):
        (folder / f"mail{number}.txt").write_text(f"from someone-{number % 9}@example.com, who has no more to say\n" * 3)
        (folder / f"tiny{number}.txt").write_text(f"tiny {number}")
    return folder


@pytest.mark.parametrize("filters", [{}, FILTERS], ids=["as it is", "filtered"])
@pytest.mark.parametrize("pieces", [1 << 20, 700], ids=["whole", "in pieces"])
@pytest.mark.parametrize("holdout", [0.05, 0.4], ids=["cut within", "by file"])
def test_held_out_is_what_a_run_holds_out(mails, tmp_path, monkeypatch, holdout, filters, pieces):
    monkeypatch.setattr("gpt.data.sources.PIECE_BYTES", pieces)
    data = DataConfig(source="text", paths=[str(mails)], holdout=holdout, cache_dir=str(tmp_path / "cache"), **filters)
    trained = prepare_corpus(data, TokenizerConfig(name="byte"), 16, lambda text: None)
    part = trained.parts[0]
    encoded = encode_texts(read(mails, "held_out", holdout=holdout, **filters), trained.tokenizer, 257)
    assert ids_of(encoded) == np.concatenate(part.held_out.tokens.shards).tolist()
    assert (encoded.bytes, encoded.documents) == (part.index.bytes["held_out"], part.index.documents["held_out"])


def test_of_a_mixture_every_part_is_held_out(mails, corpus, tmp_path):
    parts = [PartConfig(source="text", paths=[str(folder)]) for folder in (mails, corpus)]
    data = DataConfig(source="mixture", parts=parts, holdout=0.4, cache_dir=str(tmp_path / "cache"))
    trained = prepare_corpus(data, TokenizerConfig(name="byte"), 16, lambda text: None)
    texts = read_texts(EvaluateConfig(model="x", data=data, part="held_out"), ReadReport())
    expected = [i for part in trained.parts for i in np.concatenate(part.held_out.tokens.shards).tolist()]
    assert ids_of(encode_texts(texts, trained.tokenizer, 257)) == expected


@pytest.mark.parametrize("part", ["all", "auto"])
@pytest.mark.parametrize("pieces", [1 << 20, 700], ids=["whole", "in pieces"])
@pytest.mark.parametrize("holdout", [0.05, 0.4])
def test_all_is_the_files_as_they_are(corpus, part, holdout, pieces, monkeypatch):
    monkeypatch.setattr("gpt.data.sources.PIECE_BYTES", pieces)
    assert read(corpus, part, holdout=holdout) == [p.read_text(encoding="utf-8") for p in sorted(corpus.iterdir())]


def test_files_that_are_cut_at_their_very_beginning(tmp_path):
    for name, text in {"a": "x", "a (end)": "yz", "b": "long enough\nto be cut\n", "c": "\n"}.items():
        (tmp_path / name).write_text(text)
    assert read(tmp_path, "all", holdout=0.3) == ["x", "yz", "long enough\nto be cut\n"]


def test_no_text(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\0\1")
    with pytest.raises(UserError, match=r"^data: there is no text in text: 2 files \(1 empty, 1 binary\)$"):
        read(tmp_path, "all")
    with pytest.raises(UserError, match=r"^data: there is no text in text: 2 files"):
        read(tmp_path, "held_out")
    (tmp_path / "text").write_text("x" * 500)
    with pytest.raises(UserError, match=r"^data: there is no held-out text in text: 3 files \(1 empty, 1 binary\)$"):
        read(tmp_path, "held_out", min_characters=1000)


# What becomes of it


def test_a_token_stands_before_each_document():
    tokenizer = byte_tokenizer()
    end = tokenizer.end_of_text
    encoded = encode_texts(["ab", "é"], tokenizer, 257)
    assert ids_of(encoded) == [end, *tokenizer.encode("ab"), end, *tokenizer.encode("é")]
    assert (encoded.documents, encoded.bytes, encoded.text) == (2, 4, "abé".encode())


def test_without_such_a_token_the_first_is_not_scored():
    tokenizer = without_separator()
    assert tokenizer.end_of_text is None
    encoded = encode_texts(["ab", "é"], tokenizer, 300)
    assert ids_of(encoded) == tokenizer.encode("abé")
    assert (encoded.documents, encoded.bytes, encoded.text) == (2, 3, "bé".encode())


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5), st.integers(0, 30), st.booleans())
def test_the_bytes_are_those_of_the_tokens_that_are_scored(texts, max_tokens, separated):
    tokenizer = byte_tokenizer() if separated else without_separator()
    whole = [i for text in texts for i in ([tokenizer.end_of_text] if separated else []) + tokenizer.encode(text)]
    expected = whole[: max_tokens + 1] if max_tokens else whole
    if len(expected) < 2:
        return
    encoded = encode_texts(texts, tokenizer, 300, max_tokens)
    assert ids_of(encoded) == expected
    assert encoded.bytes == int(tokenizer.byte_lengths()[expected[1:]].sum()) == len(encoded.text)
    assert "".join(texts).encode()[0 if separated else 1 :].startswith(encoded.text)


def test_bytes_are_those_of_the_text_where_pieces_do_not_say(sentencepiece_tokenizer):
    encoded = encode_texts(["ba", "ba"], sentencepiece_tokenizer, 300)  # "▁ba" twice: three characters each
    assert int(sentencepiece_tokenizer.byte_lengths()[ids_of(encoded)].sum()) == 6
    assert encoded.bytes == 4


def test_reading_ends_where_enough_has_been_read(monkeypatch):
    read: list[str] = []

    class Counting(Tokenizer):
        def encode_batch(self, texts):
            read.extend(texts)
            return super().encode_batch(texts)

    monkeypatch.setattr(module, "Tokenizer", Counting)
    encoded = encode_texts(["abc"] * 1000, byte_tokenizer(), 257, 10)
    assert len(read) < 100
    assert (len(encoded.tokens), encoded.documents) == (11, 3)


def test_a_long_text_is_compressed_in_part(monkeypatch):
    monkeypatch.setattr(module, "COMPRESSED_BYTES", 5)
    encoded = encode_texts(["abc", "def"], byte_tokenizer(), 257)
    assert (encoded.bytes, encoded.text) == (6, b"abcde")


def test_too_little_text():
    with pytest.raises(UserError, match=r"^data: 1 token of text; there is nothing to predict$"):
        encode_texts(["a"], without_separator(), 300)


def test_a_tokenizer_of_another_model():
    with pytest.raises(UserError, match=r"^model: its tokenizer makes id \d+, and the model knows 50"):
        encode_texts(["abc"], byte_tokenizer(), 50)
