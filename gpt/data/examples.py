"""Examples for fine-tuning: rows of six formats become ids, and beside each id what is to be learned at it.

Every example is written out and encoded once, and what is learned is found by the characters that each token holds: parts encoded by
themselves and joined would be other tokens than the model will see. What is too long is cut or dropped here, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gpt.data.conversations import ChatRenderer, Rendered, answers, check_messages
from gpt.data.encoded import IGNORE_LABEL, Encoded
from gpt.data.formats import Classes, brief, check_fields, collect_classes, recognise_format
from gpt.data.tokenizer import Tokenizer, load_tokenizer, without_surrogates
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.data.sources import Row

__all__ = ["ExampleEncoder", "ExampleSettings", "collect_classes", "recognise_format"]

_LOSS_ON = {  # the first is what auto means
    "prompt_completion": ("completion", "all"), "messages": ("assistant", "all"), "text": ("all",), "text_label": ("auto", "all"),
}  # fmt: skip

_COMPLETIONS = ("chosen", "rejected")
_LEAST_PROMPT = 4  # of a pair that is too long, this part of a row is left to the prompt before completions are cut


@dataclass(frozen=True)
class ExampleSettings:
    """How rows become examples."""

    format: Literal["auto", "text", "prompt_completion", "messages", "text_label", "tokens_tags", "preference"] = "auto"
    """Of the rows; auto: as their fields show."""
    loss_on: Literal["auto", "completion", "assistant", "all"] = "auto"
    """What is learned; auto: the completion, the assistant's turns, or of plain text everything."""
    too_long: Literal["truncate", "drop", "split"] = "truncate"
    """What becomes of an example of more than `context_length` tokens."""
    context_length: int = 1024
    """Places, each of one token, that an example may take."""
    labels: list[str] = field(default_factory=list)
    """The classes in order; empty: those that occur."""


