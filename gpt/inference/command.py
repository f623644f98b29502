"""`gpt generate`: find the weights and the tokenizer, write to the terminal as the tokens come."""

from __future__ import annotations

import inspect
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

from gpt.commands import GenerateConfig
from gpt.errors import UserError
from gpt.inference.chat import Chat
from gpt.inference.decode import Speed
from gpt.inference.generate import generate_text, whole_texts
from gpt.inference.loading import Loaded, load_model
from gpt.inference.packing import pack_for_inference
from gpt.inference.quantize import quantize_int8
from gpt.inference.sampling import Sampling
from gpt.model.heads import describe
from gpt.runtime.compiling import should_compile_decoding
from gpt.runtime.device import find_decoding_device

_MAX_TOKENS = 200  # where max_tokens is not set


def generate(config: GenerateConfig) -> int:
    """Run `gpt generate`: prompts and their continuations on stdout, all else on stderr. Returns the exit code."""
    prompts = config.prompts or [config.prompt]
    if any("\ud800" <= c <= "\udfff" for text in [*prompts, config.system] for c in text):
        raise UserError("prompt: it is not valid UTF-8")  # so Python holds bytes of the command line that it cannot decode
    started = time.perf_counter()
    device = find_decoding_device(config.device_config, config.precision)
    loaded = load_model(config.model, device.type, device.dtype, config.allow_pickle)
    if loaded.model.config.head != "language_model":
        raise UserError(
            f"model={config.model} is a classifier: its head is {describe(loaded.model.config)}, and it continues no text; measure it with "
            "gpt evaluate, or load it with transformers"
        )
    if wrong := [i for i in config.stop_ids if not 0 <= i < loaded.model.config.vocab_size]:
        raise UserError(f"stop_ids={wrong[0]}: the model's ids go from 0 to {loaded.model.config.vocab_size - 1}")
    if config.verbose:
        parameters = loaded.model.num_parameters()
        shape = f"{parameters / 1e6:.1f}M parameters, {loaded.model.config.stock_architecture()} shape"
        _say(f"{shape}, loaded in {time.perf_counter() - started:.1f} s; {device.description}, {str(device.dtype)[6:]}")
    if config.quantize == "int8":
        _quantize(loaded)
    max_tokens, note = _max_tokens(config, loaded, prompts)
    compiled, why = should_compile_decoding(config.compile, device, max_tokens)
    if config.compile is True and not compiled:
        _say(f"compile=true: {why}")
    maker = "a compiled step" if compiled else pack_for_inference(loaded.model, len(prompts) * config.n)
    if config.verbose:
        _say(f"tokens are made by {maker}")
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty, config.seed)
    end_ids = loaded.end_ids | frozenset(config.stop_ids)
    if config.interactive:
        return Chat(
            loaded.model, loaded.tokenizer, sampling, config.max_tokens, config.stop, end_ids, config.system, compiled, config.verbose
        ).run()
    if note:
        _say(f"note: {note}")
    speed = Speed()
    pieces = generate_text(
        loaded.model, loaded.tokenizer, prompts, max_tokens, sampling, config.stop, end_ids, config.n, config.overflow, compiled, speed
    )
    rows = len(prompts) * config.n
    if rows == 1:
        _write(prompts[0])
        for _, piece in pieces:
            _write(piece)
        _write("\n")
    else:
        for row, text in enumerate(whole_texts(_counted(pieces, rows, speed) if sys.stderr.isatty() else pieces, rows)):
            _write(f"--- {row + 1} of {rows}\n{prompts[row // config.n]}{text}\n")
    if config.verbose:
        _say(speed.described())
    return 0


def _counted(pieces: Iterable[tuple[int, str]], rows: int, speed: Speed) -> Iterator[tuple[int, str]]:
    """The pieces as they are, while a line of the terminal tells how many tokens there are."""
    for piece in pieces:
        print(f"\r{rows} texts, {speed.tokens + rows} tokens", end="", file=sys.stderr, flush=True)
        yield piece
    print("\r\033[K", end="", file=sys.stderr, flush=True)


def _max_tokens(config: GenerateConfig, loaded: Loaded, prompts: list[str]) -> tuple[int, str]:
    """How many tokens to write, and what to say of a context that will not hold them."""
    limit = loaded.model.config.context_length
    longest = max((len(loaded.tokenizer.encode_prompt(prompt)) for prompt in prompts), default=0) or 1
    if config.overflow == "slide":
        wanted = config.max_tokens or _MAX_TOKENS
        if longest + wanted <= limit:
            return wanted, ""
        return wanted, (
            f"{longest} token{'s' * (longest > 1)} of prompt and {wanted} to write exceed the model's context of {limit}: "
            f"when it is full, writing goes on from its last {max(1, limit // 2)} tokens, and what was before is forgotten"
        )
    return config.max_tokens or max(1, min(_MAX_TOKENS, limit - longest)), ""


@torch.no_grad()
def _quantize(loaded: Loaded) -> None:
    """Quantise, and say what it costs on a text that every Python has, if not every Python the same."""
    ids = loaded.tokenizer.encode(inspect.getsource(textwrap))[: min(512, loaded.model.config.context_length)]
    if len(ids) < 2:  # the context is one token, after which nothing is predicted
        quantize_int8(loaded.model)
        return
    tokens = torch.tensor([ids], device=loaded.model.embeddings.tokens.weight.device)

    def loss() -> float:
        return F.cross_entropy(loaded.model(tokens)[0, :-1].float(), tokens[0, 1:]).item()

    before = loss()
    quantize_int8(loaded.model)
    after = loss()
    _say(f"int8: loss on {len(ids) - 1} tokens of Python's textwrap.py {before:.4f} -> {after:.4f} ({after - before:+.4f})")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(f"gpt: {text}", file=sys.stderr)
