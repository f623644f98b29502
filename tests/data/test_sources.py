import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import DataConfig
from gpt.data.sources import Document, ReadReport, find_files, fingerprint, read_documents
from gpt.errors import UserError


def text_of(*paths: Path | str, **settings) -> DataConfig:
    return DataConfig(source="text", paths=[str(p) for p in paths], **settings)


def read(*paths: Path | str, **settings) -> tuple[list[Document], ReadReport]:
    config, report = text_of(*paths, **settings), ReadReport()
    return read_documents(find_files(config), config, report), report


def names(*paths: Path | str) -> list[str]:
    return [f.name for f in find_files(text_of(*paths))]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.txt", "b.md", "deep/a.txt", "deep/er/c.txt", ".hidden", ".git/config", "deep/.secret.txt"):
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"the text of {name}\n")
    return tmp_path / "tree"


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of our own that the test then sees as a user who is not root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(folder)


@contextlib.contextmanager
def as_root() -> Iterator[None]:
    user = os.geteuid()
    os.seteuid(os.getuid())
    yield
    os.seteuid(user)


class TestStdlib:
    def test_is_about_twelve_megabytes_of_python_without_tests(self):
        files = find_files(DataConfig())
        assert 5e6 < sum(f.path.stat().st_size for f in files) < 30e6
        assert all(f.name.endswith(".py") for f in files)
        folders = {part for f in files for part in f.name.split("/")[:-1]}
        assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
        assert {"json", "asyncio", "email"} <= folders
        assert {"os.py", "json/decoder.py"} <= {f.name for f in files}

    def test_is_sorted_and_the_same_every_time(self):
        files = find_files(DataConfig())
        assert [f.name for f in files] == sorted({f.name for f in files})
        assert find_files(DataConfig()) == files
        assert fingerprint(files) == fingerprint(find_files(DataConfig()))

    def test_both_sides_have_their_share(self):
        config, report = DataConfig(holdout=0.05), ReadReport()
        documents = read_documents(find_files(config), config, report)
        assert 0.03 < sum(d.held_out for d in documents) / len(documents) < 0.08
        held_out = sum(len(d.text) for d in documents if d.held_out)
        assert 0.01 < held_out / sum(len(d.text) for d in documents) < 0.2  # the files differ much in length
        assert report.files == len(documents) > 300
        assert not report.split_within_files


class TestPaths:
    def test_a_file(self, tree):
        assert names(tree / "a.txt") == ["a.txt"]
        assert names(tree / ".hidden") == [".hidden"]  # whoever names it wants it

    def test_a_folder_is_every_file_below_it_that_is_not_hidden(self, tree):
        assert names(tree) == ["a.txt", "b.md", "deep/a.txt", "deep/er/c.txt"]

    def test_globs(self, tree):
        assert names(f"{tree}/*.txt") == ["a.txt"]
        assert names(f"{tree}/**/*.txt") == ["a.txt", "deep/a.txt", "deep/er/c.txt"]
        assert names(f"{tree}/d*/?.txt") == ["deep/a.txt"]
        assert names(f"{tree}/[ab].*") == ["a.txt", "b.md"]

    def test_the_order_is_that_of_the_names(self, tree):
        assert names(tree / "deep" / "er", tree / "b.md", tree / "a.txt") == ["a.txt", "b.md", "c.txt"]

    def test_a_name_with_the_characters_of_a_glob(self, tmp_path):
        for name in ("a[1].txt", "a1.txt"):
            (tmp_path / name).write_text("x")
        assert names(tmp_path / "a[1].txt") == ["a[1].txt"]

    def test_names_do_not_depend_on_where_one_stands(self, tree, monkeypatch):
        there = names(f"{tree}/**/*.txt")
        monkeypatch.chdir(tree / "deep")
        assert names("../**/*.txt") == there
        assert names("er/*.txt") == names("er") == names("er/c.txt") == ["c.txt"]
        monkeypatch.setenv("HOME", str(tree))
        assert names("~/**/*.txt") == there
        assert names("~") == names(tree)

    def test_no_file_is_read_twice(self, tree):
        assert len(names(tree, tree / "a.txt", f"{tree}/*.txt", tree / "deep" / ".." / "a.txt")) == 4

    def test_a_name_that_is_not_utf8(self, tmp_path):
        path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
        try:
            Path(os.fsdecode(path)).write_text("one\ntwo\n")
        except OSError:
            pytest.skip("this file system takes only UTF-8 names")
        files = find_files(text_of(tmp_path))
        assert [f.name for f in files] == ["caf\\xe9.txt"]
        assert fingerprint(files)
        documents, _ = read(tmp_path)
        assert "".join(d.text for d in documents) == "one\ntwo\n"

    @pytest.mark.parametrize("pattern", ["storry.txt", "stor*.text", "sub/x.txt"])
    def test_a_path_that_matches_nothing(self, tmp_path, pattern):
        (tmp_path / "story.txt").write_text("x")
        with pytest.raises(UserError, match=r"^data\.paths: no file matches") as error:
            find_files(text_of(tmp_path / pattern))
        message = str(error.value)
        assert repr(str(tmp_path / pattern)) in message
        assert "\n" not in message
        if "/" not in pattern:
            assert f"looked in {tmp_path}" in message
            assert message.endswith("Did you mean story.txt?")

    def test_one_bad_path_among_good_ones_is_named(self, tree):
        with pytest.raises(UserError, match=r"'nowhere\.txt'"):
            find_files(text_of(tree, "nowhere.txt"))

    @pytest.mark.parametrize("path", ["x" * 5000, "/dev/null", "~nobody-by-this-name/a.txt", "a\0b"])
    def test_odd_paths_match_nothing(self, path):
        with pytest.raises(UserError, match=r"^data\.paths: no file matches"):
            find_files(text_of(path))

    def test_an_empty_folder(self, tmp_path):
        (tmp_path / ".hidden").write_text("x")
        with pytest.raises(UserError, match="has no files in it") as error:
            find_files(text_of(tmp_path))
        assert str(tmp_path) in str(error.value)


