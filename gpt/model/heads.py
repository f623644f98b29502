"""The heads of a GPT: the next token, the class of a text, or the class of each token.

A head is one linear layer over the final norm. That of a text is asked at the text's last token, which alone has seen all of it; that
of tokens at each word's first piece. Both are laid out as the stock `...ForSequenceClassification` and `...ForTokenClassification` have
them. Shapes: B batch, T time, E d_model, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.model.config import GPTConfig
from gpt.model.lora import ADAPTERS


def make_head(config: GPTConfig) -> nn.Linear:
    """The config's head: (E -> vocabulary or C), with a bias where the stock class has one, that of tokens.

    Raises:
        ValueError: a head of classes that are not known.
    """
    if not config.outputs:
        raise ValueError(f"classes=[]: head={config.head} needs to know its classes")
    return nn.Linear(config.d_model, config.outputs, bias=config.head == "tokens")


@torch.no_grad()
def init_head(head: nn.Linear) -> None:
    """A fresh head: weights N(0, 0.02), bias 0."""
    nn.init.normal_(head.weight, std=0.02)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def adopt(model: nn.Module, config: GPTConfig, source: nn.Module, source_config: GPTConfig) -> bool:
    """Give a model the weights of another of its shape; a head of classes on the body of a language model is a fresh one.

    Args:
        model, config: what gets them.
        source, source_config: where they come from.

    Returns:
        Whether the head came with them.

    Raises:
        ValueError: the other's head tells other classes apart, or none where this model continues text.
    """
    weights, head = source.state_dict(), model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    comes = (config.head, config.classes) == (source_config.head, source_config.classes)
    if not comes and source_config.head != "language_model":
        raise ValueError(f"its head is {describe(source_config)}, and this model's is {describe(config)}; start from a language model")
    given = {name: weight for name, weight in weights.items() if comes or not name.startswith("head.")}
    left = model.load_state_dict(given, strict=False)
    assert not left.unexpected_keys, left
    fresh = [name for name in left.missing_keys if not name.endswith(ADAPTERS)]
    assert all(name.startswith("head.") and not comes for name in fresh), left
    if not comes:
        init_head(head)
    return comes


def describe(config: GPTConfig) -> str:
    """A head in words."""
    if config.head == "language_model":
        return "that of a language model"
    names = ", ".join(config.classes[:8]) + (f" and {len(config.classes) - 8} more" if len(config.classes) > 8 else "")
    return f"for the class of each {'text' if config.head == 'sequence' else 'word'} ({names})"


def pooled(logits: Tensor, tokens: Tensor, pad_token_id: int | None) -> Tensor:
    """What the stock classes say of each text: the logits at its last token that is no padding.

    Args:
        logits: (B, T, C).
        tokens: (B, T) int64, padded on either side.
        pad_token_id: None: nothing is padded.

    Returns:
        (B, C).
    """
    if pad_token_id is None:
        return logits[:, -1]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    last = (places * (tokens != pad_token_id)).argmax(-1)  # 0 for a row of padding alone, as in `transformers`
    return logits[torch.arange(len(tokens), device=logits.device), last]
