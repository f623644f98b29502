import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from gpt.data.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from gpt.errors import UserError

TRICKY = st.text(alphabet=st.sampled_from("ab'sS ſ\t\n\r\v\0\x85\u00a0\u200d\u2028é字🙂👩\u0301१1²<|>endoftx_-"), max_size=40)
TEXTS = st.one_of(st.text(max_size=60), TRICKY)


@pytest.fixture(scope="module")
def trained(stdlib_files: list[Path]) -> Tokenizer:
    texts = [p.read_text(encoding="utf-8") for p in stdlib_files[::4]]
    return train_bpe(texts, 1024)


@pytest.fixture(scope="module")
def fast(trained: Tokenizer, stdlib_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(folder / "tokenizer.json")
    return load_tokenizer(folder, check=stdlib_files[0].read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["bpe", "fast", "byte"])
def tokenizer(request: pytest.FixtureRequest, trained: Tokenizer, fast: Tokenizer) -> Tokenizer:
    return {"bpe": trained, "fast": fast, "byte": byte_tokenizer()}[request.param]


@given(text=TEXTS)
@example(text="")
@example(text="\ufffd\ufeff\x00\x1b[0m\r\n\r\n \U0010ffff👩‍👩‍👧‍👦")
def test_any_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text])[0].tolist() == ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_bpe_shortens_code(trained, stdlib_files):
    text = stdlib_files[1].read_text(encoding="utf-8")
    assert len(trained.encode(text)) < len(text.encode()) * 0.6


class TestFastPath:
    def test_is_taken(self, trained, fast):
        assert fast.is_fast
        assert not trained.is_fast  # no text to check it on

    def test_same_ids_on_files_it_was_not_trained_on(self, trained, fast, stdlib_files):
        texts = [p.read_text(encoding="utf-8") for i, p in enumerate(stdlib_files) if i % 4]
        assert len(texts) > 50
        for text, fast_ids, ids in zip(texts, fast.encode_batch(texts), trained.encode_batch(texts), strict=True):
            assert np.array_equal(fast_ids, ids), text[:80]

    @given(text=TEXTS)
    def test_same_ids_on_any_text(self, trained, fast, text):
        assert fast.encode(text) == trained.encode(text)

    def test_same_ids_for_every_kind_of_character(self, tmp_path):
        """A vocabulary that merges each character with its neighbours shows where the two regex engines cut differently."""
        letters = [chr(c) for c in range(0, 0x30000, 97) if not 0xD800 <= c < 0xE000]
        lines = [f"a{c}b {c} {c}{c}1{c}\n {c}'s" for c in letters]
        tokenizer = train_bpe(lines, 6000)
        tokenizer.save(tmp_path / "tokenizer.json")
        fast = load_tokenizer(tmp_path, check=lines[0])
        assert fast.is_fast
        differing = [c for c, line in zip(letters, lines, strict=True) if fast.encode(line) != tokenizer.encode(line)]
        assert differing == []

    def test_a_run_of_blanks_too_long_for_its_regex_engine(self, trained, fast):
        blanks = "x" + " " * 1_100_000
        with pytest.raises(ValueError, match="stack"):
            fast._fast.encode_to_numpy(blanks)
        assert fast.encode(blanks) == trained.encode(blanks)

    @pytest.mark.parametrize("change", ["pattern", "added token", "normalizer"])
    def test_is_not_taken_for_a_tokenizer_that_cuts_otherwise(self, trained, tmp_path, change):
        from tokenizers import AddedToken, normalizers

        backend = HFTokenizer.from_str(trained.backend.to_str())
        if change == "pattern":
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(" "), "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
        elif change == "added token":
            backend.add_tokens([AddedToken("<think>", special=False)])
        else:
            backend.normalizer = normalizers.NFC()
        backend.save(str(tmp_path / "tokenizer.json"))
        changed = load_tokenizer(tmp_path, check="text")
        assert not changed.is_fast
        text = "e\u0301 <think> so"
        assert changed.encode(text) == backend.encode(text).ids

    def test_is_not_taken_where_the_check_finds_other_ids(self, tmp_path):
        backend = byte_tokenizer().backend
        vocab = backend.get_vocab() | {"bc": 257, "ab": 258}
        backend.model = models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "c")])  # tiktoken takes the lower id first: bc
        backend.save(str(tmp_path / "tokenizer.json"))
        loaded = load_tokenizer(tmp_path, check="abc")
        assert not loaded.is_fast
        assert loaded.encode("abc") == [258, vocab["c"]]


def test_special_tokens_in_a_text_are_text(tokenizer):
    text = f"a {END_OF_TEXT} b{END_OF_TEXT}"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text is not None
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in tokenizer.encode_batch([text])[0]
    assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT


@given(text=TEXTS)
def test_byte_lengths_add_up_to_the_text(tokenizer, text):
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[tokenizer.end_of_text] == 0


