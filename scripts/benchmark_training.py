"""Our training step against those of other projects, in GPT-2's shape at 13.8 million parameters: `make bench ARGS=training`.

Every candidate runs in a process of its own, which tells its peak memory too, and they take turns of a few steps each: so a
machine whose speed drifts favours none. A peer that is not installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, BATCH, LENGTH, LAYERS, HEADS, WIDTH = 8192, 16, 256, 6, 6, 384
MODEL = ["model=gpt2-mini", f"model.vocab_size={VOCAB}", "optimizer=adamw"]
STEPS, ROUNDS = 4, 7  # of a turn; turns
PRODUCT, PRODUCTS = 2048, 20  # width of the matrices whose product gives the machine's rate, and how many make a step
TOKENS = BATCH * LENGTH


class NoMoreSteps(Exception):  # noqa: N818  (an end, not an error)
    """There are no more steps to do."""


class Pace:
    """In a candidate's process: lets it do as many steps as the other side asks for, and tells how long they took."""

    def __init__(self) -> None:
        self.left = -1
        self.started = 0.0

    def step(self) -> None:
        """To be called before every step.

        Raises:
            NoMoreSteps: nobody asks any more.
        """
        if self.left > 0:
            self.left -= 1
            return
        if self.left == 0:
            print(f"seconds {time.perf_counter() - self.started}", flush=True)
        line = sys.stdin.readline()
        if not line:
            raise NoMoreSteps
        self.left = int(line) - 1
        self.started = time.perf_counter()


