"""Prompts in, token ids out: read the prompts once, then one forward pass per token over a static key/value cache.

Shapes: B rows (prompts times samples), T time, V vocab_size. Nothing in the loop waits for an accelerator: a token is read back
while the next one is being computed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gpt.errors import UserError
from gpt.inference.native_step import NativeStep, native_obstacle
from gpt.inference.sampling import DEFAULT, Sampling, next_token, penalise, uniform_numbers
from gpt.model.attention import KVCache
from gpt.model.transformer import GPT
from gpt.runtime.compiling import compile_decoding, keep_in_place

# A compiled step's cache is a multiple of this long, so that texts of all lengths share a few compiled steps.
_COMPILED_LENGTHS = 256


@dataclass
class Speed:
    """What was done in how long; filled in while tokens are made."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    """Until the first token was there."""
    tokens: int = 0
    """After the first one of each row."""
    seconds: float = 0.0

    def described(self) -> str:
        """For people."""
        read = f"prompt: {self.prompt_tokens} tokens in {self.prompt_seconds:.2f} s"
        read += f" ({self.prompt_tokens / self.prompt_seconds:,.0f} tokens/s)" if self.prompt_seconds else ""
        return f"{read}; then {self.tokens} tokens in {self.seconds:.2f} s" + (
            f" ({self.tokens / self.seconds:,.1f} tokens/s)" if self.tokens else ""
        )


def generate_tokens(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = DEFAULT,
    stop_ids: frozenset[int] = frozenset(),
    n: int = 1,
    overflow: Literal["error", "slide"] = "error",
    first: Sequence[Sequence[int]] = (),
    compiled: bool = False,
    speed: Speed | None = None,
) -> Iterator[list[int | None]]:
    """Give the next id of every row, step by step, until all rows have ended.

    Args:
        model: in eval mode.
        prompts: ids, at least one each. Prompts of different lengths are padded on the left; each is continued as if alone.
        max_tokens: most ids per row.
        sampling: how they are chosen. Sample i of every prompt draws from the same stream of random numbers, which only the seed
            and i decide.
        stop_ids: a row ends before any of these.
        n: samples per prompt; rows are prompt 0's samples, then prompt 1's ...
        overflow: when prompt and max_tokens exceed the context, refuse; or go on from the second half of what it holds, which is
            read again each time it is full.
        first: per prompt, ids of which the first one made must be; none: any.
        compiled: compile the step that makes a token.
        speed: takes the times.

    Returns:
        One id per row and step; None for rows that have ended.

    Raises:
        UserError: a prompt that is empty, or does not fit.
    """
    _check(model, prompts, max_tokens, overflow)
    speed = speed or Speed()
    speed.prompt_tokens += sum(map(len, prompts))
    steps = _read_back(_steps(model, prompts, max_tokens, sampling, n, first, compiled))
    return _until_ended(steps, len(prompts) * n, stop_ids, speed)


def _until_ended(steps: Iterator[list[int]], rows: int, stop_ids: frozenset[int], speed: Speed) -> Iterator[list[int | None]]:
    """The steps, with None in rows that have ended, until all have."""
    ended = [False] * rows
    started = time.perf_counter()
    for number, tokens in enumerate(steps):
        ended = [done or token in stop_ids for done, token in zip(ended, tokens, strict=True)]
        now = time.perf_counter()
        if number == 0:
            speed.prompt_seconds += now - started
        else:
            speed.tokens += len(ended) - sum(ended)
            speed.seconds += now - started
        started = now
        if all(ended):
            return
        yield [None if done else token for done, token in zip(ended, tokens, strict=True)]


def _check(model: GPT, prompts: Sequence[Sequence[int]], max_tokens: int, overflow: str) -> None:
    limit = model.config.context_length
    for number, prompt in enumerate(prompts, 1):
        which = "prompt" if len(prompts) == 1 else f"prompt {number}"
        if not prompt:
            raise UserError(f"{which}: no tokens; it must have at least one")
        if overflow == "error" and len(prompt) + max_tokens > limit:
            left = limit - len(prompt)
            remedy = f"set max_tokens to at most {left}" if left > 0 else "shorten it"
            raise UserError(
                f"{which}: its {len(prompt)} token{'s' * (len(prompt) > 1)} and max_tokens={max_tokens} exceed the model's context "
                f"of {limit}; {remedy}, or overflow=slide to go on with what was written last"
            )


@torch.no_grad()
def _steps(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    n: int,
    first: Sequence[Sequence[int]],
    compiled: bool,
) -> Iterator[Tensor]:
    """The tokens of each step, (B, 1), on the model's device."""
    config, device = model.config, model.embeddings.tokens.weight.device
    limit = config.context_length
    uniform = uniform_numbers(sampling, n, max_tokens, device).repeat(len(prompts), 1)  # (B, max_tokens)
    step: Callable[[Tensor, KVCache], Tensor]
    if not compiled and native_obstacle(model, len(prompts) * n) is None:
        step = NativeStep(model)
    else:
        step = functools.partial(compile_decoding(_next_logits) if compiled else _next_logits, model)
    seen = _mask(prompts, config.vocab_size, device).repeat_interleave(n, 0) if sampling.repetition_penalty != 1 else None
    texts = prompts
    made: list[Tensor] = []
    while len(made) < max_tokens:
        texts = [text if len(text) <= limit else text[-max(1, limit // 2) :] for text in texts]
        longest, before = max(map(len, texts)), len(made)
        size = min(limit, longest + max_tokens - len(made))
        cache, logits = _read(model, texts, min(limit, -(-size // _COMPILED_LENGTHS) * _COMPILED_LENGTHS) if compiled else size)
        if not made:
            if any(first):
                allowed = _mask([ids or range(config.vocab_size) for ids in first], config.vocab_size, device)
                logits = logits.masked_fill(~allowed, float("-inf"))
            cache.repeat(n)
            texts = [text for text in texts for _ in range(n)]
            logits = logits.repeat_interleave(n, 0)
        if compiled:
            cache.fix_shapes()
            keep_in_place(cache.buffers())
        for _ in range(limit + 1 - longest):
            if seen is not None:
                logits = penalise(logits, sampling.repetition_penalty, seen)
            tokens = next_token(logits, sampling, uniform[:, len(made), None])
            made.append(tokens)
            yield tokens
            if len(made) == max_tokens:
                return
            if seen is not None:
                seen.scatter_(1, tokens, True)
            if longest + 1 <= limit:
                logits = step(tokens, cache)
                longest += 1
        texts = [[*text, *ids] for text, ids in zip(texts, torch.cat(made[before:], dim=1).tolist(), strict=True)]


def _read(model: GPT, texts: Sequence[Sequence[int]], size: int) -> tuple[KVCache, Tensor]:
    """Read texts, padded on the left to the longest: a cache of that size, and the logits (B, V) of what follows."""
    weight = model.embeddings.tokens.weight
    lengths = [len(text) for text in texts]
    longest = max(lengths)
    padding = torch.tensor([longest - length for length in lengths], device=weight.device) if min(lengths) < longest else None
    # Attention of one query over bf16 takes a CPU several times as long as over fp32 (benchmarks/RESULTS.md, "cache").
    dtype = torch.float32 if weight.is_cpu else weight.dtype
    cache = KVCache(model.config, len(texts), size, weight.device, dtype, padding)
    tokens = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts], device=weight.device)  # (B, T)
    return cache, _next_logits(model, tokens, cache)


def _next_logits(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """Read tokens (B, T): fp32 logits (B, V) of what follows them."""
    return model.head(model.hidden_states(tokens, cache)[:, -1]).float()


def _mask(ids: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """(B, V) bool, true at each row's ids."""
    mask = torch.zeros(len(ids), vocab_size, dtype=torch.bool)
    for row, found in zip(mask, ids, strict=True):
        row[torch.tensor(list(found), dtype=torch.int64)] = True
    return mask.to(device)


def _read_back(steps: Iterator[Tensor]) -> Iterator[list[int]]:
    """Tokens (B, 1) of a device to lists; those of an accelerator one step late, when the next step is already on its way."""
    waiting: tuple[Tensor, torch.Event] | None = None
    for tokens in steps:
        if tokens.is_cpu:
            yield tokens[:, 0].tolist()
            continue
        copy = tokens.to("cpu", non_blocking=True)
        event = torch.Event(tokens.device)
        event.record()
        if waiting is not None:
            waiting[1].synchronize()
            yield waiting[0][:, 0].tolist()
        waiting = copy, event
    if waiting is not None:
        waiting[1].synchronize()
        yield waiting[0][:, 0].tolist()
