"""The commands, and the settings of those that do not train. (A training run's are in `gpt.config`.)

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gpt.aws.jobs_config import FetchConfig, JobConfig, JobsConfig, LogsConfig
from gpt.config import DeviceConfig, DeviceName, Precision, RunConfig, at_least, check_seed
from gpt.data.config import DataConfig, LossOn, Metric, TokenizerConfig, holds_examples, validate_data, validate_text, validate_tokenizer
from gpt.errors import UserError
from gpt.typed import shown


@dataclass
class ModelUse:
    """Which weights, and how to compute with them."""

    model: str = ""
    """A run directory, its model/ folder, or a Hugging Face directory or hub id of a supported architecture."""
    device: DeviceName = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Of the weights and their products; auto: bf16 where the chip multiplies it."""
    quantize: Literal["none", "int8"] = "none"
    """int8: the matrices as 8-bit integers with a scale per row (torchao, weight-only); half the memory of bf16."""
    allow_pickle: bool = False
    """Read a checkpoint that is only there as pytorch_model.bin; nothing in it is run."""

    @property
    def device_config(self) -> DeviceConfig:
        """The device as a training run names it."""
        return DeviceConfig(self.device)

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        if not self.model:
            raise UserError("model: which model? Give a run directory or a Hugging Face directory, e.g. model=runs/<id>")


