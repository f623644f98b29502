"""The baseline of the classification experiment: it sees what a run sees, and chooses by what it is given to train on."""

import itertools
from pathlib import Path

import pytest
import yaml

from gpt.data.embedded import group_of, standard_library_files
from gpt.training.data import open_training_data
from scripts.baseline_classification import EXAMPLES, Examples, files_to_read, fit_baseline, read_split
from tests.training.finetuning import finetune_config, save_small_model, write_rows
from tests.training.test_classifiers import THINGS


def test_held_out_examples_are_those_that_a_run_is_measured_on(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", THINGS)
    config = finetune_config(tmp_path, save_small_model(tmp_path / "init"), rows, "data.holdout=0.3")
    data = open_training_data(config, 4, lambda text: None)
    measured = [
        (data.tokenizer.decode(example.ids), data.classes[example.classes[len(example.ids) - 1]]) for example in data.labelled(1000)
    ]
    train, held_out = read_split(config.data)
    assert sorted(zip(held_out.texts, held_out.labels, strict=True)) == sorted(measured)
    both = [*zip(train.texts, train.labels, strict=True), *zip(held_out.texts, held_out.labels, strict=True)]
    assert sorted(both) == sorted((row["text"], row["label"]) for row in THINGS)


def test_the_model_that_is_trained_for_it_has_read_no_package_that_is_held_out():
    train, held_out = read_split(EXAMPLES)
    paths = set(files_to_read(EXAMPLES))
    read = {group_of(file.name, "package") for file in standard_library_files() if file.path in paths}
    assert set(train.groups) <= read
    assert not set(held_out.groups) & read
    experiment = yaml.safe_load(Path("configs/experiment/finetune_classify.yaml").read_text())
    assert experiment["defaults"] == [{"override /data": EXAMPLES.source}]
    assert experiment["data"] == {"holdout": EXAMPLES.holdout, "holdout_by": EXAMPLES.holdout_by}


@pytest.fixture
def orders() -> Examples:
    """Two words in one order or the other, among others: only who counts pairs can tell."""
    around = [f"{a} {{}} {b}" for a, b in itertools.product("pqrst", "vwxyz")]
    pairs = {"red_first": "red blue", "blue_first": "blue red"}
    texts = [text.format(pair) for text in around for pair in pairs.values()]
    return Examples(texts, [label for _ in around for label in pairs], texts)


def test_features_are_chosen_by_cross_validation_and_scored_on_the_rest(orders):
    texts = ["m red blue n", "m blue red n", "o red blue n", "o blue red n"]
    held_out = Examples(texts, ["red_first", "blue_first", "red_first", "red_first"], texts)
    found = fit_baseline(orders, held_out, ["words", "words and pairs"])
    assert (found.features, found.cross_validated) == ("words and pairs", 1.0)
    assert found.accuracy == 0.75
    assert found.macro_f1 == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert fit_baseline(orders, held_out, ["words"]).cross_validated < 0.7


def test_what_stands_at_the_end_can_be_told_apart_from_what_stands_elsewhere():
    """One word stands everywhere, the other either here or there: only who knows the place can tell."""
    texts = [f"{first} {word} {last}" for word in "abcdefgh" for first, last in (("red", "blue"), ("blue", "red"))]
    examples = Examples(texts, [text.split()[-1] for text in texts], texts)
    held_out = Examples(["red x blue", "blue x red"], ["blue", "red"], ["1", "2"])
    assert fit_baseline(examples, held_out, ["words and pairs, last words by place"]).accuracy == 1.0
    assert fit_baseline(examples, held_out, ["words"]).accuracy == 0.5


def test_folds_keep_groups_together(orders):
    """A word that is the group's own says the class of all of it, and nothing of any other group."""
    groups = [str(number // 4) for number in range(len(orders.texts))]
    labels = [orders.labels[int(group) % 2] for group in groups]
    texts = [f"own{group} of its group" for group in groups]
    held_out = Examples(["own0 of its group"], labels[:1], groups[:1])
    assert fit_baseline(Examples(texts, labels, groups), held_out, ["words"]).cross_validated < 0.7
    assert fit_baseline(Examples(texts, labels, [str(n) for n in range(len(texts))]), held_out, ["words"]).cross_validated == 1.0
