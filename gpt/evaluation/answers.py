"""What a model answers to held-out prompts, written in batches over the key/value cache, and how good that is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt.data.config import Metric
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.evaluation.execution import Outcome, isolation, run_programs
from gpt.evaluation.questions import Question
from gpt.evaluation.scores import Scores, score_answers
from gpt.inference.generate import generate_text, whole_texts
from gpt.inference.sampling import Sampling
from gpt.model.transformer import GPT

MOST_TOKENS = 256
"""Of an answer, where nothing else is said."""
_FEWEST_TOKENS = 8
_SHOWN = 10  # examples in a report
_CODE_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Writing:
    """How answers are written.

    Attributes:
        context_length: tokens of prompt and answer.
        max_tokens: most of an answer; 0: twice those of the longest reference, at most MOST_TOKENS. Never more than half the context.
        batch: prompts at a time.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.
        stop: texts to stop before.
    """

    context_length: int
    max_tokens: int = 0
    batch: int = 32
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass
class Answers:
    """Answers, in the order of their questions.

    Attributes:
        texts: as they were written.
        max_tokens: that one could have.
        cut: prompts too long for the context, of which the beginning was left out.
    """

    texts: list[str]
    max_tokens: int
    cut: int


@dataclass
class Measured:
    """Answers and their figures.

    Attributes:
        scores: of the answers.
        answers: as they were written.
        questions: that they answer.
        outcomes: of their tests, if those ran.
    """

    scores: Scores
    answers: Answers
    questions: Sequence[Question]
    outcomes: list[Outcome] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """For a JSON file: the figures with their errors, how they were made, and the first answers."""
        answers = self.answers
        examples = []
        for number, (question, text) in enumerate(zip(self.questions[:_SHOWN], answers.texts, strict=False)):
            example: dict[str, Any] = {"prompt": question.prompt, "answer": text, "references": question.references}
            example |= {"metrics": self.scores.each[number]} if self.scores.each else {}
            example |= {"problem": self.outcomes[number].problem} if self.outcomes else {}
            examples.append(example)
        about = {"count": len(answers.texts), "max_tokens": answers.max_tokens, "cut_prompts": answers.cut}
        made = {"signatures": self.scores.signatures, "examples": examples}
        return {"metrics": self.scores.figures, "metrics_errors": self.scores.errors, "answers": about | made}


def write_answers(
    model: GPT,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    end_ids: frozenset[int],
    writing: Writing,
    written: Callable[[int], None] = lambda answers: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Answers | None:
    """Have a model answer questions, the longest prompts first, so that those of a batch are about as long.

    Each answer is what the model would write to its prompt alone, in fp32 to the letter.

    Args:
        model: in eval mode.
        tokenizer: its own.
        questions: at least one.
        end_ids: an answer ends before these, besides the tokenizer's end of text.
        writing: how.
        written: told how many answers each batch had.
        stopped: asked between batches; if it says so, None is returned.

    Raises:
        UserError: a context of fewer than two tokens, or an empty prompt where the tokenizer has nothing to begin with.
    """
    most = answer_tokens(tokenizer, questions, writing)
    room = writing.context_length - most
    before = tokenizer.encode_prompt("")
    prompts: list[str | list[int]] = []
    lengths, cut = [], 0
    for question in questions:
        ids = tokenizer.encode_prompt(question.prompt) if question.ids is None else question.ids
        prompts.append(question.prompt if question.ids is None else ids)  # a text, for what becomes of a space at its end
        if len(ids) > room:
            cut += 1
            kept = before if question.ids is None and len(before) < room else []
            prompts[-1] = [*kept, *ids[len(ids) - room + len(kept) :]]
        lengths.append(min(len(ids), room))
    order = sorted(range(len(questions)), key=lambda number: -lengths[number])
    sampling = Sampling(temperature=writing.temperature, seed=writing.seed)
    texts = [""] * len(questions)
    for start in range(0, len(order), writing.batch):
        if stopped():
            return None
        part = order[start : start + writing.batch]
        pieces = generate_text(model, tokenizer, [prompts[n] for n in part], most, sampling, writing.stop, end_ids)
        for number, text in zip(part, whole_texts(pieces, len(part)), strict=True):
            texts[number] = text
        written(len(part))
    return Answers(texts, most, cut)


def answer_tokens(tokenizer: Tokenizer, questions: Sequence[Question], writing: Writing) -> int:
    """Most tokens of an answer. Raises UserError for a context of fewer than two tokens."""
    if writing.context_length < 2:
        raise UserError(f"context_length={writing.context_length}: a prompt and an answer take at least 2 tokens")
    most = writing.max_tokens
    if not most:
        references = [text for question in questions for text in question.references]
        longest = max(len(ids) for ids in tokenizer.encode_batch(references))
        most = min(max(2 * longest, _FEWEST_TOKENS), MOST_TOKENS)
    return min(most, writing.context_length // 2)


def measure_answers(
    metrics: Sequence[Metric],
    questions: Sequence[Question],
    answers: Answers,
    execution_seconds: float = 10.0,
    executed: Callable[[int], None] = lambda programs: None,
) -> Measured:
    """The figures of answers.

    Args:
        metrics: which; with `pass` the answers are run, for which the caller has asked (`execution.check_execution`).
        questions: at least one.
        answers: to them.
        execution_seconds: for each program.
        executed: told of each program that has ended.

    Raises:
        UserError: `pass` where a row has no test.
    """
    scores = score_answers(metrics, answers.texts, [question.references for question in questions])
    if "pass" not in metrics:
        return Measured(scores, answers, questions)
    check_tests(questions)
    programs = [_program(question, text) for question, text in zip(questions, answers.texts, strict=True)]
    outcomes = run_programs(programs, execution_seconds, executed)
    scores.add_means([{"pass": 100.0 * outcome.passed} for outcome in outcomes])
    if not isolation():
        scores.notes.append("pass: this system gives a program no network of its own to be cut off from; the programs could reach it")
    return Measured(scores, answers, questions, outcomes)


def _program(question: Question, answer: str) -> str:
    """Prompt, answer and test; of a conversation the answer's blocks of code, or all of it where it has none, and the test."""
    if question.ids is None:
        return f"{question.prompt}{answer}\n\n{question.test}\n"
    code = "\n".join(_CODE_BLOCK.findall(answer)) or answer
    return f"{code}\n\n{question.test}\n"


def check_tests(questions: Sequence[Question]) -> None:
    """Raises UserError for a question without a test."""
    for question in questions:
        if not question.test.strip():
            raise UserError(
                f"{question.place}: metrics=[pass] needs the row's test, Python code that raises where the answer is wrong; "
                "data.fields.test names the field that holds it"
            )
