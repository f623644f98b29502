"""Tokenizers: text to ids and back, with where each token stands, what it holds, and what is control.

`tokenizers` defines the ids and is what gets saved; `bulk_encoding` makes the same ids several times faster where it can.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gpt.data.bulk_encoding import SPLIT_PATTERNS, byte_of_character, find_bulk_encoder, split_pattern
from gpt.data.control import render_with_control, special_pattern
from gpt.errors import UserError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as HFTokenizer

END_OF_TEXT = "<|endoftext|>"

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Text to ids and back.

    Args:
        backend: the `tokenizers` tokenizer that defines the ids.
        check: text on which the bulk encoder must agree before it is used.
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
        self._bulk = find_bulk_encoder(backend, check) if check else None
        self._inner: dict[bool, HFTokenizer] = {}

    @property
    def is_fast(self) -> bool:
        """Whether bulk encoding goes another way than through `tokenizers`."""
        return self._bulk is not None

    def describe(self) -> str:
        """What it is, in a few words: "byte-level BPE, 2,048 ids, split gpt4"."""
        spec = json.loads(self.backend.to_str())
        model, pattern = spec["model"], split_pattern(spec)
        ids, kind = f"{self.vocab_size:,} ids", str(model.get("type", "tokenizer"))
        if kind == "BPE" and not model["merges"] and self._kind != "SentencePiece":
            return f"{'bytes' if self._kind == 'byte-level' else 'characters'}, {ids}"
        splits = [f"split {name}" for name, known in SPLIT_PATTERNS.items() if known == pattern]
        return ", ".join([f"{self._kind} {kind}" if self._kind != "characters" else kind, ids, *splits])

    def encode(self, text: str) -> list[int]:
        """The ids of one text; special tokens in it are taken as text."""
        return self.encode_batch([text])[0].tolist()

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text to continue: behind what the tokenizer itself puts before a text, such as Llama's <|begin_of_text|>."""
        encoding = self.backend.encode(without_surrogates(text) or "a")  # around nothing, what comes before and after are one
        added = next((i for i, special in enumerate(encoding.special_tokens_mask) if not special), 0)
        return encoding.ids[:added] + self.encode(text)

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The ids of a conversation, rendered by the chat template, up to where the assistant's next message begins.

        Args:
            messages: each with "role" and "content".

        Raises:
            UserError: the template refuses them.
        """
        from jinja2 import TemplateError

        converted = self.to_transformers(0)

        def render(conversation: list[dict[str, Any]]) -> str:
            return converted.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)

        try:
            text, control = render_with_control(render, messages, self.control_tokens())
        except TemplateError as error:
            raise UserError(f"the tokenizer's chat template refuses the conversation: {error}") from error
        return self.encode_with_offsets(text, control)[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts, uint32 each; special tokens in them are text, lone surrogates U+FFFD."""
        texts = [without_surrogates(text) for text in texts]
        found = [self._bulk(text) if self._bulk is not None else None for text in texts]
        others = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        encodings = iter(self.backend.encode_batch_fast(others, add_special_tokens=False) if others else ())
        return [np.array(next(encodings).ids, dtype=np.uint32) if ids is None else ids for ids in found]

    def encode_with_offsets(self, text: str, control: Sequence[tuple[int, int]] = ()) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text and where each stands in it; nothing is added before or behind.

        Args:
            text: is encoded once, so that tokens come to lie across the borders of what it was made from.
            control: ranges of characters, [start, end), within which special tokens are control tokens; elsewhere they are text.

        Returns:
            The ids, and the characters of each, [start, end): all those that it holds a byte of.
        """
        text = without_surrogates(text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for mark_start, mark_end, index in [*self._marks(text, control), (len(text), len(text), None)]:
            if start < mark_start:
                part_ids, part_offsets = self._encode_part(text[start:mark_start], start == 0)
                ids += part_ids
                offsets += [(a + start, b + start) for a, b in part_offsets] if start else part_offsets
            if index is not None:
                ids.append(index)
                offsets.append((mark_start, mark_end))
            start = mark_end
        return ids, offsets

    def control_tokens(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return {token: index for token, (index, _) in self._control[0].items()}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes that each id stands for, those of its name for a special token; b"" for an id without a token."""
        return [self._pieces[index] for index in ids]

    def roles(self) -> dict[str, int]:
        """bos_token, eos_token, pad_token and unk_token, as far as there are such, and their ids."""
        named = {role: self.backend.token_to_id(token) for role, token in self.special_tokens.items()}
        if not named:
            named = dict.fromkeys(("eos_token", "bos_token", "pad_token"), self.end_of_text)  # as it is exported
        return {role: index for role, index in ({"unk_token": self._unknown} | named).items() if index is not None}

    def cut(self, pieces: Sequence[bytes]) -> list[list[int]]:
        """The ids of pieces of texts, each cut as it would be within one: nothing is put before it, special tokens in it are text.

        Args:
            pieces: bytes, which may begin or end in the middle of a character. Those that the tokenizer has no id for are left out.
        """
        segments = [self._segments(piece) for piece in pieces]
        texts = {segment for parts in segments for segment in parts if isinstance(segment, str)}
        encodings = self._within.encode_batch_fast(list(texts), add_special_tokens=False)
        ids: dict[str | bytes, list[int]] = dict(zip(texts, (encoding.ids for encoding in encodings), strict=True))
        for segment in {segment for parts in segments for segment in parts if isinstance(segment, bytes)}:
            ids[segment] = self._cut_bytes(segment)
        return [[index for segment in parts for index in ids[segment] if index != self._unknown] for parts in segments]

    def starting_with_space(self) -> list[int]:
        """The ids whose text begins with a space; none if the tokenizer is not byte-level."""
        return [i for token, i in self.backend.get_vocab().items() if token[0] == "Ġ"] if self._kind == "byte-level" else []

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: how many bytes of text each id stands for, 0 for special tokens."""
        lengths = np.array([len(piece) for piece in self._pieces], dtype=np.int64)
        lengths[[*self.control_tokens().values()]] = 0
        return lengths

    def fingerprint(self) -> str:
        """A hash of everything that decides the ids."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`, and what `load_tokenizer` reads beside it: the chat template, the names of the special tokens.

        Raises:
            OSError: that cannot be done (`tokenizers` itself would raise a bare Exception).
        """
        path.write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        if self.special_tokens:
            path.with_name(_CONFIG).write_text(json.dumps(self.special_tokens, indent=1), encoding="utf-8")
        if self.chat_template:
            path.with_name(_TEMPLATE).write_text(self.chat_template, encoding="utf-8")

    def to_transformers(self, context_length: int) -> Any:
        """The same tokenizer as a `transformers` one, for export."""
        from transformers import PreTrainedTokenizerFast

        end = None if self.end_of_text is None else self.backend.id_to_token(self.end_of_text)
        names = self.special_tokens or dict.fromkeys(("eos_token", "bos_token", "pad_token"), end)
        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend, **names, chat_template=self.chat_template,
            model_max_length=context_length, clean_up_tokenization_spaces=False,
        )  # fmt: skip

    @cached_property
    def _kind(self) -> Literal["byte-level", "characters", "SentencePiece"]:
        """How its tokens are written: in GPT-2's characters for bytes, as they are, or with "▁" for a space."""
        decoder = self.backend.decoder
        written = "" if decoder is None else decoder.__getstate__().decode()
        if "ByteLevel" in written:
            return "byte-level"
        return "SentencePiece" if "▁" in written or "Metaspace" in written else "characters"

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size
        added = self.backend.get_added_tokens_decoder()
        to_byte = byte_of_character()
        for token, index in self.backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                pieces[index] = added[index].content.encode()
            elif self._kind == "byte-level":
                pieces[index] = bytes(to_byte[c] for c in token) if to_byte.keys() >= {*token} else token.encode()
            elif _BYTE_TOKEN.fullmatch(token):
                pieces[index] = bytes([int(token[3:5], 16)])
            else:
                pieces[index] = (token.replace("▁", " ") if self._kind == "SentencePiece" else token).encode()
        return pieces

    def _segments(self, piece: bytes) -> list[str | bytes]:
        """Text as far as there are whole characters, and the bytes between."""
        found: list[str | bytes] = []
        while piece:
            try:
                return [*found, piece.decode()]
            except UnicodeDecodeError as error:
                if self._kind == "byte-level":  # its merges do not heed where a character ends
                    return [piece]
                found += [piece[: error.start].decode()] if error.start else []
                found.append(piece[error.start : error.end])
                piece = piece[error.end :]
        return found

    def _cut_bytes(self, piece: bytes) -> list[int]:
        """The ids of bytes that are no text."""
        if self._kind == "byte-level":
            written = {byte: character for character, byte in byte_of_character().items()}
            return [token.id for token in self.backend.model.tokenize("".join(written[byte] for byte in piece))]
        found = [self.backend.token_to_id(f"<0x{byte:02X}>") for byte in piece]
        return [index for index in found if index is not None]

    @cached_property
    def _unknown(self) -> int | None:
        """The id of what there is no other id for."""
        model = json.loads(self.backend.to_str())["model"]
        return model["unk_id"] if model.get("unk_id") is not None else self.backend.token_to_id(model.get("unk_token") or "")

    @cached_property
    def _within(self) -> HFTokenizer:
        """A copy that cuts a text as a part within another."""
        return _without_surroundings(self.backend, is_first=False, is_text=False)

    @cached_property
    def _control(self) -> tuple[dict[str, tuple[int, AddedToken]], re.Pattern[str]]:
        """The special tokens, their ids and rules, and what finds them in a text."""
        tokens = {token.content: (index, token) for index, token in self.backend.get_added_tokens_decoder().items() if token.special}
        return tokens, special_pattern(tokens)

    def _marks(self, text: str, control: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """Start, end and id of the control tokens; the blanks that a token takes with it belong to it."""
        marks: list[tuple[int, int, int]] = []
        for found in chain.from_iterable(self._control[1].finditer(text, start, end) for start, end in control):
            index, token = self._control[0][found.group()]
            start, end = found.span()
            if token.lstrip:
                start = max(len(text[:start].rstrip()), marks[-1][1] if marks else 0)
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            marks.append((start, end, index))
        return marks

    def _encode_part(self, text: str, is_first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of a text that holds no control token."""
        normalizer = self.backend.normalizer
        if self._keeps_bytes and (normalizer is None or normalizer.normalize_str(text) == text):
            ids = self.encode_batch([text])[0]
            ends = self._piece_lengths[ids].cumsum()
            if ends.size and ends[-1] == len(text.encode()):
                return ids.tolist(), _character_offsets(text, ends)
        if is_first not in self._inner:
            self._inner[is_first] = _without_surroundings(self.backend, is_first)
        encoding = self._inner[is_first].encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @cached_property
    def _keeps_bytes(self) -> bool:
        """Whether the bytes of its tokens are those of the normalised text, one behind the other, where nothing is added or left out."""
        return self._kind == "byte-level" or (self._kind == "characters" and self.backend.pre_tokenizer is None)

    @cached_property
    def _piece_lengths(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)


def load_tokenizer(path: str | Path, check: str = "") -> Tokenizer:
    """Load `tokenizer.json` from a file, a directory, a run or a hub id.

    Raises:
        UserError: there is none.
    """
    from tokenizers import Tokenizer as HFTokenizer

    file = Path(os.path.expanduser(path))
    if file.is_dir():
        of_run = file / "model" / "tokenizer.json"  # with the names of its special tokens
        file = of_run if (file / "config.yaml").is_file() and of_run.is_file() else file / "tokenizer.json"
    if not file.is_file():
        if file.suffix == ".json" or str(path).startswith(("/", ".", "~")):
            raise UserError(f"no tokenizer at {file}; give a folder that holds a tokenizer.json, such as runs/<id>/model, or that file")
        file = _download(str(path))
    try:
        tokenizer = Tokenizer(HFTokenizer.from_file(str(file)), check)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file} is not a tokenizer file: {error}") from error
    _read_companions(file.parent, tokenizer)
    return tokenizer


def _read_companions(directory: Path, tokenizer: Tokenizer) -> None:
    """What stands beside tokenizer.json: the names of the special tokens and the chat template."""
    config, template = directory / _CONFIG, directory / _TEMPLATE
    if config.is_file():
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{config} is not JSON: {error}; copy it again") from error
        if not isinstance(values, dict):
            raise UserError(f"{config} holds no settings of a tokenizer but {type(values).__name__}; copy it again")
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = values.get(name)
            token = token.get("content") if isinstance(token, dict) else token  # as older files write it
            if isinstance(token, str) and tokenizer.backend.token_to_id(token) is not None:
                tokenizer.special_tokens[name] = token
        found = values.get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}.get("default")
        tokenizer.chat_template = found if isinstance(found, str) else None
    if template.is_file():
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{template} is not UTF-8 text: {error}; copy it again") from error


def _download(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from gpt.data.hub import hub_answers

    try:
        return Path(hf_hub_download(hub_id, "tokenizer.json", local_files_only=not hub_answers()))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"tokenizer.path={hub_id}: no tokenizer.json in such a folder, nor at the Hugging Face hub: {why}") from error


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, which JSON can write and UTF-8 cannot."""
    if text.isascii() or _SURROGATE.search(text) is None:
        return text
    return _SURROGATE.sub("\ufffd", text)


def _character_offsets(text: str, ends: np.ndarray) -> list[tuple[int, int]]:
    """Where tokens that end at these bytes of a text stand in it, in characters."""
    starts = np.concatenate(([0], ends[:-1]))
    if not text.isascii():
        character = ((np.frombuffer(text.encode(), dtype=np.uint8) & 0xC0) != 0x80).cumsum()  # of each byte, from 1
        starts, ends = character[starts] - 1, character[ends - 1]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _without_surroundings(backend: HFTokenizer, is_first: bool, is_text: bool = True) -> HFTokenizer:
    """A copy that puts nothing around a text and whose offsets keep blanks.

    Args:
        backend: to copy.
        is_first: False: of a later part, so that there is no "▁" before it that only a first one has.
        is_text: False: of a part that is no text of its own, so that there is no blank before it that every text has, and none is taken.
    """
    from tokenizers import Tokenizer as HFTokenizer

    spec = json.loads(backend.to_str())
    spec["post_processor"] = None
    steps = spec["pre_tokenizer"] or {}
    for step in steps.get("pretokenizers", [steps]):
        if not is_text or (not is_first and step.get("prepend_scheme") == "first"):
            step |= {key: value for key, value in (("prepend_scheme", "never"), ("add_prefix_space", False)) if key in step}
    if not is_text and (normalizer := spec["normalizer"]) is not None:
        kept = [step for step in normalizer.get("normalizers", [normalizer]) if step["type"] not in ("Prepend", "Strip")]
        spec["normalizer"] = {"type": "Sequence", "normalizers": kept}
    copy = HFTokenizer.from_str(json.dumps(spec))
    copy.encode_special_tokens = True
    return copy


def _end_of_text(backend: HFTokenizer) -> int | None:
    for token in (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>"):
        if (index := backend.token_to_id(token)) is not None:
            return index
    return None
