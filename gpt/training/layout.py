"""A run's model on its devices: built, given its first weights, checkpointed, compiled and spread over the processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from gpt.config import RunConfig, TrainConfig
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.finetuning.freezing import set_trainable
from gpt.finetuning.vocabulary import adapt_vocabulary
from gpt.inference.loading import load_model
from gpt.model.heads import adopt, describe
from gpt.model.lora import init_adapters
from gpt.model.loss import LinearCrossEntropy
from gpt.model.transformer import GPT
from gpt.runtime.compiling import compile_model
from gpt.runtime.device import Device
from gpt.runtime.distributed import World
from gpt.runtime.parallel import checkpoint_activations, place_weights, split_matrices, spread
from gpt.training.checkpoint import digest
from gpt.training.objectives import frozen_folder, objective_for
from gpt.training.packed_prefix import PackedPrefix, packs_prefix
from gpt.typed import shown


@dataclass
class Layout:
    """Where a run's model is.

    Attributes:
        model: the GPT; its parameters have the same names in every layout.
        objective: what to call for a loss.
        frozen: SHA-256 of each parameter that does not train, as it began; in the main process.
    """

    model: GPT
    objective: nn.Module
    frozen: dict[str, str] = field(default_factory=dict)


def lay_out(
    config: RunConfig,
    first_weights: Callable[[], GPT],
    compiled: bool,
    world: World,
    device: Device,
    trainable: Collection[str] | None = None,
    paired: bool = False,
) -> Layout:
    """Build the model of a run.

    Args:
        config: the run, with the size of the vocabulary.
        first_weights: makes the whole model on the CPU; where parameters are divided it is called in the main process only, and
            nobody else ever holds the whole.
        compiled: whether to compile blocks and loss.
        world, device: where.
        trainable: names of the parameters that train; None: all.
        paired: whether it learns from pairs of preference.
    """
    divided = world.is_divided
    if divided:
        source = first_weights() if world.is_main else None
        with torch.device("meta"):
            model = GPT(config.model, config.lora)
    else:
        source, model = None, first_weights()
    names = {name for name, _ in model.named_parameters()}
    trainable = names if trainable is None else frozenset(trainable)
    set_trainable(model, frozenset(trainable))
    whole = source if divided else model if world.is_main else None
    digests = {name: digest(p) for name, p in whole.named_parameters() if name not in trainable} if whole is not None else {}
    if not divided:
        model.to(device.type)
        model.tie()
        assert not config.model.tie_embeddings or model.head.weight is model.embeddings.tokens.weight
        if packs_prefix(device):
            model.frozen_blocks = PackedPrefix(model, frozen_folder(config))
    objective = objective_for(config, model, LinearCrossEntropy(device.dtype), paired)
    if config.parallel.tensor > 1 and divided:
        split_matrices(model, world)
    prepare_blocks(config.train, list(model.blocks))
    if compiled:
        compile_model(model, objective.loss, device)
    spread_objective = spread(objective, world)
    if divided:
        model.to_empty(device=device.type)
        model.tie()
        model.init_tables()
        place_weights(model, source)
    return Layout(model, spread_objective, digests)


def first_weights(config: RunConfig, fresh: bool, say: Callable[[str], None], tokenizer: Tokenizer | None = None) -> GPT:
    """The model that a run begins with, in fp32 on the CPU; seeds the run's random numbers.

    Args:
        config: the run, with the size of the vocabulary.
        fresh: whether it begins with these weights, random ones or those of `init`; False: a checkpoint brings others.
        say: takes progress messages.
        tokenizer: of the run, for which weights of another one are adapted.

    Raises:
        UserError: the weights cannot be read, are not of the tokenizer beside them, or have a head of other classes.
    """
    torch.manual_seed(config.seed)
    model = GPT.materialise(config.model, lora=config.lora)
    if not fresh or config.init is None:
        model.init_weights()
        return model
    # Copied, dropout and all: what is loaded may be mapped from its file, and has the dropout of its own training.
    loaded = load_model(config.init, dtype=torch.float32, allow_pickle=config.allow_pickle, key="init")
    if config.adapt_tokenizer is not None:
        assert tokenizer is not None
        origins = adapt_vocabulary(loaded.model, loaded.tokenizer, tokenizer, config.model.vocab_size, f"init={config.init}")
        say(f"tokenizer: {tokenizer.describe()}, in place of {loaded.tokenizer.describe()}; of its {origins}")
    if config.lm_weight and not (loaded.model.config.tie_embeddings or loaded.model.config.head != "language_model"):
        raise UserError(
            f"lm_weight={shown(config.lm_weight)}: the next tokens are told by the embeddings, and init={config.init} has an output head "
            "apart from them, which is not kept; leave it out, or start from a model that ties the two"
        )
    try:
        kept = adopt(model, model.config, loaded.model, loaded.model.config)
    except ValueError as error:
        raise UserError(f"init={config.init}: {error}") from error
    init_adapters(model)
    say(f"weights: {config.init}{'' if kept else f', with a new head {describe(config.model)}'}")
    return model


def prepare_blocks(config: TrainConfig, blocks: Sequence[nn.Module]) -> None:
    """What is done to blocks before they are compiled."""
    checkpoint_activations(blocks, config.activation_checkpointing, config.activation_checkpointing_n)