@dataclass
class GenerateConfig(ModelUse):
    """One call of `gpt generate`."""

    prompt: str = ""
    """What to continue. Empty: from the start of a document."""
    prompts: list[str] = field(default_factory=list)
    """Several prompts, continued together."""
    n: int = 1
    """Continuations of each prompt."""
    interactive: bool = False
    """A chat in the terminal: with the tokenizer's chat template if it has one, else what you write is continued."""
    system: str = ""
    """interactive: the chat's system message."""
    max_tokens: int | None = None
    """Most tokens to write; null: 200, or as many as the context still holds."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities reach p together."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that are in the text already become less likely."""
    stop: list[str] = field(default_factory=list)
    """Stop before any of these texts."""
    stop_ids: list[int] = field(default_factory=list)
    """Stop before any of these token ids, besides those that the model's own files name."""
    seed: int | None = None
    """Of the sampling; null: another text each time."""
    overflow: Literal["error", "slide"] = "error"
    """When prompt and max_tokens exceed the context: refuse, or go on from the second half of what the context holds."""
    compile: Literal["auto", True, False] = "auto"
    """Compile the step that makes one token; auto: on a GPU, for long texts."""
    verbose: bool = False
    """Print the speeds of reading the prompt and of writing."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        super().validate()
        for name, low in (("n", 1), ("temperature", 0), ("top_k", 0)):
            at_least(name, getattr(self, name), low)
        if self.max_tokens is not None:
            at_least("max_tokens", self.max_tokens, 1)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={shown(self.top_p)} must be greater than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={shown(self.min_p)} must be from 0 to 1")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty={shown(self.repetition_penalty)} must be greater than 0; 1 changes nothing")
        if self.seed is not None:
            check_seed(self.seed)
        if self.prompt and self.prompts:
            raise UserError("prompts: give prompt= or prompts=, not both")
        if self.interactive and (self.prompt or self.prompts or self.n > 1):
            raise UserError("interactive=true: the chat asks for its prompts itself; leave out prompt, prompts and n")
        if self.system and not self.interactive:
            raise UserError("system: is the system message of a chat; add interactive=true, or write it into the prompt")


@dataclass
class EvaluateConfig(ModelUse):
    """One call of `gpt evaluate`."""

    data: DataConfig = field(default_factory=DataConfig)
    examples: Literal["auto", True, False] = "auto"
    """Whether the data's rows are examples to score as in fine-tuning, the completion or the answers alone; auto: if the model's own run
    was so trained, or the source holds nothing else."""
    loss_on: LossOn = "auto"
    """Of examples: what is scored; auto: the completion, the assistant's turns, or all of a text."""
    part: Literal["auto", "all", "held_out"] = "auto"
    """Of the data: all, or the share that a run with this data.holdout does not train on. auto: all of the data that is named
    here; with none named, what the model's own run held out."""
    stride: int = 0
    """Tokens from one window to the next; each token is scored once, in the first window that holds it. 0: half a window."""
    context_length: int = 0
    """Tokens of a window, and of a task's question; 0: as many as the model can read."""
    batch: int = 8
    """Windows, or requests of a task, per forward pass. Answers to prompts are written four times as many at a time."""
    max_tokens: int = 0
    """Score only the first so many tokens; 0: all."""
    metrics: list[Metric] = field(default_factory=list)
    """Of examples: have the model answer their prompts, and compare: exact_match and token_f1 (question answering), rouge (summarisation),
    chrf and bleu (translation), pass (code; runs it against data.fields.test)."""
    answer_tokens: int = 0
    """metrics: most tokens of an answer; 0: twice those of the longest right one, at most 256."""
    temperature: float = 0.0
    """metrics: divides the logits; 0 takes the likeliest token."""
    seed: int = 0
    """metrics: of the sampling, above temperature 0."""
    stop: list[str] = field(default_factory=list)
    """metrics: an answer ends before any of these texts."""
    allow_execution: bool = False
    """metrics=[pass]: run Python code that the model wrote on this machine, as you. It could read or destroy what you can."""
    execution_seconds: float = 10.0
    """metrics=[pass]: after which a program is killed."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, instead of text (`pip install 'gpt-trainer[eval]'`)."""
    tasks_dir: str | None = None
    """A folder of your own tasks as YAML files."""
    num_fewshot: int | None = None
    """Of tasks: worked examples in front of each question; null: what the task says."""
    limit: int | None = None
    """Of tasks: only the first so many questions. Of metrics: only so many prompts, drawn evenly and always the same."""
    output: str | None = None
    """Write the figures into this JSON file too."""

    def validate_settings(self) -> None:
        """Raises UserError for values that cannot be, whatever the model and the rows are."""
        super().validate()
        for name, low in (("stride", 0), ("context_length", 0), ("batch", 1), ("max_tokens", 0)):
            at_least(name, getattr(self, name), low)
            if self.tasks and name in ("stride", "max_tokens") and getattr(self, name):
                raise UserError(f"{name}={getattr(self, name)} is of text, not of tasks; leave it out, or leave out tasks")
        if self.tasks and self.data.paths:
            raise UserError(f"data.paths={shown(self.data.paths)} is not read by tasks; leave one of the two out")
        if self.context_length and self.stride > self.context_length:
            raise UserError(f"stride={self.stride} must be at most context_length={self.context_length}, or tokens would be left out")
        for name, low in (("num_fewshot", 0), ("limit", 1)):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), low)
                if not (self.tasks or (self.metrics and name == "limit")):
                    raise UserError(f"{name}={getattr(self, name)} is of tasks; name some, e.g. tasks=[lambada_openai]")
        if self.tasks_dir is not None and not self.tasks:
            raise UserError(f"tasks_dir={self.tasks_dir}: name the tasks to run, tasks=[...]")
        self._validate_metrics()

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        self.validate_settings()
        validate_data(self.data)
        if self.metrics and not self.on_examples:
            why = "these are read as text" if self.examples is False else f"data={self.data.source} is text"
            raise UserError(
                f"metrics={shown(list(self.metrics))}: are of answers to the prompts of examples, and {why}; "
                "name data with prompts and answers"
            )
        if not self.tasks and self.on_examples:
            for name in ("stride", "max_tokens"):
                if getattr(self, name):
                    raise UserError(f"{name}={getattr(self, name)} is of text, and these are examples; leave it out, or set examples=false")
        elif not self.tasks:
            validate_text(self.data)
            if self.loss_on not in ("auto", "all"):
                raise UserError(f"loss_on={self.loss_on} is of examples; add examples=true, or leave it out")

    def _validate_metrics(self) -> None:
        for name, low in (("answer_tokens", 0), ("temperature", 0)):
            at_least(name, getattr(self, name), low)
        check_seed(self.seed)
        if not self.execution_seconds > 0:
            raise UserError(f"execution_seconds={shown(self.execution_seconds)} must be greater than 0")
        usual = EvaluateConfig()
        for name in ("answer_tokens", "temperature", "seed", "stop", "allow_execution", "execution_seconds"):
            if not self.metrics and (value := getattr(self, name)) != getattr(usual, name):
                raise UserError(f"{name}={shown(value)} is of metrics; name some, e.g. metrics=[rouge]")
        if not self.metrics:
            return
        if self.tasks:
            raise UserError(f"metrics={shown(list(self.metrics))}: tasks have metrics of their own; leave one of the two out")
        if "pass" in self.metrics and not self.allow_execution:
            raise UserError(
                "metrics=[pass] runs Python code that the model wrote, on this machine and as you: it could read, change or delete all "
                "that you can; add allow_execution=true if there is nothing to lose here, best in a container or a virtual machine"
            )

    @property
    def on_examples(self) -> bool:
        """Whether rows are scored as examples, not as text."""
        return self.examples is not False and holds_examples(self.data, self.examples is True or bool(self.metrics))


