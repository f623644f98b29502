"""Text to a corpus of token ids, kept in a cache: find files, make the tokenizer, encode, write shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gpt.config import DataConfig, TokenizerConfig
from gpt.data.shards import VERSION, Index, ShardWriter, TokenArray, building, open_split, read_index, write_index
from gpt.data.sources import Document, ReadReport, find_files, fingerprint, read_documents
from gpt.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from gpt.errors import UserError

SPLITS = ("train", "held_out")
# BPE learns from every second, third ... document of a larger corpus: on the standard library half of the text gives as many
# bytes per token on held-out text as all of it, in half the time.
_BPE_CHARACTERS = 8_000_000


@dataclass
class Corpus:
    """A tokenised corpus."""

    tokenizer: Tokenizer
    train: TokenArray
    held_out: TokenArray
    index: Index

    @property
    def fingerprint(self) -> str:
        """A hash that changes with the text, the split or the tokenizer."""
        return hashlib.sha256(json.dumps(asdict(self.index), sort_keys=True).encode()).hexdigest()[:16]


def prepare_corpus(data: DataConfig, tokenizer: TokenizerConfig, context_length: int, say: Callable[[str], None]) -> Corpus:
    """The corpus of a config, from the cache if it is there.

    Args:
        data, tokenizer: what to read and how to cut it.
        context_length: both splits must hold at least one window of it.
        say: takes progress messages.

    Raises:
        UserError: no text, too little text, text that cannot be read, a tokenizer that cannot be made.
    """
    files = find_files(data)
    source = fingerprint(files)
    settings = {"version": VERSION, "source": source, "holdout": data.holdout, "on_error": data.on_error, "tokenizer": asdict(tokenizer)}
    if tokenizer.name == "pretrained":
        settings["tokenizer_hash"] = _make_tokenizer(tokenizer, []).fingerprint()
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
    try:
        directory = Path(data.cache_dir).expanduser() / "data" / key
    except RuntimeError as error:  # a user without a home, as containers have them
        raise UserError(f"data.cache_dir={data.cache_dir}: {error} Set it to a folder") from error
    index = read_index(directory)
    if index is None:
        with building(directory) as aside:
            if aside is not None:
                say(f"reading {len(files)} files")
                report = ReadReport()
                documents = read_documents(files, data, report)
                _build(aside, documents, report, tokenizer, source, say)
        index = read_index(directory)
        assert index is not None
    else:
        say(f"tokens from the cache: {directory}")
    for note in index.notes:
        say(f"note: {note}")
    corpus = Corpus(
        load_tokenizer(directory), open_split(directory, index, "train"), open_split(directory, index, "held_out"), index
    )  # fmt: skip
    for split, array in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(array) < context_length + 1:
            raise UserError(
                f"data: the {split} text has {len(array)} tokens, fewer than model.context_length={context_length} and one more; "
                "give more text or a shorter context"
            )
    return corpus


def _build(
    directory: Path, documents: list[Document], report: ReadReport, config: TokenizerConfig, source: str, say: Callable[[str], None]
) -> None:
    if not documents:
        left_out = (
            f" ({report.empty_files} empty files, {len(report.binary_files)} binary)" if report.empty_files or report.binary_files else ""
        )
        raise UserError(f"data: there is no text in the corpus{left_out}")
    training = [d.text for d in documents if not d.held_out]
    say(f"{sum(map(len, training)) / 1e6:.1f} million characters; making the tokenizer")
    tokenizer = _make_tokenizer(config, training)
    tokenizer.save(directory / "tokenizer.json")
    # A fresh one with a piece of the text to check the fast encoder on.
    tokenizer = load_tokenizer(directory, check="".join(training)[:200_000])
    say(f"encoding with {'tiktoken' if tokenizer.is_fast else 'tokenizers'}")
    index = Index(
        dtype="uint16" if tokenizer.vocab_size <= 65536 else "uint32", vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint(), source=source, notes=report.warnings(),
    )  # fmt: skip
    separator = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype=np.uint32)
    for split in SPLITS:
        texts = [d.text for d in documents if d.held_out == (split == "held_out")]
        writer = ShardWriter(directory, split, index.dtype)
        for start in range(0, len(texts), 256):
            for ids in tokenizer.encode_batch(texts[start : start + 256]):
                writer.append((separator, ids))
        index.tokens[split] = writer.sizes
        index.bytes[split] = sum(len(t.encode()) for t in texts)
        index.documents[split] = len(texts)
    write_index(directory, index)


def _make_tokenizer(config: TokenizerConfig, texts: list[str]) -> Tokenizer:
    if config.name == "byte":
        return byte_tokenizer()
    if config.name == "pretrained":
        return load_tokenizer(config.path or "")
    stride = -(-sum(map(len, texts)) // _BPE_CHARACTERS)
    return train_bpe(texts[:: max(1, stride)], config.vocab_size)