def test_byte_lengths_of_a_sentencepiece_tokenizer(sentencepiece_tokenizer):
    text = "a bab ba €ba"
    ids = sentencepiece_tokenizer.encode(text)
    assert sentencepiece_tokenizer.decode(ids) == text
    assert sentencepiece_tokenizer.byte_lengths()[ids].sum() == len(text.encode()) + 1  # it puts a space before every text


def test_ids_with_gaps_and_tokens_that_were_added():
    backend = HFTokenizer(models.BPE(vocab={"a": 0, "b": 7}, merges=[]))
    tokenizer = Tokenizer(backend)
    assert tokenizer.vocab_size == 8  # an embedding needs a row for id 7
    assert tokenizer.byte_lengths().tolist() == [1, 0, 0, 0, 0, 0, 0, 1]
    backend.add_tokens(["é!"])
    assert Tokenizer(backend).byte_lengths()[backend.token_to_id("é!")] == 3


def test_truncation_and_padding_in_the_file_do_not_apply(trained, tmp_path):
    backend = HFTokenizer.from_str(trained.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "def f(x): return x"
    assert load_tokenizer(tmp_path).encode(text) == trained.encode(text)


class TestTraining:
    def test_has_the_size_asked_for(self, trained, fast):
        assert trained.vocab_size == fast.vocab_size == 1024
        assert trained.end_of_text == 0

    def test_more_than_the_text_allows(self):
        texts = ["the cat sat on the mat, the cat sat"] * 3
        with pytest.raises(UserError, match=r"^tokenizer\.vocab_size=5000 is more than this text allows") as error:
            train_bpe(texts, 5000)
        most = int(re.findall(r"at most (\d+)", str(error.value))[0])
        assert train_bpe(texts, most).vocab_size == most
        with pytest.raises(UserError):
            train_bpe(texts, most + 1)

    def test_257_are_the_least(self):
        with pytest.raises(UserError, match=r"^tokenizer\.vocab_size=256 must be at least 257"):
            train_bpe(["some text"], 256)
        assert train_bpe(["some text"], 257).decode(train_bpe(["some text"], 257).encode("né")) == "né"

    def test_same_text_same_tokenizer(self, stdlib_files):
        texts = [stdlib_files[0].read_text(encoding="utf-8")]
        first, second, other = train_bpe(texts, 400), train_bpe(texts, 400), train_bpe(texts, 401)
        assert first.fingerprint() == second.fingerprint() != other.fingerprint()


def test_the_byte_tokenizer_has_an_id_a_byte():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 257
    text = "aé🙂"
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert sorted(tokenizer.byte_lengths()) == [0] + [1] * 256


class TestFiles:
    def test_saved_and_loaded_it_is_the_same(self, trained, tmp_path):
        trained.save(tmp_path / "tokenizer.json")
        for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
            assert load_tokenizer(path).fingerprint() == trained.fingerprint()

    def test_home_is_expanded(self, trained, tmp_path, monkeypatch):
        trained.save(tmp_path / "tokenizer.json")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert load_tokenizer("~").vocab_size == 1024

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_is_an_oserror(self, trained):
        with pytest.raises(OSError, match="No space left"):
            trained.save(Path("/dev/full"))

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("missing.json", None, "no tokenizer at"),
            ("garbage.json", b"{nope", "is not a tokenizer file"),
            ("binary.json", b"\xff\xfe\0\0", "is not a tokenizer file"),
            ("empty.json", b"", "is not a tokenizer file"),
            ("other.json", b'{"model_type": "gpt2"}', "is not a tokenizer file"),
            ("", None, "no tokenizer at"),
        ],
    )
    def test_a_file_that_is_none(self, tmp_path, name, content, says):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=says) as error:
            load_tokenizer(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("hub_id", ["gpt2", "Qwen/Qwen2.5-0.5B", "a/b/c", "no such thing!", "..", "~nobody-by-this-name/x"])
    def test_a_hub_id_without_the_hub(self, hub_id):
        with pytest.raises(UserError, match="tokenizer") as error:
            load_tokenizer(hub_id)
        assert hub_id in str(error.value)
        assert "\n" not in str(error.value)
        if "Qwen" in hub_id:
            assert "Hugging Face hub" in str(error.value)  # the dot makes it no file name


@settings(max_examples=20)
@given(text=TEXTS)
def test_the_transformers_tokenizer_has_the_same_ids(trained, text):
    converted = trained.to_transformers(128)
    assert converted.encode(text, add_special_tokens=False) == trained.encode(text) or END_OF_TEXT in text
    assert converted.decode(trained.encode(text)) == text


def test_the_transformers_tokenizer_loads_from_its_folder(trained, tmp_path, stdlib_files):
    from transformers import AutoTokenizer

    trained.to_transformers(128).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = stdlib_files[2].read_text(encoding="utf-8")
    assert loaded.encode(text) == trained.encode(text)
    assert (loaded.eos_token_id, loaded.model_max_length) == (trained.end_of_text, 128)
    assert trained.end_of_text not in trained.encode(END_OF_TEXT)  # making it changed nothing here


CHATML = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TestPrompts:
    """What a tokenizer itself puts around a text: `encode_prompt` takes what comes before, never what comes after."""

    def around(self, trained: Tokenizer, single: str) -> Tokenizer:
        from tokenizers import processors

        backend = HFTokenizer.from_str(trained.backend.to_str())
        backend.add_special_tokens(["<|begin_of_text|>", "<|eot|>"])
        names = [(name, backend.token_to_id(name)) for name in ("<|begin_of_text|>", "<|eot|>")]
        template = processors.TemplateProcessing(single=single, special_tokens=names)
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])  # as in Llama 3
        return Tokenizer(backend)

    @pytest.mark.parametrize("text", ["def f(x):", "", " ", "\n", "é🙂", "<|begin_of_text|>", "a<|eot|>", "<|endoftext|>x"])
    @pytest.mark.parametrize(
        ("single", "before"),
        [
            ("$A", []),
            ("<|begin_of_text|> $A", ["<|begin_of_text|>"]),
            ("<|begin_of_text|> $A <|eot|>", ["<|begin_of_text|>"]),
            ("$A <|eot|>", []),
            ("<|eot|> <|begin_of_text|> $A <|eot|>", ["<|eot|>", "<|begin_of_text|>"]),
        ],
    )
    def test_what_comes_before_a_text_and_nothing_after(self, trained, single, before, text):
        tokenizer = self.around(trained, single)
        assert tokenizer.encode_prompt(text) == [tokenizer.backend.token_to_id(name) for name in before] + tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text  # marks in a prompt are text
        assert not {tokenizer.backend.token_to_id(name) for name in ("<|begin_of_text|>", "<|eot|>")} & {*tokenizer.encode(text)}

    def test_a_tokenizer_that_adds_nothing(self, tokenizer, sentencepiece_tokenizer):
        for one in (tokenizer, sentencepiece_tokenizer):
            assert one.encode_prompt("a b") == one.encode("a b")
            assert one.encode_prompt("") == []


