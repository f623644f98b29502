import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from gpt.data.bulk_encoding import (
    SPLIT_PATTERNS,
    ByteEncoder,
    CharacterEncoder,
    TiktokenEncoder,
    byte_of_character,
    find_bulk_encoder,
)
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_training import byte_tokenizer, char_tokenizer, train_bpe

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TRICKY = st.text(
    alphabet=st.sampled_from("ab'sS ſ\t\n\r\v\0\x85\u00a0\u200d\u2028é字🙂👩\u0301\u031b\u1100\u1161\uac001١²<|>endoftx_-"), max_size=40
)
TEXTS = st.one_of(st.text(max_size=60), TRICKY)


@pytest.fixture(scope="module")
def texts(stdlib_files: list[Path]) -> list[str]:
    return [p.read_text(encoding="utf-8") for p in stdlib_files]


def trained(texts: list[str], vocab_size: int = 700) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges without control tokens, ids in the order of the merges."""
    backend = HFTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=sorted(byte_of_character()), show_progress=False)
    backend.train_from_iterator(texts[:20], trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


def split_then_bytes(pattern: str) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def as_gpt2(texts: list[str]) -> HFTokenizer:
    vocab, merges = trained(texts)
    vocab["<|endoftext|>"] = len(vocab)  # in the vocabulary too, as in GPT-2's file
    backend = HFTokenizer(models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def as_llama3(texts: list[str]) -> HFTokenizer:
    """As tiktoken's vocabularies are converted: every two tokens that make a third are a merge, in the order of what they make."""
    vocab, _ = trained(texts)
    merges = []
    for token in sorted(vocab, key=lambda t: vocab[t]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    vocab["Ġqzqz"] = len(vocab)  # a token that no merges make, only a whole piece
    backend = HFTokenizer(models.BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = split_then_bytes(LLAMA3)
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    names = [("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))]
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=names)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return backend


def as_qwen(texts: list[str]) -> HFTokenizer:
    backend = HFTokenizer(models.BPE(*trained([*texts[:20], "é à ñ ü " * 200])))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = split_then_bytes(LLAMA3.replace("{1,3}", ""))
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken("é!", special=False, normalized=True)])
    return backend


def as_neox(texts: list[str]) -> HFTokenizer:
    backend = as_gpt2(texts)
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken(" " * n, special=False, normalized=True) for n in range(24, 1, -1)])
    return backend


STYLES: dict[str, Callable[[list[str]], HFTokenizer]] = {
    "gpt4": lambda texts: train_bpe(texts[::4], 1024).backend,
    "gpt2": lambda texts: train_bpe(texts[::4], 1024, "gpt2").backend,
    "digits": lambda texts: train_bpe(texts[::4], 1024, "digits", ["<|a|>"]).backend,
    "byte": lambda texts: byte_tokenizer(["<|a|>"]).backend,
    "char": lambda texts: char_tokenizer(["def f(x): é字🙂'sS ſ\n"], ["<|a|>"]).backend,
    "as GPT-2's": as_gpt2,
    "as Llama 3's": as_llama3,
    "as Qwen's": as_qwen,
    "as NeoX's": as_neox,
}


