"""A chat: what the model is shown, what is remembered, how it is cut short; by hand, through a pipe and in a real terminal."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from inference_models import alone, chat_tokenizer, random_model

from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.inference.chat import Chat
from gpt.inference.loading import load_model
from gpt.inference.sampling import Sampling

ROOT = Path(__file__).parents[2]
CONTEXT = 200
END = frozenset({0, 258})
SAMPLING = Sampling(temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3", vocab_size=259, context_length=CONTEXT)


@pytest.fixture
def make(model) -> Callable[..., Chat]:
    def chat(max_tokens: int | None = 10, system: str = "", template: bool = True, sampling: Sampling = SAMPLING, **options) -> Chat:
        tokenizer = chat_tokenizer() if template else byte_tokenizer()
        return Chat(model, tokenizer, sampling, max_tokens, options.pop("stop", []), END, system, **options)

    return chat


def is_gnu_readline() -> bool:
    try:
        import readline
    except ImportError:
        return False
    return "GNU readline" in (readline.__doc__ or "")


def say(chat: Chat, text: str) -> str:
    return "".join(chat.answer(text))


def contents(chat: Chat) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in chat.messages]


def talk(chat: Chat, monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> int:
    """Run a chat on these lines; an exception stands for what happens instead of a line."""
    waiting = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    return chat.run()


class TestAnswers:
    @pytest.mark.parametrize("system", ["", "be brief"])
    def test_the_model_is_shown_what_transformers_would_show_it(self, make, model, chat_folder, system):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(chat_folder)
        chat = make(system=system)
        chat.tokenizer = load_model(str(chat_folder)).tokenizer
        history = [{"role": "system", "content": system}] if system else []
        for text in ("hi", "é🙂?"):
            history.append({"role": "user", "content": text})
            ids = theirs.apply_chat_template(history, tokenize=True, add_generation_prompt=True, return_dict=False)
            seed = (5 + len(history)) % 2**32
            expected = chat.tokenizer.decode(alone(model, ids, 10, Sampling(temperature=1.0, seed=seed), stop_ids=END))
            assert say(chat, text) == expected
            history.append({"role": "assistant", "content": expected})
            assert chat.messages == history

    def test_without_a_seed_it_answers_too(self, make):
        chat = make(sampling=Sampling(temperature=2.0))
        assert len({say(make(sampling=Sampling(temperature=2.0)), "x") for _ in range(3)}) == 3
        say(chat, "x")
        assert [role for role, _ in contents(chat)] == ["user", "assistant"]

    def test_an_answer_is_as_long_as_the_context_holds(self, make):
        chat = make(max_tokens=None)
        shown = len(chat.tokenizer.encode_chat([{"role": "user", "content": "hi"}]))
        ids = alone(chat.model, chat.tokenizer.encode_chat([{"role": "user", "content": "hi"}]), CONTEXT - shown, Sampling(1.0, seed=6))
        cut = next((i for i, token in enumerate(ids) if token in END), len(ids))
        assert say(chat, "hi") == chat.tokenizer.decode(ids[:cut])

    def test_stop_strings(self, make):
        free = say(make(max_tokens=40), "x")
        stop = free[5]
        assert say(make(max_tokens=40, stop=[stop]), "x") == free.split(stop)[0]

    def test_without_a_template_the_text_is_continued(self, make, model):
        chat = make(template=False)
        tokenizer = chat.tokenizer
        first = say(chat, "one")
        assert first == tokenizer.decode(alone(model, tokenizer.encode("one"), 10, Sampling(1.0, seed=6), stop_ids=END))
        second = say(chat, "two")
        ids = tokenizer.encode("one" + first + "two")
        assert second == tokenizer.decode(alone(model, ids, 10, Sampling(1.0, seed=8), stop_ids=END))

    def test_a_system_message_needs_a_template(self, make):
        with pytest.raises(UserError, match=r"^system: .*no chat template"):
            make(template=False, system="x")


class TestMemory:
    def test_the_oldest_turns_are_dropped_and_that_is_said(self, make, capsys):
        chat = make(system="sys")
        for turn in range(3):
            say(chat, f"{turn}" * 20)
        before = contents(chat)
        assert capsys.readouterr().err == ""
        say(chat, "x" * 60)
        after = contents(chat)
        assert "oldest turns" in capsys.readouterr().err
        assert after[0] == ("system", "sys")
        kept = after[1:-2]
        assert kept == before[len(before) - len(kept) :]
        assert 0 < len(kept) < len(before) - 1
        assert after[-2] == ("user", "x" * 60)
        assert [role for role, _ in after[1:]] == ["user", "assistant"] * (len(after) // 2)

    @pytest.mark.parametrize("text", ["x" * CONTEXT, "REFUSED"], ids=["too long", "refused by the template"])
    def test_a_message_that_cannot_be_shown_leaves_the_history_as_it_was(self, make, monkeypatch, capsys, text):
        chat = make(system="sys")
        say(chat, "a" * 30)
        say(chat, "b" * 30)
        before = contents(chat)
        with pytest.raises(UserError) as error:
            next(chat.answer(text))
        assert "\n" not in str(error.value)
        assert contents(chat) == before
        capsys.readouterr()
        assert talk(chat, monkeypatch, text) == 0
        out, err = capsys.readouterr()
        assert out.strip() == ""
        assert len([line for line in err.splitlines() if line.startswith("gpt: ")]) == 1
        assert contents(chat) == before
        assert say(chat, "c")

    def test_whatever_happens_before_an_answer_begins_leaves_no_question_without_one(self, make, monkeypatch):
        chat = make()
        say(chat, "a")
        before = contents(chat)

        def interrupted(messages: Sequence[dict[str, str]]) -> list[int]:
            raise KeyboardInterrupt

        monkeypatch.setattr(chat.tokenizer, "encode_chat", interrupted)
        assert talk(chat, monkeypatch, "b") == 0
        assert contents(chat) == before


class TestRun:
    def test_answers_are_printed_and_the_commands_work(self, make, monkeypatch, capsys):
        chat = make(system="sys")
        assert talk(chat, monkeypatch, "hello", "  ", "", " /exit ", "never") == 0
        out, err = capsys.readouterr()
        assert out == contents(chat)[-1][1] + "\n"
        assert [role for role, _ in contents(chat)] == ["system", "user", "assistant"]
        assert "Ctrl-C" in err
        assert talk(chat, monkeypatch, "again") == 0  # the end of the input is an end too
        assert len(contents(chat)) == 5
        assert talk(chat, monkeypatch, "/reset") == 0
        assert contents(chat) == [("system", "sys")]

    def test_ctrl_c_at_the_prompt_explains_and_asks_again(self, make, monkeypatch, capsys):
        chat = make()
        assert talk(chat, monkeypatch, KeyboardInterrupt, "hello") == 0
        assert capsys.readouterr().err.count("/reset forgets") == 2
        assert len(contents(chat)) == 2

    @pytest.mark.parametrize("where", ["while writing", "while computing"])
    def test_ctrl_c_within_an_answer_keeps_what_there_is_of_it(self, make, monkeypatch, capsys, where):
        chat = make(max_tokens=60)
        full = say(make(max_tokens=60), "hello")
        count = [0]

        def interrupt_later(*_) -> None:
            count[0] += 1
            if count[0] == 8:
                raise KeyboardInterrupt

        if where == "while computing":
            hook = chat.model.embeddings.register_forward_hook(interrupt_later)
        else:
            written = io.StringIO()
            original = written.write
            written.write = lambda text: interrupt_later() or original(text)
            monkeypatch.setattr(sys, "stdout", written)
        try:
            assert talk(chat, monkeypatch, "hello", "and then?") == 0
        finally:
            if where == "while computing":
                hook.remove()
        roles, texts = zip(*contents(chat), strict=True)
        assert roles == ("user", "assistant", "user", "assistant")
        assert full.startswith(texts[1])
        assert 0 < len(texts[1]) < len(full)
        assert len(texts[3]) > 0
        assert "[stopped]" in capsys.readouterr().err

    def test_verbose_prints_the_speeds(self, make, monkeypatch, capsys):
        assert talk(make(verbose=True), monkeypatch, "hello") == 0
        assert "tokens/s" in capsys.readouterr().err


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "gpt", "generate", f"model={folder}", "interactive=true", "device=cpu", "precision=fp32", *arguments]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_in_a_real_terminal_ctrl_c_stops_the_answer_and_not_the_chat(tmp_path):
    import pty

    folder = tmp_path / "model"
    model = random_model("qwen3", vocab_size=259, context_length=4000)
    model.head.weight.data[[0, 258]] = 0  # ids that end an answer: there is always a likelier one
    model.save_pretrained(folder, chat_tokenizer())
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command(folder, "temperature=0", "max_tokens=3900"),
        stdin=terminal, stdout=terminal, stderr=terminal, cwd=tmp_path, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    seen = b""

    def until(part: bytes, beyond: int = 0) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while part not in seen[beyond:]:
            assert time.monotonic() < deadline, seen.decode(errors="replace")
            if select.select([controller], [], [], 1)[0]:
                seen += os.read(controller, 4096)

    try:
        until(b"you> ")
        os.write(controller, b"hello\n")
        until(b"hello\r\n")
        start = len(seen)
        while len(seen) < start + 40:  # the answer has begun; before it the terminal is told that what is typed is no longer edited
            seen += os.read(controller, 1)
        os.killpg(process.pid, signal.SIGINT)  # what the terminal sends to its foreground group
        until(b"[stopped]", start)
        until(b"you> ", start)
        start = len(seen)
        os.write(controller, b"again\n")
        until(b"you> ", start + 5)
        assert len(seen) > start + 10, "a second answer"
        start = len(seen)
        time.sleep(0.5)  # a signal between Python's look for one and readline's wait for keys is seen at the next key only
        os.killpg(process.pid, signal.SIGINT)
        until(b"Ctrl-D or /exit ends the chat", start)
        until(b"you> ", start)
        time.sleep(0.5)
        os.write(controller, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


@pytest.mark.parametrize(
    ("given", "turns"),
    [
        (["one", "two"], ["one", "two"]),
        (['"""one', "", '  two"""', "three"], ["one\n\n  two", "three"]),
        (['"""', "def f():", '    """Doc."""', "three"], ['def f():\n    """Doc.', "three"]),
        (['"""one"""'], ["one"]),
        (['"""one', "two"], ["one\ntwo"]),  # to the end of the input
        (['"""a\nb"""'], ['"""a\nb"""']),  # pasted: nothing of it is ours
    ],
)
def test_a_turn_is_a_line_or_what_stands_between_triple_quotes(given, turns, make, monkeypatch):
    chat, asked = make(), []
    monkeypatch.setattr(chat, "_turn", asked.append)
    assert talk(chat, monkeypatch, *given) == 0
    assert asked == turns


