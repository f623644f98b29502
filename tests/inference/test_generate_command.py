"""`gpt generate` in a process of its own: what comes out on stdout, what is said on stderr, and what is refused."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inference_models import GREEDY, make_run, random_model

from gpt.commands import GenerateConfig
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.inference.command import generate
from gpt.inference.generate import generate_text, whole_texts
from gpt.inference.loading import load_model
from gpt.inference.sampling import Sampling
from gpt.runtime.cpu import Cpu

ROOT = Path(__file__).parents[2]


def gpt(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `gpt generate`."""
    done = subprocess.run(
        [sys.executable, "-m", "gpt", "generate", "device=cpu", *arguments], capture_output=True, timeout=100, cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def continued(folder: Path, prompts: list[str], max_tokens: int, sampling: Sampling = GREEDY, n: int = 1, **options) -> list[str]:
    loaded = load_model(str(folder), dtype=torch.float32)
    pieces = generate_text(loaded.model, loaded.tokenizer, prompts, max_tokens, sampling, (), loaded.end_ids, n, **options)
    return whole_texts(pieces, len(prompts) * n)


def test_one_prompt_and_its_continuation(plain_folder, tmp_path):
    code, out, err = gpt(f"model={plain_folder}", "prompt=née ", "temperature=0", "precision=fp32", "max_tokens=20", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out == "née " + continued(plain_folder, ["née "], 20)[0] + "\n"
    assert not list(tmp_path.iterdir())


def test_several_prompts_several_times_with_speeds(plain_folder, tmp_path):
    settings = ("temperature=1.5", "seed=3", "top_p=0.9", "min_p=0.01", "top_k=50", "repetition_penalty=1.1", "precision=fp32")
    code, out, err = gpt(f"model={plain_folder}", "prompts=[ab, c]", "n=2", "max_tokens=20", "verbose=true", *settings, cwd=tmp_path)
    assert code == 0, err
    texts = continued(plain_folder, ["ab", "c"], 20, Sampling(1.5, 50, 0.9, 0.01, 1.1, 3), n=2)
    prompts = ["ab", "ab", "c", "c"]
    assert out == "".join(f"--- {i + 1} of 4\n{prompt}{text}\n" for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)))
    assert len({*texts}) == 4
    first, second, third = err.splitlines()
    assert re.fullmatch(r"gpt: \d\.\dM parameters, Llama shape, loaded in [\d.]+ s; .*, float32", first)
    assert second == "gpt: tokens are made by torch: it is faster than a native step for 4 texts at once"
    assert re.fullmatch(r"gpt: prompt: 3 tokens in .* tokens/s\); then \d+ tokens in .* tokens/s\)", third)


def test_int8_says_what_it_costs(plain_folder, tmp_path):
    pytest.importorskip("torchao")
    arguments = (f"model={plain_folder}", "prompts=[ab, c]", "quantize=int8", "max_tokens=10", "temperature=0")
    for precision in ("fp32", "bf16"):
        code, out, err = gpt(*arguments, f"precision={precision}", cwd=tmp_path)
        assert code == 0, err
        assert out.startswith("--- 1 of 2\nab")
        said = re.fullmatch(r"gpt: int8: loss on 95 tokens of Python's textwrap.py ([\d.]+) -> ([\d.]+) \(([+-][\d.]+)\)\n", err)
        assert said, err
        assert float(said[2]) - float(said[1]) == pytest.approx(float(said[3]), abs=2e-4)
        assert abs(float(said[3])) < 0.5


def test_int8_says_nothing_of_a_loss_where_there_is_none(tmp_path, capsys):
    pytest.importorskip("torchao")
    model = random_model("gpt2", vocab_size=257, context_length=1)
    model.save_pretrained(tmp_path, byte_tokenizer())
    settings = {"quantize": "int8", "overflow": "slide", "max_tokens": 3, "temperature": 0, "device": "cpu", "precision": "fp32"}
    assert generate(GenerateConfig(model=str(tmp_path), prompt="a", **settings)) == 0
    written = capsys.readouterr()
    assert written.out.startswith("a")
    assert "int8" not in written.err


@pytest.mark.parametrize("compiled", [True, "auto"])
def test_without_a_compiler_the_text_is_written_all_the_same(compiled, plain_folder, monkeypatch, capsys):
    monkeypatch.setattr(Cpu, "compile_obstacle", lambda self: "there is no C++ compiler")
    settings = {"temperature": 0, "max_tokens": 10, "device": "cpu", "precision": "fp32"}
    assert generate(GenerateConfig(model=str(plain_folder), prompt="ab", compile=compiled, **settings)) == 0
    written = capsys.readouterr()
    assert written.out == "ab" + continued(plain_folder, ["ab"], 10)[0] + "\n"
    assert written.err == ("gpt: compile=true: not compiled: there is no C++ compiler\n" if compiled is True else "")


