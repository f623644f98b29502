"""The page of `gpt inspect`: its figures are those of the data, its text is text, and it can be read in light and in dark."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from inspection_pages import Page

from gpt.commands import InspectConfig
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.examples import ExampleSettings
from gpt.data.packing import best_fit, efficiency
from gpt.data.prepare import Corpus, prepare_corpus
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.inspection import figures as figures_module
from gpt.inspection.command import inspect
from gpt.inspection.figures import corpus_figures
from gpt.inspection.page import axis_ticks, check_output, flat_rows, length_histogram, write_page
from gpt.inspection.tokens import cut

EVIL = "</pre><script>alert('x')</script>&amp;<b>{{ 7 * 7 }}"


def data_config(path: Path, cache_dir: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"source": "jsonl", "paths": [str(path)], "on_error": "skip", "cache_dir": str(cache_dir)} | changes)


@pytest.fixture(scope="module")
def prepared(examples_file: Path, cache_dir: Path) -> Corpus:
    data = data_config(examples_file, cache_dir, redact=["email"])
    return prepare_corpus(data, TokenizerConfig("byte"), 192, lambda _: None, ExampleSettings(context_length=192))


@pytest.fixture(scope="module")
def page(examples_file: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    output = tmp_path_factory.mktemp("page") / "inspect.html"
    data = data_config(examples_file, cache_dir, redact=["email"], licence="<b>CC0</b>")
    inspect(InspectConfig(data=data, tokenizer=TokenizerConfig("byte"), context_length=192, n=8, output=str(output)))
    assert [path.name for path in output.parent.iterdir()] == ["inspect.html"]
    return Page(output)


def test_the_page_asks_for_nothing_and_runs_nothing(page: Page):
    page.assert_asks_for_nothing()
    assert not {"b", "iframe", "img", "form"} & page.texts.keys()
    assert "<b>CC0</b>" in page.texts["td"]


def test_text_of_any_content_is_shown_as_it_is(page: Page):
    rows = "".join(page.texts["pre"])
    assert EVIL in rows
    assert "中文" in rows
    assert "[EMAIL]" in rows
    assert "example.com" not in rows


def test_what_is_learned_is_marked_and_says_what_it_is(page: Page):
    learned = "".join(text for classes, _, text in page.spans if "learned" in classes)
    assert " It is " in learned
    assert "What is" not in learned
    titles = [title for classes, title, _ in page.spans if classes & {"learned", "read"} and title]
    assert all(re.fullmatch(r"position \d+( to \d+)?, id [\d, ]+, bytes [0-9a-f ]+", title) for title in titles)
    shades = ["o" in classes for classes, title, _ in page.spans if title]
    assert 0.3 < np.mean(shades) < 0.7


def test_the_figures_are_those_of_the_data(page: Page, prepared: Corpus):
    split = prepared.parts[0].train
    lengths = np.diff(np.asarray(split.documents).astype(np.int64))
    assert split.labels is not None
    labels = split.labels.windows(np.array([0]), len(split.tokens))[0]
    assert page.cards["Examples"] == str(len(lengths))
    assert page.cards["Tokens"] == f"{len(split.tokens):,}"
    assert page.cards["Trained on"] == f"{np.mean(labels != -100):.1%}"
    assert page.cards["Packing efficiency"] == f"{efficiency(lengths, best_fit(lengths, 192), 192):.1%}"
    cells = page.texts["td"]
    assert cells[cells.index("redacted email") + 1] == "20"
    assert cells[cells.index("dropped no target") + 1] == "1"
    assert f"longest {lengths.max()}" in page.source


def test_one_example_a_row_is_less_efficient(prepared: Corpus):
    packed, alone = (corpus_figures(prepared, 192, packed).packing for packed in (True, False))
    assert packed
    assert alone
    lengths = corpus_figures(prepared, 192, True).lengths
    assert alone.rows == len(lengths)
    assert alone.efficiency == pytest.approx(lengths.sum() / (192 * len(lengths)))
    assert packed.efficiency > 1.5 * alone.efficiency
    assert packed.examples_per_row == pytest.approx(len(lengths) / packed.rows)


def test_frequent_tokens_are_counted(prepared: Corpus):
    found = corpus_figures(prepared, 192, True)
    split = prepared.parts[0].train
    ids = split.tokens.windows(np.array([0]), len(split.tokens))[0]
    counts = np.bincount(ids, minlength=257)
    assert [token.count for token in found.frequent] == sorted(counts, reverse=True)[: len(found.frequent)]
    assert all(token.count == counts[token.id] for token in found.frequent)
    assert found.counted == found.tokens == len(ids)
    assert {"␣", "⟦<|endoftext|>⟧"} <= {token.text for token in found.frequent}
    decoded = prepared.tokenizer.decode(ids[ids != prepared.tokenizer.end_of_text].tolist())
    assert found.bytes_per_token == pytest.approx(len(decoded.encode()) / len(ids))


def test_of_a_large_source_a_part_is_counted_evenly(prepared: Corpus, monkeypatch: pytest.MonkeyPatch):
    whole = corpus_figures(prepared, 192, True)
    monkeypatch.setattr(figures_module, "COUNTED", whole.tokens // 2)
    monkeypatch.setattr(figures_module, "_BLOCK", 7)
    part = corpus_figures(prepared, 192, True)
    assert 0.4 * whole.tokens < part.counted <= whole.tokens // 2
    assert part.learned == pytest.approx(whole.learned, abs=0.05)
    assert part.tokens == whole.tokens
    assert np.array_equal(part.lengths, whole.lengths)


def test_classes_have_their_counts(labels_file: Path, cache_dir: Path, tmp_path: Path):
    output = tmp_path / "labels.html"
    data = data_config(labels_file, cache_dir)
    inspect(InspectConfig(data=data, tokenizer=TokenizerConfig("byte"), context_length=64, output=str(output)))
    page = Page(output)
    page.assert_asks_for_nothing()
    cells = page.texts["td"]
    counts = {name: int(cells[cells.index(name) + 1]) for name in ("noun", "verb", "<script>x</script>")}
    assert sum(counts.values()) == int(page.cards["Examples"])
    assert counts["noun"] > counts["verb"]  # every fourth text more
    chips = [text for classes, _, text in page.spans if "class" in classes]
    assert "noun" in chips
    assert "<script>x</script>" in chips + cells
    assert "class of the token before" in chips


def test_text_is_cut_without_gaps(corpus: Path, cache_dir: Path, tmp_path: Path):
    output = tmp_path / "text.html"
    data = data_config(corpus, cache_dir, source="text")
    inspect(InspectConfig(data=data, tokenizer=TokenizerConfig("bpe", 400), context_length=64, output=str(output)))
    cards = Page(output).cards
    assert "Packing efficiency" not in cards
    assert int(cards["Rows of an epoch"].replace(",", "")) == int(cards["Tokens"].replace(",", "")) // 64
    assert cards["Trained on"] == "100.0%"


@given(st.text(min_size=1, max_size=60))
@example("עברית <b> \u202ertl\u202c 中文\x00\x1b\r\n")
def test_any_text_comes_back_from_the_page(tmp_path_factory: pytest.TempPathFactory, text: str):
    path = tmp_path_factory.getbasetemp() / "any.html"
    found = cut(text, byte_tokenizer())
    write_page(
        path, "tokens.html.jinja", title=text, subtitle=text, cards=[], text=found.in_text(), left_out="", tokens=found.tokens,
        positions=None, length_note=text, map=None,
    )  # fmt: skip
    page = Page(path)
    page.assert_asks_for_nothing()
    (shown,) = page.texts["pre"]
    assert shown == "".join(part for segments, _ in found.in_text() for part, _ in segments)
    if text.isprintable():
        assert shown == text
    assert "".join(page.texts["td"][3::4]).replace(" ", "") == text.encode().hex()


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=200), st.integers(2, 5000))
@example([5], 5)
@example([1, 1, 1, 100], 50)
def test_every_length_is_in_one_bar(lengths: list[int], context_length: int):
    found = length_histogram(np.array(lengths), context_length)
    counts = [int(bar.title.split(": ")[1].replace(",", "")) for bar in found.bars]
    assert sum(counts) == len(lengths)
    assert all(bar.x >= 0 and bar.x + bar.width <= 100.01 and 0 < bar.height <= 100 for bar in found.bars)
    assert all(-0.01 <= tick.at <= 100.01 for tick in found.across + found.up)
    assert len(found.bars) <= 40
    fitting = [bar for bar in found.bars if bar.x + bar.width <= found.context + 0.01]
    if not found.is_beyond:
        inside = sum(int(bar.title.split(": ")[1].replace(",", "")) for bar in fitting)
        assert inside == sum(length <= context_length for length in lengths), "no bar mixes what fits with what does not"
    else:
        assert max(lengths) < context_length


@given(st.integers(1, 10**9))
def test_ticks_are_few_and_reach_the_top(reach: int):
    values, last = axis_ticks(reach)
    assert last == values[-1] >= reach
    assert 2 <= len(values) <= 6


def test_nested_values_become_rows():
    rows = flat_rows({"a": {"b": 1234, "c": None, "d": ""}, "e": [1, "x"], "f": [{"g": True}, {"g": 0.5}], "h": []})
    assert rows == [("a.b", "1,234"), ("e", "1, x"), ("f 1.g", "True"), ("f 2.g", "0.5")]


def test_every_manifest_value_stands_on_the_page(page: Page, prepared: Corpus):
    source = prepared.manifest["sources"][0]
    assert source["fingerprint"] in page.texts["td"]
    assert prepared.manifest["tokenizer"]["hash"] in page.texts["td"]


# Where the page goes


def test_no_page_is_written_if_none_is_wanted(examples_file: Path, cache_dir: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    inspect(InspectConfig(data=data_config(examples_file, cache_dir), tokenizer=TokenizerConfig("byte"), context_length=192, output=""))
    assert list(tmp_path.iterdir()) == []
    assert "page:" not in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_said_before_any_work(tmp_path: Path):
    assert check_output("") is check_output("null") is None
    with pytest.raises(UserError, match=r"output=.*nowhere/x\.html: there is no folder .*nowhere; make it"):
        check_output(str(tmp_path / "nowhere" / "x.html"))
    with pytest.raises(UserError, match=r"output=.*: is a folder; name a file in it"):
        check_output(str(tmp_path))
    with pytest.raises(UserError, match=r"there is no folder"):
        inspect(InspectConfig(data=DataConfig("text", paths=["no such file"]), output=str(tmp_path / "nowhere" / "x.html")))


def test_a_folder_that_refuses_the_page_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"output=.*: cannot write to the folder"):
        check_output(str(tmp_path / "x.html"))
    values: dict[str, Any] = {"title": "", "subtitle": "", "cards": [], "text": [], "left_out": "", "tokens": [], "positions": None}
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"output=.*x\.html: cannot be written: No space left on device"):
        write_page(tmp_path / "x.html", "tokens.html.jinja", **values, length_note="", map=None)
    assert list(tmp_path.iterdir()) == []


# Colours


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("letters", "back"),
    [
        ("text", "page"), ("text", "panel"), ("muted", "page"), ("muted", "panel"), ("muted", "read-other"), ("text", "learned"),
        ("text", "learned-other"), ("mark", "learned"), ("mark", "learned-other"), ("special", "special-back"),
        ("class", "class-back"), ("second", "panel"), ("text", "cut"), ("text", "cut-other"), ("mark", "cut"), ("mark", "cut-other"),
    ],
)  # fmt: skip
def test_letters_stand_out_from_what_is_behind_them(scheme: str, letters: str, back: str):
    folder = Path(figures_module.__file__).parent
    styles = [(folder / name).read_text() for name in ("base.html.jinja", "tokens.html.jinja")]
    colours: dict[str, str] = {}
    for style in styles:
        light, dark, *_ = re.findall(r":root {.*?}", style, re.DOTALL)
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if scheme == "light" else dark))
    bright, dim = sorted((luminance(colours[letters]), luminance(colours[back])), reverse=True)
    assert (bright + 0.05) / (dim + 0.05) >= 4.5  # WCAG 2.1, level AA
