"""A run's plan of what trains, carried out: at the start, when a stage begins, and again when the run is resumed in the middle of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from gpt.config import RunConfig
from gpt.data.config import EXAMPLE_SOURCES
from gpt.errors import UserError
from gpt.finetuning.freezing import Plan, plan_freezing, set_trainable, table
from gpt.finetuning.trainable import TableRow
from gpt.model.transformer import GPT
from gpt.runtime.compiling import FixedGraphs, kinds_of_graphs
from gpt.runtime.device import Device
from gpt.runtime.distributed import World
from gpt.runtime.parallel import spread_anew
from gpt.training.checkpoint import TrainingState
from gpt.training.length import expected_model
from gpt.training.optimizer import AdamW, Muon, build_optimizers, extend_optimizers, peak_learning_rate
from gpt.training.weight_average import WeightAverage


def expected_plan(config: RunConfig) -> Plan:
    """The plan of a run before anything is read, on the model that the config describes.

    Rows with classes give the model another head, and what rows are may show only as they are read: then it is enough that one of the
    models that it may be can have the plan.

    Raises:
        UserError: none can.
    """
    model, problem = expected_model(config), None
    told = EXAMPLE_SOURCES.get(config.data.source, config.data.format)
    kinds = {"text_label": ("sequence",), "tokens_tags": ("tokens",), "auto": ("sequence", "tokens")}.get(told, ())
    teaches = kinds if config.command == "finetune" and config.on_examples and model.head == "language_model" else ()
    for shape in (model, *(replace(model, head=head, classes=["0", "1"]) for head in teaches)):
        try:
            with torch.device("meta"):
                return plan_freezing(config.freeze, config.unfreeze, GPT(shape, config.lora), shape.head != "language_model")
        except UserError as error:
            problem = problem or error
    assert problem is not None
    raise problem


class Unfreezing:
    """What trains of a model, with the optimizers over it.

    Args:
        config: the run.
        plan: of what trains.
        model, objective: as laid out, with the first stage of the plan set.
        world, device: where.

    Attributes:
        objective: what to call for a loss; another one after a stage has begun, where DDP surrounds it.
        optimizers: over what trains.
        average: of what trains, or None.
    """

    def __init__(self, config: RunConfig, plan: Plan, model: GPT, objective: nn.Module, world: World, device: Device) -> None:
        self.plan, self.model, self.objective = plan, model, objective
        self._config, self._world, self._device = config, world, device
        self._arguments = (device.dtype, world.work_mesh, device.fused_adamw, self._scale)
        self.optimizers: list[Muon | AdamW] = build_optimizers(config.optimizer, model, *self._arguments)
        self.average = WeightAverage(model, config.train.ema) if config.train.ema else None

    def due(self, state: TrainingState, progress: float) -> bool:
        """Whether another stage begins before the next step."""
        begun = len(state.unfrozen) + 1
        return begun < len(self.plan.stages) and self.plan.stages[begun].is_due(state.step, progress)

    def begin(self, state: TrainingState, progress: float, graphs: FixedGraphs) -> str:
        """Let the next stage train from here on, and say what that is."""
        state.unfrozen.append([state.step, progress])
        names = self._extend(len(state.unfrozen), (state.step, progress))
        for name in names:
            state.frozen.pop(name, None)
        graphs.add(kinds_of_graphs(self.model, self._config.train))
        parameters = dict(self.model.named_parameters())
        number = sum(parameters[name].numel() for name in names)
        return f"step {state.step}: {number:,} parameters more train now ({_modules(names)})"

    def catch_up(self, state: TrainingState, graphs: FixedGraphs) -> None:
        """Begin the stages that had begun where a resumed run goes on."""
        for begun, (step, progress) in enumerate(state.unfrozen, 1):
            self._extend(begun, (int(step), progress))
        graphs.add(kinds_of_graphs(self.model, self._config.train))

    def rows(self) -> list[TableRow]:
        """What trains, for people."""
        return table(self.plan, self.model, self._peak)

    def _extend(self, stage: int, since: tuple[int, float]) -> frozenset[str]:
        names = self.plan.stages[stage].names
        set_trainable(self.model, self.plan.trainable(stage + 1))
        more = {name: p for name, p in self.model.named_parameters() if name in names}
        extend_optimizers(self.optimizers, self._config.optimizer, more, *self._arguments, since=since)
        if self.average is not None:
            self.average.extend(names)
        self.objective = spread_anew(self.objective, self._world)
        return names

    def _scale(self, name: str) -> float:
        return self._config.layerwise_lr_decay ** self.plan.depths[name]

    def _peak(self, name: str) -> float:
        dim = dict(self.model.named_parameters())[name].dim()
        return peak_learning_rate(self._config.optimizer, name, dim) * self._scale(name)


def _modules(names: frozenset[str]) -> str:
    """Where parameters are, in a few words."""
    modules = sorted({".".join(name.split(".")[:2]) if name.startswith("blocks.") else name.partition(".")[0] for name in names})
    return ", ".join(modules[:6]) + (f" and {len(modules) - 6} more" if len(modules) > 6 else "")