class TestChat:
    CHAT = (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "é🙂 <|im_end|> x"},
        {"role": "assistant", "content": ""},
    )

    @pytest.fixture
    def folder(self, trained: Tokenizer, tmp_path: Path) -> Path:
        from transformers import PreTrainedTokenizerFast

        backend = HFTokenizer.from_str(trained.backend.to_str())
        backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
        names = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
        PreTrainedTokenizerFast(tokenizer_object=backend, **names, chat_template=CHATML).save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("place", ["file of its own", "tokenizer_config.json", "list by name"])
    def test_the_ids_are_those_of_transformers(self, folder, place):
        import json

        from transformers import AutoTokenizer

        config = folder / "tokenizer_config.json"
        if place != "file of its own":
            (folder / "chat_template.jinja").unlink()
            named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
            values = json.loads(config.read_text()) | {"chat_template": named if place == "list by name" else CHATML}
            config.write_text(json.dumps(values))
        assert ("chat_template" in json.loads(config.read_text())) == (place != "file of its own")
        ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        assert ours.chat_template == CHATML
        assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
        for count in (1, 2, 3):
            expected = theirs.apply_chat_template(list(self.CHAT[:count]), tokenize=True, add_generation_prompt=True, return_dict=False)
            assert ours.encode_chat(self.CHAT[:count]) == expected
        assert expected[0] == ours.backend.token_to_id("<s>")
        assert ours.backend.token_to_id("<|im_end|>") not in ours.encode("<|im_end|>")  # a text's marks are text again

    def test_what_the_template_refuses_is_one_sentence(self, folder):
        with pytest.raises(UserError, match=r"^the tokenizer's chat template refuses the conversation: Unknown role$"):
            load_tokenizer(folder).encode_chat([{"role": "tool", "content": "x"}])

    def test_a_template_that_is_not_jinja(self, folder):
        (folder / "chat_template.jinja").write_text("{% for message in %}")
        with pytest.raises(UserError, match=r"^the tokenizer's chat template refuses the conversation: \S.*$"):
            load_tokenizer(folder).encode_chat(self.CHAT)

    def test_special_tokens_as_older_files_write_them_and_a_config_that_is_not_json(self, folder):
        import json

        config = folder / "tokenizer_config.json"
        values = json.loads(config.read_text()) | {"bos_token": {"content": "<s>", "lstrip": False}, "pad_token": "<not there>"}
        config.write_text(json.dumps(values))
        assert load_tokenizer(folder).special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
        config.write_text("{nope")
        with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON: .*; copy it again$"):
            load_tokenizer(folder)

    def test_without_one_there_is_none(self, trained, tmp_path):
        trained.save(tmp_path / "tokenizer.json")
        assert load_tokenizer(tmp_path).chat_template is None
