import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gpt.compose import compose_run, load_run
from gpt.data.sources import open_source
from gpt.data.survey import survey
from gpt.errors import UserError
from gpt.model.transformer import GPT
from gpt.training.checkpoint import MANIFEST, list_checkpoints
from gpt.training.data import open_training_data
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Trainer
from tests.training.finetuning import (
    CHATS,
    CONTEXT,
    SUMS,
    finetune_config,
    nats,
    stop_in_the_middle,
    write_rows,
)
from tests.training.test_trainer import assert_same_run, losses


@pytest.fixture
def config_of(tmp_path, init):
    """Composes a fine-tuning run; takes rows, or the option of the group data, and overrides."""

    def compose(rows, *overrides):
        source = rows if isinstance(rows, str) else write_rows(tmp_path / "rows.jsonl", rows)
        return finetune_config(tmp_path, init, source, *overrides)

    return compose


def train_documents(run: Path) -> int:
    manifest = json.loads((run / "model" / MANIFEST).read_text())
    return sum(source["splits"]["train"]["documents"] for source in manifest["sources"])


@pytest.mark.usefixtures("no_report")
def test_completions_are_learned_and_nothing_else_counts(config_of):
    """One row a step, so that an epoch is whole steps: each of its examples is learned once, four tokens of it."""
    trainer = Trainer(config_of(SUMS, "train.batch_tokens=64", "train.budget=2epochs", "optimizer.lr=0.01"))
    result = trainer.fit()
    run = result.run_directory
    found = losses(run)
    assert len(found) == 2 * trainer.batches.windows
    assert found[len(found)] < 0.6 * found[1]
    assert 80 < train_documents(run) < len(SUMS)
    assert read_metrics(run / "metrics.jsonl")[-2]["tokens"] == 2 * 4 * train_documents(run)
    assert result.held_out is not None
    assert result.held_out.tokens == 4 * (len(SUMS) - train_documents(run))


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_the_loss_is_that_of_every_example_by_itself(config_of, init, packing, loss_on):
    rows = [{"prompt": f"{'x' * (n % 7)}{n} is ", "completion": f"{n * n * n}{'y' * (n % 5)}"} for n in range(60)]
    overrides = [f"data.packing={packing}", "train.micro_batch=1", f"loss_on={loss_on}"]
    config = config_of(rows, *overrides)
    windows = open_training_data(config, 1, lambda _: None).batches.windows
    hold_out = survey(open_source(config.data, "auto"), config.data.holdout, 0, examples=True).hold_out
    result = Trainer(config_of(rows, *overrides, f"train.batch_tokens={64 * windows}", "train.budget=1steps")).fit()
    training = [row for number, row in enumerate(rows, 1) if not hold_out(f"rows.jsonl:{number}")]
    assert len(training) == train_documents(result.run_directory) < len(rows)
    if loss_on == "all":  # nothing stands before the first byte; all others are learned
        texts = [row["prompt"] + row["completion"] for row in training]
        training = [{"prompt": text[:1], "completion": text[1:]} for text in texts]
    total, count = nats(GPT.from_pretrained(init), training)
    assert losses(result.run_directory)[1] == pytest.approx(total / count, abs=1e-5)
    assert result.state.tokens == count
    assert (windows == len(training)) == (packing == "none")


def test_what_a_run_leaves(config_of):
    result = Trainer(config_of(SUMS, "checkpoint.every=1steps", "checkpoint.keep_last=5")).fit()
    run = result.run_directory
    manifest = json.loads((run / "model" / MANIFEST).read_text())
    assert manifest["kind"] == "language_model"
    checkpoints = list_checkpoints(run / "checkpoints")
    assert len(checkpoints) == 3
    for _, checkpoint in checkpoints:
        assert json.loads((checkpoint / MANIFEST).read_text()) == manifest
        assert MANIFEST in json.loads((checkpoint / "COMPLETE").read_text())
    report = (run / "report.html").read_text()
    shown = re.findall(r'class="prompt">(.*?)</span>.*?expected</span> (.*?)</p>', report, re.DOTALL)
    assert len(shown) == 3
    for prompt, expected in shown:
        assert {"prompt": prompt, "completion": expected} in SUMS
    assert (run / "model" / "README.md").is_file()


