"""Text in, pieces of text out: whole characters, stop strings, the ends of texts, several texts at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from inference_models import GREEDY, alone, random_model, scripted

from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_training import byte_tokenizer, train_bpe
from gpt.errors import UserError
from gpt.inference.generate import generate_text, whole_texts
from gpt.inference.sampling import Sampling
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT

TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd"), max_size=20)
NARROW = st.text(alphabet="abé€🙂", max_size=20)  # stop strings are met often


def write(tokenizer: Tokenizer, ids: Sequence[int], prompt: str = "", stop: Sequence[str] = (), max_tokens: int | None = None) -> list[str]:
    """The pieces that come when a model writes these ids."""
    model = scripted(ids, tokenizer.vocab_size, len(tokenizer.encode_prompt(prompt)) or 1)
    pieces = list(generate_text(model, tokenizer, [prompt], len(ids) if max_tokens is None else max_tokens, GREEDY, stop))
    assert all(row == 0 for row, _ in pieces)
    return [piece for _, piece in pieces]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


class TestText:
    @given(text=st.one_of(TEXT, NARROW))
    def test_pieces_are_whole_characters_and_add_up(self, tokenizer, text):
        pieces = write(tokenizer, tokenizer.encode(text), prompt="p")
        assert pieces == list(text)  # with an id a byte, each character comes when its last byte does

    @given(content=st.binary(max_size=16))
    @example(content="€".encode()[:2])
    @example(content="🙂".encode()[:3] + b"a" + "🙂".encode())
    def test_bytes_that_are_no_text_come_out_as_they_decode(self, tokenizer, content):
        every = {token: b for b in range(256) for token in [tokenizer.backend.token_to_id(byte_character(b))]}
        ids = [next(i for i, b in every.items() if b == wanted) for wanted in content]
        assert "".join(write(tokenizer, ids)) == tokenizer.decode(ids) == content.decode("utf-8", "replace")

    def test_a_character_is_held_back_until_it_is_whole(self, tokenizer):
        ids = tokenizer.encode("a€b")
        assert write(tokenizer, ids) == ["a", "€", "b"]
        assert write(tokenizer, ids, max_tokens=3) == ["a", "\ufffd"]  # the end of max_tokens cuts it

    @given(text=NARROW, stop=st.lists(st.text(alphabet="abé€🙂", max_size=3), max_size=3))
    @example(text="xabé, y", stop=["abé"])  # the last character of the stop comes in two bytes
    @example(text="aab", stop=["ab", "aab"])
    @example(text="ab", stop=[""])
    def test_stop_strings_never_leak(self, tokenizer, text, stop):
        expected = text
        for end in range(1, len(text) + 1):
            if found := [at for s in stop if s and (at := text[:end].find(s)) >= 0]:
                expected = text[: min(found)]
                break
        assert "".join(write(tokenizer, tokenizer.encode(text), prompt="p", stop=stop)) == expected

    def test_stop_strings_over_and_within_tokens(self):
        tokenizer = train_bpe(["hello world, hello there; "] * 50, 270)
        ids = tokenizer.encode("hello world, hello there; hello")
        tokens = [tokenizer.decode([i]) for i in ids]
        assert max(map(len, tokens)) > 3
        cuts = {"o w": "hell", "there": "hello world, hello ", "; ": "hello world, hello there", "d, hello th": "hello worl"}
        for stop, expected in cuts.items():
            assert "".join(write(tokenizer, ids, stop=[stop])) == expected
            assert stop not in tokens

    def test_nothing_is_written_after_a_stop_string(self, tokenizer):
        model = scripted(tokenizer.encode("ab!cd"), 257)
        passes: list[int] = []
        model.embeddings.register_forward_hook(lambda *_: passes.append(1))
        assert whole_texts(generate_text(model, tokenizer, ["p"], 5, GREEDY, ["!"]), 1) == ["ab"]
        assert len(passes) == 3  # a, b and the stop string itself

    def test_what_only_began_like_a_stop_string_is_written(self, tokenizer):
        assert "".join(write(tokenizer, tokenizer.encode("end"), stop=["end of it"])) == "end"
        assert "".join(write(tokenizer, tokenizer.encode("aaaab"), stop=["aaac"])) == "aaaab"

    def test_a_stop_string_in_the_prompt_is_not_one(self, tokenizer):
        assert "".join(write(tokenizer, tokenizer.encode("b!"), prompt="a!a", stop=["!", "ab"])) == "b"

    def test_the_end_of_the_text(self, tokenizer):
        ids = [*tokenizer.encode("ab"), tokenizer.end_of_text, *tokenizer.encode("cd")]
        assert "".join(write(tokenizer, ids)) == "ab"
        assert write(tokenizer, [tokenizer.end_of_text]) == []

    def test_an_empty_prompt_begins_a_document(self, tokenizer):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=257, context_length=24, n_layer=1, n_head=2, d_model=16)).eval()
        sampling = Sampling(temperature=1.5, seed=2)
        ids = alone(model, [tokenizer.end_of_text], 20, sampling)
        assert tokenizer.end_of_text not in ids
        assert whole_texts(generate_text(model, tokenizer, [""], 20, sampling), 1) == [tokenizer.decode(ids)]

    def test_an_empty_prompt_without_a_token_that_begins_one(self, tokenizer):
        from tokenizers import Tokenizer as HFTokenizer
        from tokenizers import models

        bare = Tokenizer(HFTokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])))
        with pytest.raises(UserError, match=r"^prompt: it is empty"):
            generate_text(scripted([0], 2), bare, [""], 5)

    def test_a_prompt_too_long(self, tokenizer):
        with pytest.raises(UserError, match=r"^prompt: its 9 tokens and max_tokens=5 exceed the model's context of 4; shorten it"):
            generate_text(scripted([1, 2, 3], 257), tokenizer, ["too long!"], 5)

    @pytest.mark.parametrize("continuation", [" ba b", "ba", " €a"])
    def test_a_tokenizer_that_strips_the_first_space(self, sentencepiece_tokenizer, continuation):
        """Decoded alone, a continuation would lose the space between the prompt and itself."""
        prompt = "ab"
        backend = sentencepiece_tokenizer
        whole = backend.encode(prompt + continuation)
        ids = whole[len(backend.encode(prompt)) :]
        assert whole[: -len(ids)] == backend.encode(prompt)
        assert "".join(write(backend, ids, prompt)) == continuation


def byte_character(byte: int) -> str:
    """GPT-2's character for a byte: itself if it is printable, else the next free one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + sum(b not in printable for b in range(byte)))


