"""The trainer: teacher-forced next-token training of a GPT, from a config to a folder with a model and a report.

Read `fit` first, top to bottom. Every step is a function of (weights, optimizer state, step number): the batch and the random
numbers of a step follow from the seed and its number, so a run that is resumed goes on exactly as if it had not stopped. What several
processes must decide together, they agree on once a step; only the main one prints and writes.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from gpt.config import parse_span
from gpt.data.batches import Batch
from gpt.data.prefetch import Prefetch
from gpt.errors import UserError
from gpt.evaluation.perplexity import HeldOutLoss
from gpt.model.transformer import GPT
from gpt.runtime.allocator import no_garbage_collection
from gpt.runtime.device import find_device, unused_settings
from gpt.runtime.distributed import Agreement, join_world
from gpt.runtime.signals import StopRequest
from gpt.training.checkpoint import TrainingState, checkpoint_name, list_checkpoints, load_checkpoint, load_weights, newest_whole
from gpt.training.checkpoint_copies import TO_USE, at_hand
from gpt.training.checkpoint_retention import Retention
from gpt.training.checkpoint_writer import CheckpointWriter
from gpt.training.failures import explained
from gpt.training.objectives import given, score_held_out
from gpt.training.optimizer import set_learning_rate
from gpt.training.preparation import PreparedRun
from gpt.training.profile import Profiler
from gpt.training.progress import say
from gpt.training.rehearsal import Rehearsed, write_rehearsal
from gpt.training.results import write_results
from gpt.training.run_directory import RunDirectory, new_run_id
from gpt.training.schedule import learning_rate_factor, warm_up
from gpt.training.watching import Watching

_MOST_REWINDS = 5  # in a run


@dataclass
class Result:
    """What `fit` returns."""

    exit_code: int
    """0, or 128 plus the signal that interrupted the run."""
    run_directory: Path
    state: TrainingState
    held_out: HeldOutLoss | None = None
    """Of the best weights on all of the held-out text; None if interrupted."""


class Trainer(PreparedRun):
    """Trains the model that a config describes.

    Args:
        config: the run, whole.

    Raises:
        UserError: the config is impossible.
    """

    def fit(self) -> Result:
        """Train, validate, save; at the end export the best weights, write samples and a report.

        Raises:
            UserError: the data, the run directory or a checkpoint to resume cannot be used, or training diverged.
        """
        config = self.config
        self.device = find_device(config.device, config.precision, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.patience = config.launch.patience(self.device.patience)
        self.world = join_world(config.parallel, self.device, self.patience)
        self.say = say if self.world.is_main else lambda text: None
        for note in (*unused_settings(config.device), *self.device.prepare_training(config.model.dropout)):
            self.say(f"note: {note}")
        if unused := config.launch.unused():
            self.say(f"note: of launch=sagemaker, and not used by launch=local: {', '.join(unused)}")
        config.run.id = self.world.share(lambda: config.run.id or new_run_id(config.command))
        if self.world.is_restart and config.resume == "never":
            config.resume = "auto"  # what is there now is this run's own
        self.directory = RunDirectory(config, owned=self.world.is_main)
        try:
            self._set_up()
            processes = f", {self.world.size} processes" if self.world.size > 1 else ""
            dtype = str(self.device.dtype).removeprefix("torch.")
            what = "precompiling" if config.precompile else f"run: {self.directory.path}"
            self.say(f"{what}  ({self.device.description}, {dtype}{processes})")
            interrupted = self._train()
            if interrupted:
                self.say(f"interrupted at step {self.state.step}; continue with: gpt {config.command} resume={self.directory.path}")
                result = Result(128 + interrupted, self.directory.path, self.state)
            elif config.precompile:
                kept = self.device.compile_cache()
                self.say(f"compiled: a run of this config finds it in {kept}" if kept else "compiled: a rehearsal keeps nothing")
                result = Result(0, self.directory.path, self.state)
            else:
                result = self._finish()
            if (record := self.device.rehearsal()) is not None and self.world.is_main:
                flops, steps = self.model.flops_per_token(), self.state.step + 1 - self.first
                rehearsed = Rehearsed(record, self.device, config, self.world.size, self.case, steps, self.total_steps, flops, self.graphs)
                self.say(f"\n{write_rehearsal(rehearsed, self.directory.path)}")
            self.world.leave()  # not after an error, which the processes first tell each other
            return result
        except (OSError, SafetensorError, RuntimeError) as error:
            told = explained(
                error, config, self.world, self.device, self.patience, self.directory.path, self.doing, self._last_checkpoint(), self.case
            )
            if told is None:
                raise
            raise told from error
        finally:
            self.directory.release()

    # The loop

    def _train(self) -> int | None:
        """Run until the budget is spent; return the signal that interrupted, if one did."""
        config, state, world = self.config, self.state, self.world
        save_every = parse_span("checkpoint.every", config.checkpoint.every)
        keep = config.checkpoint
        retention = Retention(keep.keep_last, keep.keep_best, keep.keep_every)
        writer = CheckpointWriter(self.directory.checkpoints, retention, world.is_main, self.device.pins_memory)
        self.agreement = Agreement(world)
        self.started = time.monotonic() - state.seconds
        self.busy, self.timed_steps, self.logged_step = 0.0, 0, state.step
        saved_at, saved_step = state.seconds, state.step
        stop_at_once = world.size == 1  # of several processes none may leave a step alone
        self.objective.train()
        with contextlib.ExitStack() as stack:
            self.stop = stack.enter_context(StopRequest(watched=world.size > 1))
            total, timed = self.total_seconds or self.total_steps or 0, self.total_steps is None
            self.watching = stack.enter_context(Watching(config, self.directory, state.step, total, timed, world.is_main))
            profiler = Profiler(self.directory.path / "profile", self.device, self.say) if config.profile and world.is_main else None
            if profiler is not None:
                stack.enter_context(closing(profiler))
            self.writer = stack.enter_context(closing(writer))
            prefetch = Prefetch(self.batches, state.batch, world.data_rank, world.data_size, pin=self.device.pins_memory)
            self.queue = stack.enter_context(closing(prefetch))
            stack.enter_context(no_garbage_collection())
            self.began, self.first = time.monotonic(), state.step + 1
            while True:
                signalled = self._agree()
                if done := self._done():
                    self._log()
                    if profiler is not None:
                        profiler.close()
                improved = self._validation_due(done) and self._validate()
                if signalled or done or improved is None:
                    break
                by_steps = save_every.unit == "steps"
                due = state.step % save_every.amount == 0 if by_steps else state.seconds - saved_at > save_every.amount
                if improved or (due and saved_step != state.step):
                    self._save(required=False)
                    saved_at, saved_step = state.seconds, state.step
                if state.step == self.first and (problem := self.device.after_first_step()):
                    self.watching.say(f"warning: {problem}")
                if state.step == self.first and self.timed_steps:  # it takes longer, and would hide the time of the others, which come now
                    self.busy, self.timed_steps, _ = 0.0, 0, self.clock.read()
                if not self._next_step(stop_at_once):
                    break
                if config.train.spike == "rewind" and self.step.spiked.item():
                    self._rewind()
                if state.step % config.train.log_every == 0:
                    self._log()
                if profiler is not None:
                    profiler.step()
            signalled = self._agree()
            if not config.precompile:
                self._save(required=True)
            if signalled:
                self.watching.stopped()
        return signalled or None

    def _agree(self) -> int:
        """Bring `state.seconds` up to date; the signal to stop for, or 0. The main process's clock is everybody's."""
        own = time.monotonic() - self.started if self.world.is_main else 0.0
        signalled, seconds = self.agreement.exchange(self.stop.signal or 0, own)
        self.state.seconds = seconds
        return int(signalled)

    def _done(self) -> bool:
        if self.total_steps is not None:
            return self.state.step >= self.total_steps
        return self.state.seconds >= (self.total_seconds or 0)

    def _validation_due(self, done: bool) -> bool:
        every, step = self.config.train.eval_every, self.state.step
        return step != self.state.validated_step and (done or bool(every and step and step % every == 0))

    def _next_step(self, stop_at_once: bool) -> bool:
        """Train on the next batch; False if a signal came first, and then nothing has changed."""
        config, state = self.config, self.state
        self.doing = f"training step {state.step + 1}"
        started = time.perf_counter()
        progress = min(state.step / self.total_steps if self.total_steps else state.seconds / (self.total_seconds or 1), 1.0)
        while self.unfreezing.due(state, progress):
            self.watching.say(self.unfreezing.begin(state, progress, self.graphs))
            self.objective = self.unfreezing.objective
            self.step.renew(self.objective, self._new_givers().train)
        where = (config.schedule, state.step, self.total_steps, progress)
        set_learning_rate(self.optimizers, learning_rate_factor(*where), partial(warm_up, *where))
        with self.clock.part("data"):
            batch = self.queue.get(state.batch)
        torch.manual_seed(config.seed + (state.batch << 20) + self.world.data_rank)  # dropout, as a function of the batch alone
        will_log = (state.step + 1) % config.train.log_every == 0
        stopped = (lambda: self.stop.signal is not None) if stop_at_once else (lambda: False)
        with self.graphs.running("training"):
            if not self.step(batch, stopped, measure=will_log):
                return False
        state.step += 1
        state.batch += 1
        state.stream = self.queue.state_dict()
        self.busy += time.perf_counter() - started
        self.timed_steps += 1
        self.clock.step()
        return True

    def _log(self) -> None:
        """Write a line of metrics, unless this step has one. Here, and not in the steps, the device is waited for."""
        state, config, clock = self.state, self.config, self.clock
        if state.step == self.logged_step:
            return
        started = time.perf_counter()
        self.counts.store(state)
        self.busy += time.perf_counter() - started
        rate = config.train.batch_tokens * self.timed_steps / self.busy
        wall, spent, times = time.monotonic() - self.began, clock.totals(), clock.read()
        update_norm = self.step.update_norm
        flops = self.model.flops_per_token(self.givers.prefix.share_read() if self.givers.prefix else 0.0)
        line = {
            "step": state.step,
            "tokens": state.tokens,
            "epoch": state.tokens / self.batches.tokens_per_epoch if self.batches.tokens_per_epoch else None,
            "loss": state.interval_loss / state.interval_steps if state.interval_steps else math.nan,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": self.step.grad_norm.item(),
            "update_norm": update_norm.item() if update_norm is not None else None,
            **self.step.figures(),
            "tokens_per_second": rate,
            "mfu": rate * flops / (self.peak_flops * self.world.size) if self.peak_flops else None,
            "data_wait": times["time_data"] * self.timed_steps / self.busy,
            **times,
            "share_evaluation": spent["evaluation"] / wall,
            "share_checkpointing": spent["checkpointing"] / wall,
            "memory_bytes": self.device.memory_bytes(),
            "graphs": self.graphs.count if self.compiled else None,
            "seconds": state.seconds,
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "skipped_steps": state.skipped_steps,
            "spikes": state.spikes,
            "rewinds": state.rewinds,
        }
        self.busy, self.timed_steps, self.logged_step = 0.0, 0, state.step
        self.watching.log(line)
        self._warn()
        for name in ("interval_loss", "interval_steps"):
            setattr(state, name, 0)
        self.counts.load(state)
        if state.skipped_in_a_row >= config.train.max_skipped_steps:
            raise UserError(
                f"training diverged: {state.skipped_in_a_row} steps in a row up to step {state.step} had a loss or gradient that is "
                f"not finite; {self._last_checkpoint()}. Try a lower optimizer.lr (now {config.optimizer.lr:g}) or precision=fp32"
            )

    def _last_checkpoint(self) -> str:
        kept = list_checkpoints(self.directory.checkpoints)
        return f"the last checkpoint is {kept[-1][1]}" if kept else "there is no checkpoint yet"

    def _validate(self) -> bool | None:
        """Validate on the fixed held-out windows; whether this is the best so far, or None if it was interrupted."""
        state = self.state
        self.doing = f"validating at step {state.step}"
        with self.clock.spend("evaluation"):
            result = self._held_out(self.config.train.eval_tokens, lambda: bool(self._agree()))
            answered = {} if result is None else self.answering(self.model, self.average, self.stop, state.step, self.watching.say)
        if result is None:
            return None
        gc.collect()
        self.counts.store(state)
        state.validated_step, state.val_loss = state.step, result.loss
        figures = result.figures() | answered
        self.watching.log({"step": state.step, "tokens": state.tokens, "seconds": state.seconds, **figures})
        if state.best_val_loss is not None and not result.loss < state.best_val_loss:
            return False
        state.best_val_loss, state.best_step = result.loss, state.step
        return True

    def _held_out(self, limit: int, stopped: Callable[[], bool] = lambda: False) -> HeldOutLoss | None:
        """The loss of the weights, or of their average where there is one, on held-out text, shared out among the processes."""

        def nll(batch: Batch) -> Tensor:
            return self.objective(batch.tokens, batch.targets, batch.documents, **given(self.givers.held_out, batch))

        batches = self.data.held_out(self.micro_batch, limit)
        swapped = self.average.swapped() if self.average is not None else contextlib.nullcontext()
        with swapped, self.graphs.running("evaluation"):
            return score_held_out(self.objective, nll, batches, self.byte_lengths, self.device, stopped, self.world)

    def _save(self, required: bool) -> None:
        """Save a checkpoint in the background. One that fails within the run is only said: the run goes on, and earlier ones stay."""
        self.doing = f"saving the checkpoint of step {self.state.step}"
        with self.clock.spend("checkpointing"):
            self.counts.store(self.state)
            self.watching.keep()
            averages = self.average.tensors() if self.average is not None else None
            self.writer.save(self.model, self.optimizers, self.state, self.data.manifest, averages)
            self._warn()
            gc.collect()
            if required:
                try:
                    self.writer.wait()
                except OSError as error:
                    problem = f"run.dir: the checkpoint of step {self.state.step} could not be written ({error})"
                    raise UserError(f"{problem}; {self._last_checkpoint()}") from error

    def _warn(self) -> None:
        """Say what went wrong with the checkpoints in the background."""
        if problem := self.writer.problem():
            self.watching.say(f"warning: {problem}; training goes on")

    def _rewind(self) -> None:
        """After a loss spike: weights and optimizer as of the newest checkpoint, and on with the data that follows the spike."""
        state = self.state
        self.counts.store(state)
        self.writer.close()
        newest = self.world.share(lambda: newest_whole(self.directory.checkpoints, self.watching.say))
        if newest is None or state.rewinds == _MOST_REWINDS:
            self.watching.say(
                f"loss spike at step {state.step}: left out ({'no checkpoint to go back to' if newest is None else 'too many'})"
            )
            return
        averages = self.average.tensors() if self.average is not None else None
        with at_hand(newest, self.world) as here:
            before = load_checkpoint(here, self.model, self.optimizers, averages)
        for name in ("batch", "stream", "seconds", "spikes", "skipped_steps"):
            setattr(before, name, getattr(state, name))
        before.rewinds = state.rewinds + 1
        self.watching.say(f"loss spike at step {state.step}: going back to step {before.step}, and on with other data")
        vars(state).update(vars(before))
        self.counts.load(state)
        self.logged_step = state.step

    # After the last step

    def _finish(self) -> Result:
        """The best weights, measured on all of the held-out text, exported, sampled from and reported."""
        config, state, world = self.config, self.state, self.world
        self.doing = "measuring the best weights"
        best = self.directory.checkpoints / checkpoint_name(state.best_step or 0)
        if world.share(best.is_dir) and (state.best_step != state.step or self.average is not None):
            with at_hand(best, world, TO_USE) as here:
                load_weights(here, self.model)
            self.average = None
        held_out = self._held_out(config.train.final_eval_tokens)
        assert held_out is not None
        if problem := self.graphs.problem():
            self.say(f"warning: {problem}")
        if world.is_main:
            model = self.model
            if world.is_divided or not self.device.decodes:  # this process holds only a part of it, or cannot try it out where it is
                model = GPT.materialise(config.model, lora=config.lora)
                load_weights(best, model)
                if self.device.decodes:
                    model.to(self.device.type)
                    model.tie()
            spent, capacity = self.clock.totals(), self.device.memory_limit()
            write_results(config, self.directory, state, model, self.data, held_out, spent, capacity, self.say)
        return Result(0, self.directory.path, state, held_out)
