"""The table and the picture of what trains, on the page of a run."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
from finetuning import SUMS, finetune_config, save_small_model, write_rows
from report_pages import SAMPLES, SUMMARY, Page, note, training_line, validation_line, write_metrics

from gpt.finetuning.trainable import TableRow, table_cells, write_table
from gpt.training.freezing_figure import TRAINABLE, draw_stack, freezing_section, read_rows, stage_steps
from gpt.training.report import write_live_report, write_report
from gpt.training.trainer import Trainer

TOKENS = TableRow("embeddings.tokens", 1000, 0, None, 0, 0)
BLOCKS = [
    TableRow(f"blocks.{i}", 400, 0 if i < 2 else 400, None if i < 2 else 3e-4 * (i - 1), 0 if i < 3 else 0.25, 400 if i == 2 else 0)
    for i in range(4)
]
NORM = TableRow("final_norm", 10, 10, 6e-4, 0, 10)
ROWS = [TOKENS, *BLOCKS, NORM]


def keep(directory: Path, rows: list[TableRow]) -> None:
    (directory / TRAINABLE).write_text(json.dumps([asdict(row) for row in rows]))


def boxes(svg: str) -> list[tuple[float, float, str]]:
    """(top, width, look) of each box of the stack, from the top."""
    found = [rect.attrib for rect in ElementTree.fromstring(svg).iter("rect") if rect.attrib["x"] == "1"]
    return sorted((float(rect["y"]), float(rect["width"]), rect["style"]) for rect in found)


def bars(svg: str) -> list[float]:
    """The widths of the learning rates, from the top."""
    rects = [rect.attrib for rect in ElementTree.fromstring(svg).iter("rect") if "var(--second)" in rect.attrib["style"]]
    return [float(rect["width"]) for rect in sorted(rects, key=lambda rect: float(rect["y"]))]


def test_the_page_shows_the_table_and_the_picture_also_while_the_run_goes_on(tmp_path: Path) -> None:
    keep(tmp_path, ROWS)
    write_metrics(tmp_path, [training_line(10)])
    for page in (Page(write_report(tmp_path, SAMPLES, SUMMARY)), Page(write_live_report(tmp_path))):
        assert "What trains" in page.texts["h2"]
        rows = [re.sub(r"<[^>]*>", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", page.source)]
        assert [[cell for cell in row.split("|") if cell] for row in rows][1:] == [
            [cell for cell in cells[:3] + cells[4:] + cells[3:4] if cell] for cells in table_cells(ROWS)
        ]
        assert "begins later" in page.source
        assert 'class="stack"' in page.source


def test_a_run_that_freezes_nothing_has_neither(tmp_path: Path) -> None:
    write_metrics(tmp_path, [training_line(10)])
    assert "What trains" not in Page(write_report(tmp_path, SAMPLES, SUMMARY)).texts["h2"]
    assert freezing_section(tmp_path) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "[{}]", '[{"module": "x"}]', '{"a": 1}', json.dumps([asdict(NORM) | {"parameters": 0}])])
def test_a_table_that_cannot_be_read_is_left_out(text: str, tmp_path: Path) -> None:
    (tmp_path / TRAINABLE).write_text(text)
    write_metrics(tmp_path, [training_line(10)])
    assert "What trains" not in Page(write_report(tmp_path, SAMPLES, SUMMARY)).texts["h2"]


def test_the_stack_has_a_box_for_each_module_and_a_tied_head_looks_like_its_embedding() -> None:
    svg = draw_stack(ROWS)
    stack = boxes(svg)
    assert len(stack) == 7, "head, norm, four blocks, embedding"
    looks = ["frozen" if "--faint" in look else "later" if "opacity" in look else "trains" for *_, look in stack]
    assert looks == ["frozen", "trains", "later", "trains", "frozen", "frozen", "frozen"]
    texts = [text.text for text in ElementTree.fromstring(svg).iter() if text.tag == "text"]
    assert {"head (tied)", "final norm", "block 3", "after 25% of the run", "block 2", "blocks 0–1", "token embedding"} <= set(texts)
    assert texts.count("frozen") == 3
    norm, third, second = bars(svg)
    assert norm == third == pytest.approx(2 * second), "rates are to scale"
    untied = draw_stack([*ROWS, TableRow("head", 1000, 1000, 3e-4, 0, 1000)])
    assert "head (tied)" not in untied
    assert len(boxes(untied)) == 7


def test_a_box_is_filled_as_far_as_it_trains() -> None:
    stack = boxes(draw_stack([TableRow("blocks.0", 1000, 250, 1e-3, 0, 250), TableRow("blocks.1", 10**6, 1, 1e-3, 0, 1)]))
    filled, whole = ([width for _, width, look in stack if colour in look] for colour in ("--accent", "--faint"))
    assert filled[1] == pytest.approx(whole[1] / 4, rel=0.01)
    assert 0 < filled[0] < whole[0] / 10, "what is little is still seen"


def test_a_deep_model_stays_a_small_picture() -> None:
    svg = draw_stack([TOKENS, *(TableRow(f"blocks.{i}", 400, 400, 1e-3, 0, 400) for i in range(96)), NORM])
    assert len(boxes(svg)) == 99
    assert float(re.findall(r'viewBox="0 0 400 (\S+)"', svg)[0]) < 320
    tops = [top for top, *_ in boxes(svg)]
    assert len(set(tops)) == 99


def test_modules_are_escaped() -> None:
    assert "<b>" not in draw_stack([TableRow("<b>", 1, 1, 1.0, 0, 1)])


def test_the_loss_is_marked_where_more_began_to_train(tmp_path: Path) -> None:
    counts = {10: 5, 20: 5, 30: 9, 40: 9, 50: 12}
    lines = [training_line(step, trainable_parameters=count) for step, count in counts.items()]
    lines.insert(2, validation_line(20))
    assert stage_steps(lines) == [20, 40]
    write_metrics(tmp_path, lines)
    page = Page(write_report(tmp_path, SAMPLES, SUMMARY))
    assert note(page, "Loss by step") == "Dashed: after step 20, 40 more parameters train."
    assert stage_steps([training_line(1), training_line(2)]) == [], "a run of an earlier version"


def test_rows_and_text_survive_the_file(tmp_path: Path) -> None:
    keep(tmp_path, ROWS)
    assert read_rows(tmp_path) == ROWS
    text = write_table(ROWS).splitlines()
    assert text[2].split() == ["blocks.0-1", "800", "no"]
    assert text[-1].split()[:4] == ["in", "all", "2,610", "410"]


def test_a_run_shows_its_stages(tmp_path: Path) -> None:
    model, rows = save_small_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", SUMS)
    plan = ["freeze=head_only", "unfreeze=[{at: 2, blocks: -1}]", "train.budget=4steps", "train.log_every=1", "run.id=a"]
    Trainer(finetune_config(tmp_path, model, rows, *plan)).fit()
    run = tmp_path / "runs" / "a"
    page = Page(run / "report.html")
    assert note(page, "Loss by step") == "Dashed: after step 2 more parameters train."
    svg = page.source.split('class="stack"')[1].partition("</svg>")[0]
    names = re.findall(r"<text[^>]*>([^<]*)", svg)
    assert names[:2] == ["head", "0.0002"]
    assert names[names.index("block 1") :][:3] == ["block 1", "from step 2 on", "0.0002"]
    assert names[names.index("block 0") + 1] == names[names.index("final norm") + 1] == "frozen"
