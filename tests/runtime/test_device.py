import pytest
import torch

from gpt.config import DeviceConfig
from gpt.errors import UserError
from gpt.runtime.cuda import PEAK_TFLOPS
from gpt.runtime.device import find_device


def test_auto_finds_what_torch_finds():
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert find_device(DeviceConfig("auto"), "auto").type == (accelerator.type if accelerator else "cpu")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_is_what_was_asked_for(precision, dtype):
    device = find_device(DeviceConfig("cpu"), precision)
    assert device.dtype == dtype
    with device.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_auto_precision_follows_the_chip(monkeypatch):
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("gpt.runtime.cpu.multiplies_bf16", lambda has_it=has_it: has_it)
        assert find_device(DeviceConfig("cpu"), "auto").dtype == dtype


def test_what_is_not_there_is_refused_with_what_is():
    missing = next(name for name in ("cuda", "mps") if find_device(DeviceConfig("auto"), "auto").type != name)
    with pytest.raises(UserError, match=f"device={missing}: there is none here.*device=auto"):
        find_device(DeviceConfig(missing), "auto")


def test_an_unknown_peak_is_none():
    assert find_device(DeviceConfig("cpu"), "bf16").peak_flops is None
    assert all(tflops > 50 for tflops in PEAK_TFLOPS.values())


def test_memory_is_of_this_process():
    before = find_device(DeviceConfig("cpu"), "fp32").memory_bytes()
    assert before is not None
    kept = torch.ones(64 << 20)  # 256 MB
    after = find_device(DeviceConfig("cpu"), "fp32").memory_bytes()
    assert after is not None
    assert after >= kept.nbytes
    assert after >= before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_cuda_trains_and_compiles(tmp_path, corpus, cache_dir):
    from gpt.compose import compose_run
    from gpt.training.trainer import Trainer

    places = [f"data.paths=[{corpus}]", f"data.cache_dir={cache_dir}", f"run.dir={tmp_path}"]
    for settings in (["precision=fp32", "compile=false"], ["precision=auto", "compile=true"]):
        result = Trainer(compose_run("pretrain", ["debug=golden", "data=text", "device=cuda", *places, *settings])).fit()
        assert result.exit_code == 0
        assert result.held_out is not None
        assert result.held_out.loss < 5
