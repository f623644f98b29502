"""The simulated device. It cannot be taken out of a process again, so what needs it is checked in processes of their own."""

import importlib
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from gpt.runtime.neuron_sim_record import Record, operation_names

pytestmark = pytest.mark.skipif(Version(version("torch")) < Version("2.13"), reason="it needs torch 2.13")

# What the simulation needs of torch that torch does not promise to keep, and what it needs it for.
PIECES = {
    "torch._C._acc.create_empty_tensor": "tensors of a device in Python",
    "torch._C._acc.register_python_privateuseone_hook": "a device in Python",
    "torch._C._acc.register_python_privateuseone_device_guard": "a device in Python",
    "torch._C._acc.PrivateUse1Hooks.is_available": "a device in Python",
    "torch._C._acc.DeviceGuard.type_": "a device in Python",
    "torch._C._construct_storage_from_data_pointer": "storages of a device in Python",
    "torch._C._autograd.DeviceType.PrivateUse1": "a device in Python",
    "torch._C._get_privateuse1_backend_name": "knowing whether there is such a device already",
    "torch._C._dispatch_get_all_op_names": "kernels",
    "torch._C._dispatch_has_kernel_for_dispatch_key": "kernels",
    "torch._C._ExcludeDispatchKeyGuard": "autocast",
    "torch._C._AutoDispatchBelowAutograd": "running graphs",
    "torch._C.DispatchKey.AutocastPrivateUse1": "autocast",
    "torch._ops.OpOverload.redispatch": "views",
    "torch._subclasses.FakeTensor": "knowing whether attention is being traced",
    "torch.library.fallthrough_kernel": "autocast",
    "torch.utils.backend_registration._setup_privateuseone_for_python_backend": "a device in Python",
    "torch._C._accelerator_synchronizeDevice": "torch.accelerator",
    "torch._C._accelerator_isAllocatorInitialized": "torch.accelerator",
    "torch._C._accelerator_emptyCache": "torch.accelerator",
    "torch._C._accelerator_getDeviceStats": "torch.accelerator",
    "torch._C._accelerator_resetPeakStats": "torch.accelerator",
    "torch._C._accelerator_resetAccumulatedStats": "torch.accelerator",
    "torch._C._accelerator_getMemoryInfo": "torch.accelerator",
    "torch._tensor_str.tensor_totype": "printing tensors",
    "torch.UntypedStorage.resize_": "FSDP, which frees storages",
    "torch.UntypedStorage.size": "FSDP, which frees storages",
    "torch.UntypedStorage.nbytes": "memory",
    "torch.UntypedStorage.clone": "copy.deepcopy",
    "torch.serialization.register_package": "torch.load",
    "torch._dynamo.backends.common.aot_autograd": "torch.compile",
    "torch._dynamo.register_backend": "torch.compile",
    "torch._dynamo.utils.guard_failures": "saying why a graph is compiled again",
    "torch._guards.CompileContext.current_compile_id": "saying why a graph is compiled again",
    "torch._guards.TracingContext.get_traced_code": "naming the function of a graph",
    "torch.distributed.distributed_c10d._world": "process groups",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default": "attention",
    "torch.ops.aten._scaled_dot_product_attention_math.default": "attention",
    "torch.ops.aten._copy_from.default": "copies between devices",
    "torch.ops.aten._copy_from_and_resize.default": "copies between devices",
}


@pytest.mark.parametrize("piece", PIECES)
def test_torch_still_has(piece):
    module, names = piece, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ImportError:
            module, _, name = module.rpartition(".")
            names.insert(0, name)
    for number, name in enumerate(names):
        assert hasattr(found, name), f"{'.'.join([module, *names[: number + 1]])} is gone from torch, which {PIECES[piece]} needs"
        found = getattr(found, name)


@pytest.mark.parametrize("checks", ["device", "torch", "graph", "process"])
def test_in_a_process_of_its_own(checks):
    done = run(
        "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-q", str(Path(__file__).with_name(f"neuron_sim_{checks}_checks.py"))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


REFUSED = {
    "old torch": (
        "import torch; torch.__version__ = '2.12.1+cpu'",
        "device=neuron_sim needs torch 2.13 or newer, and this is 2.12.1+cpu",
    ),
    "real device": ("import sys; sys.modules['torch_neuronx'] = sys", "torch-neuronx is registered in this Python"),
    "another device": ("import torch; torch.utils.rename_privateuse1_backend('npu')", "a device type named npu is registered"),
    "unknown operation": ("names = ['aten::topk', 'topkk']", "device.unsupported has 'topkk', which torch"),
    "composite operation": ("names = ['linear']", "'linear', which is made of other operations"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_said_at_once(case):
    first, message = REFUSED[case]
    done = run("-c", f"names = []\n{first}\nfrom gpt.runtime.neuron_sim import install\ninstall(names)")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("gpt.errors.UserError: ")
    assert message in last


def test_nothing_is_changed_by_the_import_alone():
    state = "torch._C._get_privateuse1_backend_name(), torch.accelerator.current_accelerator()"
    code = f"import torch; before = {state}; import gpt.runtime.neuron_sim; print(before == ({state}))"
    assert run("-c", code).stdout.split() == ["True"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TORCH_NEURONX", "RANK", "WORLD_SIZE"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=280, check=False, cwd=root, env=environment)


# The record, which needs no device


def test_memory_is_counted():
    record = Record()
    record.allocate(100)
    record.use(50)
    record.allocate(-60)
    assert (record.allocated_bytes, record.peak_bytes) == (40, 150)
    record.reset_peak()
    record.allocate(1)
    assert record.peak_bytes == 41
    record.operations["aten::mm"] += 1
    record.clear()
    assert (record.operations, record.allocated_bytes, record.peak_bytes) == ({}, 41, 41)


def test_operations_are_named_with_or_without_overload():
    record = Record(unsupported=operation_names(["topk", "aten::sort.stable"]))
    assert record.lacks("aten::topk")
    assert record.lacks("aten::topk.values")
    assert record.lacks("aten::sort.stable")
    assert not record.lacks("aten::sort")
    assert not record.lacks("aten::topk_")
    with pytest.raises(ValueError, match="does not know"):
        operation_names(["aten::sort.stabel"])
