"""Rows in the terminal: exactly the tokens that are learned are marked, no text is lost, and nothing in it can move the cursor."""

from __future__ import annotations

import io
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from inspection_pages import Page
from rich.ansi import AnsiDecoder
from rich.cells import cell_len
from rich.console import Console

from gpt.commands import InspectConfig
from gpt.data.batches import Batch
from gpt.data.config import DataConfig, FieldNames, PartConfig, TokenizerConfig
from gpt.data.encoded import IGNORE_LABEL
from gpt.data.examples import ExampleSettings
from gpt.data.loader import build_batches
from gpt.data.prepare import prepare_corpus
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.inspection.batches import Row, print_rows, read_rows
from gpt.inspection.command import inspect
from gpt.inspection.visible import segments

BYTES = byte_tokenizer()
END = BYTES.end_of_text or 0
LEARNED = {"#22913f", "#5a9a20"}


def visible(raw: bytes) -> str:
    return "".join(text for text, _ in segments(raw))


def encode(text: str) -> list[int]:
    return BYTES.encode(text)


def row_of(tokens: list[int], targets: list[int], documents: list[int] | None = None, classes: list[str] | None = None) -> Row:
    batch = Batch(torch.tensor([tokens]), torch.tensor([targets]), None if documents is None else torch.tensor([documents]))
    return read_rows(batch, BYTES, classes, 1)[0]


def example_row(*examples: tuple[str, str], places: int) -> Row:
    """Prompts and completions as the loader packs them: target i is what token i + 1 is learned as."""
    tokens: list[int] = []
    targets: list[int] = []
    documents: list[int] = []
    for number, (prompt, completion) in enumerate(examples):
        learned = [*encode(completion), END]
        tokens += encode(prompt) + learned
        targets += [IGNORE_LABEL] * (len(encode(prompt)) - 1) + learned + [IGNORE_LABEL]
        documents += [number] * (len(encode(prompt)) + len(learned))
    padding = places - len(tokens)
    return row_of(tokens + [END] * padding, targets + [IGNORE_LABEL] * padding, documents + [len(examples)] * padding)


def printed(row: Row, width: int = 100, names_classes: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True, highlight=False, emoji=False)
    print_rows([row], console, "example", names_classes)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def coloured(row: Row) -> list[tuple[str, str]]:
    """(character, colour) of what a terminal with all colours shows."""
    console = Console(file=io.StringIO(), width=1000, force_terminal=True, color_system="truecolor", highlight=False, emoji=False)
    print_rows([row], console, "example", False)
    assert isinstance(console.file, io.StringIO)
    found = []
    for line in AnsiDecoder().decode(console.file.getvalue()):
        for place, character in enumerate(line.plain):
            styles = [span.style for span in line.spans if span.start <= place < span.end]
            colours = [style.color.name for style in styles if not isinstance(style, str) and style.color]
            found.append((character, colours[-1] if colours else ""))
    return found


def test_the_completion_is_marked_and_the_prompt_is_not():
    row = example_row(("Q: 2+2?", " 4"), ("Q: wer?", " ich, Bär"), places=60)
    text = printed(row)
    assert "Q: 2+2?« 4⟦<|endoftext|>⟧»" in text
    assert "Q: wer?« ich, Bär⟦<|endoftext|>⟧»" in text
    assert re.search(r"example 1 ┄+\n.*\nexample 2 ┄", text)
    padding = 60 - 10 - 18
    assert f"… {padding} padding" in text
    assert f"{60 - padding} tokens in 60 places, 14 trained on (23.3% of the places), 2 examples" in text


def test_what_is_learned_has_the_colour():
    letters = coloured(example_row(("ask", "answer"), places=12))
    learned = "".join(c for c, colour in letters if colour in LEARNED)
    assert learned == "answertrained on"  # the last two words are the legend's
    assert {colour for c, colour in letters if colour in LEARNED} == LEARNED, "neighbouring tokens have two shades"
    assert {colour for c, colour in letters if c in "ask" and colour} & {"#757575", "#929292"}


