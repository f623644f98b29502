"""What a run that teaches classes leaves besides its weights: held-out examples with what is said of them, and its figures for people."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from gpt.evaluation.classification import ClassScores, likeliest, matrix_lines
from gpt.model.transformer import GPT
from gpt.training.charts import CLASS_NAME, NUMBERED_CLASSES, draw_confusion, svg
from gpt.training.data import Labelled, TrainingData
from gpt.training.report import Chart, Sample

SAMPLES = 6  # held-out examples that are shown
_MOST_DRAWN = 40  # classes of a confusion matrix
_TEXT = 600  # characters of a text that is shown


@torch.no_grad()
def class_samples(model: GPT, data: TrainingData) -> list[Sample]:
    """Some held-out examples, with the classes that the model finds likeliest and those that are right.

    Args:
        model: in eval mode.
        data: of its run.
    """
    samples, device = [], model.head.weight.device
    with torch.compiler.set_stance("force_eager"):
        for example in data.labelled(SAMPLES):
            said = likeliest(model.head, model.hidden_states(torch.tensor([example.ids], device=device)))[0].tolist()
            samples.append(_of_text(data, example, said) if data.head == "sequence" else _of_words(data, example, said))
    return samples


def _of_text(data: TrainingData, example: Labelled, said: list[int]) -> Sample:
    ((place, right),) = example.classes.items()
    text = data.tokenizer.decode(example.ids)
    shown = text if len(text) <= _TEXT else f"{text[:_TEXT]} …"
    return Sample(shown, f"\n→ {data.classes[said[place]]}", data.classes[right])


def _of_words(data: TrainingData, example: Labelled, said: list[int]) -> Sample:
    """The words with their tags. A word reaches to where the next one begins."""
    borders = [*example.classes, len(example.ids)]
    words = [data.tokenizer.decode(example.ids[start:end]).strip() for start, end in pairwise(borders)]
    right = [data.classes[number] for number in example.classes.values()]
    predicted = [data.classes[said[place]] for place in example.classes]

    def tagged(tags: list[str]) -> str:
        return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))

    return Sample("", tagged(predicted), tagged(right) if predicted != right else "the same")


def say_samples(samples: list[Sample], say: Callable[[str], None]) -> None:
    """The samples as lines for people."""
    for sample in samples:
        shown = " ".join(sample.prompt.split())[:200]
        said = sample.text.strip().removeprefix("→ ")
        mark = "" if sample.expected in (said, "the same") else f"   (right: {sample.expected})"
        say(f"--- {shown}\n    -> {said}{mark}" if shown else f"--- {said}{mark}")


def confusion_chart(scores: ClassScores) -> Chart:
    """The confusion matrix; of many classes, of those that occur most."""
    often = sorted(range(len(scores.classes)), key=lambda number: -int(scores.matrix[number].sum()))[:_MOST_DRAWN]
    shown = sorted(often)
    names, counts = [scores.classes[number] for number in shown], scores.matrix[shown][:, shown].tolist()
    note = f"Held-out {scores.what}s: {scores.count:,}."
    if len(shown) < len(scores.classes):
        note += f" The {len(shown)} most frequent of {len(scores.classes)} classes."
    title = "What was taken for what"
    longest, few, numbered = min(CLASS_NAME, max(map(len, names))), len(names) <= 5, len(names) <= NUMBERED_CLASSES
    beside, below = (0.0135, 0.0165) if numbered else (0.009, 0.011)  # of a character of their names
    picture = svg(
        title, lambda axes: draw_confusion(axes, names, counts), left=0.09 + beside * longest, top=0.98,
        bottom=0.15 if few else 0.09 + below * longest, height=3.2 if few else 4.4,
    )  # fmt: skip
    return Chart(title, picture, note)


def class_lines(scores: ClassScores) -> str:
    """The confusion matrix for the terminal, below an empty line."""
    return "\n" + "\n".join(matrix_lines(scores))
