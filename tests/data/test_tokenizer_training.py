import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt.data.bulk_encoding import SPLIT_PATTERNS
from gpt.data.config import TokenizerConfig
from gpt.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from gpt.data.tokenizer_training import byte_tokenizer, char_tokenizer, make_tokenizer, train_bpe
from gpt.errors import UserError

TRICKY = st.text(alphabet=st.sampled_from("ab'sS ſ\t\n\r\v\0\x85\u00a0\u200d\u2028é字🙂👩\u0301١1²▁<|>endoftx_-0A"), max_size=40)
TEXTS = st.one_of(st.text(max_size=60), TRICKY, st.lists(st.sampled_from([END_OF_TEXT, "<|a|>", "<0x41>", " ", "a", "\r\n"])).map("".join))
CONFIGS = {
    **{split: TokenizerConfig(vocab_size=600, split=split, special_tokens=["<|a|>"]) for split in ("gpt4", "gpt2", "digits")},
    "char": TokenizerConfig(name="char", special_tokens=["<|a|>"]),
    "byte": TokenizerConfig(name="byte", special_tokens=["<|a|>"]),
}


@pytest.fixture(scope="module")
def texts(stdlib_files: list[Path]) -> list[str]:
    return [p.read_text(encoding="utf-8") for p in stdlib_files[::8]]


@pytest.fixture(scope="module", params=CONFIGS)
def made(request: pytest.FixtureRequest, texts: list[str]) -> Tokenizer:
    return make_tokenizer(CONFIGS[request.param], iter(texts))


@pytest.fixture(scope="module")
def loaded_by_transformers(made: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("transformers")
    made.to_transformers(64).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder), made


class TestEveryKind:
    @given(text=TEXTS)
    @example(text="")
    @example(text="\ufffd\ufeff\x00\x1b[0m\r\n\r\n \U0010ffff👩‍👩‍👧‍👦\u0301")
    def test_any_text_survives_the_round_trip(self, made, text):
        ids = made.encode(text)
        assert made.decode(ids) == text
        assert b"".join(made.pieces(ids)) == text.encode()
        assert not {*ids} & {*made.control_tokens().values()}
        assert all(0 <= i < made.vocab_size for i in ids)

    @settings(max_examples=40)
    @given(text=TEXTS)
    @example(text=f"\0\r\n {END_OF_TEXT}<|a|>")
    def test_and_through_transformers_saved_and_loaded(self, loaded_by_transformers, text):
        theirs, ours = loaded_by_transformers
        assert theirs.decode(ours.encode(text)) == text
        ids = theirs.encode(text, add_special_tokens=False)
        assert theirs.decode(ids) == text
        assert ids == ours.encode(text) or END_OF_TEXT in text or "<|a|>" in text

    def test_control_tokens_come_first(self, made):
        assert made.control_tokens() == {END_OF_TEXT: 0, "<|a|>": 1}
        assert made.end_of_text == 0
        assert made.pieces([0, 1]) == [END_OF_TEXT.encode(), b"<|a|>"]

    def test_saved_and_loaded_it_is_the_same(self, made, tmp_path):
        made.save(tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path, check="def f(x): return x")
        assert loaded.is_fast
        assert (loaded.fingerprint(), loaded.describe()) == (made.fingerprint(), made.describe())

    def test_special_tokens_of_a_text_that_json_wrote_badly(self, made):
        assert made.decode(made.encode("a\ud800b")) == "a\ufffdb"
        ids, offsets = made.encode_with_offsets("a\udc00\ud800é")
        assert made.decode(ids) == "a\ufffd\ufffdé"
        assert (offsets[0], offsets[-1][1]) == ((0, 1), 4)


class TestBPE:
    def test_has_the_size_asked_for(self, texts):
        assert train_bpe(iter(texts), 700).vocab_size == 700
        assert train_bpe(texts, 700, special_tokens=["<|a|>", "<|b|>"]).vocab_size == 700

    def test_the_default_is_the_tokenizer_that_earlier_versions_trained(self):
        """The ids of what was trained decide what a checkpoint's numbers mean."""
        text = "def f(x):\n    return x + 1234567\n\n\nclass A:\n    def g(self):\n        return [self.x for _ in range(10)]\n" * 3
        tokenizer = make_tokenizer(TokenizerConfig(vocab_size=300), [text])
        assert tokenizer.fingerprint() == "40cfebdee4cd5c8d"

    def test_shortens_code(self, texts):
        tokenizer = train_bpe(texts, 1024)
        assert len(tokenizer.encode(texts[1])) < len(texts[1].encode()) * 0.6

    def test_more_than_the_text_allows(self):
        texts = ["the cat sat on the mat, the cat sat"] * 3
        with pytest.raises(UserError, match=r"^tokenizer\.vocab_size=5000 is more than this text allows") as error:
            train_bpe(texts, 5000)
        most = int(re.findall(r"at most (\d+)", str(error.value))[0])
        assert train_bpe(texts, most).vocab_size == most
        with pytest.raises(UserError):
            train_bpe(texts, most + 1)

    def test_there_is_a_least_size(self):
        with pytest.raises(UserError, match=r"^tokenizer\.vocab_size=256 must be at least 257: 256 bytes and the end-of-text token$"):
            train_bpe(["some text"], 256)
        with pytest.raises(
            UserError, match=r"^tokenizer\.vocab_size=258 must be at least 259: 256 bytes and the end-of-text .* 2 of your own$"
        ):
            train_bpe(["some text"], 258, special_tokens=["<|a|>", "<|b|>"])
        assert train_bpe(["some text"], 257).decode(train_bpe(["some text"], 257).encode("né")) == "né"

    def test_same_text_same_tokenizer(self, texts):
        first, second, other = train_bpe(texts[:1], 400), train_bpe(texts[:1], 400), train_bpe(texts[:1], 401)
        assert first.fingerprint() == second.fingerprint() != other.fingerprint()

    @pytest.mark.parametrize(
        ("split", "pieces"),
        [
            ("gpt4", ["x", " =", " ", "123", "45", "\n", "   ", " y", "(z", ")\n\n", "I", "'M"]),
            ("gpt2", ["x", " =", " 12345", "\n   ", " y", "(", "z", ")", "\n", "\n", "I", "'", "M"]),
            ("digits", ["x", " =", " ", "1", "2", "3", "4", "5", "\n", "   ", " y", "(z", ")\n\n", "I", "'M"]),
        ],
    )
    def test_no_token_goes_over_a_cut(self, split, pieces):
        text = "x = 12345\n    y(z)\n\nI'M"
        pre_tokenizer = train_bpe([text], 257, split).backend.pre_tokenizer
        assert [text[a:b] for _, (a, b) in pre_tokenizer.pre_tokenize_str(text)] == pieces
        assert {*SPLIT_PATTERNS} == {"gpt4", "gpt2", "digits"}


