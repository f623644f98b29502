"""What a model that is being fine-tuned answers to held-out prompts, at every validation (train.metrics)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from gpt.config import RunConfig
from gpt.data.tokenizer import Tokenizer
from gpt.evaluation.answers import Writing, measure_answers, write_answers
from gpt.evaluation.questions import Questions, read_questions
from gpt.evaluation.scores import check_libraries
from gpt.model.transformer import GPT
from gpt.runtime.device import Device
from gpt.runtime.distributed import World
from gpt.runtime.signals import StopRequest
from gpt.training.weight_average import WeightAverage

PREFIX = "val_"
"""Of the figures' names in metrics.jsonl."""


class Answering:
    """Has the model answer some held-out prompts, always the same, in the main process, and compares with what is right.

    The figures are those of `gpt evaluate` on the weights in fp32 with the same `limit`.

    Args:
        config: the run; without train.metrics nothing is asked.
        tokenizer: its own.
        world: its processes.
        device: where it computes.
        say: takes notes; told why nothing is measured where the model cannot write.

    Raises:
        UserError: rows without prompts and answers, or a library that is not installed.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, world: World, device: Device, say: Callable[[str], None]) -> None:
        self._train, self._tokenizer, self._measured = config.train, tokenizer, False
        self._writing = Writing(config.sequence_length)
        self._asked: Questions | None = None
        if not config.train.metrics or config.precompile:
            return
        why = ""
        if not device.decodes:
            why = "this device compiles for each length, and a text gets longer at each step"
        elif world.is_divided:
            why = "each process holds only a part of the model"
        if why:
            named = f"[{', '.join(config.train.metrics)}]"
            say(
                f"note: train.metrics={named} are not measured within this run: {why}; measure the result with gpt evaluate metrics={named}"
            )
        elif world.is_main:
            check_libraries(config.train.metrics, "train.metrics")
            self._asked = read_questions(config.data, tokenizer, held_out=True, limit=config.train.metrics_examples, key="train.metrics")

    def __call__(
        self, model: GPT, average: WeightAverage | None, stop: StopRequest, step: int, say: Callable[[str], None]
    ) -> dict[str, float]:
        """The figures as they stand in metrics.jsonl, such as val_rouge_l, 0 to 100; none if a signal comes first, or in other processes.

        Args:
            model: in any mode, and left in it.
            average: whose weights it is to have meanwhile.
            stop: asked between batches of answers.
            step: that the run is at, for people.
            say: takes the figures and, the first time, what to know of them.
        """
        if self._asked is None:
            return {}
        asked, was_training, end_ids = self._asked, model.training, frozenset(self._asked.end_ids)
        swapped = average.swapped() if average is not None else contextlib.nullcontext()
        model.eval()
        try:
            with swapped, torch.compiler.set_stance("force_eager"):
                answers = write_answers(
                    model, self._tokenizer, asked.questions, end_ids, self._writing, stopped=lambda: stop.signal is not None
                )
        finally:
            model.train(was_training)
        if answers is None:
            return {}
        scores = measure_answers(self._train.metrics, asked.questions, answers).scores
        for text in [] if self._measured else scores.notes:
            say(f"note: {text}")
        self._measured = True
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in scores.figures.items())
        say(f"answers to {len(asked.questions)} held-out prompts at step {step}: {figures} of 100")
        return {PREFIX + name: value for name, value in scores.figures.items()}