class TestReading:
    def test_empty_files_are_counted_and_left_out(self, tmp_path):
        for name, text in (("a.txt", ""), ("b.txt", " \n\t\n"), ("c.txt", "text\nmore\n")):
            (tmp_path / name).write_text(text)
        documents, report = read(tmp_path)
        assert {d.name.removesuffix(" (end)") for d in documents} == {"c.txt"}
        assert (report.empty_files, report.files) == (2, 1)

    def test_a_binary_file_is_left_out_and_said(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\0\0\0\rIHDR")
        (tmp_path / "b.txt").write_text("text\nmore\n")
        documents, report = read(tmp_path)
        assert "".join(d.text for d in documents) == "text\nmore\n"
        assert report.binary_files == ["a.png"]
        assert any("1 binary files were left out, e.g. a.png" in w for w in report.warnings())

    def test_a_binary_file_is_refused_if_asked(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\0")
        with pytest.raises(UserError, match=r"a\.png is a binary file .*data\.on_error=skip"):
            read(tmp_path, on_error="raise")

    def test_invalid_utf8_is_replaced_and_counted(self, tmp_path):
        (tmp_path / "latin.txt").write_bytes("déjà vu, ".encode("latin-1") + "a real \ufffd\n".encode())
        documents, report = read(tmp_path)
        assert "".join(d.text for d in documents) == "d\ufffdj\ufffd vu, a real \ufffd\n"
        assert report.invalid_utf8 == {"latin.txt": 2}
        assert any("1 files, 2 characters replaced, most in latin.txt" in w for w in report.warnings())

    def test_invalid_utf8_is_refused_if_asked(self, tmp_path):
        (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
        with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 at byte 1 .*data\.on_error=skip"):
            read(tmp_path, on_error="raise")

    def test_a_file_that_is_gone(self, tree):
        files = find_files(text_of(tree))
        (tree / "b.md").unlink()
        for reading in (lambda: fingerprint(files), lambda: read_documents(files, text_of(tree), ReadReport())):
            with pytest.raises(UserError, match=r"^data\.paths: .*b\.md cannot be read: No such file"):
                reading()

    @pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and then fails")
    def test_a_file_that_fails_while_it_is_read(self):
        files = find_files(text_of("/proc/self/mem"))
        for reading in (lambda: fingerprint(files), lambda: read_documents(files, text_of(), ReadReport())):
            with pytest.raises(UserError, match=r"^data\.paths: /proc/self/mem cannot be read: Input/output error"):
                reading()

    def test_a_file_that_may_not_be_read(self, unprivileged):
        with as_root():
            (unprivileged / "secret.txt").write_text("x")
            (unprivileged / "secret.txt").chmod(0)
        with pytest.raises(UserError, match=r"^data\.paths: .*secret\.txt cannot be read: Permission denied"):
            read(unprivileged)

    def test_a_folder_that_may_not_be_read(self, unprivileged):
        with as_root():
            (unprivileged / "open.txt").write_text("x")
            (unprivileged / "closed").mkdir()
            (unprivileged / "closed" / "a.txt").write_text("x")
            (unprivileged / "closed").chmod(0)
        with pytest.raises(UserError, match=r"^data\.paths: .*closed cannot be read: Permission denied"):
            find_files(text_of(unprivileged))
        with pytest.raises(UserError, match=r"^data\.paths: no file matches .*closed/a\.txt"):
            find_files(text_of(unprivileged / "closed" / "a.txt"))

    @given(
        contents=st.lists(st.one_of(st.binary(max_size=80), st.text(max_size=40).map(str.encode)), min_size=1, max_size=4),
        holdout=st.floats(0.001, 0.999),
    )
    def test_any_bytes_are_read_or_refused_in_a_sentence(self, contents, holdout):
        with tempfile.TemporaryDirectory() as folder:
            for number, content in enumerate(contents):
                Path(folder, f"{number}.bin").write_bytes(content)
            documents, report = read(folder, holdout=holdout)
            kept = [c.decode("utf-8", "replace") for c in contents if c.strip() and b"\0" not in c]
            assert "".join(d.text for d in documents) == "".join(kept)
            assert all(d.text for d in documents)
            assert report.files == len(kept)
            assert len(report.binary_files) + report.empty_files + report.files == len(contents)
            assert all(count > 0 for count in report.invalid_utf8.values())
            if report.binary_files or report.invalid_utf8:
                with pytest.raises(UserError, match=r"\A[^\n]* is (a binary file|not UTF-8 at byte)[^\n]*\Z"):
                    read(folder, holdout=holdout, on_error="raise")
            else:
                assert read(folder, holdout=holdout, on_error="raise") == (documents, report)


class TestSplit:
    @pytest.fixture
    def many(self, tmp_path):
        for number in range(400):
            (tmp_path / f"{number}.txt").write_text(f"file {number}\n")
        return tmp_path

    def sides(self, folder: Path, **settings) -> dict[str, bool]:
        return {d.name: d.held_out for d in read(folder, **settings)[0]}

    def test_many_files_are_split_whole_and_near_the_share(self, many):
        sides = self.sides(many, holdout=0.1)
        assert len(sides) == 400
        assert 0.05 < sum(sides.values()) / 400 < 0.15
        assert sum(self.sides(many, holdout=0.3).values()) > sum(sides.values())

    def test_adding_a_file_moves_no_other(self, many):
        before = self.sides(many, holdout=0.1)
        for number in range(400, 500):
            (many / f"{number}.txt").write_text("new\n")
        after = self.sides(many, holdout=0.1)
        assert {name: after[name] for name in before} == before
        assert len(after) == 500

    def test_the_same_on_another_machine(self, many, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
        shutil.copytree(many, elsewhere)
        sides = self.sides(elsewhere, holdout=0.1)
        assert sides == self.sides(many, holdout=0.1)
        below_100 = [int(name.removesuffix(".txt")) for name, held_out in sides.items() if held_out and len(name) == 6]
        assert below_100 == [32, 49, 60]  # nor may another version of ours move any
        assert fingerprint(find_files(text_of(elsewhere))) == fingerprint(find_files(text_of(many)))

    def test_few_files_are_cut_at_a_line_near_the_end(self, corpus):
        documents, report = read(corpus, holdout=0.1)
        assert report.split_within_files
        assert "only 40 files: the end of each is held out, not whole files" in report.warnings()
        for file in find_files(text_of(corpus)):
            parts = {d.held_out: d.text for d in documents if d.name.removesuffix(" (end)") == file.name}
            assert parts[False].endswith("\n")
            assert parts[False] + parts[True] == file.path.read_text(encoding="utf-8")
        share = sum(len(d.text) for d in documents if d.held_out) / sum(len(d.text) for d in documents)
        assert 0.07 < share < 0.1

    @pytest.mark.parametrize("count", [1, 2, 20, 25, 60])
    def test_both_sides_have_text_however_few_the_files(self, tmp_path, count):
        """By chance alone, one corpus of 25 files in four would hold out nothing at 5%."""
        for number in range(count):
            (tmp_path / f"{number}.txt").write_text("some text\n" * 100)
        for number in range(300):
            (tmp_path / f"{number}.png").write_bytes(b"\0")  # they are no reason to split by file
        documents, _ = read(tmp_path)
        assert {d.held_out for d in documents} == {False, True}

    def test_a_text_of_one_line(self, tmp_path):
        (tmp_path / "a.txt").write_text("x" * 1000)
        documents, _ = read(tmp_path, holdout=0.1)
        assert [len(d.text) for d in documents] == [900, 100]

    def test_the_fingerprint_is_of_names_and_contents(self, tree):
        before = fingerprint(find_files(text_of(tree)))
        (tree / "a.txt").write_text("the text of b.txt\n")
        changed = fingerprint(find_files(text_of(tree)))
        (tree / "a.txt").rename(tree / "aa.txt")
        assert len({before, changed, fingerprint(find_files(text_of(tree)))}) == 3
