"""Loss and bits per byte of a model on a text, each token scored once.

Shapes: B windows of a pass, T their length, N tokens scored, E d_model, V vocabulary.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.data.batches import Batch
from gpt.data.shards import TokenArray
from gpt.evaluation.classification import ClassCounts, ClassScores
from gpt.model.loss import IGNORE
from gpt.model.transformer import GPT
from gpt.runtime.device import Device
from gpt.runtime.distributed import World


@dataclass(frozen=True)
class HeldOutLoss:
    """Sums over a text, from which every usual figure follows."""

    nll: float
    """Nats."""
    tokens: int
    bytes: int
    """Of the text that the tokens stand for."""
    scores: ClassScores | None = None
    """Of a classifier, whose targets are classes: how often it is right."""
    pairs: int = 0
    """Of preference, whose losses were summed instead of the tokens'; 0: nats of tokens."""
    more: Mapping[str, float] = field(default_factory=dict)
    """Other figures of pairs, by name."""

    @property
    def loss(self) -> float:
        """Nats per token, whose exponential is the token perplexity; or the loss per pair."""
        return self.nll / (self.pairs or self.tokens)

    @property
    def perplexity(self) -> float:
        """Per token; infinite where it exceeds what a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def figures(self) -> dict[str, float]:
        """Those of a validation, as they stand in metrics.jsonl."""
        if self.scores is None and not self.pairs:
            return {"val_loss": self.loss, "val_bpb": self.bits_per_byte}
        more = self.scores.figures() if self.scores is not None else self.more
        return {"val_loss": self.loss, **{f"val_{name}": value for name, value in more.items()}}

    @property
    def bits_per_byte(self) -> float:
        """Does not depend on the tokenizer, unlike the loss. The end-of-text tokens' bits count, they have no bytes."""
        return self.nll / math.log(2) / max(1, self.bytes)


@dataclass(frozen=True)
class Windows:
    """Where a text is cut to be scored.

    Attributes:
        starts: (n,) of the windows; the tokens after each are its targets.
        length: T, tokens that the model reads of each window.
        overlap: targets at the beginning of every window but one at 0 that do not count, for the window before has scored them.
    """

    starts: np.ndarray
    length: int
    overlap: int = 0