def test_the_byte_tokenizer_has_an_id_a_byte():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 257
    text = "aé🙂"
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert sorted(tokenizer.byte_lengths()) == [0] + [1] * 256


class TestCharacters:
    def test_an_id_a_character_and_bytes_for_others(self):
        tokenizer = char_tokenizer(["ba", "é"])
        assert tokenizer.vocab_size == 1 + 256 + 3
        assert tokenizer.encode("abé") == [257, 258, 259]
        assert tokenizer.encode("字") == [1 + b for b in "字".encode()]
        assert tokenizer.byte_lengths()[tokenizer.encode("é字")].tolist() == [2, 1, 1, 1]

    def test_the_sign_that_sentencepiece_writes_for_a_space_is_itself(self):
        tokenizer = char_tokenizer(["▁ "])
        assert tokenizer.decode(tokenizer.encode("▁ ▁")) == "▁ ▁"
        assert b"".join(tokenizer.pieces(tokenizer.encode("▁ ▁"))).decode() == "▁ ▁"

    def test_of_no_text_it_is_bytes(self):
        assert char_tokenizer([]).encode("a") == [1 + ord("a")]


@pytest.mark.parametrize(
    ("config", "token"),
    [
        (TokenizerConfig(vocab_size=300), "a"),
        (TokenizerConfig(vocab_size=300), "the"),  # which merges make
        (TokenizerConfig(name="byte"), "é"),  # which stands for a byte in a byte-level vocabulary
        (TokenizerConfig(name="char"), "a"),
        (TokenizerConfig(name="char"), "<0x41>"),
    ],
)
def test_a_control_token_that_a_text_would_make(config, token):
    config.special_tokens = [token]
    with pytest.raises(
        UserError, match=rf"^tokenizer\.special_tokens={token}: a text can hold this as an ordinary token; write it as no .*"
    ):
        make_tokenizer(
            config, ["the theme of the other " * 9, "these are many words, and there is a text that has them all: breathe, bathe"]
        )


@pytest.mark.parametrize("token", ["<|字|>", "a字", "<|the|>", "[INST]"])
def test_a_control_token_that_no_text_makes(token):
    for name in ("bpe", "char", "byte"):
        tokenizer = make_tokenizer(TokenizerConfig(name=name, vocab_size=260, special_tokens=[token]), ["the a the a"])
        assert tokenizer.decode(tokenizer.encode(token)) == token
        assert tokenizer.control_tokens()[token] not in tokenizer.encode(token)


def test_the_end_of_text_token_among_ones_own():
    assert byte_tokenizer([END_OF_TEXT, "<|a|>"]).fingerprint() == byte_tokenizer(["<|a|>"]).fingerprint()


class TestMaking:
    def texts(self) -> Iterator[str]:
        raise AssertionError("the texts were read")
        yield ""

    def test_texts_are_not_read_where_nothing_is_learned(self, tmp_path):
        made = make_tokenizer(TokenizerConfig(name="byte"), self.texts())
        made.save(tmp_path / "tokenizer.json")
        loaded = make_tokenizer(TokenizerConfig(name="pretrained", path=str(tmp_path)), self.texts())
        assert loaded.fingerprint() == made.fingerprint()
        with pytest.raises(AssertionError, match="were read"):
            make_tokenizer(TokenizerConfig(name="char"), self.texts())

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            (TokenizerConfig(vocab_size=290), "byte-level BPE, 290 ids, split gpt4"),
            (TokenizerConfig(vocab_size=290, split="gpt2"), "byte-level BPE, 290 ids, split gpt2"),
            (TokenizerConfig(vocab_size=290, split="digits"), "byte-level BPE, 290 ids, split digits"),
            (TokenizerConfig(name="char"), "characters, 271 ids"),
            (TokenizerConfig(name="byte"), "bytes, 257 ids"),
        ],
    )
    def test_it_says_what_it_is(self, config, says):
        texts = ["the quick brown fox jumps over the lazy dog, then naps; another dog jumps over the fox " * 3]
        if config.name == "char":
            texts = ["abcdefghijklmn"]
        assert make_tokenizer(config, texts).describe() == says
