"""Which special tokens in a text are control tokens, and which are only text that somebody wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def special_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds special tokens in a text, the longest where several stand."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def render_with_control(
    render: Callable[[list[dict[str, Any]]], str], messages: Sequence[dict[str, Any]], tokens: Iterable[str]
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the ranges of its characters in which special tokens are the template's own.

    Special tokens that stand in the messages go through the template as characters of the private use area, so that what
    is the template's and what is the user's cannot be taken for one another, whatever the template does.

    Args:
        render: messages to text.
        messages: the conversation.
        tokens: the special tokens.

    Returns:
        The text and the ranges, [start, end), for `Tokenizer.encode_with_offsets`.
    """
    held: list[str] = []  # every text of the messages
    _with_texts(list(messages), lambda text: held.append(text) or text)
    everything = "\n".join(held)
    stand_ins = dict(
        zip((t for t in tokens if t in everything), (chr(c) for c in range(0xE000, 0xF900) if chr(c) not in everything), strict=False)
    )
    if not stand_ins:
        text = render(list(messages))
        return text, [(0, len(text))]
    pattern = special_pattern(stand_ins)
    text = render(_with_texts(list(messages), lambda text: pattern.sub(lambda found: stand_ins[found.group()], text)))
    restored, control = "", []
    tokens_of = {stand_in: token for token, stand_in in stand_ins.items()}
    for part in re.split(f"([{''.join(tokens_of)}])", text):
        if part not in tokens_of:
            control.append((len(restored), len(restored) + len(part)))
        restored += tokens_of.get(part, part)
    return restored, control


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A value as JSON has them with every text in it changed."""
    match value:
        case str():
            return change(value)
        case list() | tuple():
            return [_with_texts(item, change) for item in value]
        case dict():
            return {_with_texts(key, change): _with_texts(item, change) for key, item in value.items()}
    return value
