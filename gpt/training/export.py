"""`gpt export`: weights of a run to a Hugging Face directory, or its adapters to PEFT's, with a model card that says what they are."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from gpt.commands import ExportConfig
from gpt.compose import load_run
from gpt.config import RunConfig
from gpt.data.config import SourceConfig
from gpt.errors import UserError
from gpt.inference.loading import Loaded, load_model, load_unmerged
from gpt.model.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gpt.training.adapters import write_adapter
from gpt.training.checkpoint import STATE, TrainingState, read_state
from gpt.training.metrics import read_metrics
from gpt.training.report import Summary, counted_of, unit_of

AUTO_CLASSES = {
    "language_model": "AutoModelForCausalLM", "sequence": "AutoModelForSequenceClassification", "tokens": "AutoModelForTokenClassification",
}  # fmt: skip
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(config: ExportConfig) -> int:
    """Run `gpt export`. Returns the exit code.

    Raises:
        UserError: there are no such weights, or the output folder has something in it.
    """
    source = Path(os.path.expanduser(config.run))
    if config.format == "peft":
        return _export_adapter(config)
    loaded = load_model(config.run, allow_pickle=config.allow_pickle, key="run")
    default = loaded.run / "export" if loaded.run else Path(f"{source.name}-export")
    output = _output(config, default)
    dtype = _DTYPES.get(config.dtype)
    if dtype == torch.float16 and (lost := _overflowing(loaded)):
        raise UserError(f"dtype={config.dtype}: {lost} has values that it cannot hold; choose bfloat16 or float32")
    try:
        loaded.model.save_pretrained(output, tokenizer=loaded.tokenizer, dtype=dtype, card=_card(loaded))
        if (settings := loaded.directory / "generation_config.json").is_file() and settings.parent != output:
            shutil.copyfile(settings, output / "generation_config.json")
    except ValueError as error:
        raise UserError(f"output={output}: {error}") from error
    except OSError as error:
        raise UserError(_unwritable(output, error)) from error
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    stored = str(dtype or loaded.model.embeddings.tokens.weight.dtype).removeprefix("torch.")
    print(f"{output}: {loaded.model.num_parameters() / 1e6:.2f}M parameters as {stored}, {size / 1e6:,.1f} MB, ", end="")
    print(json.loads((output / "config.json").read_text(encoding="utf-8"))["architectures"][0])
    head = loaded.model.config.head
    print(f'use: transformers.{AUTO_CLASSES[head]}.from_pretrained("{output}"), or {_command(head)} model={output}', file=sys.stderr)
    return 0


def _output(config: ExportConfig, default: Path) -> Path:
    """The folder to write."""
    output = Path(os.path.expanduser(config.output)) if config.output else default
    if output.is_dir() and any(output.iterdir()) and not config.overwrite:
        raise UserError(f"output={output}: the folder is there and not empty; choose another, or overwrite=true")
    return output


def _unwritable(output: Path | str, error: OSError) -> str:
    return f"output={output} could not be written ({error.strerror or error}); name a folder with room where you may write"


def _export_adapter(config: ExportConfig) -> int:
    """The adapters of a run, or of one of its checkpoints, in PEFT's format. Returns the exit code."""
    run = Path(os.path.expanduser(config.run))
    try:
        if (finished := run / "adapter").is_dir() and (run / "config.yaml").is_file():
            settings, output = load_run(run), _output(config, run / "export")
            if output.resolve() != finished.resolve():
                shutil.copytree(finished, output, dirs_exist_ok=True)
        else:
            loaded = load_unmerged(config.run)
            assert loaded.run is not None
            settings, output = load_run(loaded.run), _output(config, loaded.run / "export")
            write_adapter(settings, output, loaded.model, loaded.tokenizer, _card(loaded, adapter=True))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"run={config.run}: {error}") from error
    except OSError as error:
        raise UserError(_unwritable(config.output or run / "export", error)) from error
    size = (output / ADAPTER_WEIGHTS).stat().st_size
    named = json.loads((output / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    print(f"{output}: adapters of {named}, {size / 1e6:,.1f} MB, in PEFT's format")
    head, count = settings.model.head, len(settings.model.classes)
    call = f'{_peft_class(head)}.from_pretrained("{output}"{f", num_labels={count}" if count else ""})'
    print(f"use: peft.{call}, or {_command(head)} model={output}", file=sys.stderr)
    return 0


def _command(head: str) -> str:
    """What uses a model with this head."""
    return "gpt generate" if head == "language_model" else "gpt evaluate"


def _peft_class(head: str) -> str:
    """PEFT's counterpart of the class of `transformers`. It makes a head for classes anew, so it wants their number."""
    return AUTO_CLASSES[head].replace("Auto", "AutoPeft")


def _overflowing(loaded: Loaded) -> str | None:
    """The first parameter that float16 cannot hold."""
    limit = torch.finfo(torch.float16).max
    return next((name for name, p in loaded.model.named_parameters() if p.detach().abs().max() > limit), None)


def _card(loaded: Loaded, adapter: bool = False) -> str | None:
    """The card that stands beside the weights already, or one made from the run and its checkpoint."""
    if (card := loaded.directory / "README.md").is_file():
        return card.read_text(encoding="utf-8")
    if loaded.run is None:
        return None
    config, lines = load_run(loaded.run), read_metrics(loaded.run / "metrics.jsonl")
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    name = loaded.run.resolve().name
    if (loaded.directory / STATE).is_file():
        state = read_state(loaded.directory)
        loss, name = losses.get(state.step), f"{name}, step {state.step}"
    else:  # model/ of a run whose card was removed
        state = TrainingState(step=max(losses, default=0), tokens=max((line.get("tokens", 0) for line in lines), default=0))
        loss = min(losses.values(), default=None)
    summary = Summary(
        title=name,
        model=f"{loaded.model.num_parameters() / 1e6:.2f}M parameters, {config.model.stock_architecture()} shape",
        steps=state.step, tokens=state.tokens, seconds=state.seconds, tokens_per_second=0.0, best_val_loss=loss, best_step=None,
        val_bpb=None, gzip_bpb=None, xz_bpb=None, skipped_steps=state.skipped_steps, finished=False,
        unit=unit_of(config.model.head), counted=counted_of(config.model.head, config.loss_on),
    )  # fmt: skip
    return model_card(config, summary, adapter=adapter)


def model_card(config: RunConfig, summary: Summary, corpus: str = "", adapter: bool = False) -> str:
    """The text of a model card (README.md) in the form that the Hugging Face hub reads.

    Paths are cut to their last part: a card is made to be given away.

    Args:
        config: the run.
        summary: its figures; None in it stands for what was not measured.
        corpus: how much text it was, for people.
        adapter: whether it stands beside adapters in PEFT's format, and not beside a whole model.
    """
    import jinja2

    from gpt import __version__

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    model = config.model
    shape = (
        f"{model.n_layer} blocks of width {model.d_model}, {model.n_head} heads ({model.n_kv_head} for keys and values), "
        f"feed-forward {model.d_ff} ({model.activation}), {model.positions} positions, {model.norm}"
    )
    return environment.get_template("model_card.md.jinja").render(
        config=config, summary=summary, corpus=corpus, adapter=adapter, shape=shape, gpt_version=__version__,
        torch_version=torch.__version__,
        task={"sequence": "text-classification", "tokens": "token-classification"}.get(model.head, "text-generation"),
        kind={"sequence": "classifier of texts", "tokens": "classifier of words"}.get(model.head, "decoder-only language model"),
        auto_class=_peft_class(model.head) if adapter else AUTO_CLASSES[model.head],
        names={"accuracy": "accuracy", "macro_f1": "macro-F1", "span_f1": "span F1"},
        data=" and ".join(map(_named, config.data.parts or [config.data])),
        init=Path(config.init).name if config.init and Path(config.init).expanduser().exists() else config.init,
    )  # fmt: skip


def _named(source: SourceConfig) -> str:
    """What was trained on, in words."""
    if source.name:
        return f"the dataset {source.name}"
    if source.paths:
        kind = {"text": "text files", "jsonl": "JSON rows", "parquet": "Parquet rows"}[source.source]
        return f"{kind} ({', '.join(Path(path).name for path in source.paths)})"
    return {
        "stdlib": "Python's standard library", "stdlib_topics": "the chapters of Python's language reference",
        "stdlib_docstrings": "functions of Python's standard library and their docstrings",
        "stdlib_chats": "conversations about functions of Python's standard library",
        "stdlib_packages": "functions of Python's standard library and the packages that they are from",
        "stdlib_exceptions": "code of Python's standard library and the exceptions that it raises or catches next",
        "stdlib_tokens": "functions of Python's standard library, cut into tokens, and the kind of each",
    }[source.source]  # fmt: skip


def describe_corpus(manifest: dict[str, Any]) -> str:
    """How much a run trained on and how much it held out, in words."""
    what = "documents" if manifest["kind"] == "text" else "examples"
    found = []
    for split, purpose in (("train", "to train on"), ("held_out", "held out")):
        sizes = [source["splits"][split] for source in manifest["sources"] if "splits" in source]
        if sizes:
            documents, size = sum(each["documents"] for each in sizes), sum(each["bytes"] for each in sizes)
            amount = f", {size / 1e6:.1f} MB" if manifest["kind"] in ("text", "language_model") else ""  # classes have no text
            found.append(f"{documents:,} {what}{amount} {purpose}")
    licences = sorted({source["licence"] for source in manifest["sources"] if source.get("licence")})
    return "; ".join(found) + (f"; licence: {', '.join(licences)}" if licences else "")
