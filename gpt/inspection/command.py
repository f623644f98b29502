"""`gpt inspect` and `gpt inspect tokens`: print what there is to see, and write the page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.commands import InspectConfig, InspectTokensConfig
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.examples import ExampleSettings
from gpt.data.loader import build_batches
from gpt.data.prepare import Corpus, prepare_corpus
from gpt.data.tokenizer import Tokenizer, load_tokenizer
from gpt.errors import UserError
from gpt.inference.loading import load_model, read_shape
from gpt.inspection.batches import Row, figures_of_row, print_rows, read_rows
from gpt.inspection.figures import Figures, corpus_figures
from gpt.inspection.page import check_output, flat_rows, length_histogram, positions_chart, write_page
from gpt.inspection.positions import MOST_POSITIONS, PositionMap, check_size, in_terminal, learned_map, rotary_map, sinusoidal_map
from gpt.inspection.tokens import CutText, cut, print_tokens
from gpt.inspection.visible import segments
from gpt.model.config import GPTConfig

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_TEXT = {"text", "stdlib", "stdlib_topics"}
_MANIFEST_ROWS = 200  # a source of many files names them all


def inspect(config: InspectConfig) -> int:
    """Run `gpt inspect`: rows of a batch on stdout, all else on stderr and on the page. Returns the exit code.

    Raises:
        UserError: no data, no such model, or a page that cannot be written.
    """
    output = check_output(config.output)
    if config.data.streaming:
        raise UserError("data.streaming=true: gpt inspect shows tokens that are prepared; leave it out")
    tokenizer = config.tokenizer
    if config.model:
        tokenizer = TokenizerConfig(name="pretrained", path=read_shape(config.model, key="model")[1])
    settings = None
    if config.examples is True or (config.examples == "auto" and _has_examples(config.data)):
        data = config.data
        settings = ExampleSettings(data.format, config.loss_on, data.too_long, config.context_length, data.labels)
    corpus = prepare_corpus(config.data, tokenizer, config.context_length, _say, settings)
    n = config.n + config.n % 2 if corpus.kind == "preference" else config.n  # a pair is two rows
    batches = build_batches(corpus, config.data, config.context_length, n, config.seed, config.loss_on == "all")
    names_classes = bool(corpus.classes)
    rows = read_rows(batches.batch(config.step), corpus.tokenizer, corpus.classes if names_classes else None, n)
    print_rows(rows, _console(), _noun(corpus), names_classes)
    if output is not None:
        found = corpus_figures(corpus, config.context_length, config.data.packing == "best_fit")
        _write_data_page(output, config, corpus, found, rows)
        _say(f"page: {output}")
    return 0


def _has_examples(data: DataConfig) -> bool:
    return any(source.source not in _PLAIN_TEXT for source in (data.parts if data.source == "mixture" else [data]))


def _noun(corpus: Corpus) -> str:
    return "document" if corpus.kind == "text" else "example"


def _write_data_page(output: Path, config: InspectConfig, corpus: Corpus, found: Figures, rows: list[Row]) -> None:
    noun = _noun(corpus)
    held_out = sum(part.held_out_documents for part in found.parts)
    cards = [
        (f"{noun.capitalize()}s", f"{len(found.lengths):,}", f"and {held_out:,} held out"),
        ("Tokens", f"{found.tokens:,}", "to train on and to read"),
        ("Bytes per token", f"{found.bytes_per_token:.2f}", f"{_size(found.bytes_per_token * found.tokens)} of text"),
        ("Trained on", f"{found.learned:.1%}", "of the tokens"),
    ]
    if found.packing:
        each = f"{found.packing.rows:,} rows of {found.packing.examples_per_row:,.1f} examples"
        cards += [("Packing efficiency", f"{found.packing.efficiency:.1%}", each)]
    else:
        cards += [("Rows of an epoch", f"{found.tokens // config.context_length:,}", "text is cut without gaps")]
    longer = float(np.mean(found.lengths > config.context_length))
    evenly = f"Counted on {found.counted:,} tokens, evenly spread." if found.counted < found.tokens else ""
    most, most_frequent = max((n for _, n in found.classes), default=0), max((t.count for t in found.frequent), default=0)
    total = sum(n for _, n in found.classes)
    sources = corpus.manifest["sources"]
    licences = [source.get("licence") or "not given" for source in sources]
    counts = [
        (source["name"], name.replace("_", " "), f"{n:,}")
        for source in sources
        for name, n in source["counts"].items()
        if n and name != "files"
    ]
    write_page(
        output, "page.html.jinja",
        title=f"Data: {', '.join(part.name for part in found.parts)}",
        subtitle=f"{_KINDS[corpus.kind]} · tokenizer of {corpus.tokenizer.vocab_size:,} ids · rows of {config.context_length:,} tokens",
        cards=cards, noun=noun, context_length=f"{config.context_length:,}",
        histogram=length_histogram(found.lengths, config.context_length),
        lengths_note=(
            f"Median {np.median(found.lengths):,.0f}, mean {found.lengths.mean():,.0f}, longest {found.lengths.max():,} tokens. "
            f"{longer:.1%} are longer than the context of {config.context_length:,}."
        ),
        names_classes=bool(corpus.classes), rows=[_row_for_page(row, noun) for row in rows],
        classes=[(name, f"{n:,}", f"{n / max(1, total):.1%}", round(100 * n / max(1, most), 2)) for name, n in found.classes],
        frequent=[(token, f"{token.share:.2%}", round(100 * token.count / most_frequent, 2)) for token in found.frequent],
        counted_note=evenly, parts=list(zip(found.parts, licences, strict=True)), counts=counts,
        manifest=flat_rows(corpus.manifest)[:_MANIFEST_ROWS],
    )  # fmt: skip


_KINDS = {
    "text": "text for pretraining",
    "language_model": "examples to continue",
    "text_label": "texts with a class each",
    "tokens_tags": "words with a class each",
    "preference": "pairs of completions, the better first",
}


def _size(n_bytes: float) -> str:
    return next(f"{n_bytes / unit:,.1f} {name}" for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if n_bytes >= unit)


def _row_for_page(row: Row, noun: str) -> dict[str, Any]:
    def title(ids: tuple[int, ...], raw: bytes, position: int) -> str:
        more = f" to {position + len(ids) - 1}" if len(ids) > 1 else ""
        return f"position {position}{more}, id {', '.join(map(str, ids))}, bytes {raw.hex(' ')}"

    return {
        "documents": [
            [
                {
                    "segments": segments(piece.raw), "learned": piece.learned, "special": piece.special, "label": piece.label,
                    "title": title(piece.ids, piece.raw, piece.position),
                }
                for piece in pieces
            ]
            for pieces in row.documents
        ],
        "padding": row.padding, "figures": figures_of_row(row, noun),
    }  # fmt: skip


def inspect_tokens(config: InspectTokensConfig) -> int:
    """Run `gpt inspect tokens`: the tokens and the heat map on stdout, and both on the page. Returns the exit code.

    Raises:
        UserError: no text, no such model, positions that there are not, or a page that cannot be written.
    """
    output = check_output(config.output)
    text = config.text or _read_stdin()
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError("text: it is not valid UTF-8")  # so Python holds bytes of the command line that it cannot decode
    shape, tokenizer_path = read_shape(config.model, key="model") if config.model else (None, "")
    kind = _kind(config, shape)
    check_size(config.length, config.d_model, kind)
    found = cut(text, load_tokenizer(tokenizer_path) if tokenizer_path else _own_tokenizer(config.tokenizer))
    positions, note = _positions(config, kind, shape, found.count)
    console = _console()
    print_tokens(found, console)
    _print_positions(positions, console, bool(output))
    console.print(note, markup=False)
    if output is not None:
        _write_tokens_page(output, config, found, positions, note)
        _say(f"page: {output}")
    return 0


def _read_stdin() -> str:
    raw = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
    if not raw:
        raise UserError('text: nothing to cut; give text="..." or pipe a text in')
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"text: stdin is not valid UTF-8: byte {error.start} is 0x{raw[error.start]:02x}; convert it first") from error


def _own_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a run on the standard library has."""
    if config.name == "pretrained":
        return load_tokenizer(config.path or "")
    return prepare_corpus(DataConfig(), config, 1, _say).tokenizer


