"""The teacher of a distillation: loaded once, asked before every pass, never changed; what it says of each row may be kept on disk.

A model of a family of ours runs as our GPT. Any other causal language model runs in `transformers`, one document a row, since models do not
agree on how they are told that a row holds several.

Shapes: B rows of T tokens, N = B T, E the teacher's d_model, V its tokens, K likeliest tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from gpt.data.batches import Batch
from gpt.data.tokenizer import Tokenizer, load_tokenizer
from gpt.errors import UserError
from gpt.finetuning.config import DistillConfig
from gpt.finetuning.row_store import RowStore, make_room, room_needed, store_name
from gpt.inference.loading import load_model, locate, tokenizer_of
from gpt.model.distillation import AllAnswers, Answers, LikeliestAnswers, TeacherHead
from gpt.model.huggingface import read_config
from gpt.model.loss import IGNORE, chunk_size
from gpt.model.transformer import GPT
from gpt.runtime.device import Device
from gpt.runtime.distributed import World
from gpt.typed import shown

_KEY = "distill.teacher"
_PROBE = 8  # tokens that show whether a model's head is all that stands between its states and its logits


class Teacher(Protocol):
    """A causal language model that is asked and does not learn.

    Attributes:
        module: its weights.
        head: states (C, E) -> logits (C, V), or more columns with -inf.
        kind: what it runs in, for people.
    """

    module: nn.Module
    head: Callable[[Tensor], Tensor]
    kind: str

    def states(self, batch: Batch) -> Tensor:
        """(N, E) of the tokens of a batch on the device; anything for documents in which nothing is learned."""
        ...


class OwnTeacher:
    """A model of ours as a `Teacher`.

    Args:
        model: in the dtype to compute in.
        tokens: how many ids the tokenizer has.
    """

    def __init__(self, model: GPT, tokens: int) -> None:
        self.module: nn.Module = model
        self.head: Callable[[Tensor], Tensor] = TeacherHead(model.head.weight, None, tokens)
        self.kind = f"{model.config.stock_architecture()} shape"
        self._model = model

    def states(self, batch: Batch) -> Tensor:
        """As of `Teacher`."""
        with torch.autocast(batch.tokens.device.type, enabled=False):
            return self._model.hidden_states(batch.tokens, documents=batch.documents).flatten(0, 1)


class ForeignTeacher:
    """A model of `transformers` as a `Teacher`.

    Where its logits are its head's product with the states, which is tried, they are made chunk by chunk; where they are more than that
    (capped, scaled), its states are all its logits.

    Args:
        model: an `AutoModelForCausalLM` on its device, in the dtype to compute in.
        tokens: how many ids the tokenizer has.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        self.module: nn.Module = model
        self.kind = f"{type(model).__name__}, run by transformers"
        self._body, self._device = model.base_model, next(model.parameters()).device
        output = model.get_output_embeddings()
        plain = isinstance(output, nn.Linear) and self._body is not model
        self.head = TeacherHead(output.weight, output.bias, tokens) if plain else lambda logits: logits[:, :tokens]
        probe = torch.arange(_PROBE, device=self._device)[None] % tokens
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            whole = model(input_ids=probe, use_cache=False).logits[0, :, :tokens]
            if plain:
                states = self._body(input_ids=probe, use_cache=False).last_hidden_state
                plain = torch.equal(output(states)[0, :, :tokens].to(whole.dtype), whole)
        if not plain:
            self.head = lambda logits: logits[:, :tokens]
            self.kind += ", all its logits at once"
        self._plain = plain

    def states(self, batch: Batch) -> Tensor:
        """As of `Teacher`."""
        with torch.autocast(self._device.type, enabled=False):
            if batch.documents is None:
                return self._run(batch.tokens, None).flatten(0, 1)
            return self._run_documents(batch.tokens, batch.targets, batch.documents)

    def _run(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """(n, T) tokens, mask 1 where they are no padding -> (n, T, E), or all logits."""
        if self._plain:
            return self._body(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return self.module(input_ids=tokens, attention_mask=mask, use_cache=False).logits

    def _run_documents(self, tokens: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        """Each document in a row of its own, padded at its end: the long ones together, and no more tokens a pass than there are here."""
        B, T = tokens.shape
        apart = documents + torch.arange(B, device=documents.device)[:, None] * (T + 1)  # a row's last document goes not on in the next
        _, place, lengths = apart.flatten().unique_consecutive(return_inverse=True, return_counts=True)
        learned = torch.zeros_like(lengths).index_add_(0, place, (targets.flatten() != IGNORE).to(lengths.dtype))
        starts = lengths.cumsum(0) - lengths
        order = lengths.argsort(descending=True, stable=True)
        order = order[learned[order] > 0]
        states: Tensor | None = None
        while len(order):
            longest = int(lengths[order[0]])
            now, order = order[: B * T // longest], order[B * T // longest :]
            steps = torch.arange(longest, device=tokens.device)
            real = steps < lengths[now, None]  # (n, longest)
            places = (starts[now, None] + steps).clamp(max=B * T - 1)
            made = self._run(tokens.flatten()[places].masked_fill(~real, 0), real.long())
            states = made.new_zeros(B * T, made.shape[-1]) if states is None else states
            states[places[real]] = made[real]
        if states is None:  # nothing is learned of any
            made = self._run(tokens[:1, :1], None)
            return made.new_zeros(B * T, made.shape[-1])
        return states


@dataclass(frozen=True)
class TeacherRows:
    """The rows of which a teacher's answers may be kept.

    Attributes:
        rows: how many; 0: they have no numbers.
        length: T, tokens of a row.
        fingerprint: of the data and of how it is cut into rows.
        epochs: how often the run sees each row; None: not known.
    """

    rows: int
    length: int
    fingerprint: Any
    epochs: float | None


class TeacherGiver:
    """Gives the objective what a teacher says of a batch, from disk where it is there.

    Args:
        teacher: is asked.
        config: how many of its likeliest tokens, all others being one; 0: all. Their probability is that at the temperature.
        tokens: V.
        store: where these are kept, row by row; None: nowhere.
        device: of the run.
        say: told once if the disk is full, after which nothing more is kept.
    """

    def __init__(
        self, teacher: Teacher, config: DistillConfig, tokens: int, store: RowStore | None, device: Device, say: Callable[[str], None]
    ) -> None:
        self.teacher, self.store = teacher, store
        self.top_k, self.temperature = min(config.top_k, tokens), config.temperature
        self._tokens, self._device, self._say = tokens, device, say
        self._keeps = store is not None

    def __call__(self, part: Batch) -> dict[str, Answers]:
        """The teacher's answers to a part of a batch on the device, as an argument for the objective."""
        if not self.top_k:
            return {"teacher": AllAnswers(self.teacher.states(part), self.teacher.head)}
        numbers = None if self.store is None or part.numbers is None else part.numbers.numpy()
        if self.store is not None and numbers is not None and self.store.holds(numbers):
            return {"teacher": self._unpacked(self.store.read(numbers))}
        answers = self._likeliest(part)
        if numbers is not None and self._keeps:
            self._keep(numbers, answers)
        return {"teacher": answers}

    def _likeliest(self, part: Batch) -> LikeliestAnswers:
        """Logits less the greatest, in fp16 whether they are to be kept or not, so that a run does not depend on what is kept."""
        states, targets = self.teacher.states(part), part.targets.flatten()
        # Text is learned from everywhere: to ask where would be to wait for the device.
        places = torch.arange(len(targets), device=targets.device) if part.documents is None else (targets != IGNORE).nonzero().flatten()
        values = torch.zeros(len(targets), self.top_k, dtype=torch.float16, device=targets.device)
        ids = torch.zeros(len(targets), self.top_k, dtype=torch.int64, device=targets.device)
        others = torch.zeros(len(targets), dtype=torch.float16, device=targets.device)
        for chunk in places.split(chunk_size(targets.device.type, self._tokens, len(targets))):
            logits = self.teacher.head(states[chunk]).float()
            found = logits.topk(self.top_k)
            values[chunk] = (found.values - found.values[:, :1]).half()
            ids[chunk] = found.indices
            likely, all_of_them = ((x / self.temperature).logsumexp(-1) for x in (found.values, logits))
            others[chunk] = -(likely - all_of_them).expm1().clamp(max=0).half()
        return LikeliestAnswers(values, ids, others)

    def _keep(self, numbers: np.ndarray, answers: LikeliestAnswers) -> None:
        store, rows = self.store, len(numbers)
        assert store is not None
        values, ids, others = (x.cpu().numpy() for x in (answers.values, answers.ids, answers.others))
        parts = (values, others, ids.astype(_id_type(self._tokens)))
        packed = np.concatenate([x.reshape(rows, store.shape[0], -1).view(np.uint8) for x in parts], -1)
        try:
            store.write(numbers, torch.from_numpy(packed))
        except OSError as error:
            self._say(f"warning: the teacher's answers cannot be written to {store.folder} ({error.strerror}); what is there is used")
            self._keeps = False

    def _unpacked(self, rows: Tensor) -> LikeliestAnswers:
        packed, width = rows.flatten(0, 1).numpy(), 2 * self.top_k
        values, others = (torch.from_numpy(packed[:, part].copy().view(np.float16)) for part in (slice(width), slice(width, width + 2)))
        ids = torch.from_numpy(packed[:, width + 2 :].copy().view(_id_type(self._tokens)).astype(np.int64))
        return LikeliestAnswers(*(x.to(self._device.type, non_blocking=True) for x in (values, ids, others.flatten())))


def _id_type(tokens: int) -> Any:
    return np.uint16 if tokens <= 2**16 else np.uint32


def load_teacher(config: DistillConfig, tokenizer: Tokenizer, length: int, device: Device, allow_pickle: bool = False) -> Teacher:
    """The teacher, on the device, in the dtype of its matrix products (bf16 where the chip has it).

    Args:
        config: names it.
        tokenizer: of the student.
        length: T, tokens that it must read.
        device: where.
        allow_pickle: also read a pickle.

    Raises:
        UserError: it is not there, cannot be loaded, has another tokenizer, or reads less than T tokens.
    """
    path = config.teacher
    assert path is not None
    with torch.random.fork_rng(devices=[]):  # the student's own random numbers stay as they are
        directory, run = locate(path, allow_pickle, _KEY)
        check_vocabulary(tokenizer, _tokenizer(path, allow_pickle), path)
        foreign = ""
        if run is None or (directory / "config.json").is_file():
            try:
                read_config(directory)
            except ValueError as error:
                foreign = str(error)
        if not foreign:
            loaded = load_model(path, device.type, device.dtype, allow_pickle, _KEY)
            if loaded.model.config.head != "language_model":
                raise UserError(f"{_KEY}={path} tells classes apart, and has no probabilities of tokens to teach; give a language model")
            _check_sizes(path, loaded.model.config.context_length, loaded.model.config.vocab_size, length, tokenizer.vocab_size)
            return OwnTeacher(loaded.model.eval().requires_grad_(False), tokenizer.vocab_size)
        if device.fixed_graphs:
            raise UserError(f"{_KEY}={path}: only transformers can run it ({foreign}), in shapes that change, which this device cannot")
        return _load_foreign(path, directory, tokenizer.vocab_size, length, device, allow_pickle, foreign)


def _tokenizer(path: str, allow_pickle: bool) -> Tokenizer:
    try:
        return load_tokenizer(tokenizer_of(path, allow_pickle, _KEY))
    except UserError as error:
        raise UserError(f"{_KEY}={path}: whether its ids mean what the student's do is not to be seen: {error}") from error


def _load_foreign(path: str, directory: Path, tokens: int, length: int, device: Device, allow_pickle: bool, why: str) -> ForeignTeacher:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            directory, dtype=device.dtype, output_loading_info=True, use_safetensors=None if allow_pickle else True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{_KEY}={path}: neither GPT ({why}) nor transformers can load it ({said})") from error
    finally:
        if shows:
            logging.enable_progress_bar()
    if missing := sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]):
        raise UserError(f"{_KEY}={path}: its files lack {missing[0]}, or have it in another shape; copy the model again")
    sizes = model.config.get_text_config()
    reads = getattr(sizes, "max_position_embeddings", None) or length
    _check_sizes(path, reads, model.get_output_embeddings().weight.shape[0], length, tokens)
    return ForeignTeacher(model.to(device.type).eval().requires_grad_(False), tokens)


def check_vocabulary(student: Tokenizer, teacher: Tokenizer, path: str) -> None:
    """Raises UserError if an id of the student's tokenizer is another token of the teacher's; the teacher may have more."""
    ours, theirs = (t.backend.get_vocab(with_added_tokens=True) for t in (student, teacher))
    different = [(index, token) for token, index in ours.items() if theirs.get(token) != index]
    if not different:
        return
    index, token = min(different)
    other = teacher.backend.id_to_token(index)
    theirs_is = "no token at all" if other is None else f"{shown(other)} to the teacher"
    raise UserError(
        f"{_KEY}={path} has another tokenizer: id {index} is {shown(token)} to the student and {theirs_is}; "
        f"give a teacher with the same, or pretrain the student with the teacher's: tokenizer=pretrained tokenizer.path={path}"
    )


def _check_sizes(path: str, reads: int, rows: int, length: int, tokens: int) -> None:
    if reads < length:
        raise UserError(
            f"{_KEY}={path} reads {reads} tokens, and rows have {length}; set train.sequence_length={reads}, or give another teacher"
        )
    if rows < tokens:
        raise UserError(f"{_KEY}={path} knows {rows} tokens, and the tokenizer has {tokens}; give a teacher that knows them all")


def open_teacher(
    config: DistillConfig,
    cache_dir: Path,
    tokenizer: Tokenizer,
    data: TeacherRows,
    compiled: bool,
    device: Device,
    world: World,
    say: Callable[[str], None],
    allow_pickle: bool = False,
) -> TeacherGiver:
    """The teacher of a run, and where its answers are kept; says which, and why.

    Args:
        config: names it.
        cache_dir: that holds the answers of all teachers, in a folder each.
        tokenizer: of the student.
        data: the rows.
        compiled: whether to compile its blocks.
        device, world: of the run; every process has the whole teacher.
        say: takes lines for people.
        allow_pickle: also read a pickle.

    Raises:
        UserError: as `load_teacher`.
    """
    teacher = world.main_first(lambda: load_teacher(config, tokenizer, data.length, device, allow_pickle))
    if compiled and not device.fixed_graphs and isinstance(teacher.module, GPT):
        for block in teacher.module.blocks:
            block.compile(**device.compile_options())
    size, dtype = sum(p.numel() for p in teacher.module.parameters()) / 1e6, str(device.dtype).removeprefix("torch.")
    whole = ", whole in every process" if world.is_divided else ""
    probabilities = f"its {config.top_k} likeliest tokens" if config.top_k else "all its probabilities"
    say(
        f"teacher: {config.teacher}, {size:.2f}M parameters in {dtype}, {teacher.kind}{whole}; {probabilities}, "
        f"temperature {config.temperature:g}, weight {config.weight:g}"
    )
    store = _open_store(config, cache_dir, teacher, tokenizer.vocab_size, data, device, world, say)
    return TeacherGiver(teacher, config, tokenizer.vocab_size, store, device, say)


def _open_store(
    config: DistillConfig,
    cache_dir: Path,
    teacher: Teacher,
    tokens: int,
    data: TeacherRows,
    device: Device,
    world: World,
    say: Callable[[str], None],
) -> RowStore | None:
    reason = "distill.cache=off" if config.cache == "off" else ""
    if not config.top_k:
        reason = reason or "all probabilities are too many to keep; set distill.top_k"
    elif not data.rows:
        reason = reason or "every epoch cuts the text into other rows"
    if reason:
        say(f"teacher's answers: not kept ({reason})")
        return None
    top_k = min(config.top_k, tokens)
    key = {
        "teacher": world.share(lambda: fingerprint(teacher.module)), "kind": teacher.kind, "tokens": tokens, "top_k": top_k,
        "temperature": config.temperature,
        "data": data.fingerprint, "length": data.length, "rows": data.rows, "device": device.type, "dtype": str(device.dtype),
    }  # fmt: skip
    folder, shape = cache_dir / store_name(key), (data.length, top_k * (2 + np.dtype(_id_type(tokens)).itemsize) + 2)
    size = room_needed(data.rows, shape, torch.uint8)
    once = data.epochs is not None and data.epochs <= 1 and not world.share(folder.is_dir)
    full = None if once else world.share(lambda: make_room(cache_dir, folder.name, size, int(config.cache_gb * 1e9)))
    if once or full:
        say(f"teacher's answers: not kept ({full or 'the run sees every example once'})")
        return None
    store = RowStore(folder, key, data.rows, shape, torch.uint8)
    say(f"teacher's answers: kept ({size / 1e9:.2g} GB at most, {store.filled():,} of {data.rows:,} rows are there), in {folder}")
    return store


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of the names, shapes and values of a module's parameters."""
    found = hashlib.sha256()
    for name, p in module.named_parameters():
        found.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        found.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