@pytest.mark.usefixtures("no_report")
def test_config_yaml_repeats_the_run(config_of, tmp_path):
    first = Trainer(config_of(SUMS, "run.id=first", "loss_on=all", "data.too_long=drop")).fit().run_directory
    again = load_run(first)
    again.run.id = "again"
    assert again.loss_on == "all"
    assert again.data.too_long == "drop"
    assert_same_run(first, Trainer(again).fit().run_directory)


def test_conversations_bring_their_template(config_of, capsys):
    run = Trainer(config_of(CHATS)).fit().run_directory
    assert "a plain one is used" in capsys.readouterr().err
    template = AutoTokenizer.from_pretrained(run / "model").chat_template
    assert template is not None
    assert "<|assistant|>" in template
    prompt = re.search(r'class="prompt">(.*?)</span>', (run / "report.html").read_text(), re.DOTALL)
    assert prompt is not None
    assert "user" in prompt[1]
    assert "say" in prompt[1]


@pytest.mark.usefixtures("no_report")
def test_prompts_and_completions_of_messages_bring_it_too(config_of):
    rows = [{"prompt": chat["messages"][:1], "completion": chat["messages"][1:]} for chat in CHATS]
    run = Trainer(config_of(rows, "train.budget=1steps")).fit().run_directory
    assert AutoTokenizer.from_pretrained(run / "model").chat_template is not None


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("rows", [SUMS, [{"text": row["prompt"] + row["completion"]} for row in SUMS]])
def test_no_template_where_there_are_no_conversations(config_of, rows):
    run = Trainer(config_of(rows, "train.budget=1steps")).fit().run_directory
    assert AutoTokenizer.from_pretrained(run / "model").chat_template is None


@pytest.mark.usefixtures("no_report")
def test_of_texts_all_is_learned_but_the_first_token(config_of):
    texts = [{"text": "a text of 24 characters!"} for _ in range(3)] + [{"text": "another, of 23 of them."} for _ in range(57)]
    trainer = Trainer(config_of(texts, "train.batch_tokens=64", "train.budget=1epochs", "data.packing=none"))
    run = trainer.fit().run_directory
    tokens = read_metrics(run / "metrics.jsonl")[-2]["tokens"]
    assert 23 * train_documents(run) <= tokens <= 23 * train_documents(run) + 3


@pytest.mark.slow
def test_the_embedded_set_trains(config_of):
    """Its rows are longer than this model reads: they are cut, and counted."""
    run = Trainer(config_of("stdlib_docstrings", "train.budget=2steps", "train.eval_tokens=64", "train.final_eval_tokens=64")).fit()
    manifest = json.loads((run.run_directory / "model" / MANIFEST).read_text())
    assert manifest["sources"][0]["counts"]["truncated"] > 100
    assert "expected" in (run.run_directory / "report.html").read_text()


@pytest.mark.usefixtures("no_report")
def test_two_sources_of_examples(tmp_path, init):
    """Rows of each are drawn by weight, and every format is learned."""
    write_rows(tmp_path / "a.jsonl", SUMS)
    write_rows(tmp_path / "b.jsonl", [{"text": f"nothing but a {'long ' * (n % 9)}text"} for n in range(60)])
    parts = (
        "["
        + ", ".join(f"{{source: jsonl, paths: ['{tmp_path / name}'], weight: {w}}}" for name, w in (("a.jsonl", 3), ("b.jsonl", 1)))
        + "]"
    )
    config = finetune_config(tmp_path, init, "mixture", f"data.parts={parts}", "data.packing=none", "train.batch_tokens=16384")
    trainer = Trainer(config)
    trainer.fit()
    drawn = [(row != -100).sum() == 4 for step in range(4) for row in trainer.batches.batch(step).targets]
    assert sum(map(bool, drawn)) == 0.75 * len(drawn) == 0.75 * 1024


@pytest.mark.usefixtures("no_report")
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(config_of, tmp_path):
    settings = ["train.budget=8steps", "train.micro_batch=1", "optimizer.lr=0.01", "train.batch_tokens=512"]
    whole = Trainer(config_of(SUMS, *settings, "run.id=whole"))
    whole.fit()
    assert whole.batches.windows < 8 * whole.sequences, "the test must cross an epoch's border"
    result = stop_in_the_middle(Trainer(config_of(SUMS, *settings, "run.id=stopped")), 3)
    assert (result.exit_code, result.state.step) == (143, 3)
    assert Trainer(compose_run("finetune", [f"resume={result.run_directory}"])).fit().exit_code == 0
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/stopped")


