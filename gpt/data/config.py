"""The schema of what is read and how it becomes ids: the sections `data` and `tokenizer` of a config. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gpt.errors import UserError
from gpt.typed import nearest_and_all, shown

FILE_SOURCES = ("text", "jsonl", "parquet")
"""Sources that read `data.paths`."""
TEXT_SOURCES = ("stdlib", "text", "stdlib_topics")
"""Sources of plain text, whatever the command."""
EXAMPLE_SOURCES = {
    "stdlib_docstrings": "prompt_completion", "stdlib_chats": "messages", "stdlib_packages": "text_label",
    "stdlib_exceptions": "text_label", "stdlib_tokens": "tokens_tags",
}  # fmt: skip
"""Sources of examples to fine-tune on, which have no plain text, with their format. The others hold rows, which may be either."""
EXAMPLE_GROUPS = ("package", "file", "class")
"""What `data.holdout_by` can be of these."""
BESIDE_FIELDS = ("answers", "test")
"""Fields of a row that say how an answer is checked: nothing of them is learned, and no row is made of them alone."""
LossOn = Literal["auto", "completion", "assistant", "all"]
Metric = Literal["exact_match", "token_f1", "rouge", "chrf", "bleu", "pass"]
"""Of what a model answers to the prompts of examples."""
REDACTIONS = ("email", "ip", "phone", "credit_card", "iban", "aws_key", "github_token", "api_key", "private_key", "jwt", "password")
"""What `data.redact` can replace."""


@dataclass
class TokenizerConfig:
    """How text becomes ids."""

    name: Literal["bpe", "char", "byte", "pretrained"] = "bpe"
    """Byte-level BPE trained on the corpus, one id a character of the corpus (bytes for others), one id a byte, or one that exists."""
    vocab_size: int = 2048
    """Ids to train (bpe)."""
    path: str | None = None
    """Folder, run, tokenizer.json or hub id of a pretrained tokenizer."""
    split: Literal["gpt4", "gpt2", "digits"] = "gpt4"
    """bpe: where a text is cut before merges are made, as GPT-4 does it, as GPT-2 does it, or as GPT-4 with every digit by itself."""
    special_tokens: list[str] = field(default_factory=list)
    """bpe, char, byte: control tokens of your own, besides the end-of-text token."""


@dataclass
class FieldNames:
    """What the fields of your rows are called."""

    text: str = "text"
    """The text of a document."""
    prompt: str = "prompt"
    """What is given."""
    completion: str = "completion"
    """What is to be learned after the prompt."""
    chosen: str = "chosen"
    """The better of two completions."""
    rejected: str = "rejected"
    """The worse one."""
    messages: str = "messages"
    """A conversation: a list of {role, content}."""
    label: str = "label"
    """The class of a text: a name or a number."""
    tokens: str = "tokens"
    """The words of a text, a list."""
    tags: str = "tags"
    """The class of each word, a list as long."""
    answers: str = "answers"
    """Other right completions, a list of texts, or as SQuAD has them, {text: [...]}: for metrics, not learned."""
    test: str = "test"
    """Python code, or a list of its lines, that raises where prompt and completion in front of it are wrong: for metrics, not learned."""


@dataclass
class SourceConfig:
    """Where text or examples come from."""

    source: Literal[
        "stdlib", "text", "jsonl", "parquet", "hf", "mixture",
        "stdlib_docstrings", "stdlib_chats", "stdlib_packages", "stdlib_exceptions", "stdlib_tokens", "stdlib_topics",
    ] = "stdlib"  # fmt: skip
    """The running Python's own standard library, files of text or rows, a dataset of the Hugging Face hub, or several of these."""
    paths: list[str] = field(default_factory=list)
    """text, jsonl, parquet: files, folders (every file below), globs, URLs that fsspec reads (s3://bucket/folder), or channel://<name>,
    an input channel of a SageMaker job. .gz, .bz2, .xz and .zst are read as they are."""
    name: str = ""
    """hf: id of the dataset."""
    config: str | None = None
    """hf: which configuration of the dataset."""
    split: str = "train"
    """hf: which split of the dataset."""
    fields: FieldNames = field(default_factory=FieldNames)
    holdout_by: str = ""
    """A field of the rows: those with one value of it are all held out or none, so that what belongs together is never on both sides.
    Empty: each row for itself. Examples out of the standard library have package (the top-level one, or the module), file, and
    class (or, outside of classes, the file)."""
    licence: str = ""
    """Of the data, as you know it; kept in the manifest beside every checkpoint."""


