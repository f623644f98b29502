"""`gpt generate`: find the weights and the tokenizer, write to the terminal as the tokens come."""

from __future__ import annotations

import sys
from pathlib import Path

from gpt.compose import load_run
from gpt.config import GenerateConfig
from gpt.data.tokenizer import Tokenizer, load_tokenizer
from gpt.errors import UserError
from gpt.inference.generate import generate_text
from gpt.model.transformer import GPT
from gpt.runtime.device import Device, find_device


def generate(config: GenerateConfig) -> int:
    """Run `gpt generate`: the prompt and its continuation on stdout. Returns the exit code."""
    if any("\ud800" <= c <= "\udfff" for c in config.prompt):  # how Python shows bytes of the command line that are not UTF-8
        raise UserError("prompt: it is not valid UTF-8")
    device = find_device(config.device, config.precision)
    model, tokenizer = load_model(config.model, device)
    sys.stdout.write(config.prompt)
    sys.stdout.flush()
    pieces = generate_text(
        model, tokenizer, config.prompt, config.max_tokens, config.temperature, config.top_k, config.top_p, config.stop, config.seed
    )
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    used = len(tokenizer.encode(config.prompt)) + config.max_tokens
    if used > model.config.context_length:
        print(
            f"gpt: note: prompt and max_tokens are {used} tokens; the model's context ends at {model.config.context_length}",
            file=sys.stderr,
        )
    return 0


def load_model(path: str, device: Device) -> tuple[GPT, Tokenizer]:
    """A model in eval mode and its tokenizer, from a run directory, its model/ folder, or a Hugging Face directory or hub id.

    Raises:
        UserError: there is no model there, or it is of a kind we cannot hold exactly.
    """
    directory = Path(path).expanduser()
    if directory.is_dir() and (directory / "config.yaml").is_file():
        if (directory / "model" / "config.json").is_file():
            directory = directory / "model"
        else:
            return _from_checkpoint(directory, device)
    elif not directory.is_dir() and (path.startswith(("/", ".", "~", "runs/")) or path.count("/") > 1):
        from gpt.config import nearest

        siblings = [str(p) for p in directory.parent.iterdir()] if directory.parent.is_dir() else []
        raise UserError(f"model={path}: there is no such directory{nearest(str(directory), siblings)}")
    try:
        model = GPT.from_pretrained(str(directory) if directory.is_dir() else path, device.type, device.dtype)
    except ValueError as error:
        raise UserError(f"model={path}: {error}") from error
    return model.eval(), load_tokenizer(directory if directory.is_dir() else path)


def _from_checkpoint(run: Path, device: Device) -> tuple[GPT, Tokenizer]:
    """The newest whole checkpoint of a run that has not finished."""
    from gpt.training.checkpoint import load_weights, newest_whole

    def say(text: str) -> None:
        print(f"gpt: {text}", file=sys.stderr)

    checkpoint = newest_whole(run / "checkpoints", say)
    if checkpoint is None:
        raise UserError(f"model={run}: the run has neither a model/ folder nor a whole checkpoint yet")
    say(f"the run has not finished; using {checkpoint}")
    model = GPT.materialise(load_run(run).model, device.type, device.dtype)
    load_weights(checkpoint, model)
    return model.eval(), load_tokenizer(run / "tokenizer.json")
