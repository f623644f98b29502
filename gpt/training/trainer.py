"""The trainer: teacher-forced next-token training of a GPT, from a config to a folder with a model and a report.

Read `fit` first, top to bottom. Every step is a function of (weights, optimizer state, step number): the batch and the random
numbers of a step follow from the seed and its number, so a run that is resumed goes on exactly as if it had not stopped.
"""

from __future__ import annotations

import errno
import math
import os
import statistics
import time
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gpt.compose import load_run
from gpt.config import RunConfig, parse_span
from gpt.data.batches import Batch, Batches
from gpt.data.prefetch import Prefetch
from gpt.data.streaming import StreamingBatches
from gpt.errors import UserError
from gpt.evaluation.perplexity import HeldOutLoss, held_out_loss
from gpt.inference.loading import load_model
from gpt.model.config import GPTConfig
from gpt.model.loss import IGNORE, LinearCrossEntropy
from gpt.model.transformer import GPT
from gpt.runtime.compiling import CompileAhead, compile_model, should_compile
from gpt.runtime.device import find_device
from gpt.runtime.signals import StopRequest
from gpt.training.checkpoint import TrainingState, list_checkpoints, load_checkpoint, load_weights, newest_whole, save_checkpoint
from gpt.training.data import OneBatch, TrainingData, open_training_data
from gpt.training.metrics import MetricsFile
from gpt.training.optimizer import build_optimizers, set_learning_rate
from gpt.training.progress import Progress, say
from gpt.training.results import write_results
from gpt.training.run_directory import RunDirectory, new_run_id
from gpt.training.schedule import learning_rate_factor

MICRO_BATCH_TOKENS = 16384  # micro_batch=auto: the most tokens that go through the model at once
# Of the data, what a run that goes on may have another value of: where things lie and how they are prepared, not what they are.
_MAY_CHANGE = ("data.paths", "data.parts", "data.cache_dir", "data.workers", "data.memory_mb", "data.licence")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Result:
    """What `fit` returns."""

    exit_code: int
    """0, or 128 plus the signal that interrupted the run."""
    run_directory: Path
    state: TrainingState
    held_out: HeldOutLoss | None = None
    """Of the best weights on all of the held-out text; None if interrupted."""


