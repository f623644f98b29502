"""The one exception that means "the user's input was wrong", and how a process ends with whatever was raised."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake that the user can mend. The message is one sentence: what, where, and the remedy; notes (`add_note`) are a line each."""


def exit_code_of(work: Callable[[], int]) -> int:
    """Do some work and return the exit code: its own, or that of what it raised, in which case it is said on stderr.

    0 done, 1 our fault (a traceback), 2 the user's input, 130 interrupted. With `GPT_DEBUG=1` everything has a traceback.
    """
    try:
        code = work()
        print(end="", flush=True)
        return code
    except UserError as error:
        if os.environ.get("GPT_DEBUG") == "1":
            raise
        print(f"gpt: {one_line(str(error))}", *(f"  {one_line(note)}" for note in _notes(error)), sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone (`gpt generate | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _notes(error: Exception) -> list[str]:
    return getattr(error, "__notes__", [])


def one_line(text: str) -> str:
    """A value in a message may hold line breaks and control characters: show them as \\n and the like."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
