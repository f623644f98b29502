"""The parts of a run, put together before its first step: data, model, optimizers, objective, and what a checkpoint brings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from gpt.config import RunConfig
from gpt.data.batches import Batches
from gpt.data.config import EXAMPLE_SOURCES
from gpt.data.streaming import StreamingBatches
from gpt.errors import UserError
from gpt.finetuning.freezing import plan_freezing
from gpt.finetuning.trainable import write_table
from gpt.model.transformer import GPT
from gpt.runtime.case import Case
from gpt.runtime.compiling import CompileAhead, FixedGraphs, kinds_of_graphs, native_throughout, should_compile
from gpt.runtime.device import Device
from gpt.runtime.distributed import World
from gpt.runtime.parallel import unwrapped
from gpt.training.answering import Answering
from gpt.training.checkpoint import TrainingState, load_checkpoint, read_state
from gpt.training.checkpoint_copies import at_hand
from gpt.training.clock import StepClock
from gpt.training.data import OneBatch, complete_shape, open_training_data
from gpt.training.layout import first_weights, lay_out, prepare_blocks
from gpt.training.length import expected_length, expected_model, run_length
from gpt.training.micro_batch import MOST_TOKENS, divisors, largest_by_formula, largest_that_fits, try_pass
from gpt.training.needs import run_case
from gpt.training.objectives import Givers, givers_for, whole_pairs
from gpt.training.resuming import checkpoint_to_continue, refuse_other_data, refuse_unlike_machines, run_to_continue, with_own_tokenizer
from gpt.training.run_directory import RunDirectory
from gpt.training.step import Counts, Step
from gpt.training.unfreezing import Unfreezing, expected_plan


class PreparedRun:
    """A run whose parts are put together as its config says (`_set_up`); `Trainer` sets it going.

    Args:
        config: the run, whole.

    Raises:
        UserError: the config is impossible.

    Attributes:
        device, world, directory, say: where it runs, with whom, in which folder, and what takes lines for people; `fit` finds them first.
    """

    device: Device
    world: World
    directory: RunDirectory
    say: Callable[[str], None]

    def __init__(self, config: RunConfig) -> None:
        config.validate()
        if config.freeze.untie and config.model.tie_embeddings:
            config.model = replace(config.model, tie_embeddings=False)
        self.plan = expected_plan(config)  # found wrong before anything is written or read
        self.paired = EXAMPLE_SOURCES.get(config.data.source, config.data.format) == "preference"  # as far as is known before rows are read
        self.config = config
        self.givers = Givers()
        self.doing, self.micro_batch, self.compiled = "setting up", 1, False  # for errors that say where a process waited or ran full

    def _set_up(self) -> None:
        config, world = self.config, self.world
        before = world.share(lambda: run_to_continue(config, self.directory.path))
        if before is not None:
            config.model = before.model  # the same, with what the data has added: the size of the vocabulary, a head of classes
        self.sequences = config.train.batch_tokens // config.sequence_length
        if self.sequences % world.data_size:
            raise UserError(
                f"train.batch_tokens={config.train.batch_tokens} is {self.sequences} sequences, which {world.data_size} processes cannot "
                f"share evenly (nearest: {math.ceil(self.sequences / world.data_size) * world.data_size * config.sequence_length})"
            )
        most = config.train.micro_batch if config.train.micro_batch != "auto" else MOST_TOKENS // config.sequence_length
        sizes = divisors(self.sequences // world.data_size, most)
        self.micro_batch = sizes[0]
        native = not world.is_divided and not config.lora.rank and native_throughout(self.device, expected_model(config))
        self.compiled, reason = should_compile(config.compile, self.device, *expected_length(config), native)
        if config.train.micro_batch == "auto" and not self.device.says_when_full:
            self.micro_batch = largest_by_formula(sizes, lambda size: self.case(micro_batch=size), self.device)
        ahead = None
        if self.compiled and not world.is_divided and self.device.compiles_ahead:
            documents = config.on_examples or config.data.document_mask
            model, prepare = expected_model(config), partial(prepare_blocks, config.train)
            ahead = CompileAhead(self.device, model, self.micro_batch, config.sequence_length, documents, prepare, config.lora)
        checkpoint = world.share(lambda: checkpoint_to_continue(self.directory.checkpoints, self.say)) if before is not None else None
        self.doing = "preparing the data"
        source = config if checkpoint is None else with_own_tokenizer(config, self.directory.path)
        self.data = world.main_first(lambda: open_training_data(source, self.sequences, self.say))
        refuse_unlike_machines(self.data.fingerprint, world)
        self.paired = bool(self.data.pairs)
        if self.paired:
            self.micro_batch, sizes = whole_pairs(self.micro_batch, sizes, config, self.sequences, world.data_size)
        if ahead is not None and not ahead.done():
            self.say("compiling (some 15 s the first time, a second after that)")
        if ahead is not None and (problem := ahead.problem()):
            self.compiled, reason = False, f"not compiled, so the run is slower: {problem}"
        complete_shape(config.model, self.data, self.say)
        self.byte_lengths = self.data.target_bytes()
        self.doing = "laying out the model"
        start = partial(first_weights, config, checkpoint is None, self.say, self.data.tokenizer)
        with torch.device("meta"):
            shape = GPT(config.model, config.lora)
            self.plan = plan = plan_freezing(config.freeze, config.unfreeze, shape, config.model.head != "language_model")
        layout = lay_out(config, start, self.compiled, world, self.device, plan.stages[0].names, self.paired)
        self.model, self.objective = layout.model, layout.objective
        kinds = kinds_of_graphs(self.model, config.train) | ({("softmax", "next tokens")} if config.lm_weight else set())
        self.graphs = FixedGraphs(self.device, kinds if self.compiled else ())
        self.unfreezing = Unfreezing(config, plan, self.model, self.objective, world, self.device)
        self.optimizers, self.average = self.unfreezing.optimizers, self.unfreezing.average
        self.batches: Batches = OneBatch(self.data.batches) if config.train.overfit else self.data.batches
        self.state = TrainingState(corpus=self.data.fingerprint, frozen=layout.frozen)
        self.total_steps, self.total_seconds = run_length(config, self.batches, self.sequences)
        if checkpoint is not None:
            self._resume(checkpoint)
        givers = self._new_givers().train
        if config.train.micro_batch == "auto" and self.device.says_when_full and not world.is_divided:
            documents = config.on_examples or config.data.document_mask
            attempt = partial(try_pass, unwrapped(self.objective), givers, self.device, config.sequence_length, documents)
            self.micro_batch = world.least(largest_that_fits(attempt, sizes))
            if self.micro_batch != sizes[0]:
                self.say(f"micro-batches of {self.micro_batch} sequences: {sizes[0]} do not fit into memory")
        self.answering = Answering(config, self.data.tokenizer, world, self.device, self.say)
        self.clock = StepClock(self.device)
        self.counts = Counts(self.state, self.device)
        self.step = Step(
            self.objective, self.model, self.optimizers, self.average, self.counts, world, self.device, self.micro_batch,
            config.train.grad_clip, config.train.spike != "none", self.clock, givers,
        )  # fmt: skip
        self.peak_flops = self.device.peak_flops
        if world.is_main:
            self.directory.describe(config, self.device, self.data.tokenizer)
            self.peak_flops = self.device.measured_peak()
        if plan.freezes or config.layerwise_lr_decay < 1:
            rows = self.unfreezing.rows()
            self.say(write_table(rows))
            if world.is_main:
                self.directory.keep_table(rows)
        size = self.model.num_parameters() / 1e6
        self.say(f"model: {size:.2f}M parameters, {config.model.stock_architecture()} shape; {reason}")

    def case(self, ranks: int | None = None, micro_batch: int | None = None) -> Case:
        """What the run needs of memory, as far as is known; on so many ranks, with so many sequences of a pass, if not its own."""
        ranks, micro_batch = ranks or self.world.size, micro_batch or self.micro_batch
        return run_case(self.config, self.plan, ranks, micro_batch, self.device, self.compiled, self.paired, self.givers.teacher)

    def _resume(self, checkpoint: Path) -> None:
        with at_hand(checkpoint, self.world) as here:
            self.unfreezing.catch_up(read_state(here), self.graphs)
            self.objective = self.unfreezing.objective
            averages = self.average.tensors() if self.average is not None else None
            state = load_checkpoint(here, self.model, self.optimizers, averages)
        refuse_other_data(self.state.corpus, state.corpus, self.directory.path)
        self.state = state
        if isinstance(self.data.batches, StreamingBatches) and state.stream is not None:
            self.data.batches.load_state_dict(state.stream)
        self.say(f"resuming from {checkpoint} at step {state.step}")

    def _new_givers(self) -> Givers:
        """What adds to each pass, with what trains now."""
        self.givers.close()
        where = (self.compiled, self.givers, self.device, self.world, self.say)
        self.givers = givers_for(self.config, self.objective, self.data, self.state, self.total_steps, *where)
        return self.givers
