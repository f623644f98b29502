"""`gpt inspect tokens`: the tokens of a text, and the positional encoding as numbers, as a picture and in the terminal."""

from __future__ import annotations

import base64
import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inspection_pages import Page
from rich.console import Console

from gpt.commands import InspectTokensConfig
from gpt.data.config import TokenizerConfig
from gpt.data.tokenizer_training import byte_tokenizer, train_bpe
from gpt.errors import UserError
from gpt.inspection import command
from gpt.inspection import tokens as tokens_module
from gpt.inspection.command import inspect_tokens
from gpt.inspection.positions import colours, in_terminal, learned_map, picture, rotary_map, sinusoidal_map
from gpt.inspection.tokens import cut, print_tokens
from gpt.model.config import GPTConfig
from gpt.model.positions import rotary_tables, sinusoidal_table
from gpt.model.transformer import GPT

BPE = train_bpe(["def add(a, b):\n    return a + b\n" * 20], 270)
TEXT = "def añd(中): <|endoftext|>\t😀\n"


@pytest.fixture
def byte_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A config whose tokenizer has an id a byte, made without reading a corpus."""
    monkeypatch.setattr(command, "_own_tokenizer", lambda config: byte_tokenizer())

    def make(**values: Any) -> InspectTokensConfig:
        return InspectTokensConfig(**{"text": "abc", "tokenizer": TokenizerConfig("byte"), "output": str(tmp_path / "t.html")} | values)

    return make


def read_picture(address: str) -> np.ndarray:
    from matplotlib.image import imread

    head, _, data = address.partition(",")
    assert head == "data:image/png;base64"
    return (imread(io.BytesIO(base64.b64decode(data)), format="png")[..., :3] * 255).round().astype(int)


@given(st.text(min_size=1, max_size=40))
def test_the_tokens_hold_every_byte_of_the_text(text: str):
    found = cut(text, BPE)
    assert b"".join(token.raw for token in found.tokens) == text.encode()
    assert [token.id for token in found.tokens] == BPE.encode(text)
    assert (found.characters, found.bytes, found.count) == (len(text), len(text.encode()), len(found.tokens))
    parts = found.in_text()
    assert parts[0][1].startswith("position 0")
    assert not any("\n" in token.text or " " in token.text for token in found.tokens)
    if text.isprintable():
        assert "".join(part for segments, _ in parts for part, _ in segments) == text


def test_a_special_token_in_the_text_is_text():
    found = cut(TEXT, BPE)
    assert not any(token.special for token in found.tokens)
    assert "".join(token.text for token in found.tokens).count("<|endoftext|>") == 1


def test_the_table_has_position_id_text_and_bytes():
    console = Console(file=io.StringIO(), width=100, no_color=True)
    print_tokens(cut("def x\t中", BPE), console)
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    ids = BPE.encode("def x\t中")
    assert [row[:2] for row in rows[2 : 2 + len(ids)]] == [[str(i), str(index)] for i, index in enumerate(ids)]
    assert ["\\xE4", "e4"] in [row[2:] for row in rows]
    assert ["→", "09"] in [row[2:] for row in rows]
    assert bytes.fromhex("".join("".join(row[3:]) for row in rows[2 : 2 + len(ids)])).decode() == "def x\t中"
    assert rows[-1] == f"7 characters, 9 bytes, {len(ids)} tokens, {9 / len(ids):.2f} bytes per token".split()


# Positions


def test_the_sinusoidal_picture_has_a_pixel_for_each_number():
    found = sinusoidal_map(9, 6)
    assert np.array_equal(found.values, sinusoidal_table(9, 6).numpy())
    pixels = read_picture(picture(found))
    assert pixels.shape == (9, 6, 3)
    assert np.array_equal(pixels, colours(found))
    red, blue = pixels[0, 1], pixels[np.unravel_index(found.values.argmin(), found.values.shape)]
    assert red[0] > red[2] + 50, "1 is red"
    assert blue[2] > blue[0] + 50, "-1 is blue"
    assert pixels[0, 0].min() > 235, "0 is white"


def test_the_rotary_pairs_turn_as_the_model_turns_them():
    config = GPTConfig(vocab_size=9, n_head=1, d_model=32, positions="rotary", rope_theta=10000.0)
    found = rotary_map(30, 32, config)
    cos, sin = rotary_tables(30, 32, 10000.0)
    assert np.array_equal(found.values, cos.numpy())
    assert [pair.name for pair in found.pairs] == [
        "dimensions 0 and 16",
        "dimensions 4 and 20",
        "dimensions 8 and 24",
        "dimensions 15 and 31",
    ]
    for pair, index in zip(found.pairs, (0, 4, 8, 15), strict=True):
        assert pair.degrees == pytest.approx(math.degrees(10000 ** (-index / 16)), rel=1e-4)
        assert pair.tokens * pair.degrees == pytest.approx(360)
        assert np.allclose([(x, y) for x, y, _ in pair.dots], torch.stack((cos[:24, index], sin[:24, index]), 1), atol=1e-4)
    assert "theta = 10,000" in found.explanation
    assert "57.3°" in found.explanation


def test_stretched_frequencies_are_seen():
    shape: dict[str, Any] = {"vocab_size": 9, "n_head": 1, "d_model": 32, "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu"}
    plain = rotary_map(8, 32, GPTConfig(**shape, bias=False))
    scaled = rotary_map(8, 32, GPTConfig(**shape, bias=False, rope_scaling="llama3"))
    assert scaled.pairs[-1].degrees == pytest.approx(plain.pairs[-1].degrees / 8, rel=1e-3)
    assert "Llama 3.1" in scaled.explanation
    assert "Llama 3.1" not in plain.explanation


def test_learned_positions_are_the_rows_of_the_model(learned_model: Path):
    table = GPT.from_pretrained(learned_model).embeddings.positions
    assert table is not None
    found = learned_map(table.weight[:7], 20)
    assert np.array_equal(found.values, table.weight[:7].detach().numpy())
    assert found.reach == pytest.approx(float(np.quantile(np.abs(found.values), 0.99)))
    assert "each of its 20 positions" in found.explanation
    assert learned_map(torch.zeros(3, 4), 3).reach == 1.0


def test_half_blocks_show_two_positions_a_line():
    found = sinusoidal_map(5, 8)
    text, left_out = in_terminal(found, 80)
    lines = text.plain.splitlines()
    assert [line[6:] for line in lines[:3]] == ["▀" * 8] * 3
    assert left_out == ""
    expected = colours(found)
    styles = {span.start: span.style for span in text.spans}
    first, second = 6, len(lines[0]) + 1 + 6 + 3
    for place, row, column in ((first, 0, 0), (second, 2, 3)):
        style = styles[place]
        assert not isinstance(style, str)
        assert style.color
        assert style.bgcolor
        assert tuple(style.color.triplet or ()) == tuple(expected[row, column])
        assert tuple(style.bgcolor.triplet or ()) == tuple(expected[row + 1, column])


def test_a_large_map_is_thinned_to_the_terminal_and_that_is_said():
    text, left_out = in_terminal(sinusoidal_map(300, 400), 60)
    lines = text.plain.splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("▀" in line for line in lines) <= 32
    assert left_out == "every 5th position and every 8th dimension"


# The command


@pytest.mark.parametrize(("positions", "kind"), [("auto", "Sinusoidal"), ("rotary", "Rotary")])
def test_without_a_model_a_map_is_drawn_at_the_size_asked_for(byte_config, positions: str, kind: str, capsys):
    config = byte_config(text=TEXT, positions=positions, d_model=32, length=50)
    assert inspect_tokens(config) == 0
    page = Page(Path(config.output))
    page.assert_asks_for_nothing()
    images = [value for tag, name, value in page.attributes if (tag, name) == ("image", "href")]
    assert [read_picture(image).shape for image in images] == [(50, 32, 3)]
    assert page.texts["figcaption"][0].startswith(f"{kind} positions")
    assert "the text ends here" in page.source
    ends = {value for tag, name, value in page.attributes if tag == "line" and name == "y1"}
    assert ends == {f"{100.0 * len(TEXT.encode()) / 50}%"}
    out = capsys.readouterr().out
    assert f"{len(TEXT.encode())} tokens" in out
    assert "the heat map needs a terminal with colours; it is on the page" in out
    assert page.cards["Bytes"] == str(len(TEXT.encode()))
    assert len([row for row in page.texts["tr"] if row]) == 1 + len(TEXT.encode())


def test_a_model_brings_its_tokenizer_positions_and_the_end_of_its_context(byte_config, learned_model: Path, capsys):
    config = byte_config(text="x" * 30, model=str(learned_model))
    inspect_tokens(config)
    out = capsys.readouterr().out
    assert "20 positions are drawn; the text takes 30. The model reads at most 20 tokens, fewer than the text has" in " ".join(out.split())
    page = Page(Path(config.output))
    (image,) = [value for tag, name, value in page.attributes if (tag, name) == ("image", "href")]
    assert read_picture(image).shape == (20, 16, 3)
    assert page.texts["figcaption"] == ["Learned positions: added to the token's vector"]


def test_a_rotary_model_shows_its_own_theta(byte_config, rotary_model: Path):
    config = byte_config(model=str(rotary_model), length=64)
    inspect_tokens(config)
    source = Path(config.output).read_text()
    assert "theta = 500,000" in source
    assert "How pairs turn" in source


def test_a_terminal_with_colours_shows_the_heat_map(byte_config, monkeypatch, capsys):
    monkeypatch.setattr(command, "_console", lambda: Console(force_terminal=True, color_system="truecolor", width=100, file=sys.stdout))
    inspect_tokens(byte_config(output=""))
    out = capsys.readouterr().out
    assert out.count("▀") == 32 * 64
    assert "blue -1, white 0, red 1" in re.sub(r"\x1b\[[\d;]*m", "", out)


def test_the_standard_library_teaches_the_tokenizer_if_no_model_does(tmp_path: Path, monkeypatch):
    asked = []

    def prepare(data, tokenizer, context_length, say):
        asked.append((data.source, tokenizer.name))
        return type("Corpus", (), {"tokenizer": BPE})

    monkeypatch.setattr(command, "prepare_corpus", prepare)
    inspect_tokens(InspectTokensConfig(text="def add", output=str(tmp_path / "t.html")))
    assert asked == [("stdlib", "bpe")]


def test_more_tokens_than_a_page_shows_are_cut_and_that_is_said(byte_config, monkeypatch, capsys):
    assert tokens_module.MOST_TOKENS == 10_000
    monkeypatch.setattr(tokens_module, "MOST_TOKENS", 1000)
    config = byte_config(text="a" * 4500, length=8)
    inspect_tokens(config)
    assert "the first 1,000 of 4,500 tokens are shown" in capsys.readouterr().out
    page = Page(Path(config.output))
    assert page.cards["Tokens"] == "4,500"
    assert len(page.texts["tr"]) == 1 + 1000
    assert "The first 1,000 of 4,500 tokens are shown." in page.texts["p"]
    assert "4,096 positions are drawn; the text takes 4,500." in page.source


class Stdin(io.TextIOWrapper):
    def __init__(self, raw: bytes, is_terminal: bool = False) -> None:
        super().__init__(io.BytesIO(raw), encoding="utf-8")
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def test_a_text_can_be_piped_in(byte_config, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Stdin("né\n".encode()))
    inspect_tokens(byte_config(text="", output=""))
    assert "3 characters, 4 bytes, 4 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stdin", "values", "message"),
    [
        (Stdin(b"", is_terminal=True), {"text": ""}, r'text: nothing to cut; give text="..." or pipe a text in'),
        (Stdin(b""), {"text": ""}, r"text: nothing to cut"),
        (Stdin(b"ab\xff"), {"text": ""}, r"text: stdin is not valid UTF-8: byte 2 is 0xff"),
        (None, {"text": "\udcff"}, r"text: it is not valid UTF-8"),
        (None, {"positions": "learned"}, r"positions=learned: learned positions exist only in a model; give one, e\.g\. model="),
        (None, {"length": 5000}, r"length=5000: at most 4096"),
        (None, {"d_model": 9000}, r"d_model=9000: at most 8192"),
        (None, {"positions": "rotary", "d_model": 33}, r"d_model=33 must be even"),
        (None, {"model": "./nowhere"}, r"model=\./nowhere: there is no such directory"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(byte_config, monkeypatch, stdin, values: dict, message: str):
    monkeypatch.setattr(sys, "stdin", stdin)
    config = byte_config(**values)
    with pytest.raises(UserError, match=message) as error:
        inspect_tokens(config)
    assert "\n" not in str(error.value)
    assert not Path(config.output).exists()


def test_positions_that_the_model_does_not_have_are_refused(byte_config, learned_model: Path):
    with pytest.raises(UserError, match=r"positions=rotary: the model .* has positions=learned; leave positions out"):
        inspect_tokens(byte_config(model=str(learned_model), positions="rotary"))


def test_a_model_without_positions_is_said_to_have_none(byte_config, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().backend.to_str())
    shape = GPTConfig(vocab_size=257, context_length=20, n_layer=1, n_head=1, d_model=8, positions="none")
    monkeypatch.setattr(command, "read_shape", lambda path, key: (shape, str(tmp_path)))
    config = byte_config(model="runs/x")
    inspect_tokens(config)
    assert "This model has no positional encoding. It reads at most 20 tokens." in capsys.readouterr().out
    assert "image" not in {tag for tag, _, _ in Page(Path(config.output)).attributes}
