"""Whether torch.compile pays within a run, getting it ready, and compiling block by block in place."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gpt.config import TrainConfig
from gpt.errors import UserError
from gpt.model import native_attention, native_products, native_rowwise
from gpt.model.config import GPTConfig, LoRAConfig
from gpt.model.kernels import kernels_of
from gpt.model.loss import LinearCrossEntropy
from gpt.model.transformer import GPT
from gpt.runtime.case import native_parts
from gpt.runtime.device import Device
from gpt.runtime.parallel import computes_again

FROZEN = "frozen"
"""The first part of what a kind of graphs is known by that a run may do without."""
# Compiling takes about 15 s on a cold cache and saves a third of the time of what follows.
_PAYS_AFTER_SECONDS = 60
_PAYS_AFTER_SECONDS_NATIVE = 1200  # where all that takes time is in C++ of ours: then it saves one to four hundredths
_PAYS_AFTER_TOKENS = 256  # for the step that makes one token, on a GPU

# What torch.compile may ask of a C++ compiler on x86.
_VECTOR_FLAGS = "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8 -mfma"


def should_compile(
    setting: Literal["auto"] | bool, device: Device, flops: float | None = None, seconds: float | None = None, native: bool = False
) -> tuple[bool, str]:
    """Whether to compile, and the reason in words.

    Args:
        setting: the config's `compile`.
        device: where the run is.
        flops: of the whole run, if known. Not of what is left of it: a run that resumes must go on with the same kernels.
        seconds: of the whole run, if its length is a time.
        native: whether blocks are `native_throughout`.
    """
    if setting is False:
        return False, "compile=false"
    if obstacle := device.compile_obstacle():
        return False, f"not compiled: {obstacle}, so the run is slower"
    if setting is True:
        return True, "compile=true"
    if device.fixed_graphs:
        return True, "compiled block by block"
    if flops is not None:
        seconds = flops / device.assumed_flops
    if native and (seconds is None or seconds < _PAYS_AFTER_SECONDS_NATIVE):
        return False, "not compiled: what takes time is in C++ already"
    if seconds is not None and seconds < _PAYS_AFTER_SECONDS:
        return False, "not compiled: the run is too short for it to pay"
    return True, "compiled block by block"


def native_throughout(device: Device, model: GPTConfig) -> bool:
    """Whether all that takes time in whole blocks without adapters is our C++ on this device, so that little is left to compile."""
    rest = model.positions == "rotary" or model.activation == "gelu" or model.dropout
    return all(native_parts(device, model)) and not rest


class CompileAhead:
    """Compiles one block and the loss in the shapes of a run, in the background, while the run still reads its text.

    What it compiles is in torch's caches when the model itself asks for it, which takes ten seconds off a first start; and it
    shows whether the compiler works here at all. Join it (`problem`) before seeding anything: dropout draws from the generator.

    Args:
        device: where the run is.
        config: the model's; a `vocab_size` that turns out to be another only means that the loss is compiled later.
        micro_batch: sequences per pass.
        length: tokens of each.
        documents: whether rows hold several documents, none of which sees another.
        prepare: is done to the blocks before they are compiled.
        lora: the adapters of the run, if any: then two blocks are compiled, since nothing flows back through what is below the first.
    """

    def __init__(
        self,
        device: Device,
        config: GPTConfig,
        micro_batch: int,
        length: int,
        documents: bool,
        prepare: Callable[[Sequence[nn.Module]], None] = lambda blocks: None,
        lora: LoRAConfig | None = None,
    ) -> None:
        self._problem: str | None = None
        # Not daemons: Python aborts when it ends under one that is in torch's C++ code. `gpt.cli.run` does not wait for them.
        self._threads = [threading.Thread(target=self._compile, args=(device, config, micro_batch, length, documents, prepare, lora))]
        if device.is_host:
            self._threads.append(threading.Thread(target=_parse_headers))
        for thread in self._threads:
            thread.start()

    def done(self) -> bool:
        """Whether it has nothing left to do."""
        return not any(thread.is_alive() for thread in self._threads)

    def problem(self) -> str | None:
        """Wait until it is done, so that what follows (measuring the peak) has the machine; what went wrong in one line, or None."""
        for thread in self._threads:
            thread.join()
        return self._problem

    def _compile(
        self,
        device: Device,
        config: GPTConfig,
        micro_batch: int,
        length: int,
        documents: bool,
        prepare: Callable[[Sequence[nn.Module]], None],
        lora: LoRAConfig | None,
    ) -> None:
        try:
            if device.is_host:
                skip_vector_probes()
            adapters = lora and lora.of_most_blocks(config)
            model = GPT.materialise(dataclasses.replace(config, n_layer=2 if adapters else 1), device.type, lora=adapters)
            for p in model.parameters():
                torch.nn.init.constant_(p, 0.01)
            loss = LinearCrossEntropy(device.dtype)
            prepare(list(model.blocks))
            compile_model(model, loss, device)
            tokens = torch.zeros(micro_batch, length, dtype=torch.int64, device=device.type)
            with device.autocast():
                hidden = model.hidden_states(tokens, documents=tokens if documents else None)
            loss(hidden, model.head.weight, tokens).backward()
        except Exception as error:  # whatever a compiler may do, the run can go on without it
            self._problem = " ".join(str(error).split())[:200]


def _parse_headers() -> None:
    """Have torch's C++ headers precompiled, five seconds of one core on a machine's first run, while Python still traces the model.

    Through an inner function of torch, for want of a public one. It is a head start and no more: whatever goes wrong here goes
    wrong again, or does not, in the compilation itself, which reports it.
    """
    source = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel(float* x) { at::vec::Vectorized<float>::loadu(x); }'
    skip_vector_probes()
    with contextlib.suppress(Exception):
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        CppPythonBindingsCodeCache.load_pybinding(["float*"], source)


class FixedGraphs:
    """Sees to it that a run on a device that compiles slowly compiles nothing once it is under way. Elsewhere it does nothing.

    Args:
        device: where the run is.
        kinds: of graphs that the run is to compile, one each (`kinds_of_graphs`).
    """

    def __init__(self, device: Device, kinds: Collection[Hashable]) -> None:
        self._watches, self._kinds = device.fixed_graphs, set(kinds)
        self._known: set[str] = set()
        self._before = _graphs_compiled()

    def add(self, kinds: Collection[Hashable]) -> None:
        """Let the next step and the next evaluation compile graphs of more kinds, for other parameters train now."""
        self._kinds |= set(kinds)
        self._known.clear()

    @property
    def expected(self) -> int:
        """How many graphs the run is to compile, as far as it is known."""
        return len(self._kinds)

    @property
    def _least(self) -> int:
        return sum(not (isinstance(kind, tuple) and kind[0] == FROZEN) for kind in self._kinds)

    @property
    def count(self) -> int:
        """Graphs that were compiled since this was made; a forward pass and its backward are one."""
        return _graphs_compiled() - self._before

    def problem(self) -> str | None:
        """That the run has compiled more or fewer graphs than expected, after its last pass; None if all is well, or nobody watches."""
        if not self._watches or self._least <= self.count <= self.expected:
            return None
        return f"{self.count} graphs were compiled where {self.expected} were expected"

    @contextlib.contextmanager
    def running(self, part: Literal["training", "evaluation"]) -> Iterator[None]:
        """Around a step, or an evaluation: the first of each may compile.

        Raises:
            UserError: a later one would have to; the message names what has changed, a shape most often.
        """
        if not self._watches:
            yield
            return
        try:
            with torch.compiler.set_stance("fail_on_recompile" if part in self._known else "default"):
                yield
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            changed = "; ".join(line.strip(" -") for line in str(error).splitlines()[2:]) or str(error).splitlines()[0]
            raise UserError(
                f"{part} would compile a graph anew after its first pass, which takes minutes on this device: {changed}. Every pass must "
                "have the same shapes"
            ) from error
        self._known.add(part)


def kinds_of_graphs(model: GPT, config: TrainConfig) -> frozenset[Hashable]:
    """What a run with fixed shapes compiles, each once: each kind of block, in training and in evaluation, and the loss's softmax.

    Blocks are of one kind if the same of their parameters train, both or neither compute activations again, and, in training, both or
    neither are given something that has a gradient. Frozen ones at the bottom run in training as in evaluation, and not at all where what
    they make is kept on disk: their kinds begin with FROZEN.
    """
    kinds: set[tuple[Hashable, ...]] = {("softmax",)}
    flows = any(p.requires_grad for p in model.embeddings.parameters())
    for number, block in enumerate(model.blocks):
        trains = tuple((name, p.requires_grad) for name, p in block.named_parameters())
        kind = (trains, computes_again(config.activation_checkpointing, config.activation_checkpointing_n, number))
        learns = any(p.requires_grad for p in block.parameters())
        if flows or learns:
            kinds.add(("training", *kind, flows))
        kinds.add(("evaluation" if number >= (model.frozen_depth or 0) else FROZEN, *kind))
        flows |= learns
    return frozenset(kind for kind in kinds if kind[0] != FROZEN or ("evaluation", *kind[1:]) not in kinds)


def _graphs_compiled() -> int:
    dynamo = sys.modules.get("torch._dynamo.utils")  # to import it takes a second
    return dynamo.counters["stats"]["unique_graphs"] if dynamo is not None else 0


def compile_model(model: GPT, loss: LinearCrossEntropy, device: Device) -> None:
    """Compile each block and the loss's softmax in place, for fixed shapes; parameter names stay as they are."""
    skip_vector_probes()
    if kernels_of(device.type).native and device.dtype == torch.bfloat16:  # to be found, or built, now: not while torch traces
        native_attention.is_native(model.config.head_dim)
        native_rowwise.is_native()
        native_products.is_native()
    torch._dynamo.config.optimize_ddp = False  # it would cut a large block's graph where DDP's buckets end
    torch._dynamo.config.recompile_limit = 64  # of a block: more than there are kinds of them over all stages of a plan
    for block in model.blocks:
        block.compile(**device.compile_options())
    loss.compile_softmax(**device.compile_options())