def _batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _loop(pace: Pace, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The bare step: forward, backward, clip, update."""
    while True:
        pace.step()
        tokens, targets = _batch()
        loss(tokens, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def ours(pace: Pace, dtype: torch.dtype = torch.bfloat16, compiled: bool = True, keep: bool = True) -> None:
    """This project's model, loss and optimizer."""
    from gpt.compose import compose_run
    from gpt.model.loss import LinearCrossEntropy
    from gpt.model.transformer import GPT
    from gpt.runtime.allocator import keep_freed_memory, no_garbage_collection
    from gpt.runtime.compiling import compile_model
    from gpt.runtime.cpu import Cpu
    from gpt.training.optimizer import build_optimizers

    if keep:
        keep_freed_memory()
    config = compose_run("pretrain", MODEL)
    model, loss = GPT(config.model), LinearCrossEntropy(dtype)
    if compiled:
        compile_model(model, loss, Cpu("CPU", dtype))

    def forward(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden = model.hidden_states(tokens)
        return loss(hidden, model.head.weight, targets) / TOKENS

    with no_garbage_collection():  # as in the trainer
        _loop(pace, model, build_optimizers(config.optimizer, model, dtype), forward)


def stock_gpt2(layers: int) -> Any:
    """transformers' GPT-2 in the shape of the candidates."""
    import transformers

    none: Any = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # dropout: the others have none
    shape = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=LENGTH, n_layer=layers, n_head=HEADS, n_embd=WIDTH, bos_token_id=0, eos_token_id=0, **none
    )
    return transformers.GPT2LMHeadModel(shape)


def trainer(pace: Pace, model: Any = None, **settings: Any) -> None:
    """transformers.Trainer, by default on a GPT-2 of which all trains."""
    import transformers

    class Paced(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            pace.step()

    class Tokens(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1 << 20

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            tokens = torch.randint(VOCAB, (LENGTH,))
            return {"input_ids": tokens, "labels": tokens}

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=1 << 16, use_cpu=True, dataloader_num_workers=0,
            report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, **settings,
        )  # fmt: skip
        model = model if model is not None else stock_gpt2(LAYERS)
        transformers.Trainer(model, arguments, train_dataset=Tokens(), callbacks=[Paced()]).train()


class _PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.view(*y.shape[:2], HEADS, -1).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(WIDTH, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.ln_2(x))


class _PlainGPT(nn.Module):
    """As in nanoGPT (Karpathy, 2022): q, k and v in one product, fused attention, all logits at once."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.h = nn.Sequential(*(_PlainBlock() for _ in range(LAYERS)))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight
        for p in self.parameters():
            nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        logits = self.lm_head(self.ln_f(self.h(x)))
        return F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))


def plain_loop(pace: Pace) -> None:
    """A loop in nanoGPT's style: bf16 autocast, the whole model compiled, fused AdamW."""
    model = _PlainGPT()
    compiled = torch.compile(model)

    def forward(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return compiled(tokens, targets)

    _loop(pace, model, [torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)], forward)


def litgpt(pace: Pace) -> None:
    """litgpt's model and loss as its `pretrain` puts them together: compiled whole, in bf16-mixed."""
    sys.path.append(os.environ.get("LITGPT_PATH", ""))
    from litgpt.config import Config  # pyright: ignore[reportMissingImports]
    from litgpt.model import GPT  # pyright: ignore[reportMissingImports]
    from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]

    shape = Config(
        block_size=LENGTH, n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCAB, padded_vocab_size=VOCAB,
        intermediate_size=4 * WIDTH, rotary_percentage=0.25, parallel_residual=False, bias=True, mlp_class_name="GptNeoxMLP",
    )  # fmt: skip
    model = GPT(shape)
    model.transformer.wte.weight = model.lm_head.weight
    compiled = torch.compile(model)

    def forward(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(tokens)
        return chunked_cross_entropy(logits, targets)

    _loop(pace, model, [torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, betas=(0.9, 0.95))], forward)


def product(pace: Pace) -> None:
    """Nothing but large bf16 matrix products."""
    square = torch.randn(PRODUCT, PRODUCT, dtype=torch.bfloat16)
    while True:
        pace.step()
        for _ in range(PRODUCTS):
            torch.mm(square, square)


CANDIDATES: dict[str, Callable[[Pace], None]] = {
    "ours, bf16, compiled": ours,
    "the same, freed memory given back": lambda pace: ours(pace, keep=False),
    "ours, bf16, eager": lambda pace: ours(pace, compiled=False),
    "ours, fp32, compiled": lambda pace: ours(pace, torch.float32),
    "ours, fp32, eager": lambda pace: ours(pace, torch.float32, compiled=False),
    "transformers.Trainer, fp32 (its default)": trainer,
    "transformers.Trainer, bf16": lambda pace: trainer(pace, bf16=True),
    "transformers.Trainer, bf16 + torch_compile": lambda pace: trainer(pace, bf16=True, torch_compile=True),
    "plain loop, bf16 + compile": plain_loop,
    "litgpt, bf16-mixed + compile, rotary": litgpt,
    "matrix products": product,
}


class Candidate:
    """A candidate's process, seen from outside."""

    def __init__(self, name: str, script: str = __file__) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  (open as long as the process is)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "text": True}
        self.process = subprocess.Popen([sys.executable, script, name], **pipes)

    def run(self, steps: int) -> float | None:
        """Seconds a step; None if the process has ended."""
        found = self._ask(f"{steps}\n", "seconds ")
        return None if found is None else found / steps

    def finish(self) -> float | None:
        """End it; its peak memory in MB."""
        assert self.process.stdin is not None
        if self.process.poll() is None:
            self.process.stdin.close()
        return self._read("memory ")

    def problem(self) -> str:
        """The last line that it said."""
        self.process.wait()
        self.log.seek(0)
        return ([line for line in self.log.read().splitlines() if line.strip()] or ["it ended"])[-1][:160]

    def _ask(self, text: str, answer: str) -> float | None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(text)
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read(answer)

    def _read(self, answer: str) -> float | None:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # libraries print there too
            if line.startswith(answer):
                return float(line.removeprefix(answer))
        return None


def training(names: list[str] | None = None) -> None:
    """A training step of ours and of others, in turn: speed, memory, and the share of the matrix products' rate.

    Args:
        names: of CANDIDATES; None: all.
    """
    print(f"\n### A training step, {LAYERS} layers, {WIDTH} wide, vocabulary {VOCAB:,}, B {BATCH} x T {LENGTH}\n")
    _report(*take_turns(names or list(CANDIDATES), __file__, ROUNDS))


def take_turns(names: list[str], script: str, rounds: int) -> tuple[dict[str, float], dict[str, float | None]]:
    """Median seconds of a step and peak memory in MB of each candidate that runs here; of the others it is said why not.

    Args:
        names: of the candidates.
        script: that runs one, given its name.
        rounds: turns of each.
    """
    running = []
    for name in names:
        candidate = Candidate(name, script)
        if candidate.run(3) is None:  # compiles, and allocates what the optimizer keeps
            print(f"- left out: {name}: {candidate.problem()}")
        else:
            running.append(candidate)
    turns: dict[str, list[float]] = {candidate.name: [] for candidate in running}
    for _ in range(rounds):
        for candidate in running:
            seconds = candidate.run(STEPS)
            assert seconds is not None, candidate.problem()
            turns[candidate.name].append(seconds)
    memory = {candidate.name: candidate.finish() for candidate in running}
    return {name: statistics.median(seconds) for name, seconds in turns.items()}, memory


