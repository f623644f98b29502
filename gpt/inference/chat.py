"""A chat in the terminal: history, the tokenizer's chat template, answers that Ctrl-C cuts short."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.inference.decode import Speed
from gpt.inference.generate import generate_text
from gpt.inference.sampling import Sampling
from gpt.model.transformer import GPT

_QUOTES = '"""'
_HELP = f"Ctrl-C stops an answer, Ctrl-D or /exit ends the chat, /reset forgets what was said. {_QUOTES} begins and ends several lines."


class Chat:
    """Asks, answers, remembers.

    With a chat template, messages are rendered by it. Without one the model is a plain language model: what is written is put
    after all that there is so far, and continued.

    Args:
        model, tokenizer: in eval mode.
        sampling: how tokens are chosen; answers use one seed after another.
        max_tokens: most per answer; None: as many as the context holds.
        stop, stop_ids: where an answer ends.
        system: the system message; empty: none.
        compiled: compile the step that makes a token.
        verbose: print the speeds of each answer.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_tokens: int | None,
        stop: Sequence[str],
        stop_ids: frozenset[int],
        system: str,
        compiled: bool = False,
        verbose: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.max_tokens = model, tokenizer, sampling, max_tokens
        self.stop, self.stop_ids, self.compiled, self.verbose = stop, stop_ids, compiled, verbose
        if system and tokenizer.chat_template is None:
            raise UserError("system: the model's tokenizer has no chat template, so there are no system messages; leave it out")
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._start)

    def run(self) -> int:
        """Talk until the input ends. Returns the exit code."""
        kind = "" if self.tokenizer.chat_template else "The tokenizer has no chat template: what you write is continued. "
        print(f"{kind}{_HELP}", file=sys.stderr)
        edit_lines()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # so that a line which is no text is refused alone
        while True:
            try:
                text = read_turn()
            except EOFError:
                print(file=sys.stderr)
                return 0
            except KeyboardInterrupt:
                print(f"\n{_HELP}", file=sys.stderr)
                continue
            if text.strip() == "/exit":
                return 0
            if text.strip() == "/reset":
                self.messages = list(self._start)
            elif text.strip():
                self._turn(text)

    def _turn(self, text: str) -> None:
        speed = Speed()
        try:
            for piece in self.answer(text, speed):
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            print(" [stopped]", end="", file=sys.stderr, flush=True)
        except UserError as error:
            print(f"gpt: {error}", file=sys.stderr)
        print(flush=True)
        if self.verbose and speed.prompt_tokens:
            print(f"gpt: {speed.described()}", file=sys.stderr)

    def answer(self, text: str, speed: Speed | None = None) -> Iterator[str]:
        """Yield the pieces of an answer. However it ends, the history has the text and as much of the answer as was made.

        Raises:
            UserError: the text alone is too long for the context, or no text, or the template refuses it; the history is then as before.
        """
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError("that is not valid UTF-8")
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._prompt()
        except BaseException:  # Ctrl-C too
            self.messages = before
            raise
        limit = self.model.config.context_length
        max_tokens = min(self.max_tokens or limit, limit - len(ids))
        sampling = self.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + len(self.messages)) % 2**32)
        made: list[str] = []
        try:
            for _, piece in generate_text(
                self.model, self.tokenizer, [ids], max_tokens, sampling, self.stop, self.stop_ids, compiled=self.compiled, speed=speed
            ):
                made.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(made)})

    def _prompt(self) -> list[int]:
        """The ids of the conversation, without its oldest turns where the context cannot hold them and an answer."""
        limit = self.model.config.context_length
        room = min(self.max_tokens or limit, limit // 4)
        dropped = 0
        while True:
            ids = self._encoded()
            if len(ids) + room <= limit:
                break
            if len(self.messages) - len(self._start) <= 1:
                raise UserError(f"that is {len(ids)} tokens, and the model's context of {limit} must hold it and an answer; shorten it")
            del self.messages[len(self._start) : len(self._start) + 2]
            dropped += 1
        if dropped:
            print(f"gpt: note: the oldest turns no longer fit the context of {limit} tokens and are forgotten ({dropped})", file=sys.stderr)
        return ids

    def _encoded(self) -> list[int]:
        if self.tokenizer.chat_template is not None:
            return self.tokenizer.encode_chat(self.messages)
        text = "".join(message["content"] for message in self.messages)
        return self.tokenizer.encode_prompt(text)


def edit_lines() -> None:
    """Have `input` edit lines, and take lines that are pasted together as one, where there is GNU readline and a terminal that tells."""
    with contextlib.suppress(ImportError):  # Windows has none
        readline = importlib.import_module("readline")  # importing it is what makes `input` edit lines
        readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off


def read_turn() -> str:
    """What is said next: a line, lines that were pasted together, or all between triple quotes, or from them to the end of the input.

    Raises:
        EOFError: nothing more is said.
    """
    asks = sys.stdin.isatty()
    text = input("\nyou> " if asks else "")
    if "\n" in text or not text.lstrip().startswith(_QUOTES):
        return text
    lines = [text.lstrip().removeprefix(_QUOTES)]
    with contextlib.suppress(EOFError):
        while not lines[-1].rstrip().endswith(_QUOTES):
            lines.append(input("...> " if asks else ""))
    lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip("\n")
