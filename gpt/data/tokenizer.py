"""Tokenizers: byte-level BPE trained on the corpus, plain bytes, or any pretrained Hugging Face tokenizer.

`tokenizers` defines the ids and is what gets saved; `tiktoken` encodes in bulk about ten times faster, and is used only
where a check on the spot shows that its ids are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers.models import Model

END_OF_TEXT = "<|endoftext|>"

# Words with their leading space, runs of at most three digits, punctuation with its trailing newlines, indentation as one
# piece: the split of GPT-4's tokenizer, which suits source code.
SPLIT_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """Text to ids and back.

    Args:
        backend: the `tokenizers` tokenizer that defines the ids.
        check: text on which the fast encoder must agree before it is used.
    """

    def __init__(self, backend: HFTokenizer, check: str = "") -> None:
        self.backend = backend
        self.backend.encode_special_tokens = True  # special tokens inside a user's text are text
        self.backend.no_truncation()  # either can be set in a tokenizer.json made for another use
        self.backend.no_padding()
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)  # ids may have gaps
        self.end_of_text: int | None = _end_of_text(backend)
        self.chat_template: str | None = None
        """How a conversation becomes a text, in Jinja, as `transformers` renders it."""
        self.special_tokens: dict[str, str] = {}
        """bos_token, eos_token, pad_token, unk_token, where the tokenizer's own files name them."""
        self._fast = _tiktoken_of(backend, check) if check else None

    @property
    def is_fast(self) -> bool:
        """Whether bulk encoding goes through tiktoken."""
        return self._fast is not None

    def encode(self, text: str) -> list[int]:
        """The ids of one text; special tokens in it are taken as text."""
        return self.encode_batch([text])[0].tolist()

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text to continue: behind what the tokenizer itself puts before a text, such as Llama's <|begin_of_text|>."""
        encoding = self.backend.encode(text or "a")  # around nothing, what comes before it and what comes after are one
        added = next((i for i, special in enumerate(encoding.special_tokens_mask) if not special), 0)
        return encoding.ids[:added] + self.encode(text)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a conversation, rendered by the chat template, up to where the assistant's next message begins.

        Args:
            messages: each with "role" and "content".

        Raises:
            UserError: the template refuses them.
        """
        from jinja2 import TemplateError

        try:
            text = self.to_transformers(0).apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"the tokenizer's chat template refuses the conversation: {error}") from error
        self.backend.encode_special_tokens = False  # the template's marks are control, not text
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        finally:
            self.backend.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts, uint32 each."""
        if self._fast is not None:
            with suppress(ValueError):  # its regex engine gives up on a run of about a million blanks
                return [self._fast.encode_to_numpy(text, disallowed_special=()) for text in texts]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint32) for e in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def starting_with_space(self) -> list[int]:
        """The ids whose text begins with a space; none if the tokenizer is not byte-level."""
        return [i for token, i in self.backend.get_vocab().items() if token[0] == "Ġ"] if _is_byte_level(self.backend) else []

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: how many bytes of text each id stands for, 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        added = self.backend.get_added_tokens_decoder()
        byte_level = _is_byte_level(self.backend)
        for token, index in self.backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                lengths[index] = 0 if added[index].special else len(token.encode())
            elif byte_level:
                lengths[index] = len(token)
            else:  # SentencePiece's way: "▁" for a space, "<0xE2>" for one byte
                lengths[index] = 1 if _BYTE_TOKEN.fullmatch(token) else len(token.replace("▁", " ").encode())
        return lengths

    def fingerprint(self) -> str:
        """A hash of everything that decides the ids."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`; OSError if that cannot be done (`tokenizers` itself would raise a bare Exception)."""
        path.write_text(self.backend.to_str(pretty=True), encoding="utf-8")

    def to_transformers(self, context_length: int) -> Any:
        """The same tokenizer as a `transformers` one, for export."""
        from transformers import PreTrainedTokenizerFast

        end = None if self.end_of_text is None else self.backend.id_to_token(self.end_of_text)
        names = self.special_tokens or dict.fromkeys(("eos_token", "bos_token", "pad_token"), end)
        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend, **names, chat_template=self.chat_template,
            model_max_length=context_length, clean_up_tokenization_spaces=False,
        )  # fmt: skip


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE.

    Args:
        texts: what to learn from.
        vocab_size: ids to make: 256 bytes, the end-of-text token, and merges.

    Raises:
        UserError: vocab_size below 257, or more than the text has merges for.
    """
    from tokenizers import models, trainers

    if vocab_size < 257:
        raise UserError(f"tokenizer.vocab_size={vocab_size} must be at least 257: 256 bytes and the end-of-text token")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=_byte_alphabet(), show_progress=False, max_token_length=32
    )  # pyright: ignore[reportCallIssue]
    backend.train_from_iterator(texts, trainer)
    made = backend.get_vocab_size()
    if made < vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} is more than this text allows: its merges give {made}; set it to at most {made}"
        )
    return Tokenizer(backend)


def byte_tokenizer() -> Tokenizer:
    """One id a byte, and the end-of-text token."""
    from tokenizers import models

    vocab = {token: index for index, token in enumerate([END_OF_TEXT, *_byte_alphabet()])}
    backend = _byte_level(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def load_tokenizer(path: str | Path, check: str = "") -> Tokenizer:
    """Load `tokenizer.json` from a file, a directory or a hub id.

    Raises:
        UserError: there is none.
    """
    from tokenizers import Tokenizer as HFTokenizer

    file = Path(os.path.expanduser(path))
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        if file.suffix == ".json" or str(path).startswith(("/", ".", "~")):
            raise UserError(f"no tokenizer at {file}")
        file = _download(str(path))
    try:
        tokenizer = Tokenizer(HFTokenizer.from_file(str(file)), check)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file} is not a tokenizer file: {error}") from error
    _read_companions(file.parent, tokenizer)
    return tokenizer


def _read_companions(directory: Path, tokenizer: Tokenizer) -> None:
    """What stands beside tokenizer.json: the names of the special tokens and the chat template."""
    config, template = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    if config.is_file():
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{config} is not JSON: {error}; copy it again") from error
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = values.get(name)
            token = token.get("content") if isinstance(token, dict) else token  # as older files write it
            if isinstance(token, str) and tokenizer.backend.token_to_id(token) is not None:
                tokenizer.special_tokens[name] = token
        found = values.get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {t.get("name"): t.get("template") for t in found}.get("default")
        tokenizer.chat_template = found
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")


def _download(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(hub_id, "tokenizer.json"))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"no tokenizer.json in the folder {hub_id!r}, nor at the Hugging Face hub: {why}") from error


def _byte_level(model: Model) -> HFTokenizer:
    from tokenizers import Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer

    backend = HFTokenizer(model)
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
    model, added = spec["model"], spec.get("added_tokens", [])
    pattern = _split_pattern(spec.get("pre_tokenizer") or {})
    if model.get("type") != "BPE" or spec.get("normalizer") or pattern is None or not all(t["special"] for t in added):
        return None
    to_byte = _byte_of_character()
    special = {t["content"]: t["id"] for t in added}
    ranks = {bytes(to_byte[c] for c in token): i for token, i in model["vocab"].items() if token not in special}
    encoding = tiktoken.Encoding("gpt", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return encoding if encoding.encode_ordinary(check) == backend.encode(check, add_special_tokens=False).ids else None


def _split_pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """The regular expression of a pre-tokenizer that splits by one and then maps bytes to characters, as tiktoken does."""
    match pre_tokenizer.get("pretokenizers"):
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
    return None