def test_ctrl_c_leaves_several_lines_unsaid(make, monkeypatch):
    chat, asked = make(), []
    monkeypatch.setattr(chat, "_turn", asked.append)
    assert talk(chat, monkeypatch, '"""one', "two", KeyboardInterrupt, "three") == 0
    assert asked == ["three"]


@pytest.mark.skipif(not is_gnu_readline(), reason="only GNU readline knows what is pasted")
def test_lines_that_are_pasted_together_are_one_turn(tmp_path):
    import pty

    controller, terminal = pty.openpty()
    code = "from gpt.inference.chat import edit_lines, read_turn; edit_lines(); print(repr(read_turn()))"
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
    )
    os.close(terminal)
    seen = b""
    try:
        while b"you> " not in seen:
            seen += os.read(controller, 4096)
        assert b"\x1b[?2004h" in seen, "the terminal is asked to tell what is pasted"
        os.write(controller, b"\x1b[200~one\ntwo\x1b[201~\n")
        while b"'one" not in seen:
            seen += os.read(controller, 4096)
        assert b"'one\\ntwo'" in seen
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def test_from_a_pipe(chat_folder, tmp_path):
    done = subprocess.run(
        command(chat_folder, "temperature=0", "max_tokens=5", "system=be brief", "verbose=true"),
        input="hello\n/reset\nhello\nno é\n/exit\nnever\n".encode(), capture_output=True, timeout=100, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    err = done.stderr.decode()
    assert err.count("tokens/s") >= 3
    assert "Traceback" not in err
    assert b"you>" not in done.stdout
    chat = Chat((m := load_model(str(chat_folder))).model, m.tokenizer, Sampling(0), 5, [], m.end_ids, "be brief")
    first = say(chat, "hello")
    chat.messages = chat.messages[:1]
    assert done.stdout.decode() == "".join(f"{text}\n" for text in (first, say(chat, "hello"), say(chat, "no é")))


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_not_utf8_is_refused_and_the_next_is_answered(make, monkeypatch, capsys, errors):
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhello\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", lines)
    chat = make()
    assert chat.run() == 0
    out, err = capsys.readouterr()
    assert "gpt: that is not valid UTF-8\n" in err
    assert contents(chat)[0] == ("user", "hello")
    assert out.strip("\n") == contents(chat)[1][1].strip("\n")
