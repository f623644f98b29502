"""Where the weights come from: the hub, pickled files, safetensors; and how much memory reading them takes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_models import OURS, logits, make_ours, make_stock, tokens_for
from torch import nn

from gpt import GPT, GPTConfig
from gpt.model import huggingface
from gpt.model.weight_files import find_checkpoint

ROOT = Path(__file__).parents[2]

# The hub


def test_what_is_neither_here_nor_at_the_hub(monkeypatch):
    import huggingface_hub

    def unreachable(repo, allow_patterns, ignore_patterns):
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"no directory 'someone/something' in .* hub: no connection$"):
        GPT.from_pretrained("someone/something")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        GPT.from_pretrained("someone/something")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose one repository is the folder returned; what is downloaded lands in another."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    repository, snapshot = tmp_path / "repository", tmp_path / "snapshot"
    repository.mkdir()

    def snapshot_download(repo, allow_patterns, ignore_patterns):
        assert repo == "someone/something"
        files = [str(f.relative_to(repository)) for f in repository.rglob("*") if f.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repository


BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def test_a_hub_id_is_downloaded_with_its_tokenizer(saved, hub):
    shutil.copytree(saved["llama"], hub, dirs_exist_ok=True)
    (hub / "original").mkdir()
    others = ("README.md", "pytorch_model.bin", "flax_model.msgpack", "original/model.safetensors", "original/tokenizer.model", "code.py")
    for name in (*BESIDE, *others):
        (hub / name).write_text("{}")
    for allow_pickle in (False, True):  # there are safetensors: nothing pickled is fetched
        found = find_checkpoint("someone/something", allow_pickle)
        assert {str(f.relative_to(found)) for f in found.rglob("*")} == {"config.json", "model.safetensors", *BESIDE}
    assert GPT.from_pretrained("someone/something").config.stock_architecture() == "Llama"


def test_pickles_are_downloaded_only_when_asked_for(pickled, hub):
    shutil.copytree(pickled("gpt2"), hub, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor .* only with allow_pickle=true"):
        GPT.from_pretrained("someone/something")
    assert GPT.from_pretrained("someone/something", allow_pickle=True).config.n_layer == 2


# Pickles


@pytest.fixture
def pickled(spoiled):
    """A checkpoint whose weights are pickled, in one file or in two."""

    def make(name: str, sharded: bool = False, **kwargs) -> Path:
        directory = spoiled(name)
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        if not sharded:
            torch.save(tensors, directory / "pytorch_model.bin", **kwargs)
            return directory
        weight_map = {key: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(tensors)}
        for file in set(weight_map.values()):
            torch.save({key: t for key, t in tensors.items() if weight_map[key] == file}, directory / file, **kwargs)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory

    return make


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox-partial"])
def test_pickles_are_read_only_when_asked_for(name, sharded, pickled, saved):
    directory = pickled(name, sharded)
    index = ".index.json" if sharded else ""
    with pytest.raises(ValueError, match=rf"only as pytorch_model\.bin{index}, .*allow_pickle=true would load"):
        GPT.from_pretrained(directory)
    want = GPT.from_pretrained(saved[name])
    got = GPT.from_pretrained(directory, allow_pickle=True)
    assert all(torch.equal(a, b) for a, b in zip(want.parameters(), got.parameters(), strict=True))
    assert got.config == want.config


def test_pickles_of_before_torch_1_6_and_of_a_whole_state_dict_are_read(pickled, saved, tmp_path):
    directory = pickled("qwen2", _use_new_zipfile_serialization=False)
    want = logits(GPT.from_pretrained(saved["qwen2"]), tokens_for(61, 24))
    assert torch.equal(logits(GPT.from_pretrained(directory, allow_pickle=True), tokens_for(61, 24)), want)

    stock = make_stock("gpt2")  # its head is its embedding: one storage under two names, in an OrderedDict
    stock.save_pretrained(tmp_path / "stock")
    (tmp_path / "stock/model.safetensors").unlink()
    torch.save(stock.state_dict(), tmp_path / "stock/pytorch_model.bin")
    model = GPT.from_pretrained(tmp_path / "stock", allow_pickle=True)
    assert (logits(model, tokens_for(61, 24)) - logits(stock, tokens_for(61, 24))).abs().max() <= 1e-5
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


def test_safetensors_are_preferred(spoiled):
    directory = spoiled("llama")
    (directory / "pytorch_model.bin").write_bytes(b"not even a pickle")
    GPT.from_pretrained(directory, allow_pickle=True)


class Evil:
    """Unpickled, it would make the file `target`."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("kind", ["zip", "old", "plain", "inside"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(kind, pickled, tmp_path):
    directory, target = pickled("gpt2"), tmp_path / "it-ran"
    file = directory / "pytorch_model.bin"
    tensors = torch.load(file)
    content = {**tensors, "transformer.wte.weight": Evil(target)} if kind == "inside" else Evil(target)
    if kind == "plain":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind != "old")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not made of tensors alone, .*none of its code was run"):
        GPT.from_pretrained(directory, allow_pickle=True)
    assert not target.exists()
    if kind == "plain":
        pickle.loads(file.read_bytes())  # it is as harmful as it claims
        assert target.exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}, "step": 3}, {"transformer.wte.weight": torch.ones(2, 2).to_sparse()}])
