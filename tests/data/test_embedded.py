import ast
import inspect
import itertools
import json
import random
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from going_on import check_going_on

from gpt.data import embedded
from gpt.data.config import SourceConfig
from gpt.data.sources import ReadReport, Row, Source, open_source
from gpt.errors import UserError

SETS = ["stdlib_docstrings", "stdlib_chats", "stdlib_packages", "stdlib_exceptions", "stdlib_tokens", "stdlib_topics"]


@cache
def source(name: str) -> Source:
    return open_source(SourceConfig(source=name), "auto")


@cache
def rows(name: str) -> list[Row]:
    return list(source(name).rows(ReadReport()))


def row(name: str, of: str) -> Row:
    (found,) = [r for r in rows(name) if r.name == of]
    return found


class TestEverySet:
    @pytest.mark.parametrize(
        ("name", "least"), [("stdlib_docstrings", 3000), ("stdlib_packages", 2000), ("stdlib_exceptions", 1800), ("stdlib_topics", 50)]
    )
    def test_is_large_enough_to_learn_from(self, name, least):
        assert len(rows(name)) > least

    @pytest.mark.parametrize("name", SETS)
    def test_names_are_unique_and_texts_are_unicode(self, name):
        some = rows(name) if name != "stdlib_tokens" else list(itertools.islice(source(name).rows(ReadReport()), 2000))
        assert len({r.name for r in some}) == len(some)
        assert all(r.place == r.name.replace(":", ", ", 1) or name == "stdlib_topics" for r in some)
        json.dumps([r.values for r in some], ensure_ascii=False).encode()

    @pytest.mark.parametrize("name", SETS)
    def test_what_it_says_of_itself(self, name):
        described = source(name).describe()
        assert described == {"source": name, "python": ".".join(map(str, sys.version_info[:3])), "licence": "PSF-2.0"}
        assert source(name).name == name
        assert source(name).fingerprint() == source(name).fingerprint()
        assert len({source(n).fingerprint() for n in SETS}) == len(SETS)

    def test_goes_on_from_anywhere(self):
        check_going_on(source("stdlib_topics"), random.Random(0))
        for name in ("stdlib_docstrings", "stdlib_tokens"):
            stream = source(name).rows(ReadReport())
            first = [next(stream).name for _ in range(30)]
            state = stream.state_dict()
            rest = [next(stream) for _ in range(30)]
            assert list(itertools.islice(source(name).rows(ReadReport(), state), 30)) == rest
            assert not {r.name for r in rest} & set(first)

    def test_is_the_same_every_time(self):
        assert list(source("stdlib_packages").rows(report := ReadReport())) == rows("stdlib_packages")
        assert report == ReadReport(files=1)

    def test_a_python_without_sources(self, tmp_path, monkeypatch):
        monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        for name in ("stdlib", "stdlib_tokens"):
            with pytest.raises(UserError, match=r"^data=stdlib: this Python has no sources in .*; give text of your own"):
                next(open_source(SourceConfig(source=name), "auto").rows(ReadReport()))


