"""Tokenizers: byte-level BPE trained on the corpus, plain bytes, or any pretrained Hugging Face tokenizer.

`tokenizers` defines the ids and is what gets saved; `tiktoken` encodes in bulk about ten times faster, and is used only
where a check on the spot shows that its ids are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer

END_OF_TEXT = "<|endoftext|>"

# Words with their leading space, runs of at most three digits, punctuation with its trailing newlines, indentation as one
# piece: the split of GPT-4's tokenizer, which suits source code.
SPLIT_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


class Tokenizer:
    """Text to ids and back.

    Args:
        backend: the `tokenizers` tokenizer that defines the ids.
        check: text on which the fast encoder must agree before it is used.
    """

    def __init__(self, backend: HFTokenizer, check: str = "") -> None:
        self.backend = backend
        self.backend.encode_special_tokens = True  # special tokens inside a user's text are text
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.end_of_text: int | None = _end_of_text(backend)
        self._fast = _tiktoken_of(backend, check) if check else None

    @property
    def is_fast(self) -> bool:
        """Whether bulk encoding goes through tiktoken."""
        return self._fast is not None

    def encode(self, text: str) -> list[int]:
        """The ids of one text; special tokens in it are taken as text."""
        if self._fast is not None:
            return self._fast.encode_ordinary(text)
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts, uint32 each."""
        if self._fast is not None:
            return [self._fast.encode_to_numpy(text, disallowed_special=()) for text in texts]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint32) for e in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: how many bytes of text each id stands for, 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        special = {i for i, added in self.backend.get_added_tokens_decoder().items() if added.special}
        byte_level = _is_byte_level(self.backend)
        for token, index in self.backend.get_vocab(with_added_tokens=True).items():
            if index not in special:
                lengths[index] = len(token) if byte_level else len(self.backend.decode([index]).encode())
        return lengths

    def fingerprint(self) -> str:
        """A hash of everything that decides the ids."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self.backend.save(str(path))

    def to_transformers(self, context_length: int) -> Any:
        """The same tokenizer as a `transformers` one, for export."""
        from transformers import PreTrainedTokenizerFast

        eos = None if self.end_of_text is None else self.backend.id_to_token(self.end_of_text)
        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend, eos_token=eos, bos_token=eos, pad_token=eos,
            model_max_length=context_length, clean_up_tokenization_spaces=False,
        )  # fmt: skip


def train_bpe(texts: Iterable[str], vocab_size: int, length: int | None = None) -> Tokenizer:
    """Train byte-level BPE.

    Args:
        texts: what to learn from.
        vocab_size: ids to make: 256 bytes, the end-of-text token, and merges.
        length: how many texts there are, for the progress bar.

    Raises:
        UserError: vocab_size below 257, or more than the text has merges for.
    """
    from tokenizers import trainers

    if vocab_size < 257:
        raise UserError(f"tokenizer.vocab_size={vocab_size} must be at least 257: 256 bytes and the end-of-text token")
    backend = _empty_byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=_byte_alphabet(), show_progress=False, max_token_length=32
    )  # pyright: ignore[reportCallIssue]
    backend.train_from_iterator(texts, trainer, length=length)
    made = backend.get_vocab_size()
    if made < vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} is more than this text allows: its merges give {made}; set it to at most {made}"
        )
    return Tokenizer(backend)


def byte_tokenizer() -> Tokenizer:
    """One id a byte, and the end-of-text token."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models

    backend = _empty_byte_level()
    vocab = {token: index for index, token in enumerate([END_OF_TEXT, *_byte_alphabet()])}
    empty = HFTokenizer(models.BPE(vocab=vocab, merges=[]))
    empty.pre_tokenizer, empty.decoder = backend.pre_tokenizer, backend.decoder
    empty.add_special_tokens([END_OF_TEXT])
    return Tokenizer(empty)


def load_tokenizer(path: str | Path, check: str = "") -> Tokenizer:
    """Load `tokenizer.json` from a file, a directory or a hub id.

    Raises:
        UserError: there is none.
    """
    from tokenizers import Tokenizer as HFTokenizer

    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if file.is_file():
        try:
            return Tokenizer(HFTokenizer.from_file(str(file)), check)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{file} is not a tokenizer file: {error}") from error
    if file.suffix or file.exists() or Path(path).is_absolute() or str(path).startswith("."):
        raise UserError(f"no tokenizer at {file}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Tokenizer(HFTokenizer.from_file(hf_hub_download(str(path), "tokenizer.json")), check)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"no tokenizer.json in the folder {path!r}, nor at the Hugging Face hub: {str(error).splitlines()[0]}") from error


def _empty_byte_level() -> HFTokenizer:
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer

    backend = HFTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_of_character() -> dict[str, int]:
    """GPT-2's map from the printable characters that stand for bytes in a byte-level vocabulary to those bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _is_byte_level(backend: HFTokenizer) -> bool:
    return "ByteLevel" in json.dumps(json.loads(backend.to_str()).get("decoder") or {})


def _end_of_text(backend: HFTokenizer) -> int | None:
    for token in (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>"):
        if (index := backend.token_to_id(token)) is not None:
            return index
    return None


def _tiktoken_of(backend: HFTokenizer, check: str) -> Any:
    """The tiktoken encoding with the same ids, or None if this tokenizer is of another kind or the ids differ on `check`."""
    import tiktoken

    spec = json.loads(backend.to_str())
    model, pre = spec["model"], spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    pattern = next((s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"), None)
    if model.get("type") != "BPE" or spec.get("normalizer") or pattern is None or not _is_byte_level(backend):
        return None
    to_byte = _byte_of_character()
    special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
    ranks = {bytes(to_byte[c] for c in token): i for token, i in model["vocab"].items() if token not in special}
    encoding = tiktoken.Encoding("gpt", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return encoding if encoding.encode_ordinary(check) == backend.encode(check, add_special_tokens=False).ids else None