@pytest.mark.usefixtures("no_report")
def test_a_finetuned_run_is_finetuned_further(config_of, tmp_path):
    run = Trainer(config_of(CHATS, "run.id=first")).fit().run_directory
    config = finetune_config(tmp_path, run, tmp_path / "rows.jsonl", "run.id=second")
    assert Trainer(config).fit().exit_code == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "runs/second/model").chat_template is not None


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        (SUMS, ["loss_on=assistant"], r"loss_on=assistant is not for rows of prompt_completion"),
        (SUMS[:1], [], r"data: .* has no training examples"),
        ([*SUMS, {"prompt": "a"}], [], r"rows\.jsonl, line 121"),
    ],
)
def test_rows_that_cannot_be_trained_on(config_of, rows, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        Trainer(config_of(rows, *overrides)).fit()
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_report")
def test_rows_left_out_are_counted(config_of):
    rows = [*SUMS, {"prompt": "an empty one", "completion": ""}, {"prompt": "x" * 200, "completion": "long"}]
    run = Trainer(config_of(rows, "data.too_long=drop", "train.budget=1steps")).fit().run_directory
    counts = json.loads((run / "model" / MANIFEST).read_text())["sources"][0]["counts"]
    assert (counts["dropped_no_target"], counts["dropped_too_long"]) == (1, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.streaming=true"], r"data\.streaming=true is of text: examples are packed"),
        (["data.document_mask=true"], r"data\.document_mask=true is of text: examples never see each other"),
        (["train.sequence_length=128"], rf"train\.sequence_length=128 is more than the model reads: model\.context_length={CONTEXT}"),
        (["model.n_layer=3"], r"model\.n_layer: init=.* brings its own shape"),
        (["tokenizer=byte"], r"tokenizer: init=.* brings its own shape and tokenizer"),
    ],
)
def test_settings_that_cannot_be(config_of, overrides, message):
    with pytest.raises(UserError, match=message):
        config_of(SUMS, *overrides)


def test_finetune_needs_weights_and_pretrain_needs_text(tmp_path, init):
    with pytest.raises(UserError, match="init: finetune starts from weights"):
        compose_run("finetune", ["data=stdlib_docstrings"])
    with pytest.raises(UserError, match="data=stdlib_docstrings: holds examples for fine-tuning, no text"):
        compose_run("pretrain", ["data=stdlib_docstrings"])


@pytest.mark.usefixtures("no_report")
def test_each_command_continues_its_own_runs(config_of):
    run = Trainer(config_of(SUMS, "train.budget=1steps")).fit().run_directory
    with pytest.raises(UserError, match="that run was started by gpt finetune"):
        compose_run("pretrain", [f"resume={run}"])


@pytest.mark.usefixtures("no_report")
def test_other_examples_under_the_same_run_are_refused(config_of, tmp_path):
    Trainer(config_of(SUMS, "run.id=r", "train.budget=1steps")).fit()
    with pytest.raises(UserError, match="data: the text or its tokens are not those"):
        Trainer(config_of([*SUMS, {"prompt": "one", "completion": "more"}], "run.id=r")).fit()
    shutil.rmtree(tmp_path / "cache")  # made again, and the same
    assert Trainer(config_of(SUMS, "run.id=r", "train.budget=2steps")).fit().state.step == 2


@pytest.mark.usefixtures("no_report")
def test_a_run_goes_on_without_the_weights_it_began_from(tmp_path, init):
    """What it needs of them is in the run: the tokenizer, and in every checkpoint the weights."""
    mine, rows = shutil.copytree(init, tmp_path / "mine"), write_rows(tmp_path / "rows.jsonl", SUMS)
    run = Trainer(finetune_config(tmp_path, mine, rows, "run.id=r")).fit().run_directory
    shutil.rmtree(mine)
    result = Trainer(compose_run("finetune", [f"resume={run}", "train.budget=5steps"])).fit()
    assert result.state.step == 5
    assert load_run(run).tokenizer.path == str(mine), "the config stays as it was, so that the same command goes on with it"


@pytest.mark.usefixtures("no_report")
def test_a_sample_shows_its_prompt_once(config_of, capsys):
    Trainer(config_of(CHATS, "train.budget=1steps")).fit()
    said = capsys.readouterr().err
    first, *others = said.split("\n--- prompt:\n")[1:]
    assert others
    word = re.search(r"say (\w+)", first)[1]
    assert said.count(f"say {word}") == 1
    prompt, answer = first.split("\n--- answer:\n")
    assert f"say {word}" in prompt
    assert f"--- expected: {word.upper()}" in answer
