"""A copy of the corpus that is prepared again and again, and what came of it."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np

from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.examples import ExampleSettings
from gpt.data.prepare import Corpus, prepare_corpus
from gpt.data.shards import Split


class Workshop:
    """A copy of the corpus, a cache of its own, and what was said while preparing."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.text, self.cache = folder / "text", folder / "cache"
        shutil.copytree(corpus, self.text)
        self.data = DataConfig(source="text", paths=[str(self.text)], cache_dir=str(self.cache))
        self.tokenizer = TokenizerConfig(name="byte")
        self.said: list[str] = []

    def prepare(self, context_length: int = 32, examples: ExampleSettings | None = None) -> Corpus:
        self.said.clear()
        return prepare_corpus(self.data, self.tokenizer, context_length, self.said.append, examples)

    def folders(self) -> set[Path]:
        place = self.cache / "data"
        return {p for p in place.iterdir() if p.is_dir()} if place.is_dir() else set()

    @property
    def built(self) -> bool:
        return any(line.startswith("encoding") for line in self.said)

    def texts(self) -> dict[str, str]:
        return {p.name: p.read_text(encoding="utf-8") for p in sorted(self.text.iterdir())}

    def counts(self) -> dict[str, int]:
        return self.prepare().manifest["sources"][0]["counts"]


def ids_of(split: Split) -> np.ndarray:
    return split.tokens.windows(np.array([0]), len(split.tokens))[0]


def documents_of(made: Corpus, split: str) -> list[str]:
    """The texts of a split of the only part, without what stands before each."""
    part = made.parts[0]
    side = part.train if split == "train" else part.held_out
    ids, borders = ids_of(side), side.documents.astype(int)
    assert (ids[borders[:-1]] == made.tokenizer.end_of_text).all()
    return [made.tokenizer.decode(ids[start + 1 : end]) for start, end in pairwise(borders)]