class TestChats:
    def test_three_questions_are_asked_about_a_function(self):
        messages = row("stdlib_chats", "json/decoder.py:JSONDecoder.decode").values["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * 3
        asked, called, _, parameters, _, does = (m["content"] for m in messages)
        assert asked.startswith("What is this function called?\n\ndef decode(self, s, _w=WHITESPACE.match):")
        assert (called, parameters) == ("decode.", "s and _w.")
        assert does == row("stdlib_docstrings", "json/decoder.py:JSONDecoder.decode").values["completion"]
        assert does not in asked

    @pytest.mark.parametrize(
        ("signature", "said"),
        [
            ("self", "It takes none."), ("a", "a."), ("cls, a, b=1", "a and b."), ("a, /, b, *, c", "a, b and c."),
            ("*args, key, **more", "key, *args and **more."),
        ],
    )  # fmt: skip
    def test_parameters_are_named(self, signature, said):
        (function,) = ast.parse(f"def f({signature}): pass").body
        assert embedded._parameters(function.args) == said


class TestDocstrings:
    def test_the_prompt_is_the_function_without_and_the_completion_the_first_line(self):
        found = row("stdlib_docstrings", "json/decoder.py:JSONDecoder.decode")
        source = inspect.getsource(json.JSONDecoder.decode)
        assert found.values["completion"] == (json.JSONDecoder.decode.__doc__ or "").strip().splitlines()[0]
        assert '"""' in source
        assert found.values["prompt"] == "".join(
            line.removeprefix("    ")
            for line in (source.partition('"""')[0].rstrip(" ") + source.rpartition('"""')[2].lstrip("\n")).splitlines(keepends=True)
        )
        assert found.place == "json/decoder.py, JSONDecoder.decode"

    def test_no_prompt_gives_its_completion_away(self):
        for r in rows("stdlib_docstrings"):
            prompt, completion = r.values["prompt"], r.values["completion"]
            assert prompt.endswith("\n")
            assert prompt[0] not in " \t\n"
            assert len(prompt) < 4000
            assert len(completion) >= 10
            assert completion == completion.strip()
            assert "\n" not in completion
        assert sum(r.values["completion"] in r.values["prompt"] for r in rows("stdlib_docstrings")) < 20

    def test_the_prompt_is_python_but_for_a_body_of_a_docstring_alone(self):
        def parses(prompt: str) -> bool:
            try:
                node = ast.parse(prompt).body[0]
            except SyntaxError:
                return False
            return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is None

        prompts = [r.values["prompt"] for r in rows("stdlib_docstrings")]
        assert sum(parses(p) or parses(p + "    pass\n") for p in prompts) > 0.995 * len(prompts)

    def test_docstrings_beside_code_are_left_alone(self, tmp_path, monkeypatch):
        (tmp_path / "m.py").write_text(
            'def a(): "Documented on one line."\n'
            'def b():\n    "Documented, and then code."; x = 1\n'
            "class C:\n    @property\n"
            '    def c(self):\n        """Documented well,\n        in two lines."""  # noted\n\n        return 1\n'
            '    @c.setter\n    def c(self, x):\n        """Documented as well."""\n'
            'def d():\n    "too short"\n'
            'async def e():\n    """   Documented, é.   """\n    def inner():\n        "Documented within."\n'
        )
        (tmp_path / "n.py").write_text("print 'not of this version'\n")
        monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        found = open_source(SourceConfig(source="stdlib_docstrings"), "auto").rows(ReadReport())
        assert {r.name: (r.values["prompt"], r.values["completion"]) for r in found} == {
            "m.py:C.c": ("@property\ndef c(self):\n\n    return 1\n", "Documented well,"),
            "m.py:C.c#2": ("@c.setter\ndef c(self, x):\n", "Documented as well."),
            "m.py:e": ('async def e():\n    def inner():\n        "Documented within."\n', "Documented, é."),
        }


class TestPackages:
    def test_ten_balanced_classes(self):
        counts = Counter(r.values["label"] for r in rows("stdlib_packages"))
        assert tuple(sorted(counts)) == tuple(sorted(embedded.PACKAGES))
        assert len(counts) == 10
        assert max(counts.values()) == embedded.PER_CLASS
        assert min(counts.values()) >= 60

    def test_the_text_is_a_function_of_the_package(self):
        found = row("stdlib_packages", "urllib/parse.py:urlparse")
        from urllib.parse import urlparse

        assert found.values == {"text": inspect.getsource(urlparse), "label": "urllib"}
        assert all(r.name.startswith(r.values["label"] + "/") for r in rows("stdlib_packages"))


class TestExceptions:
    def test_the_text_ends_where_the_exception_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "m.py").write_text(
            "class C:\n    @property\n    def f(self):\n        try:\n            é = self.x['é']\n"
            "        except KeyError: raise AttributeError('é') from None\n        except (TypeError, ValueError):\n            raise\n"
            "        except OSError as error:\n            raise Own from error\n        é = 'é'; raise IndexError\n"
        )
        (tmp_path / "n.py").write_text(
            "def g(x):\n    if not x:\n        raise ValueError(x)\n" + "    x += 1\n" * 70 + "    raise TypeError\n"
        )
        (tmp_path / "o.py").write_text("def g(x):\n    if not x:\n        raise TypeError(x)\n")  # what n.py has already
        monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        found = open_source(SourceConfig(source="stdlib_exceptions"), "auto").rows(ReadReport())
        start = "@property\ndef f(self):\n    try:\n        é = self.x['é']\n    except"
        caught = f"{start} KeyError: raise AttributeError('é') from None\n    except (TypeError, ValueError):\n        raise\n    except"
        assert {r.name: (r.values["text"], r.values["label"]) for r in found} == {
            "m.py:C.f@0": (start, "KeyError"),
            "m.py:C.f@1": (f"{start} KeyError: raise", "AttributeError"),
            "m.py:C.f@2": (caught, "OSError"),
            "m.py:C.f@3": (f"{caught} OSError as error:\n        raise Own from error\n    é = 'é'; raise", "IndexError"),
            "n.py:g@0": ("def g(x):\n    if not x:\n        raise", "ValueError"),
            "n.py:g@1": ("    x += 1\n" * 53 + "    raise", "TypeError"),
        }

    def test_no_text_tells_and_none_is_there_twice(self):
        some = rows("stdlib_exceptions")
        assert all(r.values["text"].endswith(("raise", "except")) and len(r.values["text"]) <= 600 for r in some)
        assert len({r.values["text"] for r in some}) == len(some)
        assert sum(r.values["label"] in r.values["text"] for r in some) < 0.3 * len(some)  # named before: a text of its own there

    def test_every_class_is_of_many_packages(self):
        packages: dict[str, set[str]] = {name: set() for name in embedded.EXCEPTIONS}
        counts = Counter(r.values["label"] for r in rows("stdlib_exceptions"))
        for r in rows("stdlib_exceptions"):
            packages[r.values["label"]].add(embedded.group_of(r.name, "package"))
        assert len(packages) == 10
        assert min(map(len, packages.values())) >= 10
        assert max(counts.values()) == embedded.PER_CLASS
        assert min(counts.values()) >= 30


