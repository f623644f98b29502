"""Conversations: messages checked, written as one text by the tokenizer's chat template, and which characters of it to learn.

The template is rendered by transformers' own renderer, so that training sees what `apply_chat_template` gives when the model is
used. What is to be learned is found in characters of the whole text; data/examples.py turns that into tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt.data.control import render_with_control, special_pattern
from gpt.data.formats import brief
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
Span = tuple[int, int]
"""Characters [start, end) of a text."""

_OUR_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
_NAMES = ("eos_token", "bos_token", "pad_token")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it


@dataclass(frozen=True)
class Rendered:
    """An example as one text."""

    text: str
    learned: list[Span]
    """What is to be learned, in order."""
    control: list[Span]
    """Where special tokens are control, because the template wrote them; elsewhere they are text."""


def chat_template_for(tokenizer: Tokenizer) -> tuple[str, bool]:
    """The template that conversations are written with, and whether it is ours because the tokenizer has none.

    Ours marks roles by plain text, `<|user|>` and a new line, since a tokenizer without a template has no tokens for them.
    """
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template, False
    return _OUR_TEMPLATE.read_text(encoding="utf-8"), True


def check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a row, without keys that are null, as transformers takes them.

    Args:
        value: what stands in the row.
        where: place and field, for messages: "rows.jsonl, line 3: messages".

    Raises:
        UserError: anything but a list of {role, content} with known roles and text as content; only an assistant with tool_calls
            may have none.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} must be a list of {{role, content}} with at least one in it, not {brief(value)}")
    messages = []
    for number, message in enumerate(value):
        at = f"{where}[{number}]"
        if not isinstance(message, dict):
            raise UserError(f"{at} must be {{role, content}}, not {brief(message)}")
        message = {key: item for key, item in message.items() if item is not None}
        role, content = message.get("role"), message.get("content")
        if role is None:
            raise UserError(f"{at} has no role, only {brief(', '.join(message)) if message else 'nothing'}; a message is {{role, content}}")
        if role not in ROLES:
            raise UserError(f"{at} has the role {brief(role)}; there are: {', '.join(ROLES)}")
        if content is None and not (role == "assistant" and message.get("tool_calls")):
            raise UserError(f"{at} has no content; only an assistant's message with tool_calls may have none")
        if content is not None and not isinstance(content, str):
            raise UserError(f"{at}.content must be text, not {brief(content)}")
        messages.append(message)
    return messages


def answers(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether an assistant says or calls anything in them."""
    return any(m["role"] == "assistant" and (m.get("content", "").strip() or m.get("tool_calls")) for m in messages)


class ChatRenderer:
    """Writes conversations with a tokenizer's chat template, or with ours if it has none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.template, _ = chat_template_for(tokenizer)
        self._marked = bool(_GENERATION.search(self.template))
        self._control_tokens = tokenizer.control_tokens()
        end = None if tokenizer.end_of_text is None else tokenizer.backend.id_to_token(tokenizer.end_of_text)
        # The names that the exported tokenizer is given too.
        self._names: dict[str, Any] = {**tokenizer.special_tokens} or ({} if end is None else dict.fromkeys(_NAMES, end))

    def conversation(self, messages: Sequence[dict[str, Any]], place: str, learn_all: bool = False) -> Rendered:
        """A conversation, of which the assistant's turns with their end-of-turn marks are learned, or everything.

        Where the template has {% generation %} marks, what is within them; else a turn is what rendering with it adds to rendering
        what comes before it and the header of an answer.

        Args:
            messages: as `check_messages` returns them.
            place: of the row, for messages.

        Raises:
            UserError: the template refuses the messages, or does not show where a turn begins and ends.
        """
        whole = self._render(messages, place)
        if learn_all:
            return replace(whole, learned=[(0, len(whole.text))])
        if self._marked:
            return whole
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [(self._end_of(messages[:i], whole, place, True), self._end_of(messages[: i + 1], whole, place, False)) for i in turns]
        return replace(whole, learned=learned)

    def completion(self, prompt: Sequence[dict[str, Any]], completion: Sequence[dict[str, Any]], place: str) -> Rendered:
        """Messages after messages, of which all that the second add is learned, as TRL has it. Raises as `conversation`."""
        whole = self._render([*prompt, *completion], place)
        return replace(whole, learned=[(self._end_of(prompt, whole, place, True), len(whole.text))])

    def question(self, messages: Sequence[dict[str, Any]], place: str) -> Rendered:
        """Messages and the header of an answer to them, which is to be written. Raises as `conversation`."""
        return replace(self._render(messages, place, answering=True), learned=[])

    def end_of_turn(self, messages: Sequence[dict[str, Any]], place: str) -> int | None:
        """The id of the special token that the template writes behind the last message; None if there is none. Raises as `conversation`.

        Args:
            messages: the last one has content.
        """
        whole = self._render(messages, place)
        _, said, behind = whole.text.rpartition(messages[-1]["content"].strip())
        found = special_pattern(self._control_tokens).search(behind) if said else None
        return self._control_tokens[found.group()] if found else None

    def _end_of(self, messages: Sequence[dict[str, Any]], whole: Rendered, place: str, answering: bool) -> int:
        """Where the first messages end in the whole conversation; `answering`: and the header of the answer to them."""
        beginning = self._render(messages, place, answering).text
        if not whole.text.startswith(beginning):
            raise UserError(
                f"{place}: the tokenizer's chat template writes the first {len(messages)} messages differently when others follow, so what "
                "is to be learned cannot be told apart; mark it in the template by {% generation %} and {% endgeneration %}"
            )
        return len(beginning)

    def _render(self, messages: Sequence[dict[str, Any]], place: str, answering: bool = False) -> Rendered:
        """The text, with what the template marks as learned; `answering`: with the header of an answer behind it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        marked: list[Any] = []

        def render(conversation: list[dict[str, Any]]) -> str:
            texts, spans = render_jinja_template(
                conversations=[conversation], chat_template=self.template,
                return_assistant_tokens_mask=self._marked, add_generation_prompt=answering, **self._names,
            )  # fmt: skip
            marked.extend(spans[0] if spans else [])
            return texts[0]

        try:
            text, control = render_with_control(render, messages, self._control_tokens)
        except Exception as error:  # a template is a program of others, which can fail in any way
            raise UserError(f"{place}: the tokenizer's chat template refuses the conversation: {' '.join(str(error).split())}") from error
        return Rendered(text, [(_restored(start, control), _restored(end, control)) for start, end in marked], control)


def _restored(position: int, control: Sequence[Span]) -> int:
    """Where a position of the text that the template wrote lies, once its stand-ins are the messages' special tokens again.

    One stand-in, a single character, lies between each range of control and the next.
    """
    for start, end in control:
        if position <= end - start:
            return start + position
        position -= end - start + 1
    raise AssertionError("behind the end of the text")
