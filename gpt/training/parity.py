"""`gpt parity`: does the device compute what the CPU computes? One batch of a run goes through forward and backward on both.

The reference is eager fp64 on the CPU. CPU fp32 and CPU bf16 show what rounding alone does at each place of the model; the device, in the
run's precision and compiled as the run would be, must stay within a few times of that. The first layer that does not is named.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt.config import RunConfig
from gpt.data.batches import Batch
from gpt.errors import UserError
from gpt.model.kernels import without_native
from gpt.model.loss import IGNORE, LinearCrossEntropy
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT
from gpt.runtime.compiling import should_compile
from gpt.runtime.device import Device, find_device
from gpt.runtime.distributed import World
from gpt.training.data import complete_shape, open_training_data
from gpt.training.layout import first_weights, lay_out
from gpt.training.micro_batch import divisors
from gpt.training.progress import say
from gpt.training.step import rows_on_device

if TYPE_CHECKING:
    from rich.table import Table

# Kernels that add up in another order, or keep other intermediate results, are about as far from fp64 as CPU eager is (seen: at most twice
# as far); a wrong mask, scale, cast or gradient is off by tens to thousands of times that.
TOLERANCE = 4.0
FLOOR = 2.0**-20  # relative: of fp32 sums of a few hundred terms in another order, where the CPU happens to be exact
_ZERO = 1e-7  # of a layer's gradient
_MOST_TOKENS = 4096  # of the micro-batch, unless train.micro_batch says how many: fp64 on a CPU takes its time
_MOST_LOGITS = 2**25  # compared; those of the first rows
_LOSS_CHUNK = 512  # tokens whose fp64 logits are held at once


@dataclass(frozen=True)
class Place:
    """Something that is compared.

    Attributes:
        backward: whether it is a gradient.
        layer: embeddings, blocks.<i>, final_norm, head, logits or loss.
        part: output; of gradients the parameter's name within the layer, or input.
    """

    backward: bool
    layer: str
    part: str


LOGITS, LOSS = Place(False, "logits", "output"), Place(False, "loss", "output")


@dataclass(frozen=True)
class Error:
    """How far a tensor is from the reference.

    Attributes:
        relative: the norm of the difference over that of the reference.
        typical: difference of one element, its root mean square.
        largest: difference of one element.
    """

    relative: float
    typical: float
    largest: float


@dataclass(frozen=True)
class Finding:
    """What the comparison says of one place.

    Attributes:
        place: where.
        errors: by column: the CPU in fp32 and in bf16, and the device.
        times: the device's error in terms of what rounding explains; infinite if the device gives no number.
    """

    place: Place
    errors: tuple[Error, Error, Error]
    times: float

    @property
    def departs(self) -> bool:
        """Whether it is more than rounding."""
        return not self.times <= TOLERANCE


def parity(config: RunConfig) -> int:
    """Carry out `gpt parity`: a table and a verdict on stdout. Returns 0 if the device agrees with the CPU, 1 if it departs.

    Raises:
        UserError: the device is not there, the data or weights cannot be read, or the CPU computes no finite numbers itself.
    """
    from rich.console import Console

    if config.parallel.name != "none":
        raise UserError(f"parallel={config.parallel.name}: gpt parity compares one device with the CPU; leave it out")
    if config.adapt_tokenizer is not None:
        raise UserError(f"adapt_tokenizer={config.adapt_tokenizer}: gpt parity compares the weights of init= as they are; leave it out")
    device, host = find_device(config.device, config.precision), replace(config.device, name="cpu")
    cpu, narrow = find_device(host, "fp32"), find_device(host, "bf16")
    compiled, how = should_compile(config.compile if config.compile != "auto" else True, device)
    if config.model.dropout:
        say(f"note: model.dropout={config.model.dropout:g} draws other numbers on every device: compared without it")
        config.model.dropout = 0.0
    batch = _one_batch(config)
    targets = int((batch.targets != IGNORE).sum())
    observe = partial(_observe, config, batch, targets)
    say("computing: CPU fp64, the reference")
    exact = observe(cpu, False, exact=True)
    _refuse_no_numbers(config, exact)

    def errors(device: Device, compiled: bool, name: str) -> dict[Place, Error]:
        say(f"computing: {name}")
        try:
            found = compare(observe(device, compiled), exact)
        except RuntimeError as error:
            if told := device.explain(error):
                raise UserError(told) from error
            raise
        if problem := device.after_first_step():
            say(f"note: {problem}")
        gc.collect()  # a model that was compiled refers to itself
        return found

    yardstick, precision = (1, "bf16") if device.dtype == torch.bfloat16 else (0, "fp32")
    column, rounding = f"{device.type} {precision}", f"the rounding of CPU {precision}"
    with without_native():  # what the device is held against is torch's, on a CPU too
        columns = [errors(cpu, False, "CPU fp32"), errors(narrow, False, "CPU bf16")]
    columns.append(errors(device, compiled, column))
    loss = exact[LOSS].item()
    findings = judge(columns, yardstick, loss, targets)
    console = Console(highlight=False, markup=False)
    for line in _about(config, batch, targets, device, "compiled" if compiled else how):
        console.print(line)
    console.print(_table(findings, column))
    console.print(
        "Errors against CPU fp64: |x - exact| / |exact|; largest: the device's, of one element; times: the device's in terms of "
        f"{rounding}, or of {FLOOR:.0e} if that is more. Of each layer the tensor that is furthest off.\n"
    )
    console.print(verdict(findings, rounding, device.type))
    fault = first_departure(findings)
    if fault is not None and compiled:
        columns[-1] = errors(device, False, f"{column}, not compiled")
        again = first_departure(judge(columns, yardstick, loss, targets))
        wrong = "Not compiled, it agrees: what the compiler made is wrong."
        console.print(wrong if again is None else f"Not compiled, it departs too, first in {_name(again.place)}.")
    return 0 if fault is None else 1


def _one_batch(config: RunConfig) -> Batch:
    """A micro-batch of the run's first batch, on the CPU. Sets the size of the model's vocabulary."""
    length = config.sequence_length
    sequences = config.train.batch_tokens // length
    data = open_training_data(config, sequences, say)
    complete_shape(config.model, data, say)
    micro = config.train.micro_batch
    rows = divisors(sequences, _MOST_TOKENS // length)[0] if micro == "auto" else micro
    batch = data.batches.batch(0)
    return Batch(batch.tokens[:rows], batch.targets[:rows], None if batch.documents is None else batch.documents[:rows])


# One pass


class _Watched(nn.Module):
    """A block that shows its output, from outside of what is compiled."""

    def __init__(self, block: nn.Module, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.block, self._see = block, see

    def forward(self, *inputs: object) -> Tensor:
        """As the block's."""
        x = self.block(*inputs)
        self._see(x)
        return x