@dataclass
class ExportConfig:
    """One call of `gpt export`."""

    run: str = ""
    """A run directory, one of its checkpoints, or a Hugging Face directory or hub id."""
    output: str | None = None
    """Folder to write; null: <run>/export, or the name of the model with -export here."""
    dtype: Literal["own", "float32", "bfloat16", "float16"] = "own"
    """Of the written weights; own: as they are."""
    format: Literal["hf", "peft"] = "hf"
    """hf: a Hugging Face directory, config.json, safetensors, tokenizer, model card, with adapters merged; peft: of a run with lora.rank
    the adapters alone, in PEFT's format."""
    overwrite: bool = False
    """Replace an output folder that is there."""
    allow_pickle: bool = False
    """Read a checkpoint that is only there as pytorch_model.bin; nothing in it is run."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        if not self.run:
            raise UserError("run: what to export? Give a run directory, e.g. run=runs/<id>")
        if self.format == "peft" and self.dtype != "own":
            raise UserError(f"dtype={self.dtype}: adapters are small, and are written as they were trained; leave it out")


@dataclass
class PrepareConfig:
    """One call of `gpt prepare`."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    context_length: int = 256
    """Tokens that a row of a batch will have; both sides of the split must hold as many. Examples are cut at it."""
    finetune: bool = False
    """For gpt finetune: rows are examples, not text."""
    loss_on: LossOn = "auto"
    """finetune: what of an example is learned; auto: the completion, the assistant's turns, or all of a text."""
    inspect: str | None = None
    """Instead: check a folder of prepared tokens, print its statistics and some of its documents."""
    samples: int = 3
    """inspect: how many documents to print."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        at_least("context_length", self.context_length, 1)
        at_least("samples", self.samples, 0)
        if self.inspect is None:
            validate_data(self.data)
            validate_tokenizer(self.tokenizer)
            if self.data.streaming:
                raise UserError("data.streaming=true: a stream is cut into ids while training, nothing is prepared; leave it out")


@dataclass
class InspectConfig:
    """One call of `gpt inspect`."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: str | None = None
    """A run directory or a Hugging Face directory or hub id whose tokenizer is taken."""
    context_length: int = 256
    """Tokens of a row."""
    examples: Literal["auto", True, False] = "auto"
    """Whether rows are examples to fine-tune on; auto: unless the source is plain text."""
    loss_on: LossOn = "auto"
    """What of an example is learned; auto: the completion, the assistant's turns, or all of a text."""
    n: int = 3
    """Rows of the batch to show."""
    step: int = 0
    """Which batch."""
    seed: int = 1337
    """Of the order of the data."""
    output: str = "inspect.html"
    """The page to write; empty: none."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        for name, low in (("context_length", 2), ("n", 1), ("step", 0)):
            at_least(name, getattr(self, name), low)
        check_seed(self.seed)
        validate_data(self.data)
        validate_tokenizer(self.tokenizer)


@dataclass
class InspectTokensConfig:
    """One call of `gpt inspect tokens`."""

    text: str = ""
    """What to cut into tokens; empty: what comes in on stdin."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: str | None = None
    """A run directory or a Hugging Face directory or hub id whose tokenizer and positions are taken."""
    positions: Literal["auto", "learned", "sinusoidal", "rotary"] = "auto"
    """Which positional encoding to draw; auto: the model's, else sinusoidal."""
    d_model: int = 64
    """Dimensions of the encoding, where no model tells."""
    length: int = 64
    """Positions to draw, at least as many as there are tokens."""
    output: str = "tokens.html"
    """The page to write; empty: none."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        for name, low in (("d_model", 2), ("length", 1)):
            at_least(name, getattr(self, name), low)
        if self.d_model % 2:
            raise UserError(f"d_model={self.d_model} must be even: dimensions come in pairs of a sine and a cosine")
        validate_tokenizer(self.tokenizer)


@dataclass
class RunsConfig:
    """One call of `gpt runs`."""

    dir: str = "runs"
    """The folder that holds the run directories."""
    sort: Literal["started", "val_loss", "time", "step"] = "started"
    """By what, the smallest first: so the newest run comes last, but the best one first."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        if not self.dir:
            raise UserError("dir: which folder of runs?")


