from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models

from gpt.data.tokenizer import END_OF_TEXT, Tokenizer
from gpt.data.tokenizer_training import byte_tokenizer, char_tokenizer, train_bpe
from gpt.errors import UserError
from gpt.finetuning.vocabulary import adapt_vocabulary, find_origins
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT

CODE = ["import os\nimport sys\ndef read(path):\n    return open(path)\n"] * 20
PROSE = ["the other reader read the path to the theatre, 3€ a seat — là, près du théâtre\n"] * 20


@pytest.fixture(scope="module")
def tokenizers(sentencepiece_tokenizer) -> dict[str, Tokenizer]:
    return {
        "code": train_bpe(CODE, 280), "prose": train_bpe(PROSE, 300), "byte": byte_tokenizer(), "char": char_tokenizer(PROSE),
        "sentencepiece": sentencepiece_tokenizer,
    }  # fmt: skip


def model_for(tokenizer: Tokenizer, tied: bool = True, vocab_size: int = 0) -> GPT:
    torch.manual_seed(1)
    sizes = GPTConfig(vocab_size or tokenizer.vocab_size, context_length=16, n_layer=1, n_head=2, d_model=8, tie_embeddings=tied)
    return GPT(sizes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["code", "prose", "byte", "char", "sentencepiece"])
def test_with_the_same_tokenizer_nothing_changes(tokenizers, name, tied):
    tokenizer, model = tokenizers[name], model_for(tokenizers[name], tied)
    again = Tokenizer(HFTokenizer.from_str(tokenizer.backend.to_str()))
    ids = torch.arange(16)[None] * 7 % tokenizer.vocab_size
    before = model(ids)
    origins = adapt_vocabulary(model, tokenizer, again, tokenizer.vocab_size, "init=x")
    assert (origins.shared, origins.made, origins.without) == (tokenizer.vocab_size, 0, 0)
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("old", "new"), [("code", "prose"), ("prose", "code"), ("byte", "prose"), ("char", "prose"), ("prose", "char")])
def test_shared_tokens_keep_their_rows_and_new_ones_start_from_their_pieces(tokenizers, old, new, tied):
    old, new = tokenizers[old], tokenizers[new]
    model = model_for(old, tied)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights.setdefault("head.weight", weights["embeddings.tokens.weight"])
    origins = adapt_vocabulary(model, old, new, new.vocab_size, "init=x")
    assert model.config.vocab_size == new.vocab_size == len(model.head.weight)
    assert (model.head.weight is model.embeddings.tokens.weight) == tied
    ids_of = {piece: i for i, piece in enumerate(old.pieces(range(old.vocab_size))) if i != old.end_of_text}
    shared = made = 0
    for index, piece in enumerate(new.pieces(range(new.vocab_size))):
        if index == new.end_of_text:
            pieces = [old.end_of_text]
        elif piece in ids_of:
            pieces = [ids_of[piece]]
        else:
            pieces = old.encode(piece.decode()) if is_text(piece) else merged(piece, ids_of)
            made += 1
        shared += piece in ids_of or index == new.end_of_text
        for name, weight in weights.items():
            if name in ("embeddings.tokens.weight", "head.weight"):
                row = dict(model.named_parameters(remove_duplicate=False))[name][index]
                expected = torch.stack([weight[i] for i in pieces]).double().mean(0).float()
                assert torch.equal(row, weight[pieces[0]]) if len(pieces) == 1 else torch.allclose(row, expected, atol=1e-8)
    assert (origins.shared, origins.made, origins.without) == (shared, made, 0)
    for name, p in model.named_parameters():
        assert name in ("embeddings.tokens.weight", "head.weight") or torch.equal(p, weights[name]), name