@pytest.fixture(scope="module", params=STYLES)
def pair(request: pytest.FixtureRequest, texts: list[str]) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer that encodes in bulk, and the same without."""
    written = STYLES[request.param](texts).to_str()
    check = "def f(x):\n return 'é' + x\n" if request.param == "as NeoX's" else texts[1]
    fast, slow = Tokenizer(HFTokenizer.from_str(written), check=check), Tokenizer(HFTokenizer.from_str(written))
    assert type(fast._bulk) is {"byte": ByteEncoder, "char": CharacterEncoder}.get(request.param, TiktokenEncoder)
    assert not slow.is_fast
    return fast, slow


class TestSameIds:
    def test_on_files_it_was_not_checked_on(self, pair, texts):
        fast, slow = pair
        for text, ids, expected in zip(texts[::7], fast.encode_batch(texts[::7]), slow.encode_batch(texts[::7]), strict=True):
            assert ids.dtype == np.uint32
            assert np.array_equal(ids, expected), text[:80]

    @given(text=TEXTS)
    @example(text="\ufffd\ufeff\x00\x1b[0m\r\n\r\n \U0010ffff👩‍👩‍👧‍👦")
    @example(text="e\u0301! <think> é! e\u0301\u031b \u1100\u1161 qzqz Ġqzqz<|endoftext|><|a|>")
    def test_on_any_text(self, pair, text):
        fast, slow = pair
        assert fast.encode(text) == slow.encode(text)

    @pytest.mark.parametrize("split", SPLIT_PATTERNS)
    def test_for_every_kind_of_character(self, split):
        """A vocabulary that merges each character with its neighbours shows where the two regex engines cut differently."""
        letters = [chr(c) for c in range(0, 0x30000, 97) if not 0xD800 <= c < 0xE000]
        lines = [f"a{c}b {c} {c}{c}1{c}\n {c}'s  {c}{c}\r\n" for c in letters]
        slow = train_bpe(lines, 6000, split)
        fast = Tokenizer(slow.backend, check=lines[0])
        assert fast.is_fast
        assert [c for c, line in zip(letters, lines, strict=True) if fast.encode(line) != slow.encode(line)] == []

    def test_normalising_to_every_composed_character(self, texts):
        fast = Tokenizer(as_qwen(texts), check=texts[0])
        slow = Tokenizer(fast.backend)
        marks = "\u0301\u031b\u0345\u0323\u1dfa\u1ac0"
        lines = [f"a{chr(c)}{marks[c % 6]}{marks[c % 5]} {chr(c)}" for c in range(0xC0, 0x30000, 61) if not 0xD800 <= c < 0xE000]
        assert fast.encode(lines[0]) == slow.encode(lines[0])
        assert [line for line in lines if fast.encode(line) != slow.encode(line)] == []

    def test_a_run_of_blanks_too_long_for_the_regex_engine_of_tiktoken(self, texts):
        fast = Tokenizer(train_bpe(texts[:4], 300).backend, check=texts[0])
        blanks = "x" + " " * 1_100_000
        assert fast._bulk is not None
        assert fast._bulk(blanks) is None
        assert [ids.tolist() for ids in fast.encode_batch(["a", blanks, "b"])] == [
            Tokenizer(fast.backend).encode(t) for t in ("a", blanks, "b")
        ]

    def test_an_encoder_goes_to_another_process(self, pair):
        fast, _ = pair
        copy = pickle.loads(pickle.dumps(fast._bulk))
        assert np.array_equal(copy("def f(x): é"), fast._bulk("def f(x): é"))


def test_an_added_token_in_a_text_goes_the_slow_way(texts):
    encoder = find_bulk_encoder(as_qwen(texts), "def f(x)")
    assert encoder is not None
    assert encoder("a <think> b") is None
    assert encoder("a é! b") is None
    assert encoder("a e\u0301! b") is None  # once it is normalised
    assert encoder("a <|im_end|> b") is not None
    neox = find_bulk_encoder(as_neox(texts), "def f(x)")
    assert neox is not None
    assert neox("a  b") is None


def changed(change: Callable[[dict[str, Any]], None]) -> HFTokenizer:
    """A tokenizer with one thing changed in its file."""
    spec = json.loads(byte_tokenizer().backend.to_str())
    spec["model"]["vocab"] |= {"ab": 257, "bc": 258}
    spec["model"]["merges"] = [["a", "b"], ["b", "c"]]
    change(spec)
    return HFTokenizer.from_str(json.dumps(spec))


def byte_level(**settings: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "trim_offsets": True, **settings}


class TestNotTaken:
    def test_unchanged_it_is_taken(self):
        assert find_bulk_encoder(changed(lambda spec: None), "abc") is not None

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda s: s["model"].update(merges=[["b", "c"], ["a", "b"]]), "abc"),  # tiktoken would take the lower id first
            (lambda s: s["model"].update(dropout=0.1), "abab"),
            (lambda s: s["model"].update(end_of_word_suffix="Ġ"), "ab"),
            (lambda s: s["model"]["vocab"].pop("Ā"), "a\0"),  # a byte without a token
            (lambda s: s["model"]["vocab"].update({"ā": s["model"]["vocab"]["Ă"]}), "a"),  # an id of two tokens
            (lambda s: s.update(normalizer={"type": "Lowercase"}), "ABC"),
            (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "a b"),
            (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": "a"}), "a b"),
            (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\X"}), "aab"),  # Oniguruma's own
            (lambda s: s.update(pre_tokenizer=byte_level(add_prefix_space=True, use_regex=True)), "ab"),
            (lambda s: s.update(pre_tokenizer=byte_level(add_prefix_space=False, use_regex=False)), "ab"),
            (lambda s: s.update(pre_tokenizer=None), "ab"),
        ],
    )
    def test_for_a_tokenizer_with_other_rules(self, change, text):
        backend = changed(change)
        assert find_bulk_encoder(backend, "") is None
        assert Tokenizer(backend, check="a").encode(text) == backend.encode(text, add_special_tokens=False).ids or text == "abab"

    def test_for_another_kind_of_model(self, sentencepiece_tokenizer):
        assert find_bulk_encoder(sentencepiece_tokenizer.backend, "a b") is None
        assert find_bulk_encoder(HFTokenizer(models.WordLevel({"a": 0}, unk_token="a")), "a") is None

    def test_where_two_tokens_would_be_joined_that_no_merge_joins(self):
        """bcd is a merge of b and cd, which never meet, since b and c are joined first; tiktoken would take the piece bcd as it is."""

        def change(spec: dict[str, Any]) -> None:
            spec["model"]["vocab"] |= {"cd": 259, "bcd": 260}
            spec["model"]["merges"] = [["a", "b"], ["b", "c"], ["c", "d"], ["b", "cd"]]

        backend = changed(change)
        assert find_bulk_encoder(backend, "abc") is None
        tokenizer = Tokenizer(backend, check="abc")
        assert tokenizer.decode(tokenizer.encode("bcd")) == "bcd"
        assert len(tokenizer.encode("bcd")) == 2

    def test_where_the_check_finds_other_ids(self, monkeypatch):
        backend = changed(lambda spec: None)
        monkeypatch.setitem(SPLIT_PATTERNS, "gpt4", "x")  # so that the pattern is not known to be ours
        assert find_bulk_encoder(backend, "abc") is not None
        monkeypatch.setattr("gpt.data.bulk_encoding.split_pattern", lambda spec: "[^b]|b")
        assert find_bulk_encoder(backend, "") is not None
        assert find_bulk_encoder(backend, "abc") is None


def test_ids_with_gaps():
    backend = changed(lambda s: s["model"]["vocab"].update({"ab": 1000, "bc": 2000}))
    fast = Tokenizer(backend, check="abc")
    assert fast.is_fast
    assert fast.encode("abbc") == [1000, 2000]


def test_a_character_tokenizer_with_most_characters_unknown():
    fast = Tokenizer(char_tokenizer(["ab"]).backend, check="ab")
    text = "a字🙂é\0b\uffff\U0010ffff" * 100
    assert fast.encode(text) == Tokenizer(fast.backend).encode(text)
    assert fast.decode(fast.encode(text)) == text
