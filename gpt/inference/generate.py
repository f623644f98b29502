"""Continue texts, streaming whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.inference.decode import Speed, generate_tokens
from gpt.inference.sampling import DEFAULT, Sampling
from gpt.model.transformer import GPT

_CONTEXT = 8  # ids before a new one that decide how it is decoded: some decoders strip what they take for the start of a text


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_tokens: int,
    sampling: Sampling = DEFAULT,
    stop: Sequence[str] = (),
    stop_ids: Iterable[int] = (),
    n: int = 1,
    overflow: Literal["error", "slide"] = "error",
    compiled: bool = False,
    speed: Speed | None = None,
) -> Iterator[tuple[int, str]]:
    """Give (row, piece of its continuation) as the pieces are made; each row ends at the end of a text or before a stop string.

    A piece never ends within a UTF-8 character, nor in what may turn out to be a stop string. Rows are the first prompt's n
    samples, then the second's ...; an empty prompt starts a document. A space at a prompt's end is left to the first new token:
    in the text that a model has read, a word's token begins with the space before it, so after a lone space no word can follow.

    Args:
        prompts: texts, or ids that are taken as they are.
        stop: texts to stop before.
        stop_ids: ids to stop before, besides the tokenizer's end of text.

    The other arguments are those of `generate_tokens`.
    """
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    rows = [_Row(tokenizer, ids, spaces, [s for s in stop if s]) for ids, _, spaces in encoded for _ in range(n)]
    ends = frozenset(stop_ids) | (frozenset() if tokenizer.end_of_text is None else {tokenizer.end_of_text})
    first = [allowed for _, allowed, _ in encoded]
    ids = [ids for ids, _, _ in encoded]
    return _pieces(rows, generate_tokens(model, ids, max_tokens, sampling, ends, n, overflow, first, compiled, speed))


def _pieces(rows: list[_Row], steps: Iterator[list[int | None]]) -> Iterator[tuple[int, str]]:
    for tokens in steps:
        for number, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if token is not None and not row.ended and (piece := row.add(token)):
                yield number, piece
        if all(row.ended or token is None for row, token in zip(rows, tokens, strict=True)):
            break
    for number, row in enumerate(rows):
        if not row.ended and (piece := row.rest()):
            yield number, piece


def whole_texts(pieces: Iterable[tuple[int, str]], rows: int) -> list[str]:
    """The pieces of `generate_text` put together, one text per row."""
    texts = [""] * rows
    for row, piece in pieces:
        texts[row] += piece
    return texts


def _encode(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> tuple[list[int], list[int], int]:
    """A prompt's ids, the ids of which the first new one must be (none: any), and how many characters of that one the prompt has."""
    if not isinstance(prompt, str):
        return list(prompt), [], 0
    if len(prompt) > 1 and prompt[-1] == " " != prompt[-2] and (first := tokenizer.starting_with_space()):
        return tokenizer.encode_prompt(prompt[:-1]), first, 1
    ids = tokenizer.encode_prompt(prompt)
    if not ids:
        if tokenizer.end_of_text is None:
            raise UserError("prompt: it is empty, and the tokenizer has no token that starts a document")
        ids = [tokenizer.end_of_text]  # what stands before every document in training
    return ids, [], 0


class _Row:
    """The text of one row as it grows, and what of it has been handed out."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.context = self._end_of(list(prompt))  # ids whose text is whole
        self.pending: list[int] = []  # ids whose text may still change
        self.skip = skip  # characters of the first token that the prompt already has
        self.text = ""  # not yet handed out
        self.ended = False

    def add(self, token: int) -> str:
        """Take the next id; return what can be handed out now."""
        self.pending.append(token)
        decoded = self.tokenizer.decode([*self.context, *self.pending])[len(self.tokenizer.decode(self.context)) :]
        if decoded.endswith("\ufffd"):  # the bytes of a character that is not complete
            return ""
        self.context, self.pending = self._end_of([*self.context, *self.pending]), []
        return self._hand_out(decoded)

    def rest(self) -> str:
        """What is left when no more ids come."""
        decoded = self.tokenizer.decode([*self.context, *self.pending])[len(self.tokenizer.decode(self.context)) :]
        piece = self._hand_out(decoded)
        return piece if self.ended else piece + self.text

    def _end_of(self, ids: list[int]) -> list[int]:
        """The last ids, from where a character begins: of bytes that begin within one, some decoders make nothing but U+FFFD."""
        ends = (ids[-length:] for length in range(_CONTEXT, _CONTEXT + 4))
        return next((end for end in ends if "\ufffd" not in self.tokenizer.decode(end)), ids[-_CONTEXT:])

    def _hand_out(self, decoded: str) -> str:
        self.text += decoded[self.skip :]
        self.skip = max(0, self.skip - len(decoded))
        found = [at for s in self.stop if (at := self.text.find(s)) >= 0]
        if found:
            self.ended = True
            return self.text[: min(found)]
        begun = max((k for s in self.stop for k in range(1, len(s)) if self.text.endswith(s[:k])), default=0)
        piece, self.text = self.text[: len(self.text) - begun], self.text[len(self.text) - begun :]
        return piece
