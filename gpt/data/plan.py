"""What all parts of a corpus share and what each needs to know before it is encoded: tokenizer, formats, classes, what is held out.

Made by a first look at every source, and kept in a folder of its own: a mixture's parts have one tokenizer, and a restart does not
train it again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.data.config import BESIDE_FIELDS, DataConfig, PartConfig, SourceConfig, TokenizerConfig
from gpt.data.encoding import POOL_FROM_BYTES, WorkerPool
from gpt.data.redaction import Redactor
from gpt.data.shards import VERSION, building, write_json
from gpt.data.sources import ReadReport, Source, open_source
from gpt.data.survey import HoldOut, Sample, Survey, survey
from gpt.data.tokenizer import Tokenizer, load_tokenizer
from gpt.data.tokenizer_training import make_tokenizer
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.data.examples import ExampleSettings

# BPE learns from every second, fourth ... document of a larger corpus: on the standard library half of the text gives as many
# bytes per token on held-out text as all of it, in half the time.
_BPE_CHARACTERS = 8_000_000
_TRAINING_PIECE = 1 << 18  # characters; `tokenizers` takes a hundred bytes for each of a text that it learns from
_FORMAT_ROWS = 100  # whose fields tell the format
KINDS = {name: name for name in ("text_label", "tokens_tags", "preference")}
"""Of corpora by the format of their examples; all others are language_model."""


@dataclass
class PartPlan:
    """What is known of one source.

    Attributes:
        config: as it was given.
        source: opened.
        weight: in a mixture.
        key: a hash of its rows and of how their fields are read.
        fingerprint: of its rows alone.
        format: of examples; "" for text.
        hold_out: which of its documents are held out.
    """

    config: SourceConfig
    source: Source
    weight: float
    key: str
    fingerprint: str
    format: str
    hold_out: HoldOut


@dataclass
class Plan:
    """What all parts share.

    Attributes:
        directory: with tokenizer.json and what stands beside it.
        tokenizer: loaded.
        check: text on which its fast encoder must agree.
        kind, classes: as in Corpus.
        parts: in order.
    """

    directory: Path
    tokenizer: Tokenizer
    check: str
    kind: str
    classes: list[str]
    parts: list[PartPlan]


def hash_of(settings: Any) -> str:
    """A short hash of anything JSON-able."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def make_plan(
    data: DataConfig, tokenizer: TokenizerConfig, cache: Path, say: Callable[[str], None], examples: ExampleSettings | None
) -> Plan:
    """Look at the sources and make the tokenizer, or take both from the cache.

    Raises:
        UserError: no text, rows of no or of several formats, a tokenizer that cannot be made.
    """
    configs: Sequence[SourceConfig] = data.parts if data.source == "mixture" else [data]
    sources = [open_source(config, data.on_error, data.streaming) for config in configs]
    fingerprints = [source.fingerprint() for source in sources]
    keys = [_source_key(config, fingerprint) for config, fingerprint in zip(configs, fingerprints, strict=True)]
    weights = [config.weight if isinstance(config, PartConfig) else 1.0 for config in configs]
    pretrained = load_tokenizer(tokenizer.path or "") if tokenizer.name == "pretrained" else None
    settings = {
        "version": VERSION, "sources": keys, "weights": weights, "tokenizer": asdict(tokenizer), "holdout": data.holdout,
        "on_error": data.on_error, "redact": sorted(data.redact), "examples": examples and [examples.format, examples.labels],
    }  # fmt: skip
    if pretrained is not None:
        settings["pretrained"] = [pretrained.fingerprint(), pretrained.special_tokens, pretrained.chat_template]
    directory = cache / "tokenizers" / hash_of(settings)
    with building(directory, lambda folder: (folder / "plan.json").is_file()) as aside:
        if aside is not None:
            shutil.rmtree(aside)
            aside.mkdir()
            formats, kind, classes = _recognise(sources, examples, data.on_error == "skip")
            surveys: list[Survey] = []
            for source, weight in zip(sources, weights, strict=True):
                say(f"reading {source.name}")
                characters = round(_BPE_CHARACTERS * weight / sum(weights)) if tokenizer.name in ("bpe", "char") else 0
                surveys.append(survey(source, data.holdout, characters, examples is not None, data.on_error == "skip"))
            if pretrained is not None:
                pretrained.save(aside / "tokenizer.json")
            else:
                _train(tokenizer, data, sources, [s.sample for s in surveys], aside, say)
            found = {
                "tokenizer": load_tokenizer(aside).fingerprint(),
                "formats": formats, "kind": kind, "classes": classes,
                "hold_outs": [asdict(s.hold_out) for s in surveys],
                "check": _redacted([s.sample.check for s in surveys], data)[0],
            }  # fmt: skip
            write_json(aside / "plan.json", found)
    try:
        found = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
        made = load_tokenizer(directory)
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{directory} is damaged; delete it and it is made again ({error})") from error
    if made.fingerprint() != found["tokenizer"]:
        raise UserError(f"{directory / 'tokenizer.json'} is damaged; delete {directory} and it is made again")
    parts = [
        PartPlan(config, source, weight, key, fingerprint, format, HoldOut(**hold_out))
        for config, source, weight, key, fingerprint, format, hold_out in zip(
            configs, sources, weights, keys, fingerprints, found["formats"], found["hold_outs"], strict=True
        )
    ]
    return Plan(directory, made, found["check"], found["kind"], found["classes"], parts)


