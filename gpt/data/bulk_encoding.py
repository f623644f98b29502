"""Encoding in bulk: the ids of `tokenizers`, several times faster.

`tiktoken` for byte-level BPE, tables for characters and bytes. Each is taken only for a tokenizer whose rules it is known to
follow, and only if a check on the spot gives the same ids.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import tiktoken
    from tokenizers import Tokenizer as HFTokenizer

# What ends the split of GPT-2 and all that followed it: of a run of blanks the last one goes to what follows.
_BLANKS = r"|\s+(?!\S)|\s+"
_WORDS_AS_GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|"
_SIGNS_AS_GPT4 = r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"

SPLIT_PATTERNS = {
    "gpt4": _WORDS_AS_GPT4 + r"\p{N}{1,3}" + _SIGNS_AS_GPT4 + _BLANKS,
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + _BLANKS,
    "digits": _WORDS_AS_GPT4 + r"\p{N}" + _SIGNS_AS_GPT4 + _BLANKS,
}
"""Where byte-level BPE cuts a text before it merges: words with the sign before them, runs of at most three digits, signs with the
line ends behind them, indentation as one piece (gpt4, which suits source code); runs of digits of any length and blanks of every kind
in one piece (gpt2); gpt4 with every digit by itself (digits)."""


class BulkEncoder(Protocol):
    """Makes ids several times faster than `tokenizers`."""

    def __call__(self, text: str) -> np.ndarray | None:
        """The ids of one text without lone surrogates, uint32; None for a text that must go the slow way."""
        ...


def find_bulk_encoder(backend: HFTokenizer, check: str) -> BulkEncoder | None:
    """The bulk encoder with the same ids, or None if this tokenizer is of another kind or the ids differ on `check`."""
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model.get("type") != "BPE" or any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return None
    literal = tuple(t["content"] for t in spec.get("added_tokens", []) if not t["special"])
    encoder = _character_encoder(spec, literal) or _byte_encoder(spec, literal) or _tiktoken_encoder(spec, literal, backend)
    if encoder is None:
        return None
    ids = encoder(check)
    return encoder if ids is not None and ids.tolist() == backend.encode(check, add_special_tokens=False).ids else None


@dataclass
class ByteEncoder:
    """One id a byte of UTF-8."""

    ids: np.ndarray  # (256,) uint32

    def __call__(self, text: str) -> np.ndarray:
        """The ids of a text."""
        return self.ids[np.frombuffer(text.encode(), dtype=np.uint8)]


@dataclass
class CharacterEncoder:
    """One id a character, or one for each of its bytes where it has none."""

    table: np.ndarray  # (code points,) uint32
    bytes: ByteEncoder

    NONE = 2**32 - 1

    def __call__(self, text: str) -> np.ndarray:
        """The ids of a text."""
        characters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self.table[characters]
        unknown = ids == self.NONE
        if not unknown.any():
            return ids
        others = characters[unknown]
        counts = np.ones(len(ids), dtype=np.int64)
        counts[unknown] += (others[:, None] > (0x7F, 0x7FF, 0xFFFF)).sum(axis=1)  # bytes of UTF-8
        ids = ids.repeat(counts)
        ids[unknown.repeat(counts)] = self.bytes(others.tobytes().decode("utf-32-le"))
        return ids


@dataclass
class TiktokenEncoder:
    """Byte-level BPE by tiktoken."""

    encoding: tiktoken.Encoding
    literal: tuple[str, ...]  # added tokens that are taken out of a text before it is cut
    normalizer: Any = None  # of `tokenizers`, NFC

    def __call__(self, text: str) -> np.ndarray | None:
        """The ids of a text; None where it holds an added token, or blanks too many for tiktoken's regex engine (about a million)."""
        if self.literal and any(token in text for token in self.literal):
            return None
        if self.normalizer is not None and not text.isascii() and not unicodedata.is_normalized("NFC", text):
            text = self.normalizer.normalize_str(text)  # not unicodedata's, which may be of another version of Unicode
            if self.literal and any(token in text for token in self.literal):
                return None
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            return None


def _character_encoder(spec: dict[str, Any], literal: tuple[str, ...]) -> CharacterEncoder | None:
    model = spec["model"]
    byte_ids = _ids_of_bytes(model["vocab"], [f"<0x{b:02X}>" for b in range(256)])
    plain = not (model["merges"] or model.get("ignore_merges") or spec.get("normalizer") or spec.get("pre_tokenizer") or literal)
    if byte_ids is None or not plain or not model.get("byte_fallback"):
        return None
    known = {ord(token): index for token, index in model["vocab"].items() if len(token) == 1}
    table = np.full(0x110000, CharacterEncoder.NONE, dtype=np.uint32)
    table[list(known)] = list(known.values())
    return CharacterEncoder(table, ByteEncoder(byte_ids))