def _kind(config: InspectTokensConfig, shape: GPTConfig | None) -> str:
    """learned, sinusoidal, rotary or none."""
    if shape is None:
        if config.positions == "learned":
            raise UserError("positions=learned: learned positions exist only in a model; give one, e.g. model=runs/<id>")
        return "sinusoidal" if config.positions == "auto" else config.positions
    if config.positions not in ("auto", shape.positions):
        raise UserError(f"positions={config.positions}: the model {config.model} has positions={shape.positions}; leave positions out")
    return shape.positions


def _positions(config: InspectTokensConfig, kind: str, shape: GPTConfig | None, count: int) -> tuple[PositionMap | None, str]:
    """The map to draw, and what to say of its length."""
    limit = shape.context_length if shape else MOST_POSITIONS
    length = min(max(config.length, count), limit, MOST_POSITIONS)
    note = f"{length:,} positions are drawn; the text takes {count:,}."
    if shape:
        note += f" The model reads at most {limit:,} tokens" + (
            ", fewer than the text has: the rest has no position." if count > limit else "."
        )
    elif kind != "learned":
        note += " This encoding has no last position: only a model's context length bounds it."
    if kind == "none":
        return None, f"This model has no positional encoding. It reads at most {limit:,} tokens."
    if kind == "learned":
        assert shape is not None
        table = load_model(config.model or "", key="model").model.embeddings.positions
        assert table is not None
        return learned_map(table.weight[:length], shape.context_length), note
    if kind == "rotary":
        return rotary_map(length, shape.rotary_dim if shape else config.d_model, shape), note
    return sinusoidal_map(length, shape.d_model if shape else config.d_model), note