def _source_key(config: SourceConfig, fingerprint: str) -> str:
    fields = {name: theirs for name, theirs in asdict(config.fields).items() if name not in BESIDE_FIELDS}
    return hash_of([config.source, config.config, config.split, fields, fingerprint, *([config.holdout_by] if config.holdout_by else [])])


def _recognise(sources: list[Source], examples: ExampleSettings | None, skip: bool) -> tuple[list[str], str, list[str]]:
    """The format of each source's examples, what kind of corpus they make, and its classes."""
    if examples is None:
        return ["" for _ in sources], "text", []
    from gpt.data.examples import collect_classes, recognise_format

    formats = []
    for source in sources:
        report = ReadReport()
        first = list(islice(source.rows(report), _FORMAT_ROWS))
        if not first:
            left_out = f" ({report.skipped_rows} left out, e.g. {report.first_skipped})" if report.skipped_rows else ""
            raise UserError(f"data: there are no rows in {source.place}{left_out}; give some that have")
        formats.append(recognise_format(first, examples.format, skip))
    kinds = [KINDS.get(format, "language_model") for format in formats]
    if other := next((i for i, kind in enumerate(kinds) if kind != kinds[0]), 0):
        raise UserError(
            f"data.parts: {sources[0].name} has rows of {formats[0]}, and {sources[other].name} of {formats[other]}; "
            "a model learns one of the two: leave one out"
        )
    rows = chain.from_iterable(source.rows(ReadReport()) for source in sources)
    return formats, kinds[0], collect_classes(rows, formats[0], examples.labels)


def _train(
    config: TokenizerConfig, data: DataConfig, sources: list[Source], samples: list[Sample], directory: Path, say: Callable[[str], None]
) -> None:
    texts = [text for sample in samples for text in sample.texts]
    if texts:
        say(f"making the tokenizer from {sum(map(len, texts)) / 1e6:.1f} million characters")
    texts = [piece for text in _redacted(texts, data) for piece in _pieces(text)]
    make = partial(_make_and_save, config, directory)
    if all(source.size is not None and source.size < POOL_FROM_BYTES for source in sources):
        make(texts)
    else:  # the memory that it takes, which the allocator would keep, ends with the process
        with WorkerPool(make, 1) as pool:
            pool.submit(texts).result()


def _make_and_save(config: TokenizerConfig, directory: Path, texts: list[str]) -> None:
    make_tokenizer(config, texts).save(directory / "tokenizer.json")


def _pieces(text: str) -> Iterator[str]:
    """A text cut between lines, where no tokenizer sees a word that goes on."""
    start = 0
    while len(text) - start > _TRAINING_PIECE:
        low, end = start + _TRAINING_PIECE // 2, start + _TRAINING_PIECE
        border = end
        while (border := text.rfind("\n", low, border)) >= 0:
            if not text[border - 1].isspace() and not text[border + 1].isspace():
                end = border + 1
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _redacted(texts: list[str], data: DataConfig) -> list[str]:
    """A vocabulary must not hold what the shards do not."""
    redactor = Redactor(data.redact)
    return [redactor.text(text, Counter()) for text in texts] if data.redact else texts
