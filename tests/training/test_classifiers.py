"""Fine-tuning of classifiers: the head comes from the rows, is learned, measured as `transformers` would, exported and taken up again."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gpt.compose import compose_run, compose_use, load_run
from gpt.data.sources import open_source
from gpt.data.survey import survey
from gpt.errors import UserError
from gpt.inference.loading import load_model
from gpt.training.export import export
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Trainer
from tests.training.finetuning import (
    SUMS,
    finetune_config,
    stop_in_the_middle,
    write_rows,
)
from tests.training.test_trainer import assert_same_run

KINDS = {"fruit": ["apple", "pear", "plum"], "tool": ["hammer", "saw"], "animal": ["cat", "dog", "cow"]}
_DRAW = random.Random(0)
THINGS = [
    {"text": f"{_DRAW.choice(['I saw a', 'the', 'my'])} {_DRAW.choice(words)}", "label": kind}
    for kind, words in KINDS.items()
    for _ in range(50)
]
"""The last word says the class."""
PEOPLE = [
    {
        "tokens": [name, "lives", "in", *place.split()],
        "tags": ["B-PER", "O", "O", "B-LOC", *["I-LOC"] * (len(place.split()) - 1)],
    }
    for name in ("Anna", "Bob", "Carl", "Dora", "Eve")
    for place in ("New York", "Rome", "Oslo", "San Juan", "Bonn", "Lima")
] * 4
LEARN = ["train.budget=40steps", "train.eval_every=20", "train.batch_tokens=1024", "optimizer.lr=0.01", "data.holdout=0.2"]


@pytest.fixture
def config_of(tmp_path, init):
    """Composes a fine-tuning run; takes rows and overrides."""
    return lambda rows, *overrides: finetune_config(tmp_path, init, write_rows(tmp_path / "rows.jsonl", rows), *overrides)


def held_out(config) -> list[dict[str, Any]]:
    """The rows that a run does not train on."""
    source = open_source(config.data, "raise")
    hold_out = survey(source, config.data.holdout, 0, examples=True, skip=False).hold_out
    from gpt.data.sources import ReadReport

    return [row.values for row in source.rows(ReadReport()) if hold_out(row.name)]


def validations(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line]


def test_texts_are_told_apart_as_the_stock_class_does(config_of, capsys):
    config = config_of(THINGS, *LEARN)
    result = Trainer(config).fit()
    run = result.run_directory
    assert (config.model.head, config.model.classes, config.model.tie_embeddings) == ("sequence", ["animal", "fruit", "tool"], False)
    assert load_run(run).model == config.model
    lines = validations(run)
    assert [set(line) for line in lines] == [{"step", "tokens", "seconds", "val_loss", "val_accuracy", "val_macro_f1"}] * 2
    assert result.held_out is not None
    scores = result.held_out.scores
    assert scores is not None
    assert 0.9 < lines[-1]["val_accuracy"] <= 1
    assert result.held_out.figures() == {name: value for name, value in lines[-1].items() if name.startswith("val_")}

    # What `transformers` says of the rows that were held out, in padded batches.
    rows = held_out(config)
    assert scores.count == len(rows) > 10
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    stock: Any = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    with torch.no_grad():
        said = stock(**tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)).logits
    labels = torch.tensor([stock.config.label2id[row["label"]] for row in rows])
    assert scores.accuracy == pytest.approx((said.argmax(-1) == labels).double().mean().item())
    assert result.held_out.loss == pytest.approx(torch.nn.functional.cross_entropy(said, labels).item(), abs=1e-5)

    told = capsys.readouterr().err
    assert f"held-out examples ({len(rows)} examples): accuracy {scores.accuracy:.3f}, macro-F1" in told
    assert "true    predicted" in told
    assert "bits per byte" not in told
    assert "with a new head for the class of each text (animal, fruit, tool)" in told
    assert re.search(r"--- .*(apple|saw|cat|cow|plum|dog|pear|hammer)\n    -> (animal|fruit|tool)", told)
    assert "measure: gpt evaluate model=" in told
    page = (run / "report.html").read_text()
    for shown in ("What was taken for what", "Held-out accuracy and F1", "loss, nats per example", "Macro-F1"):
        assert shown in page
    assert "bits per byte" not in page.lower().partition("<summary>config")[0]
    card = (run / "model" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert "It knows 3 classes: animal, fruit, tool." in card
    assert f"| accuracy | {scores.accuracy:.3f} |" in card


@pytest.mark.usefixtures("no_report")
def test_words_are_tagged_as_the_stock_class_does(config_of, capsys):
    config = config_of(PEOPLE, *LEARN, "data.labels=[O, B-PER, B-LOC, I-LOC]")
    result = Trainer(config).fit()
    assert (config.model.head, config.model.classes) == ("tokens", ["O", "B-PER", "B-LOC", "I-LOC"])
    run = result.run_directory
    first, last = validations(run)
    assert first["val_span_f1"] <= last["val_span_f1"]
    assert last["val_span_f1"] > 0.8
    assert last["val_accuracy"] > 0.9
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(run / "model")
    stock: Any = transformers.AutoModelForTokenClassification.from_pretrained(run / "model").eval()
    right = count = 0
    for row in held_out(config):
        text = " ".join(row["tokens"])
        with torch.no_grad():
            said = stock(**tokenizer(text, return_tensors="pt")).logits[0].argmax(-1).tolist()
        starts = [len(" ".join(row["tokens"][:n])) + bool(n) for n in range(len(row["tokens"]))]  # one token a byte
        right += sum(stock.config.id2label[said[start]] == tag for start, tag in zip(starts, row["tags"], strict=True))
        count += len(starts)
    assert result.held_out is not None
    assert result.held_out.scores is not None
    assert result.held_out.scores.count == count
    assert result.held_out.scores.accuracy == pytest.approx(right / count)
    assert "span F1" in (told := capsys.readouterr().err)
    assert re.search(r"--- \w+/B-PER lives/O in/O \w+/B-LOC", told)


@pytest.mark.usefixtures("no_report")
def test_tags_without_spans_have_no_span_f1(config_of):
    rows = [{"tokens": ["a", "1", "b"], "tags": ["letter", "digit", "letter"]}] * 30
    result = Trainer(config_of(rows, "train.budget=2steps")).fit()
    assert set(validations(result.run_directory)[-1]) >= {"val_accuracy", "val_macro_f1"}
    assert "val_span_f1" not in validations(result.run_directory)[-1]


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("rows", [THINGS, PEOPLE], ids=["texts", "words"])
def test_a_run_goes_on_as_if_it_had_not_stopped(config_of, tmp_path, rows):
    settings = ["train.budget=6steps", "checkpoint.every=3", "train.micro_batch=1", "model.dropout=0.1", "train.eval_every=3"]
    settings += ["lm_weight=0.5"] if rows is THINGS else []
    Trainer(config_of(rows, *settings, "run.id=whole")).fit()
    result = stop_in_the_middle(Trainer(config_of(rows, *settings, "run.id=stopped")), 3)
    assert (result.exit_code, result.state.step) == (143, 3)
    again = compose_run("finetune", [f"resume={result.run_directory}"]) if rows is THINGS else config_of(rows, *settings, "run.id=stopped")
    assert Trainer(again).fit().exit_code == 0
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/stopped")
    whole, stopped = (validations(tmp_path / "runs" / name)[-1] for name in ("whole", "stopped"))
    assert whole["val_accuracy"] == stopped["val_accuracy"]


@pytest.mark.usefixtures("no_report")
def test_what_is_resumed_is_not_encoded_anew(config_of, capsys):
    run = Trainer(config_of(THINGS, "train.budget=1steps")).fit().run_directory
    capsys.readouterr()
    Trainer(compose_run("finetune", [f"resume={run}", "train.budget=2steps"])).fit()
    assert "tokens from the cache" in capsys.readouterr().err


@pytest.mark.usefixtures("no_report")
def test_the_body_comes_from_the_language_model_and_the_head_is_new(config_of, init):
    trainer = Trainer(config_of(THINGS, "train.budget=1steps", "optimizer.lr=1e-9", "optimizer.weight_decay=0"))
    run = trainer.fit().run_directory
    begun, model = load_model(str(init)).model.state_dict(), load_model(str(run)).model
    assert all(torch.allclose(p, begun[name], atol=1e-6) for name, p in model.named_parameters() if not name.startswith("head."))
    assert model.head.weight.shape == (3, 32)
    assert 0.01 < model.head.weight.std() < 0.03


@pytest.mark.usefixtures("no_report")
def test_a_classifier_is_trained_further_with_its_head(config_of, tmp_path, capsys):
    """Also on rows in which not every class occurs, in another order: classes keep their numbers."""
    run = Trainer(config_of(THINGS, *LEARN, "data.labels=[tool, fruit, animal]", "run.id=first")).fit().run_directory
    rows = write_rows(tmp_path / "more.jsonl", [row for row in THINGS if row["label"] != "tool"])
    further = ["run.id=second", "train.budget=1steps", "optimizer.lr=1e-6", "data.holdout=0.2"]
    result = Trainer(finetune_config(tmp_path, run, rows, *further)).fit()
    assert result.held_out is not None
    assert result.held_out.scores is not None
    assert result.held_out.scores.classes == ["tool", "fruit", "animal"]
    assert result.held_out.scores.accuracy > 0.9
    assert f"weights: {run}\n" in capsys.readouterr().err


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("plan", ["head_only", "embeddings", "first_n"])
def test_a_plan_that_a_tied_head_could_not_have_is_for_a_head_of_classes(config_of, init, plan):
    run = Trainer(config_of(THINGS, *LEARN, f"freeze={plan}", "freeze.first_n_blocks=1" if plan == "first_n" else "freeze.head=false"))
    if plan == "embeddings":
        assert run.config.model.tie_embeddings
    model, begun = load_model(str(run.fit().run_directory)).model, load_model(str(init)).model.state_dict()
    assert torch.equal(model.embeddings.tokens.weight, begun["embeddings.tokens.weight"])
    assert model.head.weight.abs().max() > 0.1  # it has learned


@pytest.fixture(scope="module")
def classifier(init, tmp_path_factory) -> Path:
    """A run of one step on texts."""
    folder = tmp_path_factory.mktemp("classifier")
    rows = write_rows(folder / "rows.jsonl", THINGS)
    return Trainer(finetune_config(folder, init, rows, "train.budget=1steps", "run.id=r")).fit().run_directory


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        ([*THINGS, {"text": "a car", "label": "tol"}], [], r"rows.jsonl, line 151: label=tol is none of the classes. Did you mean tool\?"),
        (
            THINGS,
            ["data.labels=[animal, fruit, tools]"],
            r"data.labels=.* has tools, which is none of the classes of the model's head. Did you mean tool\? There are: .*animal",
        ),
        (THINGS, ["data.labels=[tool, fruit, animal]"], "data.labels=.* are in another order than the classes of the model's head"),
        (PEOPLE, ["data.labels=[animal, fruit, tool]"], r"tags\[0\]=B-PER is none of the classes"),
        (
            [{"tokens": ["cat"], "tags": ["animal"]}] * 40,
            [],
            "its rows are of the classes .*, one for each word, and the model's head is for",
        ),
        (SUMS, [], r"data: its rows are texts to continue, and the model's head is for the class of each text \(animal, fruit, tool\)"),
    ],
)
def test_rows_that_are_not_for_the_head_of_the_weights(tmp_path, classifier, rows, overrides, message):
    config = finetune_config(tmp_path, classifier, write_rows(tmp_path / "rows.jsonl", rows), *overrides)
    with pytest.raises(UserError, match=message) as error:
        Trainer(config).fit()
    assert "\n" not in str(error.value)


def test_a_run_that_goes_on_keeps_its_classes(config_of, tmp_path):
    Trainer(config_of(THINGS, "run.id=r", "train.budget=1steps")).fit()
    fewer = [row for row in THINGS if row["label"] != "tool"]
    with pytest.raises(UserError, match=r"its rows are of the classes \[animal, fruit\], one for each text, and the model's head is for"):
        Trainer(config_of(fewer, "run.id=r", "train.budget=2steps")).fit()


@pytest.mark.usefixtures("no_report")
def test_a_run_goes_on_without_the_weights_it_began_from(tmp_path, init):
    mine, rows = shutil.copytree(init, tmp_path / "mine"), write_rows(tmp_path / "rows.jsonl", PEOPLE)
    run = Trainer(finetune_config(tmp_path, mine, rows, "run.id=r")).fit().run_directory
    shutil.rmtree(mine)
    assert Trainer(compose_run("finetune", [f"resume={run}", "train.budget=5steps"])).fit().state.step == 5


def test_one_class_is_none(config_of):
    with pytest.raises(UserError, match=r"data\.labels: all rows have the same class, a"):
        Trainer(config_of([{"text": f"t{n}", "label": "a"} for n in range(40)])).fit()


def test_pretraining_has_no_head_of_classes():
    with pytest.raises(UserError, match=r"model\.head=sequence: a head of classes is put on trained weights; gpt finetune does it"):
        compose_run("pretrain", ["model.head=sequence", "model.classes=[a,b]"])


def test_an_unfinished_classifier_is_read_from_its_checkpoint(config_of):
    run = Trainer(config_of(THINGS, "train.budget=1steps")).fit().run_directory
    shutil.rmtree(run / "model")
    model = load_model(str(run)).model
    assert (model.config.head, model.config.classes) == ("sequence", ["animal", "fruit", "tool"])
    assert json.loads((run / "checkpoints/step-00000001/state.json").read_text())["step"] == 1


def test_it_is_exported_for_the_stock_class(classifier, tmp_path, capsys):
    assert export(compose_use("export", [f"run={classifier}", f"output={tmp_path / 'out'}", "dtype=bfloat16"])) == 0
    told = capsys.readouterr()
    assert "as bfloat16" in told.out
    assert "GPT2ForSequenceClassification" in told.out
    assert "transformers.AutoModelForSequenceClassification.from_pretrained" in told.err
    assert "or gpt evaluate model=" in told.err
    assert not (tmp_path / "out" / "generation_config.json").exists()
    stock: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (stock.dtype, list(stock.config.id2label.values())) == (torch.bfloat16, ["animal", "fruit", "tool"])
    shutil.copytree(classifier, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")  # then the card is made from the run
    assert export(compose_use("export", [f"run={tmp_path / 'run'}", f"output={tmp_path / 'again'}"])) == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert "loss, nats per example" in card
    assert "A classifier of texts: " in card


@pytest.mark.usefixtures("no_report")
def test_adapters_train_beside_the_new_head(config_of, tmp_path, capsys):
    run = Trainer(config_of(THINGS, *LEARN, "lora.rank=4", "optimizer.lr=0.02")).fit().run_directory
    assert validations(run)[-1]["val_accuracy"] > 0.6
    written = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["score"])
    card = (run / "adapter" / "README.md").read_text()
    assert 'AutoPeftModelForSequenceClassification.from_pretrained("<this folder>", num_labels=3)  # with its base' in card

    code = card.partition("```python\n")[2].partition("```")[0].replace("<this folder>", str(run / "adapter"))
    pytest.importorskip("peft")
    made: dict[str, Any] = {}
    exec(code, made)  # as a reader of the card would
    stock: Any = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    read = made["tokenizer"](["my cow", "I saw a hammer"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert (made["model"].eval()(**read).logits - stock(**read).logits).abs().max() < 1e-5
    assert load_model(str(run)).model.config.classes == ["animal", "fruit", "tool"]

    tokens = torch.tensor([load_model(str(run)).tokenizer.encode("I saw a hammer")])
    out = tmp_path / "copied"
    capsys.readouterr()
    assert export(compose_use("export", [f"run={run}", "format=peft", f"output={out}"])) == 0
    told = capsys.readouterr().err
    assert f'peft.AutoPeftModelForSequenceClassification.from_pretrained("{out}", num_labels=3), or gpt evaluate model=' in told
    merged, adapter = (load_model(str(folder)).model for folder in (run / "model", out))
    assert adapter.config == merged.config
    with torch.no_grad():
        assert (adapter(tokens) - merged(tokens)).abs().max() < 1e-5
    further = config_of(THINGS, "run.id=further", f"init={out}", "train.budget=1steps", "optimizer.lr=1e-6", "data.holdout=0.2")
    assert further.model.classes == ["animal", "fruit", "tool"]
    assert validations(Trainer(further).fit().run_directory)[-1]["val_accuracy"] == pytest.approx(
        validations(run)[-1]["val_accuracy"], abs=0.05
    )


@pytest.mark.usefixtures("no_report")
def test_every_token_may_be_asked_and_the_last_is_measured(config_of, capsys):
    config = config_of(THINGS, *LEARN, "loss_on=all")
    result = Trainer(config).fit()
    assert result.held_out is not None
    scores = result.held_out.scores
    assert scores is not None
    assert scores.count == len(held_out(config))
    assert scores.accuracy > 0.9
    assert re.search(r"40 steps, [\d,.]+M? tokens learned in", capsys.readouterr().err)