@dataclass
class RunsCompareConfig:
    """One call of `gpt runs compare`."""

    runs: list[str] = field(default_factory=list)
    """Which runs: their ids in `dir`, as much of the beginning or end of an id as tells it from others, or paths. They may be written as
    words, without `runs=`."""
    dir: str = "runs"
    """The folder in which ids are looked up."""
    output: str = "compare.html"
    """The page to write."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        if len(self.runs) < 2:
            one = f" besides {self.runs[0]}" if self.runs else ""
            raise UserError(f"runs: which runs{one}? Name at least two, e.g. gpt runs compare <id> <id>; gpt runs lists them")
        for key in ("dir", "output"):
            if not getattr(self, key):
                raise UserError(f"{key}: which {'folder of runs' if key == 'dir' else 'file'}?")


@dataclass
class DoctorConfig:
    """One call of `gpt doctor`."""

    device: DeviceName = "auto"
    """The device that this machine is meant for; that it is not here is a problem. auto: whatever torch finds."""
    run_dir: str = "runs"
    """The folder whose room and speed are measured; that of the runs, which is `run.dir` there."""
    aws: bool = False
    """Check credentials, region and role too; asks AWS who you are."""
    role: str = ""
    """aws: the role that SageMaker jobs would run as, its name or ARN."""
    json: bool = False
    """Print one JSON object instead of the table; `--json` is the same."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        if not self.run_dir:
            raise UserError("run_dir: which folder?")
        if self.role and not self.aws:
            raise UserError(f"role={self.role} is AWS's, which is not asked; add aws=true, or leave it out")


JOB_CODES = "0: the job did its work; 2: bad input; 1: failed otherwise; 143: stopped; 130: you left, and it goes on"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        what: it does, in a line.
        config: the schema of its settings.
        root: the file in `configs/` that lists its groups; empty: it has none.
        words: the key, of a list, that takes the arguments written as words, without `key=`; empty: there are none.
        trains: whether it starts a training run, which can be continued, and be one of a sweep.
        flags: keys, true or false, that may be written as --key too.
        exit_codes: what they mean, where 0 and 1 are not just done and our fault.
    """

    what: str
    config: type
    root: str = ""
    words: str = ""
    trains: bool = False
    flags: tuple[str, ...] = ()
    exit_codes: str = ""


COMMANDS = {
    "pretrain": Command(
        "train a model from scratch; with no argument, a small one on Python's standard library", RunConfig, "config", trains=True
    ),
    "finetune": Command("train a model further, on prompts and completions, chats, classes or text", RunConfig, "finetune", trains=True),
    "generate": Command("continue a prompt with a trained model, or chat with it", GenerateConfig),
    "evaluate": Command(
        "loss of a model on text or examples, how right its answers or classes are, or its scores on tasks",
        EvaluateConfig,
        "evaluate",
    ),
    "parity": Command("compare what the device computes with the CPU, layer by layer, on one batch of a run", RunConfig, "config"),
    "precompile": Command("compile the graphs of a run ahead of it, into the device's cache", RunConfig, "config"),
    "export": Command("write a run's weights as a Hugging Face directory", ExportConfig),
    "prepare": Command("cut a corpus into token ids ahead of time, or look into one that is", PrepareConfig, "prepare"),
    "inspect": Command("look at batches as a model sees them, in the terminal and on a page", InspectConfig, "inspect"),
    "inspect tokens": Command("how a text is cut into tokens, and its positional encoding", InspectTokensConfig, "inspect_tokens"),
    "runs": Command("list the runs of a folder: state, step, best validation loss, time, size", RunsConfig),
    "runs compare": Command(
        "draw the curves of several runs into one page, and what their configs differ in", RunsCompareConfig, words="runs"
    ),
    "jobs": Command("list the SageMaker jobs of runs; the same as gpt jobs list", JobsConfig),
    "jobs list": Command("list the SageMaker jobs of runs: state, machines, time, cost", JobsConfig),
    "jobs status": Command("where a run's job stands, since when, and what it costs", JobConfig, words="runs"),
    "jobs logs": Command("the log of a run's job over all its hosts, as it comes", LogsConfig, words="runs", exit_codes=JOB_CODES),
    "jobs wait": Command("wait for the end of runs' jobs", JobConfig, words="runs", exit_codes=JOB_CODES),
    "jobs stop": Command("stop runs' jobs, which save a checkpoint first", JobConfig, words="runs"),
    "jobs fetch": Command("bring a run's model, metrics and report home", FetchConfig, words="runs"),
    "doctor": Command(
        "say what this machine can do, what is wrong with it, and the fix",
        DoctorConfig,
        flags=("json",),
        exit_codes="0: no problem, though there may be warnings; 1: at least one problem",
    ),
}