class _ExactLoss(LinearCrossEntropy):
    """`LinearCrossEntropy` as it is written in books, in the dtype of the model."""

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: Tensor | None = None,
        bias: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """hidden (B, T, E), weight (V, E), targets (B, T), bias (V,) -> the sum over the valid targets."""
        assert weights is None, "what is compared is the loss of next tokens"

        def nll(hidden: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight, bias), targets, ignore_index=IGNORE, reduction="sum")

        chunks = zip(hidden.flatten(0, 1).split(_LOSS_CHUNK), targets.flatten().split(_LOSS_CHUNK), strict=True)
        return torch.stack([checkpoint(nll, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _observe(config: RunConfig, batch: Batch, targets: int, device: Device, compiled: bool, exact: bool = False) -> dict[Place, Tensor]:
    """Forward and backward of a batch, of the mean loss.

    Args:
        config: the run.
        batch: rows, on the CPU.
        targets: of them.
        device: where to compute, in which precision.
        compiled: whether blocks and loss are compiled.
        exact: compute in fp64, which only a CPU does.

    Returns:
        Everything that is compared, on the device: first what forward gives, from the embeddings to the loss, then the gradients, from the
        head to the embeddings. Those of an exact pass are rounded to fp32, which is less than what is looked for.
    """
    layout = lay_out(config, partial(first_weights, config, True, lambda text: None), compiled, World(), device)
    model, objective = layout.model, layout.objective
    if exact:
        objective = NextTokenLoss(model.double(), _ExactLoss())
    parameters = dict(model.named_parameters())
    seen: dict[str, Tensor] = {}

    def see(layer: str, x: Any) -> None:
        if x.requires_grad:
            x.retain_grad()
        seen[layer] = x

    model.embeddings.register_forward_hook(lambda module, inputs, x: see("embeddings", x))
    model.blocks = nn.ModuleList(_Watched(block, partial(see, f"blocks.{i}")) for i, block in enumerate(model.blocks))
    model.final_norm.register_forward_hook(lambda module, inputs, x: see("final_norm", x))
    part, learned = rows_on_device(batch, slice(None), device, config.model.outputs)
    with device.autocast():
        loss = objective(part.tokens, part.targets, part.documents, learned)
    loss.backward()
    with torch.no_grad(), device.autocast():
        logits = model.head(seen["final_norm"].flatten(0, 1)[: max(1, _MOST_LOGITS // config.model.outputs)])
    values = {Place(False, layer, "output"): x.detach() for layer, x in seen.items()}
    values |= {LOGITS: logits, LOSS: loss.detach() / targets}
    layers = [*reversed(seen), ""]
    for layer, below in zip(["head", *layers], layers, strict=False):
        inner = {name.removeprefix(f"{layer}."): p.grad for name, p in parameters.items() if name.startswith(f"{layer}.")}
        if below:
            inner["input"] = seen[below].grad
        values |= {Place(True, layer, name): gradient / targets for name, gradient in inner.items() if gradient is not None}
    return {place: x.float() for place, x in values.items()} if exact else values


# Comparing


def compare(found: Mapping[Place, Tensor], exact: Mapping[Place, Tensor]) -> dict[Place, Error]:
    """How far what a pass gave is from the reference, place by place; what it did not give is infinitely far.

    A parameter whose gradient is 0 (that of a key's bias is: it moves all scores of a query alike) has none but rounding to compare, which
    is measured against the gradient of its whole layer.
    """
    layers: dict[str, float] = {}
    for place, x in exact.items():
        if place.backward and place.part != "input":
            layers[place.layer] = layers.get(place.layer, 0.0) + _square(x)
    errors = {}
    for place, x in exact.items():
        if place not in found:
            errors[place] = Error(math.inf, math.inf, math.inf)
            continue
        difference = found[place].cpu().double() - x.double()  # the device may have no fp64
        size, off = _square(x), _square(difference)
        if place.backward and size < _ZERO**2 * layers.get(place.layer, 0.0):
            size = layers[place.layer]
        errors[place] = Error((off / max(size, 1e-300)) ** 0.5, (off / x.numel()) ** 0.5, difference.abs().max().item())
    return errors


def _square(x: Tensor) -> float:
    return x.double().square().sum().item()


def judge(columns: Sequence[dict[Place, Error]], yardstick: int, loss: float, targets: int) -> list[Finding]:
    """What the errors say.

    Args:
        columns: errors of CPU fp32, of CPU bf16 and of the device.
        yardstick: the one of the CPU's columns that has the device's precision.
        loss: the reference's, the mean over its targets.
        targets: how many they are.

    Returns:
        All places in the order in which they are computed.
    """
    rounding, findings = columns[yardstick], []
    for place, (wide, narrow, device) in ((place, [column[place] for column in columns]) for place in rounding):
        explained = rounding[place].relative
        if place == LOSS:  # one number, in which the CPU's errors may happen to cancel: what those of the logits leave of a mean
            explained = max(explained, rounding[LOGITS].typical / (targets**0.5 * loss))
        times = device.relative / max(explained, FLOOR)
        findings.append(Finding(place, (wide, narrow, device), math.inf if math.isnan(times) else times))
    return findings


def first_departure(findings: list[Finding]) -> Finding | None:
    """The first place that departs: in forward order, or if forward agrees, from the head down."""
    return next((finding for finding in findings if finding.departs), None)


# Showing


def _refuse_no_numbers(config: RunConfig, exact: Mapping[Place, Tensor]) -> None:
    """Raises UserError where the reference itself is not finite."""
    for place, x in exact.items():
        if not x.isfinite().all():
            whose = f"init={config.init}: with these weights" if config.init else "model: with its first weights"
            raise UserError(
                f"{whose} the CPU computes no finite numbers in fp64 either, first in {_name(place)}; there is nothing to compare"
            )


def _about(config: RunConfig, batch: Batch, targets: int, device: Device, how: str) -> Iterator[str]:
    """What is compared."""
    with torch.device("meta"):
        size = GPT(config.model).num_parameters() / 1e6
    rows, length = batch.tokens.shape
    documents = "" if batch.documents is None else ", no document seeing another"
    yield f"model:  {size:.2f}M parameters, {config.model.stock_architecture()} shape, {config.init or 'first weights'}"
    yield f"batch:  {rows} x {length} tokens of the run's first, {targets:,} targets{documents}"
    yield f"device: {device.description}, {how}"


def _table(findings: list[Finding], device: str) -> Table:
    """Of each layer the place that is furthest off."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(("", "CPU fp32", "CPU bf16", device, "largest", "times", "")):
        table.add_column(name, justify="right" if 0 < number < 6 else "left", no_wrap=True)
    for backward, title in ((False, "forward"), (True, "gradients")):
        table.add_row(title, style="bold")
        for layer in dict.fromkeys(finding.place.layer for finding in findings if finding.place.backward == backward):
            worst = max((f for f in findings if (f.place.backward, f.place.layer) == (backward, layer)), key=lambda f: f.times)
            figures = [*(error.relative for error in worst.errors), worst.errors[-1].largest]
            mark = "departs" if worst.departs else ""
            table.add_row(f"  {layer}", *(f"{figure:.1e}" for figure in figures), _times(worst.times), mark)
    return table


def _times(times: float) -> str:
    return f"{times:.2f}" if times < 10 else f"{times:.3g}"


def _name(place: Place) -> str:
    if not place.backward:
        return f"the {place.layer}" if place.layer in ("logits", "loss") else f"the output of {place.layer}"
    return f"the gradient that {place.layer} hands down" if place.part == "input" else f"the gradient of {place.layer}.{place.part}"


def verdict(findings: list[Finding], rounding: str, device: str) -> str:
    """One sentence: whether the device agrees with the CPU, or where it first departs."""
    fault = first_departure(findings)
    if fault is None:
        worst = max(findings, key=lambda finding: finding.times)
        most = f"at most {_times(worst.times)} times {rounding} ({TOLERANCE:g} allowed), in {_name(worst.place)}"
        return f"{device} agrees with the CPU: {most}."
    how = (
        "gives no finite number" if math.isinf(fault.times) else f"is off by {_times(fault.times)} times {rounding} ({TOLERANCE:g} allowed)"
    )
    forward = "; the forward pass agrees" if fault.place.backward else ""
    return f"{device} departs from the CPU first in {_name(fault.place)}: it {how}{forward}."