def is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def merged(piece: bytes, ids_of: dict[bytes, int]) -> list[int]:
    """BPE as the book has it: of all neighbours that make a token, those of the lowest id are joined first."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while joined := [(ids_of[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids_of]:
        _, i = min(joined)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ids_of[part] for part in parts]


def test_there_are_new_tokens_within_characters(tokenizers):
    """What the test above holds is held of such tokens too."""
    code = set(tokenizers["code"].pieces(range(280)))
    assert any(len(piece) > 1 and not is_text(piece) for piece in set(tokenizers["prose"].pieces(range(300))) - code)


def test_what_no_tokenizer_makes_has_no_say(tokenizers):
    """The char tokenizer has "t" and <0x74>, which it makes of no text: a new "t" is the one that it reads."""
    old, new = tokenizers["char"], tokenizers["byte"]
    origins = find_origins(old, new)
    letter, fallback = old.encode("t")[0], old.backend.token_to_id("<0x74>")
    assert letter != fallback
    assert origins.rows[new.encode("t")[0]] == [letter]
    assert origins.rows[new.encode("é")[0]] == [old.backend.token_to_id("<0xC3>")], "half of a character is its byte"


def test_blanks_before_words_count(tokenizers):
    old, new = tokenizers["sentencepiece"], train_bpe(["ba ba ba bab "] * 20, 259)
    rows, pieces = find_origins(old, new).rows, new.pieces(range(new.vocab_size))
    names = {piece: [old.backend.id_to_token(i) for i in rows[index]] for index, piece in enumerate(pieces)}
    assert names[b"ba"] == ["ba"]
    assert names[b" ba"] == ["▁ba"]
    assert names[b" "] == ["▁"]
    assert names[b"b"] == ["b"]
    assert names[b"\xe2"] == ["<0xE2>"]


def with_special(tokenizer: Tokenizer, **roles: str) -> Tokenizer:
    tokenizer.special_tokens = roles
    return tokenizer


def test_control_tokens_are_matched_by_what_they_are_for(tokenizers):
    old = with_special(byte_tokenizer(["<|start|>", "<|user|>", "<|pad|>"]), bos_token="<|start|>", pad_token="<|pad|>")
    backend = byte_tokenizer(["<|user|>", "<s>", "<|nothing|>", "<|void|>"]).backend
    spec = backend.to_str().replace(END_OF_TEXT, "</s>")
    new = with_special(Tokenizer(HFTokenizer.from_str(spec)), bos_token="<s>", eos_token="</s>", pad_token="<|void|>")
    origins, before, after = find_origins(old, new), old.control_tokens(), new.control_tokens()
    assert new.end_of_text == after["</s>"]
    assert origins.rows[after["</s>"]] == [old.end_of_text]
    assert origins.rows[after["<s>"]] == [before["<|start|>"]]
    assert origins.rows[after["<|user|>"]] == [before["<|user|>"]]
    assert origins.rows[after["<|void|>"]] == [before["<|pad|>"]]
    assert origins.rows[after["<|nothing|>"]] == [], "its name is no text that anybody has read"
    assert (origins.shared, origins.made, origins.without) == (256 + 4, 0, 1)
    weight = torch.randn(old.vocab_size + 3, 8)  # rows that no token has
    assert torch.allclose(origins.take(weight)[after["<|nothing|>"]], weight[: old.vocab_size].mean(0), atol=1e-6)


def test_the_name_of_a_control_token_is_ordinary_text_for_another(tokenizers):
    """What was a control token is none for a tokenizer that has the same as text, nor the other way round."""
    new = byte_tokenizer()
    new.backend.add_tokens(["<|user|>", "</s>"])
    new = Tokenizer(new.backend)
    old = byte_tokenizer(["<|user|>"])
    index = new.backend.get_vocab(with_added_tokens=True)["<|user|>"]
    assert find_origins(old, new).rows[index] == old.encode("<|user|>")
    assert len(old.encode("<|user|>")) == 8
    assert find_origins(new, old).rows[old.control_tokens()["<|user|>"]] == []


def test_unknown_characters_have_none(tokenizers):
    backend = HFTokenizer(models.BPE({"<unk>": 0, "a": 1, "b": 2}, [], unk_token="<unk>"))
    old, new = Tokenizer(backend), char_tokenizer(["abc"])
    rows = find_origins(old, new).rows
    assert [rows[new.encode(letter)[0]] for letter in "abc"] == [[1], [2], []]
    assert rows[new.end_of_text or 0] == [], "the old tokenizer has no end of text"
    assert find_origins(old, Tokenizer(HFTokenizer(models.BPE({"?": 0, "b": 1}, [], unk_token="?")))).rows == [[0], [2]]


def test_ids_without_tokens_and_rows_beyond_the_tokenizer(tokenizers):
    old, model = tokenizers["code"], model_for(tokenizers["code"], vocab_size=512)
    new = Tokenizer(HFTokenizer(models.BPE({"i": 0, "import": 5}, [])))
    weight = model.embeddings.tokens.weight.detach().clone()
    origins = adapt_vocabulary(model, old, new, 8, "init=x")
    assert (origins.shared, origins.made, origins.without) == (2, 0, 0)
    assert torch.equal(model.embeddings.tokens.weight[5], weight[old.encode("import")[0]])
    for index in (1, 2, 3, 4, 6, 7):
        assert torch.allclose(model.embeddings.tokens.weight[index], weight[: old.vocab_size].mean(0), atol=1e-6)


def test_what_is_said(tokenizers):
    origins = find_origins(tokenizers["byte"], tokenizers["prose"])
    assert str(origins) == "300 tokens: 257 are the old one's and keep their rows, 43 start from the mean of their old pieces"
    new = byte_tokenizer(["<|one|>"])
    assert str(find_origins(tokenizers["byte"], new)).endswith(", 1 have none and start from the mean of all")


def test_a_narrow_dtype_stays(tokenizers):
    model = model_for(tokenizers["byte"]).bfloat16()
    weight = model.embeddings.tokens.weight.detach().clone()
    adapt_vocabulary(model, tokenizers["byte"], tokenizers["prose"], 300, "init=x")
    assert model.head.weight.dtype == torch.bfloat16
    new = tokenizers["prose"].pieces(range(300)).index(b"th")
    assert torch.equal(model.head.weight[new], weight[tokenizers["byte"].encode("th")].float().mean(0).bfloat16())


def test_weights_of_another_tokenizer_are_refused(tokenizers):
    model = model_for(tokenizers["byte"])
    with pytest.raises(UserError, match="init=x: its weights know 257 tokens and the tokenizer beside them has 280, so they are not"):
        adapt_vocabulary(model, tokenizers["code"], tokenizers["byte"], 257, "init=x")
    assert model.config.vocab_size == 257