def _print_positions(positions: PositionMap | None, console: Console, on_page: bool) -> None:
    if positions is None:
        return
    console.print()
    console.print(f"{positions.kind} positions, {positions.quantity}", style="bold", markup=False)
    if console.no_color or console.color_system not in ("256", "truecolor"):
        console.print(f"(the heat map needs a terminal with colours{'; it is on the page' if on_page else ''})", markup=False)
        return
    text, thinned = in_terminal(positions, console.width)
    console.print(text, soft_wrap=True)
    reach = f"{positions.reach:.2g}"
    console.print(f"blue -{reach}, white 0, red {reach}{'; ' + thinned if thinned else ''}", markup=False)


def _write_tokens_page(output: Path, config: InspectTokensConfig, found: CutText, positions: PositionMap | None, note: str) -> None:
    cards = [
        ("Tokens", f"{found.count:,}", "of the whole text"),
        ("Characters", f"{found.characters:,}", f"{found.characters / found.count:.2f} per token"),
        ("Bytes", f"{found.bytes:,}", "as UTF-8"),
        ("Bytes per token", f"{found.bytes_per_token:.2f}", "the more, the fewer tokens"),
    ]
    write_page(
        output, "tokens.html.jinja",
        title="Tokens", subtitle=f"Cut by the tokenizer of {config.model}" if config.model else f"Cut by tokenizer={config.tokenizer.name}",
        cards=cards, text=found.in_text(), left_out=found.left_out, tokens=found.tokens, positions=positions, length_note=note,
        map=positions_chart(positions, found.count) if positions else None,
    )  # fmt: skip


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, emoji=False)


def _say(text: str) -> None:
    print(f"gpt: {text}", file=sys.stderr)
