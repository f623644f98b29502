"""`gpt evaluate` of classifiers: figures of the run, of other rows, per class; and what it says of what is not for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt.commands import GenerateConfig
from gpt.compose import compose_use
from gpt.errors import UserError
from gpt.evaluation.command import evaluate
from gpt.inference.command import generate
from gpt.training.trainer import Result, Trainer
from tests.training.finetuning import SUMS, finetune_config, save_small_model, write_rows
from tests.training.test_classifiers import PEOPLE, THINGS


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Result]:
    """A classifier of texts and one of words, trained until they are right most of the time."""
    folder = tmp_path_factory.mktemp("classifiers")
    init = save_small_model(folder / "init")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt.training.results.write_report", lambda directory, *_: directory / "report.html")
        for name, rows, steps in (("texts", THINGS, 6), ("words", PEOPLE, 3)):
            file = write_rows(folder / f"{name}.jsonl", rows)
            length = [f"train.budget={steps}steps", "train.batch_tokens=1024", "optimizer.lr=0.01", "data.holdout=0.3"]
            found[name] = Trainer(finetune_config(folder, init, file, *length, f"run.id={name}")).fit()
    return found


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """Runs `gpt evaluate` with these arguments and returns its figures."""

    def run(*arguments: str) -> dict:
        output = tmp_path / "figures.json"
        assert evaluate(compose_use("evaluate", [*arguments, "precision=fp32", "device=cpu", f"output={output}"])) == 0
        return json.loads(output.read_text())

    return run


@pytest.mark.parametrize("name", ["texts", "words"])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_run_is_measured_as_it_measured_itself(runs, figures, capsys, name, packing):
    result = runs[name]
    scores = result.held_out.scores
    assert 0.5 < scores.accuracy < 1  # the comparison means something
    own = [f"model={result.run_directory}"]
    if packing == "none":
        file = result.run_directory.parents[1] / f"{name}.jsonl"
        own += ["data=jsonl", f"data.paths=[{file}]", "data.packing=none", "data.holdout=0.3", "part=held_out"]
    found = figures(*own)
    assert found["confusion_matrix"] == scores.matrix.tolist()
    assert found["loss"] == pytest.approx(result.held_out.loss, abs=1e-5)
    assert {key: found[key] for key in scores.figures()} == pytest.approx(scores.figures())
    assert list(found["per_class"]) == scores.classes
    assert "bytes" not in found
    told = capsys.readouterr().out
    assert f"accuracy       {scores.accuracy:.4f}\n" in told
    assert f"macro-F1       {scores.macro_f1:.4f}\n" in told
    assert ("span F1 " in told) == (name == "words")
    assert "  predicted\n" in told
    assert "precision  recall      F1" in told
    assert "bits per byte" not in told


def test_other_rows_are_examples_without_saying_so(runs, figures, tmp_path):
    """Of another order and with fewer classes; numbers stand for classes, too."""
    rows = [{"text": "my cow", "label": "animal"}, {"text": "the saw", "label": 2}, {"text": "the dog", "label": "animal"}]
    found = figures(
        f"model={runs['texts'].run_directory / 'model'}", "data=jsonl", f"data.paths=[{write_rows(tmp_path / 'r.jsonl', rows)}]"
    )
    assert found["examples"] == 3
    assert [sum(row) for row in found["confusion_matrix"]] == [2, 0, 1]


def test_quantised_weights_are_measured_beside(runs, figures):
    pytest.importorskip("torchao")
    found = figures(f"model={runs['texts'].run_directory}", "quantize=int8")
    assert found["int8"]["accuracy"] == pytest.approx(found["accuracy"], abs=0.1)
    assert 0 < abs(found["int8"]["loss"] - found["loss"]) < 0.2


@pytest.mark.parametrize(
    ("name", "rows", "arguments", "message"),
    [
        (
            "texts",
            [{"text": "a cow", "label": "animl"}],
            [],
            r"r\.jsonl, line 1: label=animl is none of the classes. Did you mean animal\?",
        ),
        ("texts", [{"text": "a cow", "label": 3}], [], "label=3 is out of range; there are 0 to 2"),
        ("words", [{"tokens": ["a"], "tags": ["B-PES"]}], [], r"tags\[0\]=B-PES is none of the classes. Did you mean B-PER\?"),
        (
            "texts",
            PEOPLE[:1],
            [],
            "data: its rows are of tokens_tags, and the model's head is for the class of each text .*; give rows of text_l",
        ),
        ("words", SUMS[:1], [], "data: its rows are of prompt_completion, and the model's head is for the class of each word"),
        ("texts", THINGS[:1], ["data.labels=[tool, animal]"], "data.labels=.*: the model's head is for the class of each text"),
        ("texts", THINGS[:1], ["stride=4"], "stride=4 is of text, and these are examples"),
        ("texts", THINGS[:1], ["examples=false"], "examples=false: model=.* is a classifier, which continues no text"),
    ],
)
def test_rows_and_settings_that_are_not_for_it(runs, figures, tmp_path, name, rows, arguments, message):
    path = write_rows(tmp_path / "r.jsonl", rows)
    with pytest.raises(UserError, match=message) as error:
        figures(f"model={runs[name].run_directory}", "data=jsonl", f"data.paths=[{path}]", *arguments)
    assert "\n" not in str(error.value)


def test_text_is_not_for_it(runs, figures, tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 100)
    with pytest.raises(UserError, match=r"data=text is text: model=.* is a classifier, which continues no text; give it rows with classes"):
        figures(f"model={runs['texts'].run_directory}", "data=text", f"data.paths=[{tmp_path / 'a.txt'}]")


def test_it_continues_no_text(runs):
    for path in (runs["words"].run_directory, Path(runs["words"].run_directory) / "model"):
        with pytest.raises(UserError, match=r"is a classifier: its head is for the class of each word .*gpt evaluate"):
            generate(GenerateConfig(model=str(path), prompt="Anna lives"))
