import json
import math

import pytest

from gpt.compose import compose_use
from gpt.errors import UserError
from gpt.evaluation.command import evaluate
from gpt.model.transformer import GPT
from gpt.training.trainer import Result, Trainer
from tests.training.finetuning import CHATS, SUMS, finetune_config, nats, save_small_model, write_rows


@pytest.fixture
def init(tmp_path):
    return save_small_model(tmp_path / "init")


@pytest.fixture
def figures(tmp_path):
    """Runs `gpt evaluate` with these arguments and returns its figures."""

    def run(*arguments: str) -> dict:
        output = tmp_path / "figures.json"
        assert evaluate(compose_use("evaluate", [*arguments, "precision=fp32", "device=cpu", f"output={output}"])) == 0
        return json.loads(output.read_text())

    return run


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Runs end with model/, without a report, which takes longer than the run."""
    monkeypatch.setattr("gpt.training.results.write_report", lambda directory, *_: directory / "report.html")


def finetune(tmp_path, init, rows, *overrides: str) -> Result:
    return Trainer(finetune_config(tmp_path, init, write_rows(tmp_path / "rows.jsonl", rows), *overrides)).fit()


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize(
    ("rows", "overrides"),
    [
        (SUMS, []),
        (SUMS, ["loss_on=all", "train.sequence_length=32"]),
        (CHATS, ["data.holdout=0.2"]),
        ([{"text": row["prompt"] * 4} for row in SUMS], ["data.too_long=split", "train.sequence_length=32"]),
        ([{"prompt": row["prompt"], "completion": f"me@example{n % 9}.org"} for n, row in enumerate(SUMS)], ["data.redact=[email]"]),
        ([*SUMS, *SUMS[::3]], ["data.deduplicate=exact", "data.holdout=0.3"]),
        ([*SUMS, {"prompt": "no completion"}, {"prompt": 3, "completion": 4}], ["data.on_error=skip"]),
    ],
    ids=["completions", "all, shorter rows", "conversations", "split texts", "redacted", "no duplicates", "bad rows left out"],
)
def test_a_finetuned_run_scores_what_it_held_out(tmp_path, init, figures, rows, overrides, packing):
    """The trainer's own last figure, from nothing but the run."""
    result = finetune(tmp_path, init, rows, f"data.packing={packing}", *overrides)
    found = figures(f"model={result.run_directory}")
    assert result.held_out is not None
    assert found["loss"] == pytest.approx(result.held_out.loss, abs=1e-4)
    assert (found["tokens"], found["bytes"]) == (result.held_out.tokens, result.held_out.bytes)
    assert found["bits_per_byte"] == pytest.approx(result.held_out.bits_per_byte, abs=1e-4)
    assert found["data"]["part"] == "held_out"
    manifest = json.loads((result.run_directory / "model" / "data_manifest.json").read_text())
    assert found["examples"] == sum(source["splits"]["held_out"]["documents"] for source in manifest["sources"])
    again = figures(f"model={result.run_directory / 'model'}", "batch=3")
    assert again["loss"] == pytest.approx(found["loss"], abs=1e-5)


def test_a_run_on_two_sources(tmp_path, init, figures):
    write_rows(tmp_path / "a.jsonl", SUMS)
    write_rows(tmp_path / "b.jsonl", [{"text": row["prompt"]} for row in SUMS])
    parts = f"[{{source: jsonl, paths: ['{tmp_path / 'a.jsonl'}']}}, {{source: jsonl, paths: ['{tmp_path / 'b.jsonl'}'], weight: 2}}]"
    result = Trainer(finetune_config(tmp_path, init, "mixture", f"data.parts={parts}")).fit()
    found = figures(f"model={result.run_directory}")
    assert result.held_out is not None
    assert found["loss"] == pytest.approx(result.held_out.loss, abs=1e-4)
    assert found["tokens"] == result.held_out.tokens
    assert found["format"] == "prompt_completion and text"