def _report(seconds: dict[str, float], memory: dict[str, float | None]) -> None:
    from gpt.compose import compose_run
    from gpt.model.transformer import GPT

    peers = {name: s for name, s in seconds.items() if name.startswith("transformers.Trainer")}
    best, default = min(peers.values(), default=None), next((s for name, s in peers.items() if "fp32" in name), None)
    rate = 2 * PRODUCT**3 * PRODUCTS / seconds["matrix products"] if "matrix products" in seconds else None
    with torch.device("meta"):
        flops = GPT(compose_run("pretrain", MODEL).model).flops_per_token() * TOKENS
    print("| | tokens/s | of Trainer's best | of Trainer's default | of the products' rate | peak memory, MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, s in seconds.items():
        if name != "matrix products":
            cells = [f"{b / s:.2f}" if b else "" for b in (best, default)] + [f"{flops / s / rate:.0%}" if rate else ""]
            print(f"| {name} | {TOKENS / s:,.0f} | {' | '.join(cells)} | {memory[name] or 0:,.0f} |")
    if rate:
        print(f"\nbf16 products of {PRODUCT} x {PRODUCT}: {rate / 1e9:,.0f} GFLOP/s on {torch.get_num_threads()} threads. The share counts")
        print(f"6 operations per matrix parameter and token and all of attention's scores: {flops / 1e9:,.0f} GFLOP a step.")


def trainer_overhead(pairs: int = 50) -> None:
    """What a turn of our loop takes over the bare forward, backward, clip and step, in turn within one run of the trainer."""
    from gpt.compose import compose_run
    from gpt.training.trainer import Trainer

    ratios: list[float] = []

    class InTurn(Trainer):
        """Every other step is a bare one, on the same model and with the same optimizers."""

        turn, bare = None, 0.0

        def _next_step(self, stop_at_once: bool) -> bool:
            now = time.perf_counter()
            if self.turn is not None:  # a turn of the loop ends where the next one begins
                ratios.append((now - self.turn) / self.bare)
            if self.state.step % 2:
                self.turn = time.perf_counter()
                return super()._next_step(stop_at_once)
            batch, self.turn = self.queue.get(self.state.batch), None
            started = time.perf_counter()
            with self.device.autocast():
                loss = self.objective(batch.tokens, batch.targets)
            loss.backward()
            scale = (1 / torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])).clamp(max=1.0)
            for optimizer in self.optimizers:
                optimizer.step(scale=scale / TOKENS)
                optimizer.zero_grad()
            self.bare = time.perf_counter() - started
            self.state.step, self.state.batch = self.state.step + 1, self.state.batch + 1
            self.busy, self.timed_steps = self.busy + self.bare, self.timed_steps + 1
            self.clock.step()
            return True

    with tempfile.TemporaryDirectory() as folder:
        settings = [*MODEL, "data=text", f"data.paths=[{argparse.__file__}]", "tokenizer=byte", "compile=true", "train.log_every=9"]
        settings += [f"train.batch_tokens={TOKENS}", f"train.budget={2 * pairs + 6}steps", "train.eval_every=0", "train.sample_tokens=1"]
        InTurn(compose_run("pretrain", [*settings, f"data.cache_dir={folder}/data", f"run.dir={folder}"])).fit()
    found = sorted(ratios[3:])
    low, middle, high = (found[len(found) * share // 4] - 1 for share in (1, 2, 3))
    mean = statistics.fmean(found) - 1
    print(f"\n- our loop over the bare step, {len(found)} pairs: {middle:+.1%} (quartiles {low:+.1%}, {high:+.1%}); mean {mean:+.1%}")


def end() -> None:
    """A candidate's last words: its peak memory in MB."""
    import resource

    print(f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != 'darwin' else 2**20)}", flush=True)


if __name__ == "__main__":
    try:
        CANDIDATES[sys.argv[1]](Pace())
    except NoMoreSteps:
        end()