def test_several_texts_are_counted_on_a_terminal_and_there_alone(plain_folder, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    config = GenerateConfig(model=str(plain_folder), prompts=["ab", "c"], max_tokens=10, temperature=0, device="cpu", precision="fp32")
    assert generate(config) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert generate(config) == 0
    assert capsys.readouterr().out == quiet.out
    counts = [int(n) for n in re.findall(r"\r2 texts, (\d+) tokens", terminal.getvalue())]
    assert counts == sorted(counts)
    assert counts[-1] <= 20
    assert terminal.getvalue().endswith("tokens\r\033[K")


def test_too_many_tokens_are_refused_or_slide(plain_folder, tmp_path):
    arguments = (f"model={plain_folder}", "prompt=abcd", "max_tokens=150", "temperature=0", "precision=fp32")
    code, out, err = gpt(*arguments, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err == (
        "gpt: prompt: its 4 tokens and max_tokens=150 exceed the model's context of 96; "
        "set max_tokens to at most 92, or overflow=slide to go on with what was written last\n"
    )
    with pytest.raises(UserError, match=r"^prompt: its 1 token and max_tokens=96 exceed the model's context of 96; "):
        generate(GenerateConfig(model=str(plain_folder), prompt="a", max_tokens=96, device="cpu"))
    code, out, err = gpt(*arguments, "overflow=slide", cwd=tmp_path)
    assert code == 0
    assert out == "abcd" + continued(plain_folder, ["abcd"], 150, overflow="slide")[0] + "\n"
    assert re.fullmatch(r"gpt: note: 4 tokens of prompt and 150 to write exceed the model's context of 96: .* 48 tokens.*\n", err)


def test_without_max_tokens_the_context_is_filled(plain_folder, capsys):
    for prompt, left in (("a", 95), ("a" * 90, 6)):
        assert generate(GenerateConfig(model=str(plain_folder), prompt=prompt, temperature=0, device="cpu", precision="fp32")) == 0
        assert capsys.readouterr().out == prompt + continued(plain_folder, [prompt], left)[0] + "\n"
    with pytest.raises(UserError, match=r"its 96 tokens .*; shorten it, or overflow=slide"):
        generate(GenerateConfig(model=str(plain_folder), prompt="a" * 96, device="cpu"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stop_ids=[1, 257]"], "stop_ids=257: the model's ids go from 0 to 256"),
        (["stop_ids=[-1]"], "stop_ids=-1: "),
        (["interactive=true", "system=x"], "system: the model's tokenizer has no chat template"),
    ],
)
def test_what_only_the_model_can_tell_is_one_line_too(plain_folder, tmp_path, arguments, says):
    code, out, err = gpt(f"model={plain_folder}", *arguments, cwd=tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_stop_ids_and_the_ends_that_the_model_names(plain_folder, chat_folder, capsys):
    def written(folder: Path, **settings) -> str:
        config = GenerateConfig(model=str(folder), prompt="ab", temperature=2.0, seed=1, device="cpu", precision="fp32", **settings)
        assert generate(config) == 0
        return capsys.readouterr().out.removeprefix("ab")[:-1]

    free = written(plain_folder, max_tokens=40)
    loaded = load_model(str(plain_folder))
    ids = [loaded.tokenizer.encode(c)[0] for c in free if c.isascii()]
    stop = ids[len(ids) // 2]
    cut = written(plain_folder, max_tokens=40, stop_ids=[stop])
    assert cut == free[: free.index(loaded.tokenizer.decode([stop]))]
    ends = load_model(str(chat_folder)).end_ids
    assert ends == {0, 258, 77}
    assert written(chat_folder, max_tokens=100) == continued(chat_folder, ["ab"], 100, Sampling(2.0, seed=1))[0]


def test_a_prompt_that_is_not_utf8(capsys):
    """Python hands over bytes of the command line that are not UTF-8 as lone surrogates, which no tokenizer takes."""
    for settings in ({"prompt": "caf\udce9"}, {"prompts": ["a", "caf\udce9"]}, {"interactive": True, "system": "caf\udce9"}):
        with pytest.raises(UserError, match=r"^prompt: it is not valid UTF-8"):
            generate(GenerateConfig(model="no matter", **settings))
    assert capsys.readouterr().out == ""


def test_a_run_and_its_checkpoint(tmp_path):
    run = tmp_path / "runs" / "one"
    make_run(run)
    settings = ("prompt=ab", "temperature=0", "max_tokens=10", "precision=fp32")
    code, newest, err = gpt("model=runs/one", *settings, cwd=tmp_path)
    assert code == 0, err
    assert "the run has not finished" in err
    code, same, err = gpt("model=runs/one/checkpoints/step-00000007", *settings, cwd=tmp_path)
    assert (code, err, same) == (0, "", newest)
    load_model(str(run)).model.save_pretrained(run / "model", load_model(str(run)).tokenizer)
    code, finished, err = gpt("model=runs/one", *settings, cwd=tmp_path)
    assert (code, err, finished) == (0, "", newest)
    assert newest.startswith("ab")


def test_a_model_that_is_not_there(tmp_path):
    code, out, err = gpt("model=runs/none", "prompt=x", cwd=tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "model=runs/none: there is no such directory" in err
