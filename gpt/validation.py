"""What the types of a run's config cannot check: impossible values and combinations, each with key and remedy. Imports no torch."""

from __future__ import annotations

import math
import re
from pathlib import Path

from gpt.aws.validation import validate_launch, with_channels
from gpt.config import RunConfig, at_least, check_seed, parse_span
from gpt.data.config import validate_data, validate_examples, validate_text, validate_tokenizer
from gpt.errors import UserError
from gpt.finetuning.config import validate_finetuning
from gpt.typed import nearest, shown


def validate_run(c: RunConfig) -> None:
    """Raises UserError for the first impossible value or combination, with its key."""
    if c.launch.name != "local":
        c = with_channels(c)
    check_seed(c.seed)
    for key, value, low in (
        ("train.grad_clip", c.train.grad_clip, 0), ("train.log_every", c.train.log_every, 1),
        ("train.eval_every", c.train.eval_every, 0),
        ("train.max_skipped_steps", c.train.max_skipped_steps, 1), ("train.sample_tokens", c.train.sample_tokens, 1),
        ("checkpoint.keep_last", c.checkpoint.keep_last, 1), ("device.threads", c.device.threads, 0),
        ("checkpoint.keep_best", c.checkpoint.keep_best, 1), ("checkpoint.keep_every", c.checkpoint.keep_every, 0),
        ("train.activation_checkpointing_n", c.train.activation_checkpointing_n, 1),
        ("optimizer.weight_decay", c.optimizer.weight_decay, 0), ("optimizer.adam_weight_decay", c.optimizer.adam_weight_decay, 0),
        ("schedule.warmup", c.schedule.warmup, 0), ("lm_weight", c.lm_weight, 0),
    ):  # fmt: skip
        at_least(key, value, low)
    at_least("train.sequence_length", c.train.sequence_length, 0)
    if c.train.sequence_length > c.model.context_length:
        raise UserError(
            f"train.sequence_length={c.train.sequence_length} is more than the model reads: model.context_length={c.model.context_length}"
        )
    for name in ("eval_tokens", "final_eval_tokens"):
        at_least(f"train.{name}", getattr(c.train, name), c.sequence_length, f", one {_length_key(c)}")
    for name in ("lr", "adam_lr", "eps"):
        if not getattr(c.optimizer, name) > 0:
            raise UserError(f"optimizer.{name}={shown(getattr(c.optimizer, name))} must be greater than 0")
    for name in ("momentum", "beta1", "beta2"):
        if not 0 <= getattr(c.optimizer, name) < 1:
            raise UserError(f"optimizer.{name}={shown(getattr(c.optimizer, name))} must be at least 0 and less than 1")
    if not 0 <= c.train.ema < 1:
        raise UserError(f"train.ema={shown(c.train.ema)} must be at least 0 and less than 1, such as 0.999")
    for name in ("decay", "final"):
        if not 0 <= getattr(c.schedule, name) <= 1:
            raise UserError(f"schedule.{name}={shown(getattr(c.schedule, name))} must be from 0 to 1")
    validate_finetuning(c.freeze, c.unfreeze, c.layerwise_lr_decay, c.distill, c.dpo)
    _validate_lora(c)
    _validate_text(c)
    _validate_batch(c)
    _validate_length(c)
    if c.launch.dry_run and c.launch.name != "sagemaker":
        raise UserError(
            f"launch.dry_run=true is of launch=sagemaker, and this is launch={c.launch.name}, which sends nothing; leave it out, or add "
            "launch=sagemaker"
        )
    if c.launch.name != "local":
        validate_launch(c)
    _validate_devices(c)
    if c.run.id and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", c.run.id):
        raise UserError(f"run.id={shown(c.run.id)}: must be letters, digits, '.', '_' and '-', and start with a letter or digit")
    if c.resume not in ("auto", "never"):
        directory = Path(c.resume).expanduser()
        if not c.resume or not directory.is_dir():
            raise UserError(
                f"resume={shown(c.resume)}: there is no such directory; give auto, never or a run directory"
                f"{nearest(c.resume, ('auto', 'never'))}"
            )
        if not (directory / "config.yaml").is_file():
            raise UserError(f"resume={shown(c.resume)} is not a run directory: it has no config.yaml; give one such as runs/<id>")


