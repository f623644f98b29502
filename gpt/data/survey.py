"""A first look at a source, at most some 256 MB: how it is divided into training and held-out text, and a sample for a tokenizer.

Held-out documents are chosen by a hash of their names, or of what data.holdout_by says that they belong to, so adding a file never moves
another across the border. A corpus of few documents is cut within the documents instead, or chance would decide how much is held out, if
anything; examples, which cannot be cut, and groups go by the order of hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gpt.data.config import BESIDE_FIELDS
from gpt.data.formats import brief
from gpt.data.sources import ReadReport, Row, Source
from gpt.errors import UserError

MIN_FILES_PER_SIDE = 10  # to be expected on either side of the border; fewer documents are cut within
SURVEY_CHARACTERS = 256_000_000
CHECK_CHARACTERS = 200_000  # of text on which the fast encoder must agree


@dataclass(frozen=True)
class HoldOut:
    """Which documents, or which parts of them, are held out.

    Attributes:
        share: of the whole.
        within: the end of each document is held out.
        border: else the documents whose hash, from 0 to 1, is below it.
    """

    share: float
    within: bool
    border: float

    def __call__(self, key: str) -> bool:
        """Whether the document or example of this name is held out."""
        return name_hash(key) < self.border

    def cut(self, text: str) -> tuple[str, str]:
        """The training part and the held-out part of a text: the border is a line's start if there is one near."""
        border = int(len(text) * (1 - self.share))
        newline = text.find("\n", border)
        if 0 <= newline < border + max(1, (len(text) - border) // 2):
            border = newline + 1
        return text[:border], text[border:]


def name_hash(name: str) -> float:
    """From 0 to 1, evenly."""
    return int.from_bytes(hashlib.md5(name.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()[:8], "big") / 2**64


def text_of(row: Row) -> str:
    """The text of a row for pretraining.

    Raises:
        UserError: the row has none.
    """
    text = row.values.get("text")
    if isinstance(text, str):
        return text
    if text is not None:
        raise UserError(f"{row.place}: text must be text, not {brief(text)}; mend it, or leave it out with data.on_error=skip")
    have = f"it has {', '.join(row.values)}" if row.values else "none of data.fields is there"
    if {"completion", "messages", "chosen"} & row.values.keys():
        raise UserError(f"{row.place}: an example ({have}), no plain text; use gpt finetune, or examples=true with gpt evaluate")
    raise UserError(f"{row.place}: no text to train on ({have}); name the field that holds it, e.g. data.fields.text=body")


def texts_of(row: Row) -> str:
    """All that a row of examples says, a line each; not how an answer to it is checked."""

    def inside(value: Any) -> Iterable[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            for item in value:
                yield from inside(item)
        elif isinstance(value, dict):
            for key, item in value.items():
                if key != "role":
                    yield from inside(item)

    return "\n".join(t for key, value in row.values.items() if key not in ("label", "tags", *BESIDE_FIELDS) for t in inside(value))


@dataclass
class Sample:
    """Every document at first, then every second, fourth ...: so many that they stay below `limit` characters; none if that is 0."""

    limit: int
    texts: list[str] = field(default_factory=list)
    check: str = ""
    """How the text begins, all of it."""
    _stride: int = 1
    _seen: int = 0
    _characters: int = 0

    def add(self, text: str) -> None:
        """One more document."""
        if len(self.check) < CHECK_CHARACTERS:
            self.check += text[: CHECK_CHARACTERS - len(self.check)]
        if self.limit and self._seen % self._stride == 0:
            self.texts.append(text)
            self._characters += len(text)
        self._seen += 1
        while self._characters > self.limit and len(self.texts) > 1:
            self.texts = self.texts[::2]
            self._stride *= 2
            self._characters = sum(map(len, self.texts))


@dataclass
class Survey:
    """What was found."""

    hold_out: HoldOut
    sample: Sample
    """Of the training text."""
    whole: bool
    """Whether all of the source was read."""


def survey(source: Source, holdout: float, characters: int, examples: bool = False, skip: bool = False) -> Survey:
    """Look at a source.

    Args:
        source: its rows are read as far as is needed.
        holdout: share to hold out.
        characters: of the sample; 0: none is needed, only the text to check the fast encoder on.
        examples: rows are examples, not documents.
        skip: rows without a text are passed over, rather than refused.

    Raises:
        UserError: there are no rows, or one cannot be read.
    """
    enough = MIN_FILES_PER_SIDE / min(holdout, 1 - holdout)
    by_name, within = HoldOut(holdout, False, holdout), HoldOut(holdout, True, 0.0)
    whole_texts, cut_texts = Sample(characters), Sample(characters)
    few: list[tuple[str, str]] = []
    groups: set[str] = set()
    documents = read = 0
    whole = True
    report = ReadReport()
    for row in source.rows(report):
        if skip and not examples and not isinstance(row.values.get("text"), str):
            continue
        text = texts_of(row) if examples else text_of(row)
        read += len(text)
        if row.piece == 0 and text.strip() and row.group not in groups:
            documents += 1
            if row.group is not None:
                groups.add(row.group)
        if not by_name(row.held_out_key):
            whole_texts.add(text)
        if documents < enough:
            whole_rows = examples or row.group is not None
            few.append((row.held_out_key, text if whole_rows else ""))
            if not whole_rows:
                cut_texts.add(within.cut(text)[0])
        elif few:
            few, cut_texts = [], Sample(0)
        if read >= SURVEY_CHARACTERS or (not characters and documents >= enough and len(whole_texts.check) >= CHECK_CHARACTERS):
            whole = False
            break
    if not whole and not groups and source.size is not None and source.size > read:
        documents = round(documents * source.size / read)  # about as many as there are
    if not documents and not examples:
        left_out = [f"{n} {what}" for n, what in ((report.empty_files, "empty"), (report.binary_files, "binary")) if n]
        raise UserError(f"data: there is no text in {source.place}" + f" ({', '.join(left_out)})" * bool(left_out))
    if documents * min(holdout, 1 - holdout) >= MIN_FILES_PER_SIDE:
        return Survey(by_name, whole_texts, whole)
    if not examples and not groups:
        return Survey(within, cut_texts, whole)
    ordered = sorted(name_hash(key) for key in dict(few))
    held = max(1, round(len(ordered) * holdout))
    border = (ordered[held - 1] + ordered[held]) / 2 if held < len(ordered) else 1.0
    few_texts = Sample(characters)
    for key, text in few:
        if name_hash(key) >= border:
            few_texts.add(text)
    return Survey(HoldOut(holdout, False, border), few_texts, whole)
