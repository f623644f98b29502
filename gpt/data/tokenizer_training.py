"""Make a tokenizer: byte-level BPE, characters or bytes, or one that exists.

Ids begin with the end-of-text token and the control tokens of the user; bytes, characters and merges follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from gpt.data.bulk_encoding import SPLIT_PATTERNS, byte_of_character
from gpt.data.config import TokenizerConfig
from gpt.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, without_surrogates
from gpt.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers.models import Model


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of a config.

    Args:
        config: which one.
        texts: what to learn from, read once, as they come; not read for bytes and for one that exists.

    Raises:
        UserError: there is no such tokenizer, or the texts do not allow it.
    """
    match config.name:
        case "bpe":
            return train_bpe(texts, config.vocab_size, config.split, config.special_tokens)
        case "char":
            return char_tokenizer(texts, config.special_tokens)
        case "byte":
            return byte_tokenizer(config.special_tokens)
        case "pretrained":
            return load_tokenizer(config.path or "")


def train_bpe(texts: Iterable[str], vocab_size: int, split: str = "gpt4", special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Train byte-level BPE.

    Args:
        texts: what to learn from.
        vocab_size: ids to make: control tokens, 256 bytes and merges.
        split: which of SPLIT_PATTERNS cuts a text before its pieces are merged.
        special_tokens: control tokens besides the end-of-text token.

    Raises:
        UserError: vocab_size below 256 and the control tokens, or more than the text has merges for; a control token that
            text can make.
    """
    from tokenizers import models, trainers

    control = _control_tokens(special_tokens)
    if vocab_size < (low := 256 + len(control)):
        own = f" and {len(control) - 1} of your own" if len(control) > 1 else ""
        raise UserError(f"tokenizer.vocab_size={vocab_size} must be at least {low}: 256 bytes and the end-of-text token{own}")
    backend = _byte_level(models.BPE(), split)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=control, initial_alphabet=_byte_alphabet(), show_progress=False, max_token_length=32
    )  # pyright: ignore[reportCallIssue]
    backend.train_from_iterator(_encodable(texts), trainer)
    made = backend.get_vocab_size()
    if made < vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} is more than this text allows: its merges give {made}; set it to at most {made}"
        )
    _check_control_tokens(backend, control)
    return Tokenizer(backend)


def byte_tokenizer(special_tokens: Sequence[str] = ()) -> Tokenizer:
    """One id a byte, and the control tokens.

    Raises:
        UserError: a control token that text can make.
    """
    from tokenizers import models

    control = _control_tokens(special_tokens)
    backend = _byte_level(models.BPE(vocab=_numbered([*control, *_byte_alphabet()]), merges=[]), "gpt4")
    backend.add_special_tokens(control)
    _check_control_tokens(backend, control)
    return Tokenizer(backend)


def char_tokenizer(texts: Iterable[str], special_tokens: Sequence[str] = ()) -> Tokenizer:
    """One id a character that occurs in the texts, one id a byte of any other, and the control tokens.

    Raises:
        UserError: a control token that text can make.
    """
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models

    characters: set[str] = set()
    for text in _encodable(texts):
        characters.update(text)
    control = _control_tokens(special_tokens)
    byte_names = [f"<0x{b:02X}>" for b in range(256)]
    _refuse(token for token in control if token in byte_names or len(token) == 1)
    backend = HFTokenizer(models.BPE(vocab=_numbered([*control, *byte_names, *sorted(characters)]), merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(control)
    return Tokenizer(backend)


def _byte_level(model: Model, split: str) -> HFTokenizer:
    from tokenizers import Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer

    backend = HFTokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_PATTERNS[split]), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _byte_alphabet() -> list[str]:
    return sorted(byte_of_character())


def _control_tokens(special_tokens: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([END_OF_TEXT, *special_tokens]))


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _check_control_tokens(backend: HFTokenizer, control: Sequence[str]) -> None:
    """A control token whose characters merges join, or that is the name of a byte, would be made by text too."""
    _refuse(token for token in control if [t.id for t in backend.model.tokenize(token)] == [backend.token_to_id(token)])


def _refuse(tokens: Iterator[str]) -> None:
    for token in tokens:
        raise UserError(
            f"tokenizer.special_tokens={token}: a text can hold this as an ordinary token; "
            f"write it as no text is cut, e.g. <|{token.strip('<|>') or 'mark'}|>"
        )


def _encodable(texts: Iterable[str]) -> Iterator[str]:
    return map(without_surrogates, texts)
