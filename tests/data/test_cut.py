"""`Tokenizer.cut`: pieces of texts as a tokenizer cuts them within one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from gpt.data.tokenizer import END_OF_TEXT, Tokenizer
from gpt.data.tokenizer_training import byte_tokenizer, char_tokenizer, train_bpe

TEXTS = st.text(alphabet=st.sampled_from("abt he\n é€🙂<|>0x"), max_size=20)
TRAINED = ["the other the thé bathe €a the\n"] * 20


@pytest.fixture(scope="module", params=["bpe", "byte", "char"])
def of_ours(request) -> Tokenizer:
    return {"bpe": train_bpe(TRAINED, 268), "byte": byte_tokenizer(), "char": char_tokenizer(["abthe é\n"])}[request.param]


@given(text=TEXTS)
def test_text_is_cut_as_ever_where_nothing_stands_before_one(of_ours, text):
    assert of_ours.cut([text.encode()]) == [of_ours.encode(text)]


@given(pieces=st.lists(st.one_of(st.binary(max_size=6), TEXTS.map(str.encode)), max_size=4))
def test_bytes_are_kept_also_where_they_are_no_characters(of_ours, pieces):
    cut = of_ours.cut(pieces)
    assert [b"".join(of_ours.pieces(ids)) for ids in cut] == pieces


def test_merges_of_bytes_hold_within_characters():
    tokenizer = train_bpe(["a€ b€ c€ "] * 20, 260)
    joined = tokenizer.backend.get_vocab_size() - 1
    halves = [piece for piece in tokenizer.pieces(range(257, joined + 1)) if piece in ("€".encode()[:2], "€".encode()[1:])]
    assert halves, "the text must make the tokenizer join two bytes of the sign"
    assert tokenizer.cut(halves) == [[tokenizer.pieces(range(joined + 1)).index(half)] for half in halves]


@given(text=TEXTS.filter(bool))
def test_no_blank_is_put_before_a_piece(sentencepiece_tokenizer, text):
    """Every text of Llama's kind begins with "▁"; a piece within one does only if it has a blank there."""
    cut, with_blank = sentencepiece_tokenizer.cut([text.encode(), f" {text}".encode()])
    assert with_blank == sentencepiece_tokenizer.encode(text)
    assert b"".join(sentencepiece_tokenizer.pieces(cut)).decode() == text


def test_bytes_of_a_sentencepiece_tokenizer(sentencepiece_tokenizer):
    euro = "€".encode()
    cut = sentencepiece_tokenizer.cut([euro[:2], b"ba" + euro[:1], euro[2:] + b" ba", b"</s>"])
    assert [sentencepiece_tokenizer.pieces(ids) for ids in cut[:3]] == [[euro[:1], euro[1:2]], [b"ba", euro[:1]], [euro[2:], b" ba"]]
    assert sentencepiece_tokenizer.end_of_text not in cut[3]


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_metaspace_puts_none_before_a_piece_either_and_unknown_characters_are_left_out(scheme):
    backend = HFTokenizer(models.Unigram([("<unk>", 0.0), ("▁", -3.0), ("a", -2.0), ("▁a", -1.0)], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = Tokenizer(backend)
    assert tokenizer.cut([b"a", b" a", b"xa", b"x", b"", b"\xff"]) == [[2], [3], [2], [], [], []]


def test_a_blank_is_not_put_before_bytes_either():
    backend = byte_tokenizer().backend
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = Tokenizer(backend)
    assert tokenizer.pieces(tokenizer.encode("a")) == [b" ", b"a"]
    assert [tokenizer.pieces(ids) for ids in tokenizer.cut([b"a", b" a"])] == [[b"a"], [b" ", b"a"]]


def test_roles(sentencepiece_tokenizer):
    end = byte_tokenizer().end_of_text
    assert byte_tokenizer().roles() == {"eos_token": end, "bos_token": end, "pad_token": end}
    named = byte_tokenizer(["<|start|>"])
    named.special_tokens = {"bos_token": "<|start|>", "eos_token": END_OF_TEXT}
    assert named.roles() == {"bos_token": named.control_tokens()["<|start|>"], "eos_token": named.end_of_text}
    assert sentencepiece_tokenizer.roles()["unk_token"] == sentencepiece_tokenizer.backend.token_to_id("<unk>")