def test_a_space_at_the_end_of_the_prompt_belongs_to_the_next_word():
    tokenizer = train_bpe(["import sys and import os; import re " * 50], 270)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=270, context_length=32, n_layer=1, n_head=2, d_model=32)).eval()
    words = tokenizer.starting_with_space()
    assert {tokenizer.decode([i])[0] for i in words} == {" "}
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("import")]))[0, -1]
    best = max(words, key=lambda i: logits[i].item())
    text = whole_texts(generate_text(model, tokenizer, ["import "], 1, GREEDY), 1)[0]
    assert text == tokenizer.decode([best])[1:]
    inside = tokenizer.encode("import sys")
    assert inside[: len(tokenizer.encode("import"))] == tokenizer.encode("import"), "the premise: the space is the word's"


def test_only_one_space_after_a_word_is_left_to_the_next_token():
    tokenizer = train_bpe(["import sys and import os; import re " * 50], 270)
    model = random_model("llama", vocab_size=270)
    for prompt in ("import  ", " ", "import\n"):
        got = whole_texts(generate_text(model, tokenizer, [prompt], 5, GREEDY), 1)
        assert got == [tokenizer.decode(alone(model, tokenizer.encode(prompt), 5))]


def test_the_first_space_is_left_out_however_the_first_token_comes():
    """Healed, the first token is held back while its bytes make no character; the space is still the prompt's."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(" é!")
    model = scripted(ids, 257, 1)
    assert list(generate_text(model, tokenizer, ["p "], len(ids), GREEDY)) == [(0, "é"), (0, "!")]


def test_a_batch_of_texts_is_the_texts_one_by_one():
    tokenizer = byte_tokenizer()
    model = random_model("qwen2", vocab_size=257, context_length=64)
    sampling = Sampling(temperature=1.5, seed=3)
    prompts = ["a longer text é", "", "b ", [5, 6, 7]]
    stop = ["e", "\n"]
    pieces = list(generate_text(model, tokenizer, prompts, 30, sampling, stop, n=3))
    assert {row for row, _ in pieces} <= set(range(12))
    texts = whole_texts(pieces, 12)
    for number, prompt in enumerate(prompts):
        assert texts[3 * number : 3 * number + 3] == whole_texts(generate_text(model, tokenizer, [prompt], 30, sampling, stop, n=3), 3)
    assert len({*texts}) > 9


def test_rows_that_met_a_stop_string_leave_the_others_alone():
    tokenizer = byte_tokenizer()
    model = random_model("llama", vocab_size=257, context_length=64)
    sampling = Sampling(temperature=2.0, seed=1)
    free = whole_texts(generate_text(model, tokenizer, ["x"], 40, sampling, n=8), 8)
    assert len({*free}) == 8
    stop = next(c for c in free[2] if 2 <= sum(c in text for text in free) <= 6)
    cut = whole_texts(generate_text(model, tokenizer, ["x"], 40, sampling, [stop], n=8), 8)
    assert cut == [text.split(stop)[0] for text in free]
    assert cut[2] != free[2]
    assert sum(text == whole for text, whole in zip(cut, free, strict=True)) >= 2


def test_stop_ids_besides_the_end_of_text():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("abcd")
    model = scripted(ids, 257)
    assert whole_texts(generate_text(model, tokenizer, ["p"], 4, GREEDY, stop_ids=[ids[2]]), 1) == ["ab"]


def test_it_is_refused_before_the_first_piece_is_asked_for():
    """So that nothing of a text that cannot be continued is printed."""
    with pytest.raises(UserError, match="exceed the model's context"):
        generate_text(random_model("gpt2", vocab_size=257), byte_tokenizer(), ["x" * 30], 5)


@given(prompt=st.sampled_from(["ab", "a🙂€🙂", "€€€€", "éééééééé", "b" + "🙂€é" * 4]), text=st.text(alphabet="abé €🙂", max_size=12))
@example(prompt="ab", text="€€€€")  # more bytes in a row than are looked back at
@example(prompt="b🙂🙂€🙂", text="€")
def test_a_sentencepiece_tokenizer_streams_what_it_decodes_at_once(sentencepiece_tokenizer, prompt, text):
    before, whole = sentencepiece_tokenizer.encode(prompt), sentencepiece_tokenizer.encode(prompt + text)
    assume(whole[: len(before)] == before)
    assert sentencepiece_tokenizer.decode(whole) == prompt + text
    assert "".join(write(sentencepiece_tokenizer, whole[len(before) :], prompt)) == text


@given(words=st.lists(st.sampled_from(["import", " os", "\n", " é🙂", " return", "  ", "x"]), max_size=12))
def test_a_bpe_tokenizer_streams_what_it_decodes_at_once(words):
    ids = BPE.encode("".join(words))
    assert "".join(write(BPE, ids, "import re")) == "".join(words)


BPE = train_bpe(["import os\n    return é🙂 import re\n" * 30], 278)
