import bz2
import contextlib
import gzip
import lzma
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import zstandard

from gpt.data import files as data_files
from gpt.data.files import FileReader, StoredFile, fingerprint_files, list_files
from gpt.errors import UserError

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def names(*paths: Path | str) -> list[str]:
    return [f.name for f in list_files([str(p) for p in paths])]


def content(file: StoredFile, skip: int = 0) -> bytes:
    with FileReader(file) as reader:
        reader.skip(skip)
        return b"".join(iter(lambda: reader.read(1000), b""))


def the_file(path: Path | str) -> StoredFile:
    (file,) = list_files([str(path)])
    return file


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.txt", "b.md", "deep/a.txt", "deep/er/c.txt", ".hidden", ".git/config", "deep/.secret.txt"):
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"the text of {name}\n")
    return tmp_path / "tree"


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder of a remote file system."""
    memory = fsspec.filesystem("memory")
    for name in ("a.txt", "b.md", "deep/a.txt", "deep/er/c.txt.gz", ".hidden", "deep/.secret/d.txt"):
        text = f"the text of {name}\n".encode()
        memory.pipe(f"/bucket/{name}", gzip.compress(text) if name.endswith(".gz") else text)
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


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


class TestPaths:
    def test_a_file(self, tree):
        assert names(tree / "a.txt") == ["a.txt"]
        assert names(tree / ".hidden") == [".hidden"]  # whoever names it wants it
        assert the_file(tree / "a.txt").size == len("the text of a.txt\n")

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
        file = the_file(tmp_path)
        assert file.name == "caf\\xe9.txt"
        assert fingerprint_files([file])
        assert content(file) == b"one\ntwo\n"

    @pytest.mark.parametrize("pattern", ["storry.txt", "stor*.text", "sub/x.txt"])
    def test_a_path_that_matches_nothing(self, tmp_path, pattern):
        (tmp_path / "story.txt").write_text("x")
        with pytest.raises(UserError, match=r"^data\.paths: no file matches") as error:
            names(tmp_path / pattern)
        message = str(error.value)
        assert repr(str(tmp_path / pattern)) in message
        assert "\n" not in message
        if "/" not in pattern:
            assert f"looked in {tmp_path}" in message
            assert message.endswith("Did you mean story.txt?")

    def test_one_bad_path_among_good_ones_is_named(self, tree):
        with pytest.raises(UserError, match=r"'nowhere\.txt'"):
            names(tree, "nowhere.txt")

    @pytest.mark.parametrize("path", ["x" * 5000, "/dev/null", "~nobody-by-this-name/a.txt", "a\0b"])
    def test_odd_paths_match_nothing(self, path):
        with pytest.raises(UserError, match=r"^data\.paths: no file matches"):
            names(path)

    def test_an_empty_folder(self, tmp_path):
        (tmp_path / ".hidden").write_text("x")
        with pytest.raises(UserError, match="has no files in it") as error:
            names(tmp_path)
        assert str(tmp_path) in str(error.value)


class TestFilesThatCannotBeRead:
    def test_one_that_is_gone(self, tree):
        file = the_file(tree / "b.md")
        (tree / "b.md").unlink()
        for reading in (lambda: fingerprint_files([file]), lambda: content(file)):
            with pytest.raises(UserError, match=r"^data\.paths: .*b\.md cannot be read: No such file"):
                reading()

    @pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and then fails")
    def test_one_that_fails_while_it_is_read(self):
        file = the_file("/proc/self/mem")
        for reading in (lambda: fingerprint_files([file]), lambda: content(file)):
            with pytest.raises(UserError, match=r"^data\.paths: /proc/self/mem cannot be read: Input/output error"):
                reading()

    def test_one_that_may_not_be_read(self, unprivileged):
        with as_root():
            (unprivileged / "secret.txt").write_text("x")
            (unprivileged / "secret.txt").chmod(0)
        for reading in (lambda f: fingerprint_files([f]), content):
            with pytest.raises(UserError, match=r"^data\.paths: .*secret\.txt cannot be read: Permission denied"):
                reading(the_file(unprivileged))

    def test_a_folder_that_may_not_be_read(self, unprivileged):
        with as_root():
            (unprivileged / "open.txt").write_text("x")
            (unprivileged / "closed").mkdir()
            (unprivileged / "closed" / "a.txt").write_text("x")
            (unprivileged / "closed").chmod(0)
        with pytest.raises(UserError, match=r"^data\.paths: .*closed cannot be read: Permission denied"):
            names(unprivileged)
        with pytest.raises(UserError, match=r"^data\.paths: no file matches .*closed/a\.txt"):
            names(unprivileged / "closed" / "a.txt")


class TestUrls:
    def test_files_folders_and_globs(self, bucket):
        assert names(f"{bucket}/a.txt") == ["a.txt"]
        assert names(bucket) == names(f"{bucket}/") == ["a.txt", "b.md", "deep/a.txt", "deep/er/c.txt"]
        assert names(f"{bucket}/**/*.txt") == ["a.txt", "deep/.secret/d.txt", "deep/a.txt"]
        assert names(f"{bucket}/d*/a.*") == ["deep/a.txt"]
        assert names(bucket, f"{bucket}/deep/a.txt") == ["a.txt", "b.md", "deep/a.txt", "deep/er/c.txt"]

    def test_an_empty_object_in_place_of_a_folder_is_no_file(self, bucket, monkeypatch):
        """The console of S3 makes such."""
        memory = type(fsspec.filesystem("memory"))
        find = memory.find
        marker = {"/bucket/deep/": {"name": "/bucket/deep/", "size": 0, "type": "file"}}
        monkeypatch.setattr(memory, "find", lambda *a, **k: {**find(*a, **k), **marker})
        assert names(bucket) == ["a.txt", "b.md", "deep/a.txt", "deep/er/c.txt"]

    def test_a_url_beside_a_local_path(self, bucket, tree):
        assert names(bucket, tree / "deep") == ["a.txt", "a.txt", "b.md", "deep/a.txt", "deep/er/c.txt", "er/c.txt"]

    def test_what_is_read_and_where_from(self, bucket):
        files = {f.name: f for f in list_files([bucket])}
        assert content(files["deep/a.txt"]) == b"the text of deep/a.txt\n"
        assert content(files["deep/a.txt"], skip=4) == b"text of deep/a.txt\n"
        assert content(files["deep/er/c.txt"]) == b"the text of deep/er/c.txt.gz\n"
        assert files["deep/er/c.txt"].path == "memory:///bucket/deep/er/c.txt.gz"
        assert files["a.txt"].size == len("the text of a.txt\n")

    def test_the_fingerprint_changes_with_a_file(self, bucket):
        before = fingerprint_files(list_files([bucket]))
        assert fingerprint_files(list_files([bucket])) == before
        fsspec.filesystem("memory").pipe("/bucket/a.txt", b"the text of b.txt\n")
        assert fingerprint_files(list_files([bucket])) != before

    @pytest.mark.parametrize("path", ["nowhere.txt", "nowhere/*.txt", "nowhere"])
    def test_one_that_matches_nothing(self, bucket, path):
        with pytest.raises(UserError, match=rf"^data\.paths: no file matches '{bucket}/{re.escape(path)}'$"):
            names(f"{bucket}/{path}")

    def test_a_package_that_is_missing_is_named_with_its_remedy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "s3fs", None)
        with pytest.raises(UserError, match=r"^data\.paths: s3://bucket/x needs a package .*: pip install 'gpt-trainer\[s3\]'$"):
            names("s3://bucket/x")
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(UserError, match=r"^data\.paths: gs://bucket/x needs a package .*gcsfs"):
            names("gs://bucket/x")

    def test_a_protocol_that_nobody_knows(self):
        with pytest.raises(UserError, match=r"^data\.paths: nosuch://x/y cannot be read: .*nosuch"):
            names("nosuch://x/y")

    @pytest.mark.parametrize("error", [PermissionError("Access Denied"), RuntimeError("Unable to\nlocate credentials"), TimeoutError()])
    def test_what_the_other_side_refuses_is_one_sentence(self, bucket, monkeypatch, error):
        def refuse(*_, **__):
            raise error

        memory = type(fsspec.filesystem("memory"))
        files = list_files([f"{bucket}/a.txt"])
        monkeypatch.setattr(memory, "info", refuse)
        monkeypatch.setattr(memory, "_open", refuse)
        for reading in (lambda: names(f"{bucket}/a.txt"), lambda: content(files[0]), lambda: fingerprint_files(files)):
            with pytest.raises(UserError, match=r"^data\.paths: memory://.*a\.txt cannot be read: [^\n]+$"):
                reading()


class TestChannels:
    @pytest.fixture(autouse=True)
    def job(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data_files, "CHANNELS", str(tmp_path / "channels"))
        for key in [key for key in os.environ if key.startswith("SM_CHANNEL")]:
            monkeypatch.delenv(key)

    def test_the_environment_says_where_it_is(self, tree, monkeypatch):
        monkeypatch.setenv("SM_CHANNEL_TRAIN", str(tree))
        assert names("channel://train") == names(tree)
        assert names("channel://train/deep") == names(tree / "deep")
        assert names("channel://train/*.md") == ["b.md"]

    def test_else_it_is_where_sagemaker_puts_it(self, tree, tmp_path):
        shutil.copytree(tree, tmp_path / "channels" / "my-data")
        assert names("channel://my-data") == names(tree)

    def test_one_that_is_not_there(self, tree, tmp_path, monkeypatch):
        with pytest.raises(UserError, match=r"^data\.paths: there is no channel 'train' .*this machine has none"):
            names("channel://train")
        monkeypatch.setenv("SM_CHANNEL_TRAINING", str(tree))
        (tmp_path / "channels" / "test").mkdir(parents=True)
        with pytest.raises(UserError, match=r"^data\.paths: there is no channel 'train' \(.*/train\); there are: test, training$"):
            names("channel://train")

    def test_one_that_is_empty(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SM_CHANNEL_TRAIN", str(tmp_path))
        with pytest.raises(UserError, match=r"^data\.paths: the channel 'train' \(.*\) is empty; .*there are: train$"):
            names("channel://train")


class TestCompressed:
    text = b"".join(b"line %d\n" % i for i in range(50_000))

    @pytest.mark.parametrize("suffix", [*COMPRESS, ".GZ"])
    def test_are_read_as_they_are_under_their_plain_name(self, tmp_path, suffix):
        (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix.lower()](self.text))
        file = the_file(tmp_path)
        assert file.name == "a.txt"
        assert content(file) == self.text
        assert content(file, skip=300_001) == self.text[300_001:]
        assert file.size == os.path.getsize(file.path) < len(self.text)

    @pytest.mark.parametrize("suffix", COMPRESS)
    def test_one_archive_behind_another(self, tmp_path, suffix):
        """As `cat` makes them; a reader that stops behind the first would lose text without a word."""
        (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix](b"one ") + COMPRESS[suffix](b"two"))
        assert content(the_file(tmp_path)) == b"one two"

    @pytest.mark.parametrize("suffix", COMPRESS)
    def test_one_that_is_cut_off_or_damaged_is_named(self, tmp_path, suffix):
        whole = COMPRESS[suffix](os.urandom(20_000))
        path = tmp_path / f"a.txt{suffix}"
        for broken in (whole[:-100], whole[: len(whole) // 2], b"no archive at all\n" * 9, whole[:50] + b"\xff" * 200 + whole[250:]):
            path.write_bytes(broken)
            with pytest.raises(UserError, match=rf"^data\.paths: {re.escape(str(path))} is damaged or cut off, as \{suffix} [^\n]+$"):
                content(the_file(path))

    def test_a_suffix_alone_is_a_name(self, tmp_path):
        (tmp_path / ".gz").write_text("plain")
        assert content(the_file(tmp_path / ".gz")) == b"plain"


class TestFingerprint:
    def test_is_of_names_and_contents_not_of_the_place(self, tree, tmp_path):
        before = fingerprint_files(list_files([str(tree)]))
        shutil.copytree(tree, tmp_path / "elsewhere" / "copy")
        os.utime(tmp_path / "elsewhere" / "copy" / "a.txt", (1, 1))
        assert fingerprint_files(list_files([str(tmp_path / "elsewhere" / "copy")])) == before
        (tree / "a.txt").write_text("the text of b.txt\n")
        changed = fingerprint_files(list_files([str(tree)]))
        (tree / "a.txt").rename(tree / "aa.txt")
        assert len({before, changed, fingerprint_files(list_files([str(tree)]))}) == 3

    def test_large_files_count_by_size_and_time(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data_files, "HASHED_BYTES", 10)
        path = tmp_path / "large.txt"
        path.write_text("x" * 11)
        before = fingerprint_files([the_file(path)])
        path.write_text("x" * 12)
        os.utime(path, ns=(5, 5))
        changed = fingerprint_files([the_file(path)])
        os.utime(path, ns=(6, 6))
        assert len({before, changed, fingerprint_files([the_file(path)])}) == 3
