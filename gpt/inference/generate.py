"""Continue a text token by token, with a key/value cache, streaming whole characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.inference.sampling import next_token
from gpt.model.attention import KVCache
from gpt.model.transformer import GPT


@torch.no_grad()
def generate_tokens(
    model: GPT,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    first: Sequence[int] = (),
) -> Iterator[int]:
    """Yield token ids that continue a prompt, at most until the model's context is full.

    Args:
        model: in eval mode.
        prompt: at least one id, at most the model's context_length.
        max_tokens: most ids to yield.
        temperature, top_k, top_p: see `gpt.inference.sampling`; temperature 0 is greedy.
        seed: of the sampling; None draws one.
        first: if given, the first id is one of these.

    Raises:
        UserError: a prompt that does not fit the context.
    """
    limit = model.config.context_length
    if not 0 < len(prompt) <= limit:
        raise UserError(f"prompt: {len(prompt)} tokens, but the model's context holds 1 to {limit}")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    weight = model.embeddings.tokens.weight
    cache = KVCache(model.config, 1, min(limit, len(prompt) + max_tokens), weight.device, weight.dtype)
    tokens = torch.tensor([list(prompt)], device=weight.device)  # (1, T)
    allowed = torch.tensor(first, dtype=torch.int64, device=weight.device)
    for _ in range(max_tokens):
        logits = model.head(model.hidden_states(tokens, cache)[:, -1])  # (1, V)
        if first:
            logits = torch.full_like(logits, float("-inf")).index_copy(1, allowed, logits[:, allowed])
            first = ()
        tokens = next_token(logits, temperature, top_k, top_p, generator)  # (1, 1)
        yield int(tokens)
        if cache.length == limit:
            return


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
) -> Iterator[str]:
    """Yield pieces of the continuation as they are made, ending at the end of the text or before a stop string.

    A piece never ends within a UTF-8 character, nor in what may turn out to be a stop string. Arguments as for
    `generate_tokens`; an empty prompt starts a document. A space at the prompt's end is left to the first new token: in the text
    that a model has read, a word's token begins with the space before it, so after a lone space no word can follow.
    """
    ids, first, spaces = tokenizer.encode(prompt), [], 0
    if len(prompt) > 1 and prompt[-1] == " " != prompt[-2] and (first := tokenizer.starting_with_space()):
        ids, spaces = tokenizer.encode(prompt[:-1]), 1
    if not ids:
        if tokenizer.end_of_text is None:
            raise UserError("prompt: it is empty, and the tokenizer has no token that starts a document")
        ids = [tokenizer.end_of_text]  # what stands before every document in training
    stop = [s for s in stop if s]
    prompt_length = len(tokenizer.decode(ids)) + spaces
    made: list[int] = []
    text, sent = "", 0
    for token in generate_tokens(model, ids, max_tokens, temperature, top_k, top_p, seed, first):
        if token == tokenizer.end_of_text:
            break
        made.append(token)
        text = tokenizer.decode([*ids, *made])[prompt_length:]  # some decoders strip what they take for the start of a text
        ends = [at for s in stop if (at := text.find(s)) >= 0]
        if ends:
            yield text[sent : min(ends)]
            return
        safe = len(text) - _unfinished(text, stop)
        if safe > sent:
            yield text[sent:safe]
            sent = safe
    if rest := text[sent:]:
        yield rest


def _unfinished(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end may still change or belong to a stop string."""
    whole = text.rstrip("\ufffd")  # what follows are the bytes of a character that is not complete
    begun = max((n for s in stop for n in range(1, len(s)) if whole.endswith(s[:n])), default=0)
    return len(text) - len(whole) + begun
