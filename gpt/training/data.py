"""What a run trains on and is measured on: a prepared corpus, or a source that is read as it comes, behind one face."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np
from torch import Tensor

from gpt.config import RunConfig
from gpt.data.batches import Batch, Batches
from gpt.data.config import DataConfig
from gpt.data.conversations import chat_template_for
from gpt.data.examples import ExampleSettings, recognise_format
from gpt.data.loader import build_batches, count_held_out, examples_in_a_row, held_out_batches
from gpt.data.plan import hash_of
from gpt.data.prepare import Corpus, prepare_corpus
from gpt.data.sources import ReadReport, open_source
from gpt.data.streamed import prepare_streams
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.inference.loading import read_shape
from gpt.model.config import GPTConfig
from gpt.model.heads import describe
from gpt.model.loss import IGNORE
from gpt.typed import nearest, shown

_FORMAT_ROWS = 100  # that show whether examples are conversations
_PROMPT_TOKENS, _SHOWN_TOKENS = 32, 160  # of a held-out text: given, and with what follows
_HEADS: dict[str, Literal["sequence", "tokens"]] = {"text_label": "sequence", "tokens_tags": "tokens"}


@dataclass(frozen=True)
class Prompt:
    """The beginning of a held-out text, and how it goes on there."""

    ids: list[int]
    expected: str


@dataclass(frozen=True)
class Labelled:
    """A held-out example of a classifier: its ids, and the number of the class at each of some places."""

    ids: list[int]
    classes: dict[int, int]


@dataclass
class TrainingData:
    """Data of a run.

    Attributes:
        tokenizer: that made its ids.
        batches: to train on.
        fingerprint: changes with the data, the tokenizer or the split.
        manifest: what the data is, for people and for the record.
        on_examples: whether rows are packed examples, rather than windows of text.
        held_out: (sequences of a batch, most tokens) -> batches to measure on.
        rows: how many rows there are to train on ("train") and held out ("held_out"); 0 where they are cut anew in each epoch.
        prompts: (how many) -> beginnings of held-out texts.
        head: what its targets are: the tokens that follow, or classes of texts or of words.
        classes: these, in order.
        labelled: (at most how many) -> held-out examples with classes.
        pairs: of preference: most pairs in two rows that belong together; 0: rows stand for themselves.
    """

    tokenizer: Tokenizer
    batches: Batches
    fingerprint: str
    manifest: dict[str, Any]
    on_examples: bool
    held_out: Callable[[int, int], Iterator[Batch]]
    rows: dict[str, int]
    prompts: Callable[[int], list[Prompt]]
    head: Literal["language_model", "sequence", "tokens"] = "language_model"
    classes: list[str] = field(default_factory=list)
    labelled: Callable[[int], list[Labelled]] = lambda count: []
    pairs: int = 0

    def target_bytes(self) -> np.ndarray:
        """How many bytes of text each target stands for: those of its token; a class is no text."""
        return self.tokenizer.byte_lengths() if self.head == "language_model" else np.zeros(len(self.classes), dtype=np.int64)

    def held_out_text(self, limit: int, most_bytes: int) -> str:
        """The text of the held-out targets, for other compressors to be tried on; at most about so many bytes."""
        lengths, end, parts, size = self.tokenizer.byte_lengths(), self.tokenizer.end_of_text, [], 0
        for batch in self.held_out(1, limit):
            ids = batch.targets[(batch.targets != IGNORE) & (batch.targets != (-1 if end is None else end))]
            parts.append(ids)
            size += int(lengths[ids.numpy()].sum())
            if size >= most_bytes:
                break
        return self.tokenizer.decode(_joined(parts))


class OneBatch:
    """The first of some batches, again and again."""

    def __init__(self, batches: Batches) -> None:
        self.tokens_per_epoch, self.windows = batches.tokens_per_epoch, batches.windows  # the budget counts as without it
        self._batches = batches
        self._first: Batch | None = None  # a stream gives it once

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The first one."""
        if self._first is None:
            self._first = self._batches.batch(0, rank, world)
        return self._first


def _joined(parts: list[Tensor]) -> list[int]:
    return [index for part in parts for index in part.tolist()]


def open_training_data(config: RunConfig, sequences: int, say: Callable[[str], None]) -> TrainingData:
    """The data of a run.

    Args:
        config: the run.
        sequences: of a batch, over all micro-batches and ranks.
        say: takes progress messages.

    Raises:
        UserError: it cannot be read, is too little, or is of a kind that this model does not learn.
    """
    length, data = config.sequence_length, config.data
    if data.streaming:
        most = max(config.train.eval_tokens, config.train.final_eval_tokens)
        corpus, batches = prepare_streams(data, config.tokenizer, length, sequences, config.seed, most, say)
        fingerprint = hash_of([corpus.fingerprint, [part.index.source for part in corpus.parts]])  # there are no shards that would tell
    else:
        examples = None
        if config.on_examples:
            examples = ExampleSettings(data.format, config.loss_on, data.too_long, length, _classes_in_order(config))
        corpus = prepare_corpus(data, config.tokenizer, length, say, examples)
        batches = build_batches(corpus, data, length, sequences, config.seed, config.loss_on == "all")
        fingerprint = corpus.fingerprint
    template, is_ours = chat_template_for(corpus.tokenizer)
    if is_ours and config.on_examples and _holds_conversations(data):
        say("note: the tokenizer has no chat template: a plain one is used, and goes with the exported model")
        corpus.tokenizer.chat_template = template
    return TrainingData(
        corpus.tokenizer,
        batches,
        fingerprint,
        corpus.manifest,
        config.on_examples,
        lambda batch, limit: held_out_batches(corpus, data, length, batch, limit),
        {"train": batches.windows, "held_out": count_held_out(corpus, data, length)} if config.on_examples else {"train": 0, "held_out": 0},
        lambda count: _held_out_prompts(corpus, count),
        _HEADS.get(corpus.kind, "language_model"),
        corpus.classes,
        lambda count: _held_out_labelled(corpus, count),
        pairs=examples_in_a_row(corpus, data, length) if corpus.kind == "preference" else 0,
    )