def _byte_encoder(spec: dict[str, Any], literal: tuple[str, ...]) -> ByteEncoder | None:
    model = spec["model"]
    byte_ids = _ids_of_bytes(model["vocab"], [*byte_of_character()])
    plain = not (model["merges"] or model.get("ignore_merges") or spec.get("normalizer") or literal)
    return ByteEncoder(byte_ids) if byte_ids is not None and plain and split_pattern(spec) else None


def _ids_of_bytes(vocab: dict[str, int], names: list[str]) -> np.ndarray | None:
    """(256,) ids of the bytes, whose tokens are called so; None if one has no token."""
    return np.array([vocab[name] for name in names], dtype=np.uint32) if all(name in vocab for name in names) else None


def _tiktoken_encoder(spec: dict[str, Any], literal: tuple[str, ...], backend: HFTokenizer) -> TiktokenEncoder | None:
    import tiktoken

    pattern, normalizer = split_pattern(spec), backend.normalizer
    if pattern is None or spec.get("normalizer") not in (None, {"type": "NFC"}) or (ranks := _ranks(spec["model"], backend)) is None:
        return None
    if normalizer is not None:
        literal += tuple(normalizer.normalize_str(token) for token in literal)
    try:
        encoding = tiktoken.Encoding("gpt", pat_str=_quicker(pattern), mergeable_ranks=ranks, special_tokens={})
    except ValueError:  # its regex engine does not know all that the other one does
        return None
    return TiktokenEncoder(encoding, literal, normalizer)


def _ranks(model: dict[str, Any], backend: HFTokenizer) -> dict[bytes, int] | None:
    """The tokens that merges can make, by their bytes; None if tiktoken would merge them otherwise.

    tiktoken joins any two neighbours that make a token, that of the lowest id first, and takes a piece that is a token as it
    is. Merges in the order of their ids come to the same if every token comes out of its own bytes by merges, or else
    (in a vocabulary that was tiktoken's) if whatever two tokens make it, they are one of the merges.
    """
    vocab: dict[str, int] = model["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    made = [vocab[left + right] for left, right in merges]
    if made != sorted(made):
        return None
    to_byte = byte_of_character()
    tokens = {*to_byte, *(left + right for left, right in merges)} | (vocab.keys() if model.get("ignore_merges") else set())
    if not to_byte.keys() <= vocab.keys():
        return None
    ranks = {bytes(to_byte[c] for c in token): vocab[token] for token in tokens if to_byte.keys() >= {*token}}
    if len({*ranks.values()}) < len(ranks):
        return None
    pairs = set(merges)
    by_merges = _without_shortcut(model, backend)
    for token in tokens:
        whole = len(token) == 1 or len(by_merges.tokenize(token)) == 1
        if not whole and not all((token[:i], token[i:]) in pairs for i in range(1, len(token)) if {token[:i], token[i:]} <= vocab.keys()):
            return None
    return ranks


def _without_shortcut(model: dict[str, Any], backend: HFTokenizer) -> Any:
    """The BPE model that makes every token by merges, even where the tokenizer takes a piece that is a token as it is."""
    from tokenizers import Tokenizer as HFTokenizer

    if not model.get("ignore_merges"):
        return backend.model
    spec = {"version": "1.0", "model": {**model, "ignore_merges": False}, "added_tokens": []}
    return HFTokenizer.from_str(json.dumps(spec)).model


def split_pattern(spec: dict[str, Any]) -> str | None:
    """The regular expression of a pre-tokenizer that splits by one and then maps bytes to characters, as tiktoken does."""
    match spec.get("pre_tokenizer"):
        case {"type": "ByteLevel", "add_prefix_space": False} as whole if whole.get("use_regex", True):
            return SPLIT_PATTERNS["gpt2"]
        case {
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ]
        }:
            return pattern
    return None


def _quicker(pattern: str) -> str:
    """The same split for tiktoken's regex engine, which matches all that needs no look-ahead at once if it is one group: a quarter faster.

    Possessive quantifiers would keep the group from it; in our own patterns what follows them is of other characters, so that
    they change nothing.
    """
    head = pattern.removesuffix(_BLANKS)
    if head != pattern and not head.endswith("\\"):
        if pattern in SPLIT_PATTERNS.values():
            head = head.replace("?+", "?").replace("++", "+")
        return f"(?:{head}){_BLANKS}"
    return pattern


def byte_of_character() -> dict[str, int]:
    """GPT-2's map from the printable characters that stand for bytes in a byte-level vocabulary to those bytes, in their order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return {chr(b if b in printable else next(others)): b for b in range(256)}