@dataclass
class PartConfig(SourceConfig):
    """One part of a mixture."""

    weight: float = 1.0
    """How often windows come from this part, in proportion to the other parts."""


@dataclass
class DataConfig(SourceConfig):
    """What to train on."""

    parts: list[PartConfig] = field(default_factory=list)
    """mixture: its sources, [{source: text, paths: [a.txt], weight: 2}, {source: stdlib}]."""
    streaming: bool = False
    """Cut the text into ids while training instead of beforehand: nothing is kept on disk, and a dataset of the hub is not downloaded."""
    holdout: float = 0.05
    """Share of the documents that is held out for validation."""
    on_error: Literal["auto", "raise", "skip"] = "auto"
    """What cannot be read: stop; or leave a row or binary file out and replace invalid UTF-8, counted. auto: stop for rows, else skip."""
    deduplicate: Literal["none", "exact"] = "none"
    """exact: of documents with the same text only the first is kept; counted."""
    min_characters: int = 1
    """Documents with fewer characters, blanks at both ends apart, are left out; counted."""
    redact: list[str] = field(default_factory=list)
    """Secrets and personal data to replace by their names, counted: [email, ip, phone, credit_card, iban, aws_key, github_token,
    api_key, private_key, jwt, password]."""
    format: Literal["auto", "text", "prompt_completion", "messages", "text_label", "tokens_tags", "preference"] = "auto"
    """Of fine-tuning rows; auto recognises it by their fields."""
    labels: list[str] = field(default_factory=list)
    """text_label, tokens_tags: the classes in order; empty: all that occur, sorted."""
    too_long: Literal["truncate", "drop", "split"] = "truncate"
    """Examples longer than the context: cut at the end, left out, or cut into several; counted."""
    packing: Literal["best_fit", "none"] = "best_fit"
    """Examples: several in a row of the batch, none seeing another; or one a row."""
    document_mask: bool = False
    """Pretraining: a token sees only its own document, and positions restart with each."""
    workers: int = 0
    """Processes that cut text into ids; 0: one a core, and none for a small corpus."""
    memory_mb: int = 1024
    """About how much memory preparing may take, over all its processes."""
    cache_dir: str = "~/.cache/gpt"
    """Where tokenised text is kept between runs."""


def validate_tokenizer(tokenizer: TokenizerConfig) -> None:
    """Raises UserError for settings of a tokenizer that cannot be."""
    name = tokenizer.name
    if name == "pretrained" and not tokenizer.path:
        raise UserError("tokenizer.path=null: tokenizer=pretrained needs a folder, a tokenizer.json or a hub id")
    if name != "pretrained" and tokenizer.path:
        raise UserError(
            f"tokenizer.path={shown(tokenizer.path)} is not read by tokenizer={name}; add tokenizer=pretrained, or tokenizer.path=null"
        )
    special = tokenizer.special_tokens
    if name == "pretrained" and special:
        raise UserError(f"tokenizer.special_tokens={shown(special)}: tokenizer=pretrained has its own; take them out")
    if not all(special) or len(set(special)) < len(special):
        raise UserError(f"tokenizer.special_tokens={shown(special)}: each must be there once and not be empty")
    if name == "bpe" and tokenizer.vocab_size < (low := 257 + len(special)):
        tokens = f", the end-of-text token and {len(special)} of your own" if special else " and the end-of-text token"
        raise UserError(f"tokenizer.vocab_size={tokenizer.vocab_size} must be at least {low}: 256 bytes{tokens}")


def holds_examples(data: DataConfig, finetuning: bool) -> bool:
    """Whether rows are examples to fine-tune on, packed and masked, rather than text to cut into windows.

    Raises:
        UserError: a mixture of both.
    """
    kinds = {part.source for part in data.parts or [data]}
    examples = {kind for kind in kinds if kind in EXAMPLE_SOURCES or (finetuning and kind not in TEXT_SOURCES)}
    if examples and examples < kinds:
        raise UserError(f"data.parts: {min(examples)} holds examples and {min(kinds - examples)} text; mix only one kind")
    return bool(examples)