def test_examples_on_any_model(tmp_path, init, figures, capsys):
    """The figures are those of every example by itself."""
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)
    found = figures(f"model={init}", "data=jsonl", f"data.paths=[{rows}]", "examples=true")
    total, count = nats(GPT.from_pretrained(init), SUMS)
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (found["tokens"], found["examples"], found["format"]) == (count, len(SUMS), "prompt_completion")
    assert found["bytes"] == 3 * len(SUMS)
    assert found["data"]["part"] == "all"
    printed = capsys.readouterr().out
    assert f"{len(SUMS)} of prompt_completion, {count} tokens to score" in printed
    assert f"{found['loss']:.4f} nats per token" in printed
    everything = figures(f"model={init}", "data=jsonl", f"data.paths=[{rows}]", "examples=true", "loss_on=all")
    assert everything["tokens"] > 3 * count


def test_all_of_a_runs_data(tmp_path, init, figures):
    result = finetune(tmp_path, init, SUMS)
    found = figures(f"model={result.run_directory}", "part=all")
    assert (found["examples"], found["tokens"], found["data"]["part"]) == (len(SUMS), 4 * len(SUMS), "all")


def test_the_held_out_part_of_named_examples(tmp_path, init, figures):
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)
    found = figures(f"model={init}", "data=jsonl", f"data.paths=[{rows}]", "examples=true", "part=held_out", "data.holdout=0.5")
    assert 40 < found["examples"] < 80


def test_int8_is_set_against_the_weights_as_they_are(tmp_path, init, figures, capsys):
    pytest.importorskip("torchao")
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)
    found = figures(f"model={init}", "data=jsonl", f"data.paths=[{rows}]", "examples=true", "quantize=int8")
    total, count = nats(GPT.from_pretrained(init), SUMS)
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    difference = found["int8"]["loss"] - found["loss"]
    assert 0 < abs(difference) < 0.2
    assert found["int8"]["loss_difference"] == pytest.approx(difference)
    assert f"loss {found['loss']:.4f} -> {found['int8']['loss']:.4f}, {difference:+.4f}" in capsys.readouterr().out


def test_what_was_left_out_is_said(tmp_path, init, figures, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [*SUMS, {"prompt": "x" * 99, "completion": "y"}, {"prompt": "nothing", "completion": " "}])
    found = figures(f"model={init}", "data=jsonl", f"data.paths=[{rows}]", "examples=true", "data.too_long=drop")
    assert found["counts"] == {"dropped_too_long": 1, "dropped_no_target": 1}
    assert "dropped no target: 1, dropped too long: 1" in capsys.readouterr().out


def test_rows_that_are_skipped_are_said(tmp_path, init, figures, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [*SUMS, {"prompt": 3, "completion": "a number"}])
    found = figures(f"model={init}", "data=jsonl", f"data.paths=[{rows}]", "examples=true", "data.on_error=skip")
    assert found["examples"] == len(SUMS)
    assert "1 " in (said := capsys.readouterr().err)
    assert "prompt_completion" in said


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (SUMS, ["stride=8"], "stride=8 is of text, and these are examples"),
        (SUMS, ["max_tokens=8"], "max_tokens=8 is of text, and these are examples"),
        (SUMS, ["loss_on=assistant"], "loss_on=assistant is not for rows of prompt_completion"),
        ([{"text": "a", "label": "b"}], [], "data: its rows are of the format text_label, which needs a classification head"),
        ([{"tokens": ["a"], "tags": ["b"]}], [], "data: its rows are of the format tokens_tags"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], [], "data: its rows are of the format preference: .*val_reward_accuracy"),
        ([{"prompt": "a", "completion": ""}], [], r"data: there are no examples to score \(dropped_no_target: 1\)"),
        ([{"prompt": "a"}], [], r"rows\.jsonl, line 1"),
        (SUMS, ["context_length=999"], "context_length=999: the model reads at most 64 tokens"),
    ],
)
def test_what_cannot_be_scored(tmp_path, init, figures, rows, arguments, message):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=message) as error:
        figures(f"model={init}", "data=jsonl", f"data.paths=[{path}]", "examples=true", *arguments)
    assert "\n" not in str(error.value)


def test_stride_is_not_for_a_run_on_examples(tmp_path, init, figures):
    result = finetune(tmp_path, init, SUMS, "train.budget=1steps")
    with pytest.raises(UserError, match="stride=8 is of text, and these are examples"):
        figures(f"model={result.run_directory}", "stride=8")


def test_rows_are_text_unless_examples_are_asked_for(tmp_path, init, figures):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": row["prompt"]} for row in SUMS])
    found = figures(f"model={init}", "data=jsonl", f"data.paths=[{rows}]")
    assert found["documents"] == len(SUMS)
    assert "examples" not in found
