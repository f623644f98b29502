"""How near answers come to their references: the usual figures, all from 0 to 100, as papers give them.

Exact match and token F1 follow SQuAD v1.1's official script (Rajpurkar et al., 2016); ROUGE is `rouge_score` (Lin, 2004), chrF
(Popović, 2015) and BLEU (Papineni et al., 2002) are `sacrebleu`. Of several references the best counts."""

from __future__ import annotations

import importlib
import logging
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt.data.config import Metric
from gpt.errors import UserError

_LIBRARIES = {"rouge": "rouge_score.rouge_scorer", "chrf": "sacrebleu.metrics", "bleu": "sacrebleu.metrics"}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LATIN_SHARE = 0.9  # of a text's letters and digits, below which ROUGE says little


@dataclass
class Scores:
    """What was found.

    Attributes:
        figures: exact_match, token_f1, rouge_1, rouge_2, rouge_l, chrf, bleu; 0 to 100.
        errors: standard errors of those that are means over answers.
        each: per answer, those that one answer has.
        signatures: how a library says that its figure was made, for others to repeat it.
        notes: what a reader of the figures should know.
    """

    figures: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    each: list[dict[str, float]] = field(default_factory=list)
    signatures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add_means(self, values: Sequence[dict[str, float]]) -> None:
        """Figures that are the means of what each answer has."""
        self.each = self.each or [{} for _ in values]
        for before, own in zip(self.each, values, strict=True):
            before.update(own)
        for name in values[0]:
            column = [own[name] for own in values]
            self.figures[name] = statistics.fmean(column)
            if len(column) > 1:
                self.errors[name] = statistics.stdev(column) / len(column) ** 0.5


def check_libraries(metrics: Sequence[Metric], key: str = "metrics") -> None:
    """Raises UserError if a library that a metric needs is not installed. `key` is what the user calls the metrics."""
    for metric in metrics:
        try:
            if metric in _LIBRARIES:
                importlib.import_module(_LIBRARIES[metric])
        except ImportError as error:
            library = _LIBRARIES[metric].partition(".")[0]
            raise UserError(f"{key}=[{metric}] needs {library}: pip install 'gpt-trainer[eval]' ({error})") from error


def score_answers(metrics: Sequence[Metric], answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """The figures of answers; `pass` is not among them (`gpt.evaluation.execution`).

    Args:
        metrics: which.
        answers: at least one; blanks at both ends do not count.
        references: right answers of each, at least one.
    """
    scores = Scores()
    answers, references = [answer.strip() for answer in answers], [[text.strip() for text in texts] for texts in references]
    for metric, of_one in (("exact_match", exact_match), ("token_f1", token_f1)):
        if metric in metrics:
            best = [100.0 * _best(of_one, answer, texts) for answer, texts in zip(answers, references, strict=True)]
            scores.add_means([{metric: value} for value in best])
    if "rouge" in metrics:
        _add_rouge(scores, answers, references)
    for metric in ("chrf", "bleu"):
        if metric in metrics:
            _add_sacrebleu(metric, scores, answers, references)
    return scores


def _best(of_one: Callable[[str, str], float], answer: str, texts: Sequence[str]) -> float:
    return max(of_one(answer, text) for text in texts)


def normalised(text: str) -> str:
    """As SQuAD compares answers: lower case, no punctuation, no English articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    """1 if they are the same but for what `normalised` takes away, else 0."""
    return float(normalised(answer) == normalised(reference))


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words of both, as bags; 0 to 1, and 0 where either has none."""
    given, right = normalised(answer).split(), normalised(reference).split()
    same = sum((Counter(given) & Counter(right)).values())
    if not same:
        return 0.0
    precision, recall = same / len(given), same / len(right)
    return 2 * precision * recall / (precision + recall)


def _add_rouge(scores: Scores, answers: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    from rouge_score import rouge_scorer

    names = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    logging.getLogger("absl").setLevel(logging.WARNING)  # the scorer announces its tokenizer
    scorer = rouge_scorer.RougeScorer([*names], use_stemmer=False)
    values = []
    for answer, texts in zip(answers, references, strict=True):
        found = scorer.score_multi(texts, answer)
        values.append({ours: 100.0 * float(found[theirs].fmeasure) for theirs, ours in names.items()})
    scores.add_means(values)
    scores.signatures["rouge"] = f"rouge_score {_version('rouge_score')}, F-measure, no stemming"
    letters = [character for texts in references for text in texts for character in text if character.isalnum()]
    if letters and (share := sum(map(str.isascii, letters)) / len(letters)) < _LATIN_SHARE:
        scores.notes.append(
            f"rouge counts words of a-z and 0-9 only, which {share:.0%} of the references' letters are; chrf counts those of every script"
        )


def _add_sacrebleu(metric: str, scores: Scores, answers: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    counter = CHRF() if metric == "chrf" else BLEU(force=True)  # force: it warns of texts that look tokenised
    most = max(map(len, references))
    streams: list[Any] = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]  # None: none
    found = counter.corpus_score(list(answers), streams)
    scores.figures[metric] = float(found.score)
    scores.signatures[metric] = str(counter.get_signature())


def _version(library: str) -> str:
    from importlib.metadata import version

    return version(library)