def _classes_in_order(config: RunConfig) -> list[str]:
    """The classes that rows may name, in order: those that the config lists, or those of the head that `init` has; [] for any.

    Raises:
        UserError: they are not the same.
    """
    given, model = config.data.labels, config.model
    if model.head == "language_model" or given == model.classes:
        return given
    if given:
        other = next((name for name in given if name not in model.classes), None)
        what = "are in another order than the classes" if other is None else f"has {shown(other)}, which is none of the classes"
        raise UserError(
            f"data.labels={shown(given)} {what} of the model's head{nearest(other or '', model.classes) or '.'} There are: "
            f"{shown(model.classes)}. Leave data.labels out, or start from a language model"
        )
    if config.init is None:
        return model.classes
    try:
        # Classes that a run took from its data must be looked for there again, or a run that goes on would have all of it encoded anew.
        own = read_shape(config.init, config.allow_pickle)[0]
    except UserError:  # the weights have gone since the run began
        return model.classes
    return model.classes if own.head != "language_model" else []


def complete_shape(model: GPTConfig, data: TrainingData, say: Callable[[str], None]) -> None:
    """Give a model as many ids as the data's tokenizer has, unless its config says how many, and the head that the data teaches.

    Raises:
        UserError: it says too few, or has a head for something else.
    """
    _complete_vocabulary(model, data.tokenizer, say)
    if data.head == "language_model":
        if model.head == data.head:
            return
        raise UserError(
            f"data: its rows are texts to continue, and the model's head is {describe(model)}; give rows of "
            f"{_format_for(model)}, or start from a language model"
        )
    if model.head == "language_model":
        model.head, model.classes, model.tie_embeddings = data.head, data.classes, False
    elif (model.head, model.classes) != (data.head, data.classes):
        raise UserError(
            f"data: its rows are of the classes {shown(data.classes)}, one for each {_each(data.head)}, and the model's head is "
            f"{describe(model)}; give rows of {_format_for(model)} with these classes, or start from a language model"
        )


def _format_for(model: GPTConfig) -> str:
    return next(kind for kind, head in _HEADS.items() if head == model.head)


def _each(head: str) -> str:
    return "text" if head == "sequence" else "word"


def _complete_vocabulary(model: GPTConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    have = tokenizer.vocab_size
    if not model.vocab_size:
        model.vocab_size = have
    elif model.vocab_size < have:
        raise UserError(f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {have} (0 takes the tokenizer's)")
    elif model.vocab_size > have:
        say(f"note: model.vocab_size={model.vocab_size}, but the tokenizer has {have} ids; the rest is never used")


def _holds_conversations(data: DataConfig) -> bool:
    """Whether examples are written with a chat template: messages, or prompts and completions that are lists of them."""
    for part in data.parts or [data]:
        rows = list(islice(open_source(part, data.on_error).rows(ReadReport()), _FORMAT_ROWS))
        kind = recognise_format(rows, data.format, data.on_error == "skip")
        written = {"prompt_completion": "prompt", "preference": "chosen"}.get(kind, "")
        if kind == "messages" or any(isinstance(row.values.get(written), list) for row in rows):
            return True
    return False


def _held_out_prompts(corpus: Corpus, count: int) -> list[Prompt]:
    """The first held-out examples, cut where their learned part begins, or texts, cut after some words."""
    found = []
    split, step = corpus.parts[0].held_out, 2 if corpus.kind == "preference" else 1  # of a pair, the chosen one
    for start, end in list(pairwise(split.documents[: step * count + 1].tolist()))[::step]:
        if split.labels is None:
            end = min(end, start + _SHOWN_TOKENS)
        ids = split.tokens.windows(np.array([start]), end - start)[0]
        if split.labels is None:
            border, last = min(_PROMPT_TOKENS, len(ids) // 2), len(ids)
        else:
            learned = np.flatnonzero(split.labels.windows(np.array([start]), end - start)[0] != IGNORE)
            border = int(learned[0])
            later = np.flatnonzero(np.diff(learned) > 1)  # of a conversation, the first answer
            last = int(learned[later[0]] if len(later) else learned[-1]) + 1
        if border:
            expected = [index for index in ids[border:last].tolist() if index != corpus.tokenizer.end_of_text]
            found.append(Prompt(ids[:border].tolist(), corpus.tokenizer.decode(expected)))
    return found


def _held_out_labelled(corpus: Corpus, count: int) -> list[Labelled]:
    """Held-out examples with classes, from all over the data: rows of one class often stand together."""
    split = corpus.parts[0].held_out
    assert split.labels is not None
    borders, found = split.documents.astype(np.int64), []
    for number in np.unique(np.linspace(0, len(borders) - 2, count).round().astype(np.int64)):
        start, end = borders[number : number + 2].tolist()
        ids, labels = (array.windows(np.array([start]), end - start)[0].tolist() for array in (split.tokens, split.labels))
        found.append(Labelled(ids, {place: label for place, label in enumerate(labels) if label != IGNORE}))
    return found