def _validate_lora(c: RunConfig) -> None:
    """Adapters are of weights that are there, of this shape, and whole."""
    if not c.lora.rank:
        return
    try:
        c.lora.modules(c.model)
    except ValueError as error:
        raise UserError(f"lora.{error}") from error
    if c.init is None:
        raise UserError(
            f"lora.rank={c.lora.rank}: adapters change weights that have been trained; add init=<run, Hugging Face directory or hub id>"
        )
    if c.parallel.tensor > 1:
        raise UserError(
            f"lora.rank={c.lora.rank}: tensor parallelism does not divide adapters, and this is parallel.tensor={c.parallel.tensor}; leave "
            "it out, parallel=fsdp divides them"
        )


def _validate_text(c: RunConfig) -> None:
    """What is read, and how it becomes ids."""
    validate_data(c.data)
    if c.model.head != "language_model" and not c.init:
        raise UserError(
            f"model.head={c.model.head}: a head of classes is put on trained weights; gpt finetune does it where rows have classes"
        )
    if c.on_examples and c.command == "finetune":
        validate_examples(c.data)
    else:
        validate_text(c.data)
        if c.loss_on not in ("auto", "all"):
            raise UserError(f"loss_on={c.loss_on} is of examples to fine-tune on, and this is text; leave it out")
        if c.lm_weight:
            raise UserError(f"lm_weight={shown(c.lm_weight)} is of examples with classes to fine-tune on, and this is text; leave it out")
    _validate_metrics(c)
    validate_tokenizer(c.tokenizer)
    if c.adapt_tokenizer is not None and c.init is None:
        raise UserError(
            f"adapt_tokenizer={shown(c.adapt_tokenizer)}: weights that there are go on with another tokenizer, and there are none; "
            "give init=<run, Hugging Face directory or hub id>, or leave it out"
        )
    if c.adapt_tokenizer is not None and c.lora.rank:
        raise UserError(
            f"lora.rank={c.lora.rank}: adapters leave the embeddings frozen, and those of adapt_tokenizer must train; "
            "adapt the tokenizer in a run of its own, and give that to init="
        )
    ids, whose = {
        "bpe": (c.tokenizer.vocab_size, f"tokenizer.vocab_size={c.tokenizer.vocab_size}"),
        "char": (257, "the 257 ids that tokenizer=char has at least"),
        "byte": (257, "the 257 ids of tokenizer=byte"),
        "pretrained": (0, ""),
    }[c.tokenizer.name]
    if 0 < c.model.vocab_size < ids:
        raise UserError(f"model.vocab_size={c.model.vocab_size} is smaller than {whose} (0 takes the tokenizer's)")


def _validate_metrics(c: RunConfig) -> None:
    """Metrics are of answers to the prompts of examples."""
    at_least("train.metrics_examples", c.train.metrics_examples, 1)
    named = f"train.metrics={shown(list(c.train.metrics))}"
    if c.train.metrics and not (c.on_examples and c.command == "finetune"):
        raise UserError(f"{named}: are of answers to the prompts of examples, and this run learns text; leave it out")
    if "pass" in c.train.metrics:
        raise UserError(f"{named}: a run never runs what the model writes; take pass out, and measure it with gpt evaluate metrics=[pass]")


def _validate_batch(c: RunConfig) -> None:
    """Batches are whole sequences, passes whole parts of a batch."""
    at_least("train.batch_tokens", c.train.batch_tokens, 1)
    length = c.sequence_length
    sequences, rest = divmod(c.train.batch_tokens, length)
    if rest:
        near = " or ".join(str(n * length) for n in (sequences, sequences + 1) if n)
        raise UserError(f"train.batch_tokens={c.train.batch_tokens} is not a multiple of {_length_key(c)}={length} (nearest: {near})")
    micro = c.train.micro_batch
    if micro != "auto":
        at_least("train.micro_batch", micro, 1)
        if sequences % micro:
            near = min((d for d in range(1, min(sequences, 4096) + 1) if sequences % d == 0), key=lambda d: abs(d - micro))
            raise UserError(
                f"train.micro_batch={micro} does not divide the {sequences} sequences of a batch "
                f"(train.batch_tokens / {_length_key(c)}; nearest: {near})"
            )


