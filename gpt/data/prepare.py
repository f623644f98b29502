"""Text or examples to a corpus of token ids, kept in a cache: look at the sources, make the tokenizer, encode in parallel, write shards.

What has been written is committed every few seconds: a build that was killed goes on where it stopped, to the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.deduplication import SeenDocuments
from gpt.data.encoding import Batch, Reader, TextEncoder, Work, count_workers, encode_batches
from gpt.data.manifest import combine, describe_part, describe_tokenizer, read_manifest, summary
from gpt.data.plan import PartPlan, Plan, hash_of, make_plan
from gpt.data.progress import PreparationProgress
from gpt.data.shards import (
    SPLITS,
    VERSION,
    Index,
    ShardWriter,
    Split,
    building,
    check_files,
    checksum,
    mark_verified,
    open_split,
    read_index,
    write_index,
    write_json,
)  # fmt: skip
from gpt.data.sources import ReadReport
from gpt.data.tokenizer import Tokenizer, load_tokenizer
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.data.examples import ExampleSettings

COMMIT_SECONDS = 10.0
COMMIT_BYTES = 64_000_000  # of text
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_OF_THE_BUILD = ("progress.json", "seen.sqlite", "seen.sqlite-journal")

# What is said of examples each time they are used.
_CUT = {
    "truncated": "were cut to fit the context", "split": "were cut into several", "dropped_too_long": "were longer and left out",
    "dropped_no_target": "had nothing to learn and were left out",
    "dropped_no_difference": "had the same completion twice and were left out",
}  # fmt: skip

Kind = Literal["text", "language_model", "text_label", "tokens_tags", "preference"]


@dataclass
class Part:
    """A prepared source: `weight` is how often windows come from it, in proportion to the other parts."""

    name: str
    weight: float
    train: Split
    held_out: Split
    index: Index


@dataclass
class Corpus:
    """A tokenised corpus: one part, or those of a mixture.

    Attributes:
        tokenizer: of all parts.
        parts: in the order of the config.
        manifest: where the data comes from and what became of it; JSON-able.
        kind: text for pretraining, or what examples teach.
        classes: of text_label and tokens_tags, in the order of their numbers.
    """

    tokenizer: Tokenizer
    parts: list[Part]
    manifest: dict[str, Any]
    kind: Kind
    classes: list[str]

    @property
    def fingerprint(self) -> str:
        """A hash that changes with the tokens, labels, split or tokenizer; not with where the files lie or when they were touched."""
        shards = [{name: file for name, file in part.index.files.items() if name.endswith(".bin")} for part in self.parts]
        what = [self.tokenizer.fingerprint(), self.kind, self.classes, shards, [part.weight for part in self.parts]]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def prepare_corpus(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    context_length: int,
    say: Callable[[str], None],
    examples: ExampleSettings | None = None,
) -> Corpus:
    """The corpus of a config, from the cache if it is there.

    Args:
        data, tokenizer: what to read and how to cut it.
        context_length: both splits of a text must hold at least one window of it.
        say: takes progress messages.
        examples: how rows become examples; None: text for pretraining.

    Raises:
        UserError: no text, too little text, text that cannot be read, a tokenizer that cannot be made, a damaged cache.
    """
    cache = cache_directory(data)
    plan = make_plan(data, tokenizer, cache, say, examples)
    if examples is not None:
        for part in plan.parts:
            learned = {"prompt_completion": "the completion", "messages": "the assistant's turns"}.get(part.format, "all")
            loss = "" if plan.kind != "language_model" else f"; learned: {'all' if examples.loss_on == 'all' else learned}"
            say(f"{part.source.name}: rows of {part.format}{loss}")
    parts, manifests = [], []
    for part in plan.parts:
        directory = cache / "data" / hash_of(_part_settings(part, plan, data, examples))
        index = _prepared(directory, part, plan, data, examples, say)
        check_files(directory, index)
        for note in index.notes:
            say(f"note: {note}")
        train, held_out = (open_split(directory, index, split) for split in SPLITS)
        parts.append(Part(part.source.name, part.weight, train, held_out, index))
        manifest = read_manifest(directory)
        _check_size(parts[-1], context_length, manifest["counts"])
        # Licence and paths are as this config has them, not as the one that built the cache.
        manifests.append(
            manifest | {"name": part.source.name, "weight": part.weight, "format": part.format or "text"} | part.source.describe()
        )
    manifest = combine(manifests, describe_tokenizer(tokenizer, plan.tokenizer), plan.kind, plan.classes)
    return Corpus(plan.tokenizer, parts, manifest, cast(Kind, plan.kind), plan.classes)


def cache_directory(data: DataConfig) -> Path:
    """Where what is prepared is kept.

    Raises:
        UserError: there is no such place.
    """
    try:
        return Path(data.cache_dir).expanduser()
    except RuntimeError as error:  # a user without a home, as containers have them
        raise UserError(f"data.cache_dir={data.cache_dir}: {error} Set it to a folder") from error


def _part_settings(part: PartPlan, plan: Plan, data: DataConfig, examples: ExampleSettings | None) -> dict[str, Any]:
    """What decides the ids of a part."""
    return {
        "version": VERSION, "source": part.key, "hold_out": asdict(part.hold_out), "on_error": data.on_error, "redact": sorted(data.redact),
        "min_characters": data.min_characters, "deduplicate": data.deduplicate, "tokenizer": plan.tokenizer.fingerprint(),
        "examples": examples and [asdict(examples), part.format, plan.classes, plan.tokenizer.chat_template],
    }  # fmt: skip


_WHY_NONE = {
    "dropped_too_long": "longer than a row; set data.too_long=truncate, or longer rows",
    "dropped_no_target": "without a completion, a text or an assistant's turn to learn; mend them",
    "skipped_rows": "left out by data.on_error=skip; mend them",
}


def _check_size(part: Part, context_length: int, counts: dict[str, int]) -> None:
    for name, split in (("training", part.train), ("held-out", part.held_out)):
        if part.index.kind == "text" and len(split.tokens) < context_length + 1:
            raise UserError(
                f"data: the {name} text has {len(split.tokens)} tokens, fewer than model.context_length={context_length} and one more; "
                "give more text or a shorter context"
            )
        if not len(split.tokens):
            why = max(_WHY_NONE, key=lambda count: counts.get(count, 0))
            remedy = f": {n:,} are {_WHY_NONE[why]}" if (n := counts.get(why, 0)) else "; give more, or change data.holdout"
            raise UserError(f"data: {part.name} has no {name} examples{remedy}")


def _prepared(
    directory: Path, part: PartPlan, plan: Plan, data: DataConfig, examples: ExampleSettings | None, say: Callable[[str], None]
) -> Index:
    """The index of a part's folder, built if it is not there."""
    with building(directory, lambda folder: read_index(folder) is not None) as aside:
        if aside is None:
            say(f"tokens from the cache: {directory}")
        elif read_index(aside) is None:
            _Build(aside, part, plan, data, examples, say).run()
        if aside is not None:
            for name in _OF_THE_BUILD:
                (aside / name).unlink(missing_ok=True)
    if aside is not None:
        say(f"tokens kept in {directory}")
    index = read_index(directory)
    assert index is not None
    return index


