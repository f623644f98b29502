"""`gpt finetune experiment=finetune_classify` against TF-IDF with logistic regression: `make bench ARGS=classification`.

The baseline reads the examples that the run trains on, whole where the run cuts them at its context, and is scored on those that the run
holds out. Which n-grams it counts, and how much it is regularised, is chosen by cross-validation on the training examples, in folds that
keep together what the run keeps together (`data.holdout_by`). A second baseline is told, besides, where the last words stand.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import FeatureUnion

from gpt.compose import compose_run
from gpt.data.config import DataConfig
from gpt.data.embedded import group_of, standard_library_files
from gpt.data.sources import ReadReport, open_source
from gpt.data.survey import HoldOut, survey
from gpt.training.metrics import read_metrics

EXPERIMENT = "experiment=finetune_classify"
EXAMPLES = DataConfig("stdlib_exceptions", holdout=0.2, holdout_by="package")
"""What it learns and holds out, for the model that it starts from, before which no run can be composed."""
SEEDS = (1337, 1338, 1339)
FOLDS = 3
PLACES = 12
STRENGTHS = (10.0, 100.0, 1000.0)
"""C of the logistic regression: the larger, the less it is held back."""


@dataclass(frozen=True)
class Examples:
    """Texts with their classes, and what each belongs to; itself, without `data.holdout_by`."""

    texts: list[str]
    labels: list[str]
    groups: list[str]


@dataclass(frozen=True)
class Baseline:
    """What was chosen, and how it does.

    Attributes:
        features: by their name in `FEATURES`.
        strength: C.
        cross_validated: mean accuracy over the folds.
        accuracy, macro_f1: on the held-out examples, after a fit on all training examples.
    """

    features: str
    strength: float
    cross_validated: float
    accuracy: float
    macro_f1: float


def _words(longest: int) -> TfidfVectorizer:
    return TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, longest), sublinear_tf=True)


def _characters(shortest: int, longest: int, analyzer: Literal["char", "char_wb"] = "char", lowercase: bool = True) -> TfidfVectorizer:
    return TfidfVectorizer(analyzer=analyzer, ngram_range=(shortest, longest), min_df=2, lowercase=lowercase, sublinear_tf=True)


def _last_words() -> TfidfVectorizer:
    """The last PLACES words, signs and ends of lines, each with its distance from the end."""
    return TfidfVectorizer(analyzer=cast(Any, _placed), sublinear_tf=True)


def _placed(text: str) -> list[str]:
    return [f"{place} {word}" for place, word in enumerate(reversed(re.findall(r"\w+|[^\w\s]|\n", text)[-PLACES:]))]


FEATURES: dict[str, Callable[[], TfidfVectorizer | FeatureUnion]] = {
    "words": lambda: _words(1),
    "words and pairs": lambda: _words(2),
    "characters 2-5": lambda: _characters(2, 5),
    "characters 2-5, case kept": lambda: _characters(2, 5, lowercase=False),
    "characters 2-5 within words": lambda: _characters(2, 5, "char_wb"),
    "words and pairs, characters 2-5 within words": lambda: FeatureUnion(
        [("words", _words(2)), ("characters", _characters(2, 5, "char_wb"))]
    ),
    "words and pairs, last words by place": lambda: FeatureUnion([("words", _words(2)), ("last", _last_words())]),
    "characters 2-5, case kept, last words by place": lambda: FeatureUnion(
        [("characters", _characters(2, 5, lowercase=False)), ("last", _last_words())]
    ),
}
"""What is counted: words, signs apart, and runs of characters; and what stands how far from the end, which no n-gram says."""
PLACED = tuple(name for name in FEATURES if name.endswith("by place"))
NGRAMS = tuple(name for name in FEATURES if name not in PLACED)


def read_split(config: DataConfig) -> tuple[Examples, Examples]:
    """The examples that a run with this data trains on, and those that it holds out.

    Raises:
        UserError: they cannot be read.
    """
    source = open_source(config, config.on_error)
    hold_out = _hold_out(config)
    train, held_out = Examples([], [], []), Examples([], [], [])
    for row in source.rows(ReadReport()):
        side = held_out if hold_out(row.held_out_key) else train
        side.texts.append(row.values["text"])
        side.labels.append(row.values["label"])
        side.groups.append(row.held_out_key)
    return train, held_out


def files_to_read(config: DataConfig) -> list[str]:
    """The files of the standard library of packages that a run with this data, held out by package, does not hold out."""
    hold_out = _hold_out(config)
    return [file.path for file in standard_library_files() if not hold_out(group_of(file.name, "package"))]


def _hold_out(config: DataConfig) -> HoldOut:
    return survey(open_source(config, config.on_error), config.holdout, 0, examples=True).hold_out


def fit_baseline(train: Examples, held_out: Examples, names: Sequence[str] = NGRAMS, folds: int = FOLDS) -> Baseline:
    """Choose features and C by cross-validated accuracy, fit all training examples, score the held-out ones.

    Args:
        train: every class at least `folds` times.
        held_out: read for the final score only.
        names: which of `FEATURES` to try.
        folds: of the cross-validation.
    """
    found = {choice: score for name in names for choice, score in _cross_validated(train, name, folds).items()}
    (name, strength), score = max(found.items(), key=lambda item: item[1])
    vectorizer = FEATURES[name]()
    model = _fitted(vectorizer.fit_transform(train.texts), train.labels, strength)
    said = model.predict(vectorizer.transform(held_out.texts))
    right = held_out.labels
    return Baseline(name, strength, score, float(accuracy_score(right, said)), float(f1_score(right, said, average="macro")))


def _cross_validated(train: Examples, name: str, folds: int) -> dict[tuple[str, float], float]:
    """(features, C) -> mean accuracy."""
    sums = dict.fromkeys(itertools.product([name], STRENGTHS), 0.0)
    for inside, outside in StratifiedGroupKFold(folds, shuffle=True, random_state=0).split(train.texts, train.labels, train.groups):
        vectorizer = FEATURES[name]()
        fitted = vectorizer.fit_transform([train.texts[i] for i in inside])
        scored = vectorizer.transform([train.texts[i] for i in outside])
        for strength in STRENGTHS:
            model = _fitted(fitted, [train.labels[i] for i in inside], strength)
            sums[name, strength] += float(accuracy_score([train.labels[i] for i in outside], model.predict(scored)))
    return {choice: total / folds for choice, total in sums.items()}


def _fitted(features: Any, labels: list[str], strength: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)  # else the baseline would be weaker than it is
        return LogisticRegression(C=strength, max_iter=5000).fit(features, labels)


def classification() -> None:
    """Print both as a Markdown table. INIT=runs/<id> names the model to fine-tune; else the default one is trained, which takes minutes, on
    what is not held out: of the whole standard library it would have read the held-out code, exceptions and all, as plain text."""
    with tempfile.TemporaryDirectory() as folder:
        init = os.environ.get("INIT") or _run(
            folder, "pretrain", "base", ["data=text", f"data.paths=[{','.join(files_to_read(EXAMPLES))}]"]
        )
        train, held_out = read_split(compose_run("finetune", [f"init={init}", EXPERIMENT]).data)
        print(f"\n### {len(set(train.labels))} classes, {len(train.texts):,} examples to train on, {len(held_out.texts):,} held out\n")
        print("| | accuracy | macro-F1 | accuracy cross-validated |\n| --- | ---: | ---: | ---: |")
        for what, names in (("TF-IDF", NGRAMS), ("TF-IDF with the last words by their place", PLACED)):
            found = fit_baseline(train, held_out, names)
            figures = f"{found.accuracy:.2%} | {found.macro_f1:.2%} | {found.cross_validated:.2%}"
            print(f"| {what}, logistic regression ({found.features}, C {found.strength:g}) | {figures} |", flush=True)
        for seed in SEEDS:
            run = _run(folder, "finetune", f"seed-{seed}", [f"init={init}", EXPERIMENT, f"seed={seed}"])
            end = [line for line in read_metrics(Path(run) / "metrics.jsonl") if "val_loss" in line][-1]
            print(f"| {EXPERIMENT}, seed {seed} | {end['val_accuracy']:.2%} | {end['val_macro_f1']:.2%} | |", flush=True)


def _run(folder: str, command: str, name: str, settings: Sequence[str]) -> str:
    """Train, and return the run's directory."""
    done = subprocess.run(
        [sys.executable, "-m", "gpt", command, f"run.dir={folder}", f"run.id={name}", *settings], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"gpt {command} {' '.join(settings)}: {done.stderr[-2000:]}")
    return str(Path(folder) / name)


if __name__ == "__main__":
    classification()