def validate_text(data: DataConfig) -> None:
    """Raises UserError for examples where text is wanted, or settings that only examples have."""
    for part in data.parts or [data]:
        if part.source in EXAMPLE_SOURCES:
            raise UserError(
                f"data={part.source}: holds examples for fine-tuning, no text; use it with gpt finetune or gpt prepare finetune=true, "
                "or look at it with gpt inspect"
            )
    usual = DataConfig()
    for name in ("format", "labels", "too_long", "packing"):
        if (value := getattr(data, name)) != getattr(usual, name):
            raise UserError(f"data.{name}={shown(value)} is of examples to fine-tune on, and this is text; leave it out")


def validate_examples(data: DataConfig) -> None:
    """Raises UserError for settings that examples do not have."""
    for name, why in (("document_mask", "examples never see each other"), ("streaming", "examples are packed, which needs all of them")):
        if getattr(data, name):
            raise UserError(f"data.{name}=true is of text: {why}; leave it out")


def validate_data(data: DataConfig) -> None:
    """Raises UserError for settings of a source that cannot be."""
    if not 0 < data.holdout < 1:
        raise UserError(f"data.holdout={shown(data.holdout)} must be greater than 0 and less than 1")
    for key, value, low in (
        ("min_characters", data.min_characters, 0), ("workers", data.workers, 0), ("memory_mb", data.memory_mb, 64),
    ):  # fmt: skip
        if value < low:
            raise UserError(f"data.{key}={value} must be at least {low}")
    for kind in data.redact:
        if kind not in REDACTIONS:
            raise UserError(f"data.redact={kind}: no such kind{nearest_and_all(kind, REDACTIONS)}")
    if data.streaming and data.deduplicate != "none":
        raise UserError(f"data.deduplicate={data.deduplicate}: a stream is read once and forgotten; leave out data.streaming, or this")
    if len(set(data.labels)) < len(data.labels):
        raise UserError(f"data.labels={shown(data.labels)}: each class must be there once")
    if data.source == "mixture":
        if len(data.parts) < 2:
            raise UserError(
                "data.parts: data=mixture needs two sources or more, e.g. data.parts=[{source: text, paths: [a.txt]}, {source: stdlib}]"
            )
        for number, part in enumerate(data.parts):
            _validate_source(part, f"data.parts[{number}]")
            if part.source == "mixture":
                raise UserError(f"data.parts[{number}].source=mixture: a mixture holds sources, not mixtures; list their parts")
            if not 0 < part.weight < float("inf"):
                raise UserError(f"data.parts[{number}].weight={shown(part.weight)} must be greater than 0")
    elif data.parts:
        raise UserError(f"data.parts is not read by data={data.source}; add data=mixture, or take the parts out")
    _validate_source(data, "data")


def _validate_source(source: SourceConfig, key: str) -> None:
    """What a source reads must be there, what it does not read must not."""
    kind, name = source.source, f"data={source.source}" if key == "data" else f"{key}.source={source.source}"
    if kind in FILE_SOURCES and not all(source.paths or [""]):
        suffix = {"text": "txt"}.get(kind, kind)
        raise UserError(f"{key}.paths={shown(source.paths)}: {name} needs files, folders or globs, e.g. {key}.paths=[book.{suffix}]")
    if kind not in FILE_SOURCES and source.paths:
        what = "data=text" if key == "data" else f"{key}.source=text"
        raise UserError(f"{key}.paths={shown(source.paths)} is not read by {name}; add {what}, or take the paths out")
    if kind == "hf" and not source.name:
        raise UserError(f"{key}.name: {name} needs the id of a dataset, e.g. {key}.name=roneneldan/TinyStories")
    if kind != "hf" and (source.name or source.config):
        given = "name" if source.name else "config"
        raise UserError(f"{key}.{given}={getattr(source, given)} is not read by {name}; add data=hf, or take it out")
    if by := source.holdout_by:
        what = f"{key}.holdout_by={shown(by)}"
        if kind == "mixture":
            raise UserError(f"{what}: it is of each part; set it there, e.g. data.parts=[{{source: jsonl, holdout_by: {by}, ...}}, ...]")
        if kind in TEXT_SOURCES:
            raise UserError(f"{what}: {name} has whole texts, which have no fields; take it out")
        if kind in EXAMPLE_SOURCES and by not in EXAMPLE_GROUPS:
            raise UserError(f"{what}: {name} has no such field{nearest_and_all(by, EXAMPLE_GROUPS)}")
