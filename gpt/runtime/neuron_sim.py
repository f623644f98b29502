"""The simulated Trainium device: torch's device type `neuron`, as AWS TorchNeuron registers it, computed by the CPU.

`install` gives a process real tensors with `device.type == "neuron"`, torch.accelerator, autocast, torch.compile(backend="neuron") and the
process group "neuron", so that the code that trains on Trainium runs on a laptop, unchanged, and to the same numbers as on the CPU.
It refuses what the hardware refuses and records what that would compile. It cannot tell of kernels, compiler errors, numerics, speed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
import time
import types
from collections.abc import Callable, Collection
from typing import Any

import torch

from gpt.errors import UserError
from gpt.runtime.neuron_sim_kernels import RECORD, device_storage, memory_of, refuse_operations, refuse_pinned, register_kernels
from gpt.runtime.neuron_sim_record import Record, operation_names

_OLDEST_TORCH = (2, 13)
_libraries: list[torch.library.Library] = []  # kept, or torch forgets the kernels; empty: not installed


def install(unsupported: Collection[str] = (), strict: bool | None = None) -> Record:
    """Make the device `neuron` of this process a simulated one. There is one such device type in a process, and no way back.

    Args:
        unsupported: operations that the chip is said to lack, such as "topk", "aten::topk" or "aten::topk.values".
        strict: whether they are an error outside a compiled graph, too, where they else run on the CPU and count as fallbacks; None:
            what TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION says.

    Returns:
        What the device does, from now on; a second call gives the same, with the new settings.

    Raises:
        UserError: torch is too old, the real device is here, or `unsupported` names no operation.
    """
    if not _libraries:
        _refuse_impossible()
    try:
        names = operation_names(unsupported)
    except ValueError as error:
        raise UserError(f"device.unsupported has {error}") from None
    if not _libraries:
        _register()
    refuse_operations(names, _libraries[-1])
    RECORD.unsupported = names
    RECORD.strict = os.environ.get("TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION") == "1" if strict is None else strict
    return RECORD


def _refuse_impossible() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST_TORCH:
        raise UserError(f"device=neuron_sim needs torch 2.13 or newer, and this is {torch.__version__}; upgrade torch, or take device=cpu")
    name = torch._C._get_privateuse1_backend_name()
    if "torch_neuronx" in sys.modules or name != "privateuseone":
        what = "torch-neuronx" if "torch_neuronx" in sys.modules else f"a device type named {name}"
        raise UserError(
            f"device=neuron_sim: {what} is registered in this Python, which has room for one such device type; take device=neuron, "
            f"or set TORCH_DEVICE_BACKEND_AUTOLOAD=0"
        )


def _register() -> None:
    from torch._dynamo import register_backend, trace_rules
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    from gpt.runtime.neuron_sim_graphs import compile_graph

    neuron = NeuronModule("torch.neuron")
    _setup_privateuseone_for_python_backend("neuron", backend_module=neuron, hook=_Hooks(), device_guard=_Guard())
    _libraries.extend(register_kernels())
    for module in (neuron, TorchNeuronXModule("torch_neuronx")):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    register_backend(compile_graph, name="neuron")
    # To dynamo our kernels are Python functions like any, which it would compile where it meets them outside a graph.
    for part in ("", "_kernels", "_graphs", "_processes"):
        trace_rules.add(f"{__name__}{part}")
    _replace_in_torch()
    if torch.distributed.is_available():
        from gpt.runtime.neuron_sim_processes import register_process_group

        register_process_group()


# What torch asks a device in C++


class _Hooks(torch._C._acc.PrivateUse1Hooks):  # type: ignore[attr-defined]
    def is_available(self) -> bool:
        return True

    def has_primary_context(self, device_id: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class _Guard(torch._C._acc.DeviceGuard):  # type: ignore[attr-defined]
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1  # type: ignore[attr-defined]


def _replace_in_torch() -> None:
    """What a device in Python cannot tell torch otherwise."""
    library: Any = torch._C
    library._accelerator_synchronizeDevice = lambda index: None
    library._accelerator_isAllocatorInitialized = lambda: True
    library._accelerator_emptyCache = lambda: None
    library._accelerator_getDeviceStats = lambda index: _statistics()
    library._accelerator_resetPeakStats = lambda index: RECORD.reset_peak()
    library._accelerator_resetAccumulatedStats = lambda index: None
    library._accelerator_getMemoryInfo = lambda index: (max(0, RECORD.memory_limit - RECORD.allocated_bytes), RECORD.memory_limit)
    torch.Event = Event
    torch.Tensor.pin_memory = refuse_pinned
    storage: Any = torch.UntypedStorage
    for name, of_device in (("resize_", _resize), ("size", _size), ("nbytes", _size), ("clone", _clone)):
        setattr(storage, name, _for_device(of_device, getattr(storage, name)))
    # print(tensor) computes in float64, which the chip takes for float32 silently, and we refuse.
    printing: Any = importlib.import_module("torch._tensor_str")
    widest = printing.tensor_totype
    printing.tensor_totype = lambda tensor: tensor.float() if tensor.device.type == "neuron" else widest(tensor)
    # Before torch's own reader, which wants a storage with a method of the device's name
    torch.serialization.register_package(1, lambda storage: None, _read_storage)


def _for_device(of_device: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    def method(storage: torch.UntypedStorage, *args: Any) -> Any:
        return (of_device if hasattr(storage, "_neuron_sim") else otherwise)(storage, *args)  # a tensor that is traced has none

    return method


def _resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    memory_of(storage).resize(size)
    return storage


def _size(storage: torch.UntypedStorage) -> int:
    return memory_of(storage).size


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return device_storage(memory_of(storage).storage.clone())


def _read_storage(storage: Any, location: str) -> Any:
    return device_storage(storage) if location.partition(":")[0] == "neuron" else None


def _statistics() -> dict[str, Any]:
    return {name: {"all": {"current": RECORD.allocated_bytes, "peak": RECORD.peak_bytes}} for name in ("allocated_bytes", "reserved_bytes")}


class Event(torch.Event):
    """`torch.Event` that can tell the time on the simulated device, where an operation is done when it returns."""

    _timed: bool
    _recorded: float | None

    def __new__(cls, device: Any = None, **options: Any) -> Any:
        """As `torch.Event`; of another device type it is torch's own."""
        if device is not None and torch.device(device).type != "neuron":
            return torch.Event.__base__(device, **options)  # type: ignore[misc]
        event = super().__new__(cls, torch.device("neuron"), **options)
        event._timed, event._recorded = options.get("enable_timing", False), None
        return event

    def record(self, stream: Any = None) -> None:
        """Take the time."""
        self._recorded = time.perf_counter()

    def query(self) -> bool:
        """Whether what was recorded is done: it is."""
        return True

    def synchronize(self) -> None:
        """Wait for what was recorded: it is done."""

    def wait(self, stream: Any = None) -> None:
        """Have a stream wait: there is nothing to wait for."""

    def elapsed_time(self, other: Any) -> float:
        """Milliseconds from this event to another.

        Raises:
            ValueError: one was made without enable_timing=True, or not recorded.
        """
        if not (self._timed and other._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._recorded is None or other._recorded is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return 1000 * (other._recorded - self._recorded)


# What the code that runs on Trainium imports


class Stream:
    """A queue of work, which is done as soon as it is given."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.device("neuron", 0)
        kind = torch._C._autograd.DeviceType.PrivateUse1  # type: ignore[attr-defined]
        self.stream_id, self.device_index, self.device_type = 0, 0, kind.value  # as of a torch.Stream

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def wait_stream(self, stream: Any) -> None:
        """Wait for another: it is done."""

    def wait_event(self, event: Any) -> None:
        """Wait for an event: it has happened."""

    def record_event(self, event: Any = None) -> Any:
        """An event that has been recorded."""
        event = Event("neuron") if event is None else event
        event.record()
        return event

    def synchronize(self) -> None:
        """Wait for all work: it is done."""

    def query(self) -> bool:
        """Whether all work is done."""
        return True


class NeuronModule(types.ModuleType):
    """`torch.neuron`."""

    Stream, Event = Stream, Event

    def is_available(self) -> bool:
        """Yes."""
        return True

    def is_initialized(self) -> bool:
        """Yes."""
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None:
        return None

    def device_count(self) -> int:
        """A process has one device."""
        return 1

    def current_device(self) -> int:
        """Its number."""
        return 0

    def set_device(self, device: Any) -> None:
        """Which core is this process's is not ours to choose."""

    def synchronize(self, device: Any = None) -> None:
        """Wait for the device."""

    def empty_cache(self) -> None:
        """Give back memory that is not used: there is none."""

    def current_stream(self, device: Any = None) -> Stream:
        """The queue that work goes to."""
        return Stream()

    default_stream = current_stream

    def stream(self, stream: Any) -> Any:
        """A context in which work goes to a queue."""
        return stream

    def manual_seed_all(self, seed: int) -> None:
        """The device draws from the CPU's generator, which has a seed of its own."""

    manual_seed = manual_seed_all

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """The CPU generator's state."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Set the CPU generator's state."""
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What autocast may compute in."""
        return [torch.bfloat16, torch.float16]

    def memory_allocated(self, device: Any = None) -> int:
        """Bytes of tensors that are alive."""
        return RECORD.allocated_bytes

    def max_memory_allocated(self, device: Any = None) -> int:
        """The most there were."""
        return RECORD.peak_bytes

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """Measure it from here on."""
        RECORD.reset_peak()


class TorchNeuronXModule(types.ModuleType):
    """`torch_neuronx`, as far as our code calls it."""

    __version__ = ".".join(torch.__version__.split("+")[0].split(".")[:2]) + ".0+sim"

    def get_fallback_ops(self) -> list[str]:
        """Operations that ran on the CPU since `clear_op_tracking`."""
        return sorted(RECORD.fallbacks)

    def clear_op_tracking(self) -> None:
        """Forget them."""
        RECORD.fallbacks.clear()

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        """Bytes by names such as allocated_bytes.all.peak."""
        return dict(torch.accelerator.memory_stats())

    def get_dynamo_metrics(self) -> dict[str, int]:
        """How many graphs were compiled."""
        return {"graphs": len(RECORD.graphs)}