class _Build:
    """Fills a folder with the shards of one source."""

    def __init__(
        self, directory: Path, part: PartPlan, plan: Plan, data: DataConfig, examples: ExampleSettings | None, say: Callable[[str], None]
    ) -> None:
        self.directory, self.part, self.plan, self.data, self.say = directory, part, plan, data, say
        self.index = Index(
            dtype="uint16" if plan.tokenizer.vocab_size <= 65536 else "uint32", vocab_size=plan.tokenizer.vocab_size,
            tokenizer=plan.tokenizer.fingerprint(), source=part.fingerprint, kind=plan.kind, classes=plan.classes,
            labelled=examples is not None,
        )  # fmt: skip
        self.skip = data.on_error == "skip"
        self.fast = load_tokenizer(plan.directory, check=plan.check)
        if examples is None:
            encoder = TextEncoder(str(plan.directory), plan.check, part.hold_out, self.fast)
        else:
            from gpt.data.examples import ExampleEncoder

            encoder = ExampleEncoder(str(plan.directory), examples, part.format, plan.classes)
        self.work = Work(encoder, sorted(data.redact), part.hold_out, self.index.dtype, self.index.labelled, self.skip)
        self.examples = examples is not None
        self.counts: Counter[str] = Counter()
        self.characters = 0
        self.seconds = 0.0
        self.next_batch = 0
        self.stream_state: dict[str, Any] | None = None
        self.report = ReadReport()
        self.seen_state: dict[str, str] | None = None
        self.writers: dict[str, ShardWriter] = {}
        self._go_on()

    def _writer(self, split: str, state: dict[str, Any] | None = None) -> ShardWriter:
        return ShardWriter(self.directory, split, self.index.dtype, self.index.labelled, state)

    def _go_on(self) -> None:
        """Take up what an earlier process committed, if it did and it is whole."""
        try:
            progress = json.loads((self.directory / "progress.json").read_text(encoding="utf-8"))
            self.writers = {split: self._writer(split, progress["splits"][split]) for split in SPLITS}
            self.report = ReadReport(**progress["report"])
        except FileNotFoundError:
            self.writers = {split: self._writer(split) for split in SPLITS}
            return
        except (ValueError, KeyError, TypeError):
            self.say(f"what an earlier call left in {self.directory} is damaged; starting from the beginning")
            shutil.rmtree(self.directory)
            self.directory.mkdir()
            self.writers = {split: self._writer(split) for split in SPLITS}
            return
        self.counts, self.characters, self.seconds = Counter(progress["counts"]), progress["characters"], progress["seconds"]
        self.next_batch, self.stream_state, self.seen_state = progress["batch"] + 1, progress["stream"], progress["seen"]
        self.say(f"going on behind {self._documents:,} documents ({self.characters / 1e6:.1f} MB), where an earlier call stopped")

    @property
    def _documents(self) -> int:
        return sum(writer.documents for writer in self.writers.values())

    @property
    def _tokens(self) -> int:
        return sum(writer.tokens for writer in self.writers.values())

    def run(self) -> None:
        """Read, encode, write, from where it stands to the end."""
        source, how = self.part.source, "in bulk" if self.fast.is_fast else "with tokenizers"
        workers, alone = count_workers(self.data.workers, source.size, self.data.memory_mb)
        self.say(f"encoding {how}" + f" in {workers} process{'es' * (workers > 1)}" * (workers > 0 and not alone))
        started = committed = time.monotonic()
        since = 0
        stream = source.rows(self.report, self.stream_state)
        final: dict[str, Any] = {}
        with ExitStack() as stack:
            seen = None
            if self.data.deduplicate == "exact":
                seen = stack.enter_context(closing(SeenDocuments(self.directory / "seen.sqlite", self.next_batch - 1)))
                if self.seen_state is not None:
                    seen.load_state_dict(self.seen_state)
            reader = Reader(stream, self.report, self.data.min_characters, seen, self.examples, self.skip, self.next_batch)
            progress = stack.enter_context(PreparationProgress(source.size, self.say))
            encoded = stack.enter_context(closing(encode_batches(iter(reader), self.work, workers, self.data.memory_mb, alone)))
            for batch, (chunks, counts) in encoded:
                for split, chunk in chunks.items():
                    self.writers[split].append(chunk.ids, chunk.starts, chunk.n_bytes, chunk.labels)
                self.counts.update(counts)
                self.counts.update(batch.left_out)
                self.characters += batch.characters
                since += batch.characters
                final = batch.state
                progress.update(self._documents, self.characters, self._tokens)
                if time.monotonic() - committed > COMMIT_SECONDS or since > COMMIT_BYTES:
                    self._commit(batch, seen, self.seconds + time.monotonic() - started)
                    committed, since = time.monotonic(), 0
        self.seconds += time.monotonic() - started
        self._finish(ReadReport(**final["report"]))

    def _commit(self, batch: Batch, seen: SeenDocuments | None, seconds: float) -> None:
        """Make sure that what is written so far is there after a kill: the files first, then what says so."""
        for writer in self.writers.values():
            writer.sync()
        if seen is not None:
            seen.commit()
        progress = {
            "batch": batch.number, "characters": self.characters, "counts": self.counts, "seconds": seconds,
            "splits": {split: writer.state_dict() for split, writer in self.writers.items()},
        }  # fmt: skip
        write_json(self.directory / "progress.json", progress | batch.state)

    def _finish(self, report: ReadReport) -> None:
        report.split_within_files = self.part.hold_out.within
        if refused := self.counts.pop("skipped_rows", 0):
            report.skipped_rows += refused
            report.first_skipped = report.first_skipped or f"those that are not of {self.part.format} (data.on_error=raise names the first)"
        self.index.notes = report.warnings()
        for split, writer in self.writers.items():
            writer.finish()
            self.index.tokens[split], self.index.bytes[split] = writer.sizes, writer.bytes
            self.index.documents[split] = writer.documents
            self.index.files |= writer.files
        for name in _TOKENIZER_FILES:
            if (self.plan.directory / name).is_file():
                shutil.copyfile(self.plan.directory / name, self.directory / name)
                self.index.files[name] = checksum(self.directory / name)
        cut = [f"{n:,} {_CUT[name]}" for name in _CUT if (n := self.counts.get(name, 0))]
        self.index.notes += [f"of the examples {', '.join(cut)}"] if cut else []
        description = describe_part(self.part.source.describe(), self.data, self.part.config.holdout_by, self.index, self.counts, report)
        write_json(self.directory / "manifest.json", description)
        self.index.files["manifest.json"] = checksum(self.directory / "manifest.json")
        mark_verified(self.directory, self.index)
        write_index(self.directory, self.index)
        self.say(summary(self.index, self.counts, self.seconds, self.part.hold_out.within))