def test_pickles_of_other_things_are_refused(content, pickled):
    directory = pickled("gpt2")
    torch.save(content, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin does not hold tensors by their names"):
        GPT.from_pretrained(directory, allow_pickle=True)


def test_broken_pickles_are_refused(pickled):
    directory = pickled("gpt2", sharded=True)
    file = directory / "pytorch_model-00002-of-00002.bin"
    whole = file.read_bytes()
    for cut in (whole[:-200], whole[: len(whole) // 2], b""):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match=r"pytorch_model-00002-of-00002\.bin is not "):
            GPT.from_pretrained(directory, allow_pickle=True)
    file.unlink()
    with pytest.raises(ValueError, match=r"names the file pytorch_model-00002-of-00002\.bin, which is not there"):
        GPT.from_pretrained(directory, allow_pickle=True)


def test_an_index_of_safetensors_cannot_name_a_pickle(pickled):
    directory = pickled("gpt2")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"transformer.wte.weight": "pytorch_model.bin"}}))
    with pytest.raises(ValueError, match=r"names the file pytorch_model\.bin"):
        GPT.from_pretrained(directory)
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        GPT.from_pretrained(directory)


# Memory

MEASURE = """
import json, sys, torch
from gpt import GPT
import gpt.model.huggingface

def kib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

before = kib("VmRSS")
model = GPT.from_pretrained(sys.argv[1], dtype=torch.float32, allow_pickle=True)
for parameter in model.parameters():
    parameter.sum()  # what is mapped counts when it was read
heavy = {"transformers", "huggingface_hub", "tokenizers", "sympy", "torch._dynamo"} & set(sys.modules)
nbytes = sum(p.nbytes for p in model.parameters())
print(json.dumps({"peak": kib("VmHWM") - before, "end": kib("VmRSS") - before, "model": nbytes / 1024, "heavy": sorted(heavy)}))
"""
SIZES = {"vocab_size": 16_000, "context_length": 64, "n_layer": 6, "n_head": 8, "d_model": 896}
MIB = 1024  # in KiB, as the system counts
MARGIN = 64 * MIB  # code that is imported late, a tensor being turned and converted, what the allocator keeps of those before
MAPPING = 64 * MIB  # what is held of one file: 32 MB, and the tensor that goes beyond


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Checkpoints of about 280 MB in fp32."""
    folder = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("gpt2", "llama"):
            model = GPT.materialise(GPTConfig(**{**OURS[name], **SIZES, "d_ff": 2_700 if name == "llama" else 3_584}))
            for parameter in model.parameters():
                parameter.data.fill_(0.01)
            model.save_pretrained(folder / f"{name}-one")
            model.save_pretrained(folder / f"{name}-bf16", dtype=torch.bfloat16)
            patch.setattr(huggingface, "MAX_SHARD_BYTES", 60 * 10**6)
            model.save_pretrained(folder / f"{name}-shards")
            patch.undo()
    shutil.copytree(folder / "gpt2-shards", folder / "gpt2-pickled")
    weight_map = {}
    for file in sorted((folder / "gpt2-pickled").glob("*.safetensors")):
        tensors = load_file(file)
        torch.save(tensors, folder / "gpt2-pickled" / f"pytorch_{file.stem}.bin")
        weight_map |= dict.fromkeys(tensors, f"pytorch_{file.stem}.bin")
        file.unlink()
    (folder / "gpt2-pickled/model.safetensors.index.json").unlink()
    (folder / "gpt2-pickled/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory a process has used")
@pytest.mark.parametrize("name", ["gpt2-shards", "gpt2-one", "gpt2-bf16", "gpt2-pickled", "llama-shards", "llama-one", "llama-bf16"])
def test_the_peak_of_memory_is_the_model_and_a_part_of_one_file(name, large):
    command = [sys.executable, "-c", MEASURE, str(large / name)]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads(done.stdout)
    files = [f.stat().st_size / 1024 for f in (large / name).iterdir() if f.suffix in (".safetensors", ".bin")]
    assert (len(files) == 1) == name.endswith(("one", "bf16"))
    assert found["model"] > 250 * MIB
    # Where the file is the model nothing is held twice. GPT-2's matrices are turned, but not its embedding, which stays mapped.
    beside = 0 if name in ("llama-shards", "llama-one") else max(files) if name == "gpt2-pickled" else min(max(files), MAPPING)
    assert found["peak"] <= found["model"] + beside + MARGIN, found
    assert found["end"] <= found["model"] + MARGIN, found
    assert found["heavy"] == []


def test_a_mapped_model_can_be_trained_and_its_file_stays(spoiled):
    directory = spoiled("llama")
    before = (directory / "model.safetensors").read_bytes()
    model = GPT.from_pretrained(directory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (directory / "model.safetensors").read_bytes() == before
    again = GPT.from_pretrained(directory)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert isinstance(a, nn.Parameter)
        assert a.requires_grad
        assert a.is_contiguous()
        assert torch.equal(a, b + 1.0)
    model.save_pretrained(directory)
    assert torch.equal(GPT.from_pretrained(directory).head.weight, model.head.weight)
    assert torch.equal(again.head.weight + 1.0, model.head.weight)  # its file is gone, and it still has it


def test_nothing_is_allocated_for_a_checkpoint_that_does_not_fit(spoiled, monkeypatch):
    directory = spoiled("gpt2")
    monkeypatch.setattr(GPT, "materialise", lambda *args: pytest.fail("allocated"))
    (directory / "config.json").write_text((directory / "config.json").read_text().replace('"n_positions": 24', '"n_positions": 25'))
    with pytest.raises(ValueError, match=r"wpe\.weight has shape \(24, 32\) where config\.json asks for \(25, 32\)"):
        GPT.from_pretrained(directory)


def test_loading_draws_no_random_numbers_and_leaves_the_initialisers_alone(saved):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    GPT.from_pretrained(saved["qwen3"])
    assert torch.equal(torch.get_rng_state(), state)
    assert make_ours({}).head.weight.std() > 0.1