class Trainer:
    """Trains the model that a config describes.

    Args:
        config: the run, whole.

    Raises:
        UserError: the config is impossible.
    """

    def __init__(self, config: RunConfig) -> None:
        config.validate()
        self.config = config

    def fit(self) -> Result:
        """Train, validate, save; at the end export the best weights, write samples and a report.

        Raises:
            UserError: the data, the run directory or a checkpoint to resume cannot be used, or training diverged.
        """
        config = self.config
        config.run.id = config.run.id or new_run_id(config.command)
        self.device = find_device(config.device.name, config.precision, config.device.threads)
        self.directory = RunDirectory(config)
        try:
            self._set_up()
            say(f"run: {self.directory.path}  ({self.device.description}, {str(self.device.dtype).removeprefix('torch.')})")
            interrupted = self._train()
            if interrupted:
                say(f"interrupted at step {self.state.step}; continue with: gpt {config.command} resume={self.directory.path}")
                return Result(128 + interrupted, self.directory.path, self.state)
            return self._finish()
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError) and error.errno not in _DISK_FULL:
                raise
            raise UserError(f"run.dir: {self.directory.path} could not be written ({error}); {self._last_checkpoint()}") from error
        finally:
            self.directory.release()

    # Before the first step

    def _set_up(self) -> None:
        config = self.config
        resumable = self._check_same_run()
        self.sequences = config.train.batch_tokens // config.sequence_length
        self.micro_batch = self._micro_batch()
        self.compiled, reason = should_compile(config.compile, self.device, *self._expected_length())
        ahead = None
        if self.compiled:
            documents = config.on_examples or config.data.document_mask
            ahead = CompileAhead(self.device, self._expected_model(), self.micro_batch, config.sequence_length, documents)
        checkpoint = self._checkpoint() if resumable else None
        self.data = open_training_data(self._with_tokenizer(checkpoint), self.sequences, say)
        if ahead is not None and not ahead.done():
            say("compiling (some 15 s the first time, a second after that)")
        if ahead is not None and (problem := ahead.problem()):
            self.compiled, reason = False, f"not compiled, so the run is slower: {problem}"
        self._set_vocab_size(self.data)
        self.byte_lengths = self.data.tokenizer.byte_lengths()
        self.model = self._initial_model(checkpoint)
        self.model.to(self.device.type)
        self.model.tie()
        self.loss = LinearCrossEntropy(self.device.dtype)
        self.optimizers = build_optimizers(config.optimizer, self.model)
        self.batches: Batches = OneBatch(self.data.batches) if config.train.overfit else self.data.batches
        self.state = TrainingState(corpus=self.data.fingerprint)
        self.total_steps, self.total_seconds = self._length()
        if checkpoint is not None:
            self._resume(checkpoint)
        self.metrics = MetricsFile(self.directory.metrics, self.state.step)
        self.directory.write_config(config)
        self.directory.write_environment(self.device)
        self.data.tokenizer.save(self.directory.path / "tokenizer.json")
        say(f"model: {self.model.num_parameters() / 1e6:.2f}M parameters, {config.model.stock_architecture()} shape; {reason}")
        if self.compiled:
            compile_model(self.model, self.loss)

    def _checkpoint(self) -> Path | None:
        """The checkpoint to go on from; None: from the beginning, said aloud."""
        checkpoint = newest_whole(self.directory.checkpoints, say)
        if checkpoint is None:
            say(f"no checkpoint in {self.directory.checkpoints} yet: starting at step 0")
        return checkpoint

    def _with_tokenizer(self, checkpoint: Path | None) -> RunConfig:
        """The config, with the run's own copy of a pretrained tokenizer where that has gone and the run goes on."""
        tokenizer, own = self.config.tokenizer, self.directory.path / "tokenizer.json"
        if checkpoint is None or tokenizer.path is None or os.path.exists(tokenizer.path) or not own.is_file():
            return self.config
        return replace(self.config, tokenizer=replace(tokenizer, path=str(own)))

    def _initial_model(self, checkpoint: Path | None) -> GPT:
        """Random weights, or those of `init`, in fp32 on the CPU; where a checkpoint brings them, any. Seeds the run's random numbers."""
        config = self.config
        torch.manual_seed(config.seed)
        model = GPT.materialise(config.model)
        if checkpoint is not None or config.init is None:
            model.init_weights()
            return model
        # Copied, dropout and all: what is loaded may be mapped from its file, and has the dropout of its own training.
        loaded = load_model(config.init, dtype=torch.float32, allow_pickle=config.allow_pickle, key="init").model
        model.load_state_dict(loaded.state_dict())
        say(f"weights: {config.init}")
        return model

    def _expected_length(self) -> tuple[float | None, float | None]:
        """The run's length in floating-point operations and in seconds, as far as the config alone tells."""
        config, budget = self.config, parse_span("train.budget", self.config.train.budget)
        tokens = {"steps": budget.amount * config.train.batch_tokens, "tokens": budget.amount}.get(budget.unit)
        if tokens is None:
            return None, budget.amount if budget.unit == "seconds" else None
        with torch.device("meta"):
            model = GPT(self._expected_model())
        return model.flops_per_token() * tokens, None

    def _expected_model(self) -> GPTConfig:
        """The model's config before there is a tokenizer to tell the size of its vocabulary."""
        return replace(self.config.model, vocab_size=self.config.model.vocab_size or self.config.tokenizer.vocab_size)

    def _check_same_run(self) -> bool:
        """Whether the run directory holds a run to continue.

        Raises:
            UserError: it does and may not be continued, or not with this config.
        """
        config, path = self.config, self.directory.path
        if not (path / "config.yaml").is_file():
            return False
        if config.resume == "never":
            raise UserError(f"run.id={config.run.id}: {path} exists, and resume=never; choose another run.id")
        before = load_run(path)
        if not config.model.vocab_size:
            config.model.vocab_size = before.model.vocab_size
        keys = ["seed", "init", "loss_on", "train.batch_tokens", "train.sequence_length", "train.overfit", "optimizer.name"]
        keys += [key for key in _leaves("data", config.data) if key not in _MAY_CHANGE]
        for key in (*keys, *_leaves("model", config.model), *_leaves("tokenizer", config.tokenizer)):
            now, then = _value(config, key), _value(before, key)
            if now != then:
                raise UserError(f"{key}={now}: the run in {path} was started with {key}={then}; set it so, or choose another run.id")
        return True

    def _resume(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.model, self.optimizers)
        if state.corpus != self.state.corpus:
            raise UserError(
                f"data: the text or its tokens are not those that {self.directory.path} was started with "
                f"(fingerprint {self.state.corpus}, then {state.corpus}); restore it, or choose another run.id"
            )
        self.state = state
        if isinstance(self.data.batches, StreamingBatches) and state.stream is not None:
            self.data.batches.load_state_dict(state.stream)
        say(f"resuming from {checkpoint} at step {state.step}")

    def _set_vocab_size(self, data: TrainingData) -> None:
        model, have = self.config.model, data.tokenizer.vocab_size
        if not model.vocab_size:
            model.vocab_size = have
        elif model.vocab_size < have:
            raise UserError(f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {have} (0 takes the tokenizer's)")
        elif model.vocab_size > have:
            say(f"note: model.vocab_size={model.vocab_size}, but the tokenizer has {have} ids; the rest is never used")

    def _micro_batch(self) -> int:
        """Sequences per pass: as configured, or the largest divisor of the batch within MICRO_BATCH_TOKENS."""
        if self.config.train.micro_batch != "auto":
            return self.config.train.micro_batch
        most = max(1, MICRO_BATCH_TOKENS // self.config.sequence_length)
        return max(d for d in range(1, min(self.sequences, most) + 1) if self.sequences % d == 0)

    def _length(self) -> tuple[int | None, float | None]:
        """The run's length, in steps or in seconds.

        Raises:
            UserError: a warm-up longer than the run.
        """
        budget = parse_span("train.budget", self.config.train.budget)
        if budget.unit == "seconds":
            return None, budget.amount
        if budget.unit == "epochs" and not self.batches.windows:
            raise UserError(f"train.budget={self.config.train.budget}: how long a stream is is not known; give steps, tokens or a time")
        steps = {
            "steps": budget.amount,
            "tokens": budget.amount / self.config.train.batch_tokens,
            "epochs": budget.amount * self.batches.windows / self.sequences,
        }[budget.unit]
        total = max(1, math.ceil(steps))
        if self.config.schedule.warmup >= 1 and self.config.schedule.warmup > total:
            raise UserError(f"schedule.warmup={self.config.schedule.warmup:g} steps is longer than the run of {total} steps")
        return total, None

    # The loop

    def _train(self) -> int | None:
        """Run until the budget is spent; return the signal that interrupted, if one did."""
        config, state = self.config, self.state
        save_every = parse_span("checkpoint.every", config.checkpoint.every)
        self.started = time.monotonic() - state.seconds
        saved_at, saved_step = time.monotonic(), state.step
        busy: list[float] = []  # seconds of each step since the last line of metrics
        warm = False
        self.model.train()
        with (
            StopRequest() as stop,
            Progress(self.total_seconds or self.total_steps or 0, self.total_steps is None) as progress,
            closing(Prefetch(self.batches, state.step, pin=self.device.pins_memory)) as self.queue,
        ):
            waited = 0.0
            while True:
                improved = self._validation_due() and self._validate(progress, stop)
                if stop.signal or self._done():
                    break
                by_steps = save_every.unit == "steps"
                due = state.step % save_every.amount == 0 if by_steps else time.monotonic() - saved_at > save_every.amount
                if improved or (due and saved_step != state.step):
                    self._save(progress, required=False)
                    saved_at, saved_step = time.monotonic(), state.step
                step_started = time.monotonic()
                done = self._step(stop)
                if done is None:  # a signal came first
                    break
                log_due = state.step % config.train.log_every == 0 or self._done()
                if warm or log_due:  # a process's first step takes longer, and would hide the time of the others
                    busy.append(time.monotonic() - step_started)
                else:
                    waited = self.queue.waited
                warm = True
                state.seconds = time.monotonic() - self.started
                if log_due:
                    waited, before = self.queue.waited, waited
                    progress.update(self._log(*done, statistics.fmean(busy), (waited - before) / sum(busy)))
                    busy.clear()
            state.seconds = time.monotonic() - self.started
            self._save(progress, required=True)
        self.metrics.close()
        return stop.signal

    def _done(self) -> bool:
        if self.total_steps is not None:
            return self.state.step >= self.total_steps
        return time.monotonic() - self.started >= (self.total_seconds or 0)

    def _validation_due(self) -> bool:
        every, step = self.config.train.eval_every, self.state.step
        return step != self.state.validated_step and (self._done() or bool(every and step and step % every == 0))

    def _step(self, stop: StopRequest) -> tuple[float, float] | None:
        """One optimizer step. Returns the learning rate as a share of its peak, and the gradient norm; None if a signal came first."""
        config, state, device = self.config, self.state, self.device
        progress = state.step / self.total_steps if self.total_steps else state.seconds / (self.total_seconds or 1)
        factor = learning_rate_factor(config.schedule, state.step, self.total_steps, min(progress, 1.0))
        set_learning_rate(self.optimizers, factor)
        batch = self.queue.get(state.step)
        valid = int((batch.targets != IGNORE).sum())
        torch.manual_seed(config.seed + (state.step << 20))  # dropout, as a function of the step alone
        total = torch.zeros((), device=device.type)
        for first in range(0, len(batch.tokens), self.micro_batch):
            if stop.signal:
                self._zero_grad()
                return None
            part = self._part(batch, first)
            with device.autocast():
                hidden = self.model.hidden_states(part.tokens, documents=part.documents)
            loss = self.loss(hidden, self.model.head.weight, part.targets) / valid
            loss.backward()
            total += loss.detach()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.train.grad_clip or math.inf, foreach=True)
        if torch.isfinite(grad_norm) and torch.isfinite(total):
            for optimizer in self.optimizers:
                optimizer.step()
            state.skipped_in_a_row = 0
            state.interval_loss += total.item()
            state.interval_steps += 1
        else:
            self._skip()
        self._zero_grad()
        state.step += 1
        state.tokens += valid
        state.stream = self.queue.state_dict()
        return factor, grad_norm.item()

    def _part(self, batch: Batch, first: int) -> Batch:
        """The rows of a micro-batch, on the device."""

        def moved(rows: Tensor) -> Tensor:
            return rows[first : first + self.micro_batch].to(self.device.type, non_blocking=True)

        return Batch(moved(batch.tokens), moved(batch.targets), None if batch.documents is None else moved(batch.documents))

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _skip(self) -> None:
        state = self.state
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise UserError(
                f"training diverged: {state.skipped_in_a_row} steps in a row up to step {state.step + 1} had a loss or gradient that is "
                f"not finite; {self._last_checkpoint()}. Try a lower optimizer.lr (now {self.config.optimizer.lr:g}) or precision=fp32"
            )

    def _last_checkpoint(self) -> str:
        kept = list_checkpoints(self.directory.checkpoints)
        return f"the last checkpoint is {kept[-1][1]}" if kept else "there is no checkpoint yet"

    def _log(self, factor: float, grad_norm: float, seconds_per_step: float, data_wait: float) -> dict[str, Any]:
        state, config = self.state, self.config
        rate = config.train.batch_tokens / seconds_per_step
        peak = self.device.peak_flops
        line = {
            "step": state.step,
            "tokens": state.tokens,
            "epoch": state.tokens / self.batches.tokens_per_epoch if self.batches.tokens_per_epoch else None,
            "loss": state.interval_loss / state.interval_steps if state.interval_steps else math.nan,
            "lr": config.optimizer.lr * factor,
            "grad_norm": grad_norm,
            "tokens_per_second": rate,
            "mfu": rate * self.model.flops_per_token() / peak if peak else None,
            "data_wait": data_wait,
            "memory_bytes": self.device.memory_bytes(),
            "seconds": state.seconds,
            "skipped_steps": state.skipped_steps,
        }
        state.interval_loss, state.interval_steps = 0.0, 0
        self.metrics.write(line)
        return line

    def _validate(self, progress: Progress, stop: StopRequest) -> bool:
        """Validate on the fixed held-out windows; whether this is the best so far."""
        state = self.state
        result = self._held_out(self.config.train.eval_tokens, stop)
        if result is None:  # interrupted
            return False
        state.validated_step, state.seconds = state.step, time.monotonic() - self.started
        self.metrics.write(
            {"step": state.step, "tokens": state.tokens, "seconds": state.seconds, "val_loss": result.loss, "val_bpb": result.bits_per_byte}
        )
        progress.validated(result.loss, result.bits_per_byte)
        if state.best_val_loss is not None and not result.loss < state.best_val_loss:
            return False
        state.best_val_loss, state.best_step = result.loss, state.step
        return True

    def _held_out(self, limit: int, stop: StopRequest | None = None) -> HeldOutLoss | None:
        stopped = (lambda: stop.signal is not None) if stop is not None else (lambda: False)
        batches = self.data.held_out(self.micro_batch, limit)
        return held_out_loss(self.model, self.loss, batches, self.byte_lengths, self.device, stopped)

    def _save(self, progress: Progress, required: bool) -> None:
        """Save a checkpoint. One that fails within the run is only said: the run goes on, and earlier ones stay."""
        try:
            keep_last = self.config.checkpoint.keep_last
            save_checkpoint(self.directory.checkpoints, self.model, self.optimizers, self.state, keep_last, self.data.manifest)
        except OSError as error:
            if required:
                problem = f"run.dir: the checkpoint of step {self.state.step} could not be written ({error})"
                raise UserError(f"{problem}; {self._last_checkpoint()}") from error
            progress.say(f"warning: the checkpoint of step {self.state.step} could not be written ({error}); training goes on")

    # After the last step

    def _finish(self) -> Result:
        """The best weights, measured on all of the held-out text, exported, sampled from and reported."""
        config, state, path = self.config, self.state, self.directory.path
        best = self.directory.checkpoints / f"step-{state.best_step or 0:08d}"
        if state.best_step is not None and best.is_dir() and state.best_step != state.step:
            load_weights(best, self.model)
        held_out = self._held_out(config.train.final_eval_tokens)
        assert held_out is not None
        write_results(config, self.directory, state, self.model, self.data, held_out, say)
        return Result(0, path, state, held_out)


def _leaves(prefix: str, section: Any) -> list[str]:
    """The dotted keys of a section."""
    found = []
    for f in fields(section):
        key = f"{prefix}.{f.name}"
        found += _leaves(key, getattr(section, f.name)) if is_dataclass(getattr(section, f.name)) else [key]
    return found


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