class ExampleEncoder:
    """Makes examples of rows: an `Encoder`, for worker processes; the tokenizer is loaded when the first rows come.

    An example is at most `context_length` tokens and takes as many places. Language modelling: `labels[i] = ids[i]` where the token is
    learned, IGNORE_LABEL elsewhere and at the first token, before which nothing stands that it could be told from. So the target of place i
    is `labels[i + 1]`, also over the border of two examples in a row, and that of an example's last place is IGNORE_LABEL. text_label: the
    number of the class on the last token; whether those before it learn it too (`loss_on=all`) is the loader's business, for what is held
    out is measured at the last. tokens_tags: that of each word on the word's first piece. preference: two examples, the prompt
    with the chosen completion and with the rejected one, of which the completions are learned; both are there or neither is.

    What the tokenizer itself puts before a text (Llama's <|begin_of_text|>) stands before every example but conversations, whose template
    writes it. A completion and a text end with the end-of-text token, which is learned with them.

    Counted in `Encoded.counts`: truncated, split, dropped_too_long, dropped_no_target (an empty completion or text, no assistant that says
    anything, or nothing to learn left), dropped_no_difference (of two completions). A dropped row has no ids. Pieces of a split text, and
    pairs, have one `held_out_key`.

    Args:
        tokenizer_directory: with tokenizer.json, as `load_tokenizer` takes it.
        settings: what is learned, what becomes of long examples.
        format: of the rows, from `recognise_format`.
        classes: from `collect_classes`; for text_label and tokens_tags.

    Raises:
        UserError: settings that do not go with the format.
    """

    def __init__(self, tokenizer_directory: str, settings: ExampleSettings, format: str, classes: list[str]) -> None:
        self.tokenizer_directory, self.settings, self.format, self.classes = tokenizer_directory, settings, format, classes
        loss_on = _LOSS_ON.get(format, ())
        if settings.loss_on not in ("auto", *loss_on):
            raise UserError(
                f"loss_on={settings.loss_on} is not for rows of {format}; there are: {', '.join(dict.fromkeys(('auto', *loss_on)))}"
            )
        if settings.too_long == "split" and format != "text":
            raise UserError(f"data.too_long=split is for rows of text; rows of {format} would lose what they answer: set truncate or drop")
        self._learn_all = (loss_on[0] if settings.loss_on == "auto" and loss_on else settings.loss_on) == "all"
        self._classes = Classes(classes)
        self._loaded: Tokenizer | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ExampleEncoder, (self.tokenizer_directory, self.settings, self.format, self.classes)

    def __call__(self, rows: Sequence[Row]) -> list[Encoded]:
        """Each row's example, in order; of a split text, its pieces.

        Raises:
            UserError: the first row that is none of this format, with its place; or there is no tokenizer.
        """
        if rows and self._loaded is None:
            some = "\n".join(str(value) for row in rows[:100] for value in row.values.values())[:100_000]
            self._loaded = load_tokenizer(self.tokenizer_directory, check=without_surrogates(some))
        return [example for row in rows for example in self._examples(row)]

    def _examples(self, row: Row) -> list[Encoded]:
        check_fields(row, self.format, exactly=self.settings.format == "auto")
        match self.format:
            case "text_label":
                return self._labelled_text(row)
            case "tokens_tags":
                return self._tagged_words(row)
            case "text":
                text = self._text(row, "text")
                return self._language(row, Rendered(text, [(0, len(text))], []) if text.strip() else None, ends=True)
            case "messages":
                messages = check_messages(row.values["messages"], f"{row.place}: messages")
                told = self._learn_all or answers(messages)
                return self._language(row, self._chat.conversation(messages, row.place, self._learn_all) if told else None)
            case "preference":
                return self._preference(row)
            case _:
                return self._prompt_completion(row)

    def _prompt_completion(self, row: Row) -> list[Encoded]:
        if isinstance(row.values["prompt"], list) and isinstance(row.values["completion"], list):
            prompt, completion = (check_messages(row.values[name], f"{row.place}: {name}") for name in ("prompt", "completion"))
            if self._learn_all:
                return self._language(row, self._chat.conversation([*prompt, *completion], row.place, learn_all=True))
            return self._language(row, self._chat.completion(prompt, completion, row.place) if answers(completion) else None)
        before, after = self._text(row, "prompt"), self._text(row, "completion")
        if not (after.strip() or self._learn_all) or not (before + after).strip():
            return self._language(row, None)
        text = before + after
        return self._language(row, Rendered(text, [(0 if self._learn_all else len(before), len(text))], []), ends=True)

    def _language(self, row: Row, rendered: Rendered | None, ends: bool = False) -> list[Encoded]:
        """The example of a text for language modelling; `ends`: the end-of-text token follows, and what comes before a text precedes."""
        if rendered is None:
            return [_dropped(row, "dropped_no_target")]
        before = self._before if ends else []
        ids, learned = self._tokens(rendered, ends)
        room = max(0, self.settings.context_length - len(before))
        if len(ids) <= room:
            windows, count = [(0, len(ids))], ""
        elif self.settings.too_long == "drop":
            return [_dropped(row, "dropped_too_long")]
        elif self.settings.too_long == "split":
            windows, count = _pieces(len(ids), room, overlap=not before), "split"
        else:
            windows, count = [_window(learned, room, first=0 if before else 1)], "truncated"
        examples = []
        for start, end in windows:
            labels = np.where(learned[start:end], ids[start:end], IGNORE_LABEL)
            labels = np.concatenate([np.full(len(before), IGNORE_LABEL), labels]).astype(np.int32)
            labels[:1] = IGNORE_LABEL
            if (labels != IGNORE_LABEL).any():
                counts = {count: 1} if count and not examples else {}
                examples.append(self._encoded(row, [*before, *ids[start:end]], labels, counts))
        return examples or [_dropped(row, "dropped_no_target")]

    def _tokens(self, rendered: Rendered, ends: bool) -> tuple[list[int], np.ndarray]:
        """The ids of a text, and which of them are learned, without what comes before it; `ends`: as for `_language`."""
        ids, offsets = self._tokenizer.encode_with_offsets(rendered.text, rendered.control)
        learned = _learned_tokens(offsets, rendered.learned, len(rendered.text))
        if ends and self._end is not None:
            ids, learned = [*ids, self._end], np.append(learned, True)
        if not (ends and self._before):
            learned[:1] = False
        return ids, learned

    def _preference(self, row: Row) -> list[Encoded]:
        prompt, chosen, rejected = (row.values.get(name) for name in ("prompt", *_COMPLETIONS))
        if isinstance(chosen, list) and isinstance(rejected, list):
            told = [check_messages(row.values[name], f"{row.place}: {name}") for name in _COMPLETIONS]
            if isinstance(prompt, list):
                before = check_messages(prompt, f"{row.place}: prompt")
            else:  # the messages that both begin with are the prompt, as in TRL; a text beside them is one of these once more
                before = [message for message, other in takewhile(lambda pair: pair[0] == pair[1], zip(*told, strict=False))]
                told = [messages[len(before) :] for messages in told]
            if not before:
                raise UserError(f"{row.place}: chosen and rejected begin with different messages; they must answer the same prompt")
            if not all(map(answers, told)):
                return [_dropped(row, "dropped_no_difference" if told[0] == told[1] else "dropped_no_target")]
            return self._pair(row, [self._chat.completion(before, messages, row.place) for messages in told], ends=False)
        texts = [self._text(row, name) for name in _COMPLETIONS]
        if prompt is None:  # what both begin with, up to a blank, as in TRL
            same = list(takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
            before = texts[0][: len(same)].removesuffix(" ")
            texts = [text[len(before) :] for text in texts]
        else:
            before = self._text(row, "prompt")
        if not any(text.strip() for text in texts):
            return [_dropped(row, "dropped_no_target")]
        return self._pair(row, [Rendered(before + text, [(len(before), len(before + text))], []) for text in texts], ends=True)

    def _pair(self, row: Row, pair: list[Rendered], ends: bool) -> list[Encoded]:
        """The examples of the chosen and the rejected completion; of both the prompt loses the same beginning if one is too long."""
        before, counts = self._before if ends else [], {}
        made = [self._tokens(rendered, ends) for rendered in pair]
        room, longest = max(0, self.settings.context_length - len(before)), max(len(ids) for ids, _ in made)
        if longest > room:
            if self.settings.too_long == "drop":
                return [_dropped(row, "dropped_too_long")]
            prompt = min(int(np.argmax(learned)) if learned.any() else len(learned) for _, learned in made)
            cut = max(0, min(longest - room, prompt - max(1, room // _LEAST_PROMPT)))
            made = [(ids[cut : cut + room], learned[cut : cut + room]) for ids, learned in made]
            counts = {"truncated": 1}
        if made[0][0] == made[1][0]:
            return [_dropped(row, "dropped_no_difference")]
        examples = []
        for ids, learned in made:
            labels = np.concatenate([np.full(len(before), IGNORE_LABEL), np.where(learned, ids, IGNORE_LABEL)]).astype(np.int32)
            labels[:1] = IGNORE_LABEL
            if not (labels != IGNORE_LABEL).any():
                return [_dropped(row, "dropped_no_target")]
            examples.append(self._encoded(row, [*before, *ids], labels, counts if not examples else {}))
        return examples

    def _labelled_text(self, row: Row) -> list[Encoded]:
        label = self._classes.number(row.values["label"], f"{row.place}: label")
        text = self._text(row, "text")
        ids = [*self._before, *self._tokenizer.encode(text)] if text.strip() else []
        labels = np.full(len(ids), IGNORE_LABEL, dtype=np.int32)
        return self._fitted(row, ids, labels, last=label)

    def _tagged_words(self, row: Row) -> list[Encoded]:
        words, tags = row.values["tokens"], row.values["tags"]
        for name, value in (("tokens", words), ("tags", tags)):
            if not isinstance(value, list):
                raise UserError(f"{row.place}: {name} must be a list, not {brief(value)}")
        if len(words) != len(tags):
            raise UserError(f"{row.place}: {len(words)} tokens and {len(tags)} tags; each token has one")
        for number, word in enumerate(words):
            if not isinstance(word, str) or not word:
                raise UserError(f"{row.place}: tokens[{number}] must be text with a character in it, not {brief(word)}")
        classes = [self._classes.number(tag, f"{row.place}: tags[{number}]") for number, tag in enumerate(tags)]
        ids, offsets = self._tokenizer.encode_with_offsets(" ".join(words))
        labels = np.full(len(self._before) + len(ids), IGNORE_LABEL, dtype=np.int32)
        ends = np.array([end for _, end in offsets], dtype=np.int64)
        starts = np.cumsum([0, *(len(word) + 1 for word in words)])[:-1]
        firsts = np.searchsorted(ends, starts, side="right")  # the token that holds the word's first character
        for token, start, word, label in reversed(list(zip(firsts.tolist(), starts.tolist(), words, classes, strict=True))):
            if token < len(ids) and offsets[token][0] < start + len(word):  # blanks may have no token
                labels[len(self._before) + token] = label  # of words in one token, the first counts
        return self._fitted(row, [*self._before, *ids], labels)

    def _fitted(self, row: Row, ids: list[int], labels: np.ndarray, last: int | None = None) -> list[Encoded]:
        """An example with classes, cut at its end if too long; `last`: the class of the last token that remains."""
        length = self.settings.context_length
        too_long = len(ids) > length
        if too_long and self.settings.too_long == "drop":
            return [_dropped(row, "dropped_too_long")]
        ids, labels = ids[:length], labels[:length]
        if last is not None:
            labels[-1:] = last
        if not (labels != IGNORE_LABEL).any():
            return [_dropped(row, "dropped_no_target")]
        return [self._encoded(row, ids, labels, {"truncated": 1} if too_long else {})]

    def _text(self, row: Row, name: str) -> str:
        value = row.values[name]
        if not isinstance(value, str):
            both = ""
            if name in ("prompt", "completion", *_COMPLETIONS):
                other = "prompt or completion" if "completion" in row.values else "counterpart"
                both = f" (or a list of messages, as its {other} then is too)"
            raise UserError(f"{row.place}: {name} must be text{both}, not {brief(value)}")
        return value

    def _encoded(self, row: Row, ids: list[int], labels: np.ndarray, counts: dict[str, int]) -> Encoded:
        made = np.array(ids, dtype=np.uint32)
        return Encoded(row.name, row.held_out_key, made, labels, int(self._byte_lengths[made[labels != IGNORE_LABEL]].sum()), counts)

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self._loaded is not None  # by the first rows
        return self._loaded

    @cached_property
    def _chat(self) -> ChatRenderer:
        return ChatRenderer(self._tokenizer)

    @cached_property
    def _before(self) -> list[int]:
        """What the tokenizer puts before a text."""
        return self._tokenizer.encode_prompt("")

    @cached_property
    def _end(self) -> int | None:
        """The token that ends a text: the one at which whoever loads the exported tokenizer stops."""
        named = self._tokenizer.special_tokens.get("eos_token")
        return self._tokenizer.end_of_text if named is None else self._tokenizer.backend.token_to_id(named)

    @cached_property
    def _byte_lengths(self) -> np.ndarray:
        return self._tokenizer.byte_lengths()


def _dropped(row: Row, why: str) -> Encoded:
    return Encoded(row.name, row.held_out_key, np.array([], dtype=np.uint32), np.array([], dtype=np.int32), 0, {why: 1})


def _learned_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], characters: int) -> np.ndarray:
    """(N,) bool: the tokens that hold at least one character of a span."""
    before = np.zeros(characters + 1, dtype=np.int64)  # how many learned characters stand before each
    for start, end in spans:
        before[start + 1 : end + 1] = 1
    np.cumsum(before, out=before)
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    return before[ends] > before[starts]


def _window(learned: np.ndarray, room: int, first: int) -> tuple[int, int]:
    """Which `room` tokens of an example that is too long to keep.

    The beginning; but if nothing that is learned is in it, the first target, as much of it as fits, and the end of what stands before it.

    Args:
        learned: (N,) bool, N > room.
        first: how many tokens of the window cannot be learned: 1 if nothing stands before it, else 0.
    """
    if learned[:room].any() or not learned.any():
        return 0, room
    start = int(np.argmax(learned))
    end = start + int(np.argmin(np.append(learned[start:], False)))
    start = min(start - first, end - room)
    return start, start + room


def _pieces(length: int, room: int, overlap: bool) -> list[tuple[int, int]]:
    """Cuts of a text in pieces of `room` tokens; with `overlap`, each begins with the last token of the one before, so that every token is
    learned in one of them."""
    step = max(1, room - overlap)
    return [(start, min(start + room, length)) for start in range(0, length, step)]
