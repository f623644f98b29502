"""A trained model with another tokenizer: which rows of the old embeddings each row of the new ones is made of.

A token that both tokenizers have keeps its row; a new one starts from the mean of the rows of the pieces that the old tokenizer cuts
its text into (Gee et al., "Fast Vocabulary Transfer", 2022), in the embedding and in a head of its own alike. Shapes: V ids, E d_model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.data.tokenizer import Tokenizer
from gpt.inference.loading import check_rows
from gpt.model.transformer import GPT


@dataclass(frozen=True)
class Origins:
    """Where the rows of a new vocabulary come from.

    Attributes:
        rows: of each new id the old ids whose rows it starts from the mean of: one for a token that both have, none where the old
            tokenizer has nothing to say of it, or where the id has no token.
        known: the old ids that are tokens; what has no rows of its own starts from the mean of theirs.
        shared, made, without: how many tokens are of each kind: both have them, made of their old pieces, of nothing.
    """

    rows: list[list[int]]
    known: list[int]
    shared: int
    made: int
    without: int

    def __str__(self) -> str:
        """How many tokens come from where, in a line."""
        parts = [f"{self.shared:,} are the old one's and keep their rows", f"{self.made:,} start from the mean of their old pieces"]
        if self.without:
            parts.append(f"{self.without:,} have none and start from the mean of all")
        return f"{self.shared + self.made + self.without:,} tokens: {', '.join(parts)}"

    @torch.no_grad()
    def take(self, weight: Tensor) -> Tensor:
        """The rows (V_old, E) of the old tokenizer's ids -> those of the new one's, (V_new, E), in the same dtype."""
        counts = torch.tensor([len(ids) for ids in self.rows])
        flat = torch.tensor([i for ids in self.rows for i in ids], dtype=torch.int64)
        taken = F.embedding_bag(flat, weight.float(), counts.cumsum(0) - counts, mode="mean")
        taken[counts == 0] = weight[self.known].float().mean(dim=0)
        return taken.to(weight.dtype)


def find_origins(old: Tokenizer, new: Tokenizer, size: int | None = None) -> Origins:
    """Compare two tokenizers, whatever their kinds: by the bytes that a token stands for, and control tokens by what they are for.

    Args:
        old: of the weights that there are.
        new: of those to be made.
        size: ids of the new model, at least those of `new`; None: just these.
    """
    control, text = _control(new), _texts(old)
    before = _control(old)
    purposes = {purpose: index for index, all_of_it in before.items() for purpose in all_of_it}
    rows: list[list[int]] = [[] for _ in range(size or new.vocab_size)]
    tokens = new.backend.get_vocab(with_added_tokens=True)
    pieces = new.pieces(range(new.vocab_size))
    unknown: list[int] = []
    for token, index in tokens.items():
        if index in control:
            rows[index] = [purposes[purpose] for purpose in control[index] if purpose in purposes][:1]
        elif same := text.get(pieces[index]):
            rows[index] = [same.get(token, same[""])]
        elif pieces[index]:
            unknown.append(index)
    shared = sum(map(bool, rows))
    for index, cut in zip(unknown, old.cut([pieces[index] for index in unknown]), strict=True):
        rows[index] = [piece for piece in cut if piece not in before]
    made = sum(bool(rows[index]) for index in unknown)
    known = sorted(old.backend.get_vocab(with_added_tokens=True).values())
    return Origins(rows, known, shared, made, len(tokens) - shared - made)


def adapt_vocabulary(model: GPT, old: Tokenizer, new: Tokenizer, size: int, key: str) -> Origins:
    """Make the embedding of tokens, and a head that has weights of its own for them, those of another tokenizer; the rest stays.

    Args:
        model: of the old tokenizer; changed in place.
        old, new: its tokenizer, and the one to go on with.
        size: ids of the new model, at least those of `new`.
        key: what the user calls the weights, for messages.

    Returns:
        Where the rows come from.

    Raises:
        UserError: the model's weights are not of the old tokenizer.
    """
    before = model.config.vocab_size
    check_rows(before, old, key)
    origins = find_origins(old, new, size)
    embedding = model.embeddings.tokens
    embedding.weight, embedding.num_embeddings = nn.Parameter(origins.take(embedding.weight)), size
    if model.config.tie_embeddings:
        model.head.out_features = size
    elif model.config.head == "language_model":
        model.head.weight, model.head.out_features = nn.Parameter(origins.take(model.head.weight)), size
    model.config = replace(model.config, vocab_size=size)
    model.tie()
    return origins


def _control(tokenizer: Tokenizer) -> dict[int, list[tuple[str, str]]]:
    """The ids that stand for no text, each with what it is for: the end of a text first, then its name, then its other roles."""
    found: dict[int, list[tuple[str, str]]] = {}
    if (end := tokenizer.end_of_text) is not None:
        found[end] = [("role", "end of text")]
    for token, index in tokenizer.control_tokens().items():
        found.setdefault(index, []).append(("name", token))
    for role, index in tokenizer.roles().items():
        found.setdefault(index, []).append(("role", role))
    return found


def _texts(tokenizer: Tokenizer) -> dict[bytes, dict[str, int]]:
    """The bytes of its tokens -> their ids by how the tokenizer writes them; under "" the one that it makes of these bytes."""
    control = _control(tokenizer)
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    found: dict[bytes, dict[str, int]] = {}
    for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if index not in control and pieces[index]:
            found.setdefault(pieces[index], {})[token] = index
    several = [piece for piece, ids in found.items() if len(ids) > 1]  # such as "A" and <0x41>
    for piece, cut in zip(several, tokenizer.cut(several), strict=True):
        ids = found[piece]
        ids[""] = cut[0] if len(cut) == 1 and cut[0] in ids.values() else min(ids.values())
    for ids in found.values():
        ids.setdefault("", next(iter(ids.values())))
    return found