@given(st.data())
def test_the_marks_are_those_of_the_targets(data: st.DataObject):
    tokens = data.draw(st.lists(st.integers(0, 256), min_size=1, max_size=40))
    learned = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    borders = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    documents = [sum(borders[1 : i + 1]) for i in range(len(tokens))]
    following = [*tokens[1:], 65]
    row = row_of(tokens, [f if is_learned else IGNORE_LABEL for f, is_learned in zip(following, learned, strict=True)], documents)
    starts = [i for i in range(len(tokens)) if i == 0 or documents[i] != documents[i - 1]]
    shown = [(p.position + i, token, p.learned) for pieces in row.documents for p in pieces for i, token in enumerate(p.ids)]
    read = len(tokens) - row.padding
    expected = []
    for place in range(read):
        if place in starts and place and learned[place - 1]:
            expected.append((place, tokens[place], True))  # predicted by the document before, and read by this one
        expected.append((place, tokens[place], place not in starts and learned[place - 1]))
    if read and learned[read - 1]:
        expected.append((read, following[read - 1], True))
    assert shown == expected
    assert row.learned == sum(learned)
    if row.padding:
        assert not any(learned[read:])
        assert len(set(tokens[read:])) == 1


@given(st.text(max_size=30))
@example("中😀é👩‍👩‍👧")
def test_every_character_is_whole_though_each_byte_is_a_token(text: str):
    pieces = row_of([65, *encode(text)], [*encode(text), END]).documents[0]
    assert [p.raw.decode() for p in pieces if not p.special] == [pieces[0].raw.decode(), *text]


def test_a_character_that_is_half_learned_or_cut_off_is_shown_in_bytes():
    letter, first, second = encode("aé")
    assert "a\\xC3«\\xA9»" in printed(row_of([letter, first, second], [IGNORE_LABEL, second, IGNORE_LABEL]))
    assert "\\xC3\n" in printed(row_of([first], [IGNORE_LABEL]))


