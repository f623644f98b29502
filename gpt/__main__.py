"""`python -m gpt` is `gpt`."""

from gpt.cli import run

run()