def _length_key(c: RunConfig) -> str:
    """The key that sets the length of a row."""
    return "model.context_length" if c.sequence_length == c.model.context_length else "train.sequence_length"


def _validate_devices(c: RunConfig) -> None:
    """How many devices, and what each has of the batch and the model."""
    for key, value, low in (
        ("parallel.tensor", c.parallel.tensor, 1), ("parallel.replicate", c.parallel.replicate, 1),
        ("launch.nnodes", c.launch.nnodes, 1), ("launch.node_rank", c.launch.node_rank, 0),
        ("launch.max_restarts", c.launch.max_restarts, 0),
    ):  # fmt: skip
        at_least(key, value, low)
    c.launch.patience(0)
    at_least("device.ranks", c.device.ranks, 0)
    if not 0 < c.device.mfu <= 1:
        raise UserError(f"device.mfu={shown(c.device.mfu)} must be greater than 0 and at most 1: a share of the chip's peak")
    if c.launch.nproc != "auto":
        at_least("launch.nproc", c.launch.nproc, 1)
    if c.parallel.name == "none":
        for key, value in (("launch.nproc", c.launch.nproc), ("launch.nnodes", c.launch.nnodes)):
            if value not in ("auto", 1):
                raise UserError(f"{key}={value}: parallel=none is one process; add parallel=ddp or parallel=fsdp")
        if c.parallel.tensor > 1:
            raise UserError(f"parallel.tensor={c.parallel.tensor}: parallel=none is one device; add parallel=ddp or parallel=fsdp")
    if c.parallel.replicate > 1 and c.parallel.name != "fsdp":
        raise UserError(
            f"parallel.replicate={c.parallel.replicate} is of parallel=fsdp, and this is parallel={c.parallel.name}; leave it out"
        )
    for name in ("n_head", "n_kv_head", "d_ff"):
        if getattr(c.model, name) % c.parallel.tensor:
            raise UserError(f"parallel.tensor={c.parallel.tensor} does not divide model.{name}={getattr(c.model, name)}")
    if c.launch.node_rank >= c.launch.nnodes:
        raise UserError(f"launch.node_rank={c.launch.node_rank} must be less than launch.nnodes={c.launch.nnodes}")
    if c.launch.nnodes > 1 and not re.fullmatch(r"[^:\s]+:\d{1,5}", c.launch.endpoint):
        raise UserError(
            f"launch.endpoint={shown(c.launch.endpoint)}: several machines meet at one of them; give host:port of that with node_rank=0"
        )


def _validate_length(c: RunConfig) -> None:
    """How long the run is, and what the schedule does within it."""
    parse_span("checkpoint.every", c.checkpoint.every, ("steps", "seconds"))
    budget = parse_span("train.budget", c.train.budget)
    steps = {"steps": budget.amount, "tokens": budget.amount / c.train.batch_tokens}.get(budget.unit)
    warmup = c.schedule.warmup
    if warmup >= 1:
        if steps is not None and warmup > math.ceil(steps):
            raise UserError(
                f"schedule.warmup={shown(warmup)} steps is longer than the run: train.budget={c.train.budget} is {math.ceil(steps)} steps"
            )
        warmup = warmup / steps if steps else 0.0
    if c.schedule.name == "wsd" and warmup + c.schedule.decay > 1 + 1e-9:
        raise UserError(
            f"schedule.decay={shown(c.schedule.decay)} must be at most {1 - warmup:.3g} of the run, "
            f"since schedule.warmup={shown(c.schedule.warmup)} comes before it"
        )