@given(st.binary(max_size=40))
def test_nothing_invisible_is_left(raw: bytes):
    text = visible(raw)
    assert all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in text)
    assert not set(text) & set("\u202e\u2066\u200f\ufeff\u200b")
    assert text.count("\n") == raw.count(b"\n") == text.count("↵\n") or "↵".encode() in raw


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\tb", "a→   b"), ("a\r\n", "a␍↵\n"), ("\x1b[31m", "\\x1B[31m"), ("\u202eabc", "\\u202Eabc"), ("\x85", "\\u0085"), ("👩‍👧", "👩‍👧")],
)
def test_control_characters_have_a_mark(text: str, shown: str):
    assert visible(text.encode()) == shown
    assert segments(b"plain") == [("plain", False)]


@pytest.mark.parametrize("width", [24, 40, 100])
def test_lines_keep_to_the_width(width: int):
    text = "word " * 30 + "x" * 300 + "中文字符" * 40 + "😀" * 50 + "\tשלום\n"
    row = row_of([END, *encode(text)], [*encode(text), END])
    lines = printed(row, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    letters = re.sub(r"\s", "", "".join(lines))
    assert re.sub(r"\s", "", text.replace("\t", "→").replace("\n", "↵")) in letters


def test_a_row_of_text_is_cut_where_documents_begin():
    tokens = [END, *encode("one\n"), END, *encode("two")]
    text = printed(row_of(tokens, [*tokens[1:], *encode("!")]))
    assert re.search(r"example 1 ┄+\n⟦<\|endoftext\|>⟧«one↵»\nexample 2 ┄+\n«⟦<\|endoftext\|>⟧two!»", text)


def test_a_class_stands_behind_its_token():
    tokens = encode("def f")
    text = printed(row_of(tokens, [1, IGNORE_LABEL, IGNORE_LABEL, IGNORE_LABEL, 0], [0] * 5, ["name", "<kw>"]), names_classes=True)
    assert "«d»‹<kw>›ef «f»‹name›" in text
    assert "class of the token before" in text


def test_a_row_of_padding_alone_can_be_shown():
    row = row_of([END] * 8, [IGNORE_LABEL] * 8, [0] * 8)
    assert (row.documents, row.padding) == ([], 8)
    assert "… 8 padding" in printed(row)


def data_config(path: Path, cache_dir: Path, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"source": "jsonl", "paths": [str(path)], "on_error": "skip", "cache_dir": str(cache_dir)}
    return DataConfig(**values | changes)


def test_of_a_real_batch_the_completions_are_marked(examples_file: Path, cache_dir: Path):
    data = data_config(examples_file, cache_dir)
    corpus = prepare_corpus(data, TokenizerConfig("byte"), 192, lambda _: None, ExampleSettings(context_length=192))
    rows = read_rows(build_batches(corpus, data, 192, 6, 1).batch(2), corpus.tokenizer, None, 6)
    assert len(rows) == 6
    documents = [pieces for row in rows for pieces in row.documents]
    assert len(documents) > 6
    for pieces in documents:
        prompt = b"".join(p.raw for p in pieces if not p.learned).decode()
        completion = b"".join(p.raw for p in pieces if p.learned).decode()
        assert prompt.startswith(("What is ", "Mail to "))
        assert prompt.endswith("?") or prompt.endswith("}}")
        assert re.fullmatch(r" (It is \d+\.( Indeed\.)*|</pre>.*中文)<\|endoftext\|>", completion)


def test_the_command_prints_the_rows_of_the_step(examples_file: Path, cache_dir: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    config = InspectConfig(
        data=data_config(examples_file, cache_dir), tokenizer=TokenizerConfig("byte"), context_length=192, n=2, output=""
    )  # fmt: skip
    assert inspect(config) == 0
    first = capsys.readouterr().out
    assert "row 2 of 2" in first
    assert "« It is" in first
    assert max(map(cell_len, first.splitlines())) <= 60
    config.step = 1
    inspect(config)
    assert capsys.readouterr().out != first


@pytest.mark.parametrize(("paths", "as_examples"), [("text", False), ("jsonl", True)])
def test_auto_takes_rows_as_examples_but_not_plain_text(
    paths: str, as_examples: bool, corpus: Path, examples_file: Path, cache_dir: Path, capsys: pytest.CaptureFixture
):
    path = examples_file if paths == "jsonl" else corpus
    config = InspectConfig(
        data=data_config(path, cache_dir, source=paths), tokenizer=TokenizerConfig("byte"), context_length=192, n=1, output=""
    )
    inspect(config)
    assert (" example" in capsys.readouterr().out) == as_examples


def test_a_model_lends_its_tokenizer(examples_file: Path, learned_model: Path, cache_dir: Path, capsys: pytest.CaptureFixture):
    config = InspectConfig(data=data_config(examples_file, cache_dir), model=str(learned_model), context_length=192, n=1, output="")
    inspect(config)
    by_model = capsys.readouterr().out
    config.model, config.tokenizer = None, TokenizerConfig("byte")
    inspect(config)
    assert capsys.readouterr().out == by_model


def test_a_mixture_with_masked_documents_shows_its_parts(corpus: Path, examples_file: Path, cache_dir: Path, tmp_path: Path, capsys):
    parts = [
        PartConfig("text", paths=[str(corpus)], weight=3),
        PartConfig("jsonl", paths=[str(examples_file)], fields=FieldNames(text="prompt")),
    ]
    data = DataConfig("mixture", parts=parts, cache_dir=str(cache_dir), document_mask=True)
    config = InspectConfig(
        data=data, tokenizer=TokenizerConfig("byte"), examples=False, context_length=64, n=8, output=str(tmp_path / "mixture.html")
    )
    inspect(config)
    assert "document 2" in capsys.readouterr().out
    cells = Page(tmp_path / "mixture.html").texts["td"]
    assert [cells[cells.index(name) + 2] for name in ("text: 40 files", "jsonl: 1 file")] == ["3", "1"]


def test_a_stream_is_refused(examples_file: Path, cache_dir: Path):
    config = InspectConfig(data=data_config(examples_file, cache_dir, streaming=True), output="")
    with pytest.raises(UserError, match=r"data\.streaming=true: .*leave it out"):
        inspect(config)