@functools.cache
def compile_decoding(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile the function that makes one token, for fixed shapes; on a GPU its kernels are recorded and replayed as one."""
    skip_vector_probes()
    return torch.compile(step, dynamic=False, fullgraph=True, mode="reduce-overhead")


def keep_in_place(tensors: Iterable[Tensor]) -> None:
    """Promise that these tensors, which a compiled step writes to, stay where they are: only then can its kernels be recorded."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor, guard=False)


def should_compile_decoding(setting: Literal["auto"] | bool, device: Device, tokens: int) -> tuple[bool, str]:
    """Whether to compile the step that makes one token, and the reason in words.

    Args:
        setting: the config's `compile`.
        device: where.
        tokens: how many steps there will be.
    """
    if setting is False:
        return False, "compile=false"
    if setting == "auto" and device.is_host:
        return False, "not compiled: on a CPU the packed weights are as fast without"
    if obstacle := device.compile_obstacle():
        return False, f"not compiled: {obstacle}"
    if setting == "auto" and tokens < _PAYS_AFTER_TOKENS:
        return False, "not compiled: the text is too short for it to pay"
    return True, "compile=true" if setting is True else "compiled"


def skip_vector_probes() -> None:
    """Save eight seconds of every start on x86; to be called in each thread that compiles, since the setting is the thread's own.

    For each instruction set that the CPU has, torch.compile builds a test program and loads it in a new Python process, which
    imports torch. All that this can find out is that the compiler is too old to know the set, and asking it takes no time.
    """
    import torch._inductor.config as inductor

    if inductor.cpp.vec_isa_ok is None and _compiler_knows_vectors():
        inductor.cpp.vec_isa_ok = True


@functools.cache
def _compiler_knows_vectors() -> bool:
    command = [os.environ.get("CXX", "g++"), *_VECTOR_FLAGS.split(), "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except OSError:  # another compiler, which torch will find
        return False
