from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gpt.config import GenerateConfig
from gpt.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from gpt.errors import UserError
from gpt.inference.command import generate
from gpt.inference.generate import generate_text, generate_tokens
from gpt.inference.sampling import next_token
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT

CONTEXT = 24
SHAPES = {
    "qwen3": {"n_kv_head": 2, "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "qk_norm": True},
    "gpt2": {},
    "transformer-2017": {"positions": "sinusoidal", "activation": "gelu", "embedding_scale": 32**0.5},
}


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> GPT:
    """A random model whose attention matters: at the initial scale every continuation would look alike."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "d_model": 32, "dropout": 0.1, "tie_embeddings": False, **SHAPES[request.param]}
    model = GPT(GPTConfig(vocab_size=61, context_length=CONTEXT, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.eval()


def scripted(ids: Sequence[int], vocab_size: int, prompt_length: int = 1) -> GPT:
    """A model that writes `ids` after any prompt of that length: its blocks add nothing, its positions are all different and
    its head knows what comes after each."""
    places = max(1, prompt_length - 1 + len(ids))
    model = GPT(GPTConfig(vocab_size, places, n_layer=1, n_head=1, d_model=places + 1, d_ff=1, tie_embeddings=False))
    with torch.no_grad():
        for parameter in [*model.blocks.parameters(), model.embeddings.tokens.weight, model.head.weight]:
            parameter.zero_()
        assert model.embeddings.positions is not None
        model.embeddings.positions.weight.copy_(torch.eye(places, places + 1))
        for place, token in enumerate(ids, start=prompt_length - 1):
            model.head.weight[token, place] = 1
    return model.eval()


def write(tokenizer: Tokenizer, ids: Sequence[int], prompt: str = "", stop: Sequence[str] = (), max_tokens: int | None = None) -> list[str]:
    """The pieces that come when a model writes these ids."""
    model = scripted(ids, tokenizer.vocab_size, len(tokenizer.encode(prompt)) or 1)
    return list(generate_text(model, tokenizer, prompt, len(ids) if max_tokens is None else max_tokens, temperature=0, stop=stop))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


def test_the_script_is_followed(tokenizer):
    ids = tokenizer.encode("aaab, aaa")
    assert list(generate_tokens(scripted(ids, 257, 3), [7, 7, 7], 99, temperature=0)) == ids


class TestTokens:
    @pytest.mark.parametrize("prompt_length", [1, 2, 9])
    def test_the_cache_changes_nothing(self, model, prompt_length):
        prompt = [(7 * i + 3) % 61 for i in range(prompt_length)]
        whole = list(prompt)
        for made in generate_tokens(model, prompt, 14, temperature=0):
            with torch.no_grad():
                assert made == int(model(torch.tensor([whole]))[0, -1].argmax())
            whole.append(made)
        assert len(whole) == prompt_length + 14
        assert len(set(whole[prompt_length:])) > 2

    def test_sampling_with_the_cache_is_sampling_without(self, model):
        generator, whole = torch.Generator().manual_seed(7), [5]
        for made in generate_tokens(model, [5], 20, temperature=0.7, top_k=20, top_p=0.9, seed=7):
            with torch.no_grad():
                assert made == int(next_token(model(torch.tensor([whole]))[:, -1], 0.7, 20, 0.9, generator))
            whole.append(made)

    def test_the_seed_decides(self, model):
        def draw(seed: int | None) -> list[int]:
            return list(generate_tokens(model, [1, 2], 20, temperature=2.0, seed=seed))

        torch.manual_seed(1)
        first = draw(3)
        torch.manual_seed(2)
        assert draw(3) == first
        assert draw(4) != first
        assert draw(None) != draw(None)

    @pytest.mark.parametrize("max_tokens", [0, 1, 5])
    def test_max_tokens(self, model, max_tokens):
        assert len(list(generate_tokens(model, [1, 2], max_tokens, seed=1))) == max_tokens

    @pytest.mark.parametrize("prompt_length", [1, 10, CONTEXT - 1, CONTEXT])
    def test_it_ends_when_the_context_is_full(self, model, prompt_length):
        made = list(generate_tokens(model, [3] * prompt_length, 1000, seed=1))
        assert len(made) == CONTEXT - prompt_length + 1  # the last is written after a full context and not read

    @pytest.mark.parametrize("prompt_length", [0, CONTEXT + 1, 1000])
    def test_a_prompt_that_does_not_fit(self, model, prompt_length):
        with pytest.raises(UserError, match=rf"^prompt: {prompt_length} tokens, but the model's context holds 1 to {CONTEXT}$"):
            next(generate_tokens(model, [3] * prompt_length, 5))

    def test_each_token_costs_one_pass_and_comes_at_once(self, model):
        lengths: list[int] = []
        hook = model.embeddings.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
        try:
            tokens = generate_tokens(model, [1, 2, 3], 10, seed=1)
            next(tokens)
            assert lengths == [3]
            next(tokens)
            assert lengths == [3, 1]
        finally:
            hook.remove()

    def test_no_gradient_is_kept_and_the_mode_outside_stays(self, model):
        tokens = generate_tokens(model, [1], 3, seed=1)
        next(tokens)
        assert torch.is_grad_enabled()
        assert model(torch.tensor([[1]])).requires_grad


TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd"), max_size=20)
NARROW = st.text(alphabet="abé€🙂", max_size=20)  # stop strings are met often


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
        assert "".join(generate_text(model, tokenizer, "p", 5, temperature=0, stop=["!"])) == "ab"
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
        model = GPT(GPTConfig(vocab_size=257, context_length=CONTEXT, n_layer=1, n_head=2, d_model=16)).eval()
        ids = list(generate_tokens(model, [tokenizer.end_of_text], 20, temperature=1.5, seed=2))
        assert tokenizer.end_of_text not in ids
        assert "".join(generate_text(model, tokenizer, "", 20, temperature=1.5, seed=2)) == tokenizer.decode(ids)

    def test_an_empty_prompt_without_a_token_that_begins_one(self, tokenizer):
        from tokenizers import Tokenizer as HFTokenizer
        from tokenizers import models

        bare = Tokenizer(HFTokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])))
        with pytest.raises(UserError, match=r"^prompt: it is empty"):
            next(generate_text(scripted([0], 2), bare, "", 5))

    def test_a_prompt_too_long(self, tokenizer):
        with pytest.raises(UserError, match=r"^prompt: 9 tokens, but the model's context holds 1 to 3"):
            next(generate_text(scripted([1, 2, 3], 257), tokenizer, "too long!", 5))

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


def test_a_prompt_that_is_not_utf8(capsys):
    """Python hands over bytes of the command line that are not UTF-8 as lone surrogates, which no tokenizer takes."""
    with pytest.raises(UserError, match=r"^prompt: it is not valid UTF-8"):
        generate(GenerateConfig(model="no matter", prompt="caf\udce9"))
    assert capsys.readouterr().out == ""


def test_a_space_at_the_end_of_the_prompt_belongs_to_the_next_word():
    tokenizer = train_bpe(["import sys and import os; import re " * 50], 270)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=270, context_length=32, n_layer=1, n_head=2, d_model=32)).eval()
    words = tokenizer.starting_with_space()
    assert {tokenizer.decode([i])[0] for i in words} == {" "}
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("import")]))[0, -1]
    best = max(words, key=lambda i: logits[i].item())
    text = "".join(generate_text(model, tokenizer, "import ", 1, temperature=0))
    assert text == tokenizer.decode([best])[1:]
    inside = tokenizer.encode("import sys")
    assert inside[: len(tokenizer.encode("import"))] == tokenizer.encode("import"), "the premise: the space is the word's"