class TestTokens:
    def test_every_token_has_its_kind(self, tmp_path, monkeypatch):
        (tmp_path / "m.py").write_text(
            'class C:\n    def f(self, x=1.5):\n        # note\n        if x:\n            return f"{x}" + "é"\n'
        )
        monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        (found,) = open_source(SourceConfig(source="stdlib_tokens"), "auto").rows(ReadReport())
        pairs = list(zip(found.values["tokens"], found.values["tags"], strict=True))
        assert pairs[:9] == [
            ("def", "keyword"), ("f", "name"), ("(", "operator"), ("self", "name"), (",", "operator"), ("x", "name"),
            ("=", "operator"), ("1.5", "number"), (")", "operator"),
        ]  # fmt: skip
        assert pairs[10:15] == [("# note", "comment"), ("if", "keyword"), ("x", "name"), (":", "operator"), ("return", "keyword")]
        assert pairs[-2:] == [("+", "operator"), ('"é"', "string")]

    def test_of_the_standard_library(self):
        some = list(itertools.islice(source("stdlib_tokens").rows(ReadReport()), 2000))
        assert all(len(r.values["tokens"]) == len(r.values["tags"]) > 0 for r in some)
        assert {tag for r in some for tag in r.values["tags"]} == set(embedded.TAGS)
        assert all(token.strip() for r in some for token in r.values["tokens"])


def test_topics_are_the_chapters_that_help_shows():
    from pydoc_data.topics import topics

    assert {r.name: r.values for r in rows("stdlib_topics")} == {f"pydoc_data/topics.py:{n}": {"text": t} for n, t in topics.items()}
    assert Path(rows("stdlib_topics")[0].name).parent == Path("pydoc_data")
