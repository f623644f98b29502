"""Held-out rows as questions: what a model is given, and what it should write. Read from the rows themselves, so that a training run
and `gpt evaluate` ask the same, and so that other right answers and tests, which are not among the tokens, are there too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from gpt.data.config import DataConfig
from gpt.data.conversations import ChatRenderer, check_messages
from gpt.data.deduplication import SeenDocuments
from gpt.data.encoding import Reader
from gpt.data.formats import brief, check_fields, recognise_format
from gpt.data.redaction import Redactor
from gpt.data.sources import ReadReport, Row, Source, open_source
from gpt.data.survey import name_hash, survey, texts_of
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError

FORMATS = ("prompt_completion", "messages")
"""Formats of rows that ask something."""
_FORMAT_ROWS = 100  # whose fields tell the format
_DRAWN_FROM, _DRAWN_FROM_ROWS = 4_000_000, 4  # characters, and rows for each one that is wanted, of a source that are enough to draw from


@dataclass(frozen=True)
class Question:
    """One example.

    Attributes:
        prompt: as text; of a conversation, rendered, up to where the answer begins.
        ids: of a conversation, the ids of that, with the template's special tokens; of a plain prompt None.
        references: right answers, at least one.
        test: code that raises where prompt and answer in front of it are wrong; empty: none.
        place: of the row, for messages.
    """

    prompt: str
    ids: list[int] | None
    references: list[str]
    test: str
    place: str


@dataclass
class Questions:
    """The questions of some data.

    Attributes:
        questions: in the order of the rows, or of a hash where only some are wanted; those of several sources one behind the other.
        end_ids: special tokens that a chat template writes behind an answer.
        left_out: rows that ask nothing: no_answer (an empty completion, no assistant that says anything), no_prompt, skipped_rows.
        report: what was met while reading.
    """

    questions: list[Question] = field(default_factory=list)
    end_ids: set[int] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)
    report: ReadReport = field(default_factory=ReadReport)


def read_questions(data: DataConfig, tokenizer: Tokenizer, held_out: bool, limit: int | None = None, key: str = "metrics") -> Questions:
    """Read the questions of examples; filtered and redacted as the config says.

    Args:
        data: where they are.
        tokenizer: the model's; it renders conversations.
        held_out: only those that a run with this data holds out; else all.
        limit: only so many, always the same, drawn evenly; of several sources an equal share of each.
        key: what the user calls the metrics, for messages.

    Raises:
        UserError: rows that cannot be read, or have no prompts and answers.
    """
    found = Questions()
    parts = data.parts or [data]
    for number, part in enumerate(parts):
        share = None if limit is None else (limit - len(found.questions)) // (len(parts) - number)
        source = open_source(part, data.on_error)
        found.questions += islice(_of_source(source, data, tokenizer, held_out, share, found, key), share)
    if not found.questions:
        left = ", ".join(f"{name}: {count}" for name, count in sorted(found.left_out.items()))
        of = " held-out" * held_out
        raise UserError(f"{key}: there are no{of} prompts to answer in the data" + f" ({left})" * bool(left))
    return found


def _of_source(
    source: Source, data: DataConfig, tokenizer: Tokenizer, held_out: bool, limit: int | None, found: Questions, key: str
) -> Iterator[Question]:
    skip = data.on_error == "skip"
    kind = recognise_format(list(islice(source.rows(ReadReport()), _FORMAT_ROWS)), data.format, skip)
    if kind not in FORMATS:
        raise UserError(
            f"{key}: rows of {kind} have no prompts to answer; there are metrics of answers for rows of {' and '.join(FORMATS)}"
        )
    maker = _Maker(tokenizer, kind, data.format == "auto")
    for row in _drawn(_rows(source, data, held_out, found.report), limit):
        try:
            made = maker.question(row)
        except UserError as error:
            if not skip:
                raise
            found.report.skipped(str(error))
            continue
        if isinstance(made, Question):
            found.end_ids |= maker.end_ids
            yield made
        else:
            found.left_out[made] += 1


def _rows(source: Source, data: DataConfig, held_out: bool, report: ReadReport) -> Iterator[Row]:
    """The rows that a run with this data holds out, or all; filtered and redacted."""
    skip = data.on_error == "skip"
    hold_out = survey(source, data.holdout, 0, examples=True, skip=skip).hold_out if held_out else None
    seen = SeenDocuments(Path(":memory:")) if data.deduplicate == "exact" else None
    redactor = Redactor(data.redact)
    for batch in Reader(source.rows(report), report, data.min_characters, seen, examples=True, skip=skip):
        for row in batch.rows:
            if hold_out is None or hold_out(row.held_out_key):
                yield redactor.row(row, Counter())


def _drawn(rows: Iterator[Row], limit: int | None) -> Iterator[Row]:
    """All rows in order; or, where only some are wanted, in that of a hash: neighbours are alike, and the first would be a poor sample.

    Of a large source that is the order among the rows at its beginning, lest all of it be read for a few.
    """
    if limit is None:
        yield from rows
        return
    kept, characters = [], 0
    for row in rows:
        kept.append(row)
        characters += len(texts_of(row))
        if characters >= _DRAWN_FROM and len(kept) >= _DRAWN_FROM_ROWS * limit:
            break
    yield from sorted(kept, key=lambda row: name_hash(row.name))


class _Maker:
    """Makes questions of the rows of one format. `end_ids` fills while it does."""

    def __init__(self, tokenizer: Tokenizer, format: str, exactly: bool) -> None:
        self._tokenizer, self._format, self._exactly = tokenizer, format, exactly
        self.end_ids: set[int] = set()

    def question(self, row: Row) -> Question | str:
        """The row's question, or why it has none. Raises UserError for a row that is not of the format."""
        check_fields(row, self._format, self._exactly)
        if self._format == "messages":
            return self._of_chat(row, check_messages(row.values["messages"], f"{row.place}: messages"))
        prompt, completion = row.values["prompt"], row.values["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            both = (check_messages(row.values[name], f"{row.place}: {name}") for name in ("prompt", "completion"))
            return self._of_chat(row, [message for messages in both for message in messages])
        if not isinstance(prompt, str) or not isinstance(completion, str):
            name, value = ("completion", completion) if isinstance(prompt, str) else ("prompt", prompt)
            raise UserError(f"{row.place}: {name} must be text, or both prompt and completion lists of messages, not {brief(value)}")
        if not completion.strip():
            return "no_answer"
        return Question(prompt, None, [completion, *_others(row)], _test(row), row.place)

    def _of_chat(self, row: Row, messages: list[dict[str, Any]]) -> Question | str:
        """The last thing that an assistant says is the answer; what comes after it is not looked at."""
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("content", "").strip()]
        if not said:
            return "no_answer"
        before = messages[: said[-1]]
        if not before:
            return "no_prompt"
        rendered = self._chat.question(before, row.place)
        if not self.end_ids and (end := self._chat.end_of_turn(messages[: said[-1] + 1], row.place)) is not None:
            self.end_ids = {end}
        ids, _ = self._tokenizer.encode_with_offsets(rendered.text, rendered.control)
        return Question(rendered.text, ids, [messages[said[-1]]["content"], *_others(row)], _test(row), row.place)

    @cached_property
    def _chat(self) -> ChatRenderer:
        return ChatRenderer(self._tokenizer)


def _others(row: Row) -> list[str]:
    """Right answers besides the completion."""
    value = row.values.get("answers")
    texts = value.get("text") if isinstance(value, dict) else value
    texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{row.place}: answers must be a list of texts, or {{text: [...]}}, not {brief(value)}")
    return [text for text in texts if text.strip()]


def _test(row: Row) -> str:
    """The code that checks an answer."""
    value = row.values.get("test")
    lines = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"{row.place}: test must be Python code as text, or a list of its lines, not {brief(value)}")
    return "\n".join(lines)
