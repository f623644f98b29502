import json
import os

from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.data.deduplication import SeenDocuments
from gpt.data.sources import Row


def row(text: str, piece: int = 0) -> Row:
    return Row("n", "p", {"text": text}, piece)


@given(st.lists(st.text(max_size=3)))
def test_the_first_of_each_is_new(tmp_path_factory, texts):
    seen = SeenDocuments(tmp_path_factory.mktemp("seen") / "seen.sqlite")
    kept = [text for text in texts if seen.is_new(row(text), 0)]
    assert kept == list(dict.fromkeys(texts))
    seen.close()


@settings(max_examples=40)
@given(st.lists(st.sampled_from("abcde"), max_size=12), st.integers(0, 12), st.integers(0, 12))
def test_after_a_kill_what_came_behind_the_commit_is_forgotten(tmp_path_factory, texts, committed, read):
    """Batches of one document: those up to `committed` are safely written, those up to `read` were seen and perhaps stored."""
    path = tmp_path_factory.mktemp("seen") / "seen.sqlite"
    seen = SeenDocuments(path)
    kept = [text for number, text in enumerate(texts[:committed]) if seen.is_new(row(text), number)]
    state = json.loads(json.dumps(seen.state_dict()))
    for number, text in enumerate(texts[committed : committed + read]):
        seen.is_new(row(text), committed + number)
    seen.commit()
    seen.close()
    after = SeenDocuments(path, committed - 1)
    after.load_state_dict(state)
    kept += [text for number, text in enumerate(texts[committed:]) if after.is_new(row(text), committed + number)]
    assert kept == list(dict.fromkeys(texts))
    after.close()


def test_what_was_not_committed_is_not_there(tmp_path):
    seen = SeenDocuments(tmp_path / "seen.sqlite")
    assert seen.is_new(row("a"), 0)
    seen.commit()
    assert seen.is_new(row("b"), 1)
    seen.close()
    again = SeenDocuments(tmp_path / "seen.sqlite", 5)
    assert not again.is_new(row("a"), 6)
    assert again.is_new(row("b"), 6)
    again.close()


def test_pieces_of_a_large_text_count_with_what_is_before_them(tmp_path):
    seen = SeenDocuments(tmp_path / "seen.sqlite")
    assert [seen.is_new(row(t, i), 0) for i, t in enumerate("abc")] == [True, True, True]
    assert [seen.is_new(row(t, i), 0) for i, t in enumerate("abc")] == [False, False, False]  # the same text
    assert [seen.is_new(row(t, i), 0) for i, t in enumerate("xbc")] == [True, True, True]  # the same only in part
    state = seen.state_dict()
    assert seen.is_new(row("d", 3), 0)
    seen.load_state_dict(state)
    assert not seen.is_new(row("d", 3), 0)
    seen.close()


def test_examples_are_the_same_if_all_their_fields_are(tmp_path):
    seen = SeenDocuments(tmp_path / "seen.sqlite")
    assert seen.is_new(Row("1", "", {"prompt": "a", "completion": "b"}), 0)
    assert not seen.is_new(Row("2", "", {"completion": "b", "prompt": "a"}), 0)
    assert seen.is_new(Row("3", "", {"prompt": "a", "completion": "c"}), 0)
    seen.close()


def test_the_table_is_small_and_on_disk(tmp_path):
    seen = SeenDocuments(tmp_path / "seen.sqlite")
    for number in range(20_000):
        assert seen.is_new(row(f"a text of some length {number} " * 20), number)
    seen.commit()
    assert os.path.getsize(tmp_path / "seen.sqlite") < 60 * 20_000
    seen.close()