def strided_windows(tokens: int, context_length: int, stride: int) -> Windows:
    """Windows that score every token of a text but its first once, each with all the context that its window has before it.

    All targets of the first window count, of the others the last `stride`. The last window may reach beyond the text; a text
    shorter than a window gets one of its own length.

    Args:
        tokens: of the text, at least 2.
        context_length: most tokens of a window.
        stride: from one window to the next, 1 to context_length; context_length is windows without overlap.
    """
    beyond = max(0, tokens - 1 - context_length)  # targets that the first window does not hold
    return Windows(np.arange(1 - (-beyond // stride)) * stride, min(context_length, tokens - 1), context_length - stride)


def window_batches(tokens: TokenArray, windows: Windows, batch: int) -> Iterator[Batch]:
    """Windows of a text as batches, the last one padded with targets that do not count, so shapes never change.

    Args:
        tokens: the ids; IGNORE where a window reaches beyond the text.
        windows: which of them.
        batch: B.
    """
    for first in range(0, len(windows.starts), batch):
        starts = windows.starts[first : first + batch]
        rows = torch.full((batch, windows.length + 1), IGNORE)
        rows[: len(starts)] = torch.from_numpy(tokens.windows(starts, windows.length + 1))
        targets = rows[:, 1:].clone()
        targets[: len(starts)][torch.from_numpy(starts > 0), : windows.overlap] = IGNORE
        yield Batch(rows[:, :-1].clamp(min=0), targets, None)


@torch.no_grad()
def score_batches(
    model: nn.Module,
    nll: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    byte_lengths: np.ndarray,
    device: Device,
    stopped: Callable[[], bool] = lambda: False,
    scored: Callable[[int], None] = lambda tokens: None,
    world: World | None = None,
) -> HeldOutLoss | None:
    """Score the targets of batches.

    Args:
        model: what to measure; put into eval mode meanwhile.
        nll: a batch on the device -> the sum of its valid targets' nats.
        batches: tokens and targets.
        byte_lengths: (V,) bytes per id.
        device: where.
        stopped: asked between passes; if it says so, None is returned.
        scored: told how many tokens each pass has scored.
        world: the processes that share the batches out; each gets the figures of all.
    """
    world = world or World()
    was_training = model.training
    model.eval()
    sums, counted, n_bytes = torch.zeros((), dtype=torch.float64), 0, 0
    remaining = iter(batches)
    try:
        while group := list(islice(remaining, world.data_size)):
            if stopped():
                return None
            # A process that is left without a batch computes one that does not count, for the others wait for it in every pass.
            is_mine = world.data_rank < len(group)
            batch = group[world.data_rank] if is_mine else replace(group[0], targets=torch.full_like(group[0].targets, IGNORE))
            documents = None if batch.documents is None else batch.documents.to(device.type)
            with device.autocast():
                moved = Batch(batch.tokens.to(device.type), batch.targets.to(device.type), documents, batch.numbers)
                sums += nll(moved).cpu().double()
            ids = batch.targets[batch.targets != IGNORE].numpy()
            counted += len(ids)
            n_bytes += int(byte_lengths[ids].sum())
            scored(len(ids))
    finally:
        model.train(was_training)
    total, tokens, size = world.total([sums.item(), counted, n_bytes])
    return HeldOutLoss(total, round(tokens), round(size))


def strided_loss(
    model: GPT,
    tokens: TokenArray,
    context_length: int,
    stride: int,
    batch: int,
    byte_lengths: np.ndarray,
    device: Device,
    scored: Callable[[int], None] = lambda tokens: None,
) -> HeldOutLoss:
    """Score every token of a text but its first once, in `strided_windows`. The rest as for `score_batches`."""
    windows = strided_windows(len(tokens), context_length, stride)
    padded = TokenArray([*tokens.shards, np.full(windows.length, IGNORE)])  # for a last window that reaches beyond the text

    batches = window_batches(padded, windows, min(batch, len(windows.starts)))
    result = score_batches(model, partial(_valid_nll, model, device.fixed_graphs), batches, byte_lengths, device, scored=scored)
    assert result is not None
    assert result.tokens == len(tokens) - 1
    return result


def score_examples(
    model: GPT, batches: Iterable[Batch], byte_lengths: np.ndarray, device: Device, scored: Callable[[int], None] = lambda tokens: None
) -> HeldOutLoss:
    """Score what is learned of examples. The rest as for `score_batches`."""
    result = score_batches(model, partial(_valid_nll, model, device.fixed_graphs), batches, byte_lengths, device, scored=scored)
    assert result is not None
    return result


def score_classes(model: GPT, batches: Iterable[Batch], device: Device, scored: Callable[[int], None]) -> HeldOutLoss:
    """Score a classifier on the classes of examples, and count what it says. The rest as for `score_batches`."""
    counts = ClassCounts(model)

    def nll(batch: Batch) -> Tensor:
        hidden = model.hidden_states(batch.tokens, documents=batch.documents)
        counts(hidden, batch.targets)
        with torch.autocast(hidden.device.type, enabled=False):
            return token_nll(model, hidden.flatten(0, 1), batch.targets.flatten())[0].sum()

    no_text = np.zeros(len(counts.classes), dtype=np.int64)
    result = score_batches(model, counts.beside(nll), batches, no_text, device, scored=scored)
    assert result is not None
    return replace(result, scores=counts.scores())


def _valid_nll(model: GPT, fixed_shapes: bool, batch: Batch) -> Tensor:
    """The nats of all targets but IGNORE. With fixed shapes the others are computed too, and count 0."""
    hidden, targets = model.hidden_states(batch.tokens, documents=batch.documents).flatten(0, 1), batch.targets.flatten()
    if not fixed_shapes:
        counts = targets != IGNORE
        hidden, targets = hidden[counts], targets[counts]
    with torch.autocast(hidden.device.type, enabled=False):
        return token_nll(model, hidden, targets)[0].sum()


def token_nll(model: GPT, hidden: Tensor, targets: Tensor, chunk: int = 512) -> tuple[Tensor, Tensor]:
    """What each target costs, with never more than `chunk` rows of logits at a time.

    Args:
        model: whose head is asked; any module that makes logits of hidden states will do for one.
        hidden: (N, E), of the places before the targets.
        targets: (N,) ids.
        chunk: rows.

    Returns:
        (N,) fp32 nats, and (N,) bool: whether the target is the likeliest token.
    """
    nats, likeliest = [hidden.new_empty(0, dtype=torch.float32)], [targets.new_empty(0, dtype=torch.bool)]
    for rows, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = model.head(rows).float()
        nats.append(F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="none"))
        likeliest.append(logits.argmax(-1) == wanted)
    return torch.cat(nats), torch.cat(likeliest)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """What general compressors reach on a text, to see bits per byte in proportion: `gzip -9` and `xz -9e`."""
    sizes = {"gzip -9": gzip.compress(text, 9), "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
    return {name: 8 * len(compressed) / len(text) for name, compressed in sizes.items()} if text else {}
