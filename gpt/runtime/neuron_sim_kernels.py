"""Tensors and operations of the simulated device.

A tensor of device type `neuron` has a storage of that type whose bytes are those of a hidden CPU storage. Every operation runs the CPU's
kernel on CPU tensors that share those bytes, so that nothing is copied and results are the CPU's to the bit. Behind a Python kernel torch
does not look at devices again: mixed ones, float64 and the like are refused here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensor

from gpt.runtime.neuron_sim_record import COUNTED_AS, SDPA, Record, overloads_of

RECORD = Record()  # of this process, in which there is one device
CPU = torch.device("cpu")
NEURON = torch.device("neuron" if torch._C._get_privateuse1_backend_name() == "neuron" else "privateuseone", 0)
REFUSED_DTYPES = frozenset({torch.float64, torch.complex128})
FLASH_HEAD_DIMS = (64, 128)  # of the chip's attention kernel
_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_UNDER_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]

_aten = torch.ops.aten
_set_storage = _aten.set_.source_Storage_storage_offset
_nbytes: Any = torch.UntypedStorage.nbytes  # as it is before `gpt.runtime.neuron_sim` makes it heed what FSDP frees
_plans: dict[OpOverload, _Plan] = {}

# Geometry alone; what the CPU does to a tensor's shape it does to that of any device.
_VIEWS = ("view", "alias", "as_strided", "_reshape_alias", "unfold", "set_.source_Storage", "set_.source_Tensor",
          "set_.source_Storage_storage_offset")  # fmt: skip
_NO_KERNEL = {"aten::empty", "aten::empty_strided", "aten::_local_scalar_dense", "aten::resize_", "aten::_to_copy", "aten::_copy_from"}
_INDEXED = ("aten::index", "aten::_index_put_impl_", "aten::_unsafe_index")  # may have indices on the CPU
_FUSED_OPTIMIZERS = ("aten::_fused_adam", "aten::_fused_sgd", "aten::_fused_adagrad")

# torch.autocast's lists for CUDA: what is computed in the low precision, and what in fp32.
_LOW_PRECISION = (
    "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_tbc",
    "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "einsum", "gru_cell", "linalg_multi_dot", "linalg_vecdot", "linear",
    "lstm_cell", "matmul", "mm", "mv", "prelu", "rnn_relu_cell", "rnn_tanh_cell", "scaled_dot_product_attention",
)  # fmt: skip
_FULL_PRECISION = (
    "acos", "asin", "binary_cross_entropy_with_logits", "cdist", "cosh", "cosine_similarity", "cross_entropy_loss", "cumprod", "cumsum",
    "dist", "erfinv", "exp", "expm1", "group_norm", "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss", "layer_norm", "log",
    "log10", "log1p", "log2", "log_softmax.int", "logsumexp", "mse_loss", "multilabel_margin_loss", "nll_loss", "nll_loss_nd",
    "norm.Scalar", "norm.ScalarOpt_dim", "poisson_nll_loss", "pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "prod", "prod.dim_int",
    "reciprocal", "renorm", "rms_norm", "rsqrt", "sinh", "smooth_l1_loss", "soft_margin_loss", "softmax.int", "softplus", "sum",
    "sum.dim_IntList", "tan",
)  # fmt: skip


# Memory


class HostMemory:
    """The CPU storage whose bytes a device storage has, counted as the device's from its making until both are gone.

    Python switches threads at calls and jumps only, so that the additions of `Record.allocate` are not torn apart.
    """

    __slots__ = ("size", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.size = _nbytes(storage)
        RECORD.allocate(self.size)

    def resize(self, size: int) -> None:
        """Count another number of bytes. They stay where they are: FSDP frees storages and takes them again at the same size."""
        RECORD.allocate(size - self.size)
        self.size = size

    def __del__(self) -> None:
        RECORD.allocate(-self.size)


def memory_of(storage: torch.UntypedStorage) -> HostMemory:
    """What is behind a storage of the device."""
    try:
        return storage._neuron_sim  # type: ignore[attr-defined]
    except AttributeError:  # torch's own, of a tensor that has no element yet
        assert not _nbytes(storage), "a storage of device neuron that the simulation has not made"
        return _attach(storage, torch.UntypedStorage(0))


def _attach(storage: Any, host: Any) -> HostMemory:
    storage._neuron_sim = memory = HostMemory(host)
    host._on_neuron = weakref.ref(storage)
    return memory


def device_storage(host: Any) -> Any:
    """A storage of the device with the bytes of a CPU storage: the one that it has already, or a new one."""
    known = getattr(host, "_on_neuron", None)
    storage = known() if known is not None else None
    if storage is None:
        storage = torch._C._construct_storage_from_data_pointer(host.data_ptr(), NEURON, _nbytes(host))
        _attach(storage, host)
    return storage


def host_tensor(tensor: Tensor) -> Tensor:
    """A CPU tensor that shares the bytes of a tensor of the device; a CPU tensor itself."""
    if tensor.is_cpu:
        return tensor
    host = memory_of(tensor.untyped_storage()).storage
    return torch.empty(0, dtype=tensor.dtype, device=CPU).set_(host, tensor.storage_offset(), tensor.shape, tensor.stride())


def device_tensor(host: Tensor) -> Tensor:
    """A tensor of the device that shares the bytes of a CPU tensor.

    Raises:
        TypeError: the chip does not have its dtype.
    """
    if host.dtype in REFUSED_DTYPES:
        raise TypeError(f"{str(host.dtype).removeprefix('torch.')} on neuron: the chip has no such numbers; use float32 there, or the CPU")
    empty = torch._C._acc.create_empty_tensor((0,), host.dtype)  # type: ignore[attr-defined]
    return _point(empty, host)


def _point(tensor: Tensor, host: Tensor) -> Tensor:
    storage = device_storage(host.untyped_storage())
    return _set_storage.redispatch(_ON_CPU, tensor, storage, host.storage_offset(), host.shape, host.stride())


# Operations


class _Plan:
    """What is to be known of an operation, read off its schema once."""

    __slots__ = ("aliases", "has_kernel", "is_indexed", "name", "refusal", "tensors", "written")

    def __init__(self, op: OpOverload) -> None:
        schema = op._schema
        whole = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
        self.name: str = COUNTED_AS.get(schema.name, whole)
        self.has_kernel = schema.name not in _NO_KERNEL
        self.is_indexed = schema.name.startswith(_INDEXED)
        self.refusal = None
        if schema.name.startswith(_FUSED_OPTIMIZERS):
            self.refusal = f"{whole}: no fused optimizer runs on neuron; leave the optimizer's fused=True out"
        # Where the arguments are that it writes to, by position or name, and which of them each result is.
        self.written: list[int | str] = []
        places: dict[str, int | str] = {}
        for position, argument in enumerate(schema.arguments):
            alias = argument.alias_info
            if alias is not None and alias.is_write:
                place = argument.name if argument.kwarg_only else position
                self.written.append(place)
                places.update(dict.fromkeys(alias.before_set, place))
        self.tensors = [n for n, a in enumerate(schema.arguments) if n and not a.kwarg_only and isinstance(a.type, torch.TensorType)]
        self.aliases: list[int | str | None] = []
        for result in schema.returns:
            alias = result.alias_info
            self.aliases.append(next((places[n] for n in alias.before_set if n in places), None) if alias and alias.is_write else None)


def run_operation(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run an operation whose arguments are on the device: the kernel of everything that has no other.

    Raises:
        NotImplementedError: the chip lacks it.
        RuntimeError: an argument is on the CPU.
    """
    plan = _plans.get(op)
    if plan is None:
        plan = _plans[op] = _Plan(op)
    record, name = RECORD, plan.name
    if plan.refusal is not None:
        raise NotImplementedError(plan.refusal)
    if record.unsupported:
        _note_fallback(name)
    record.operations[name] += 1
    signature: list[Any] = []
    hosts = [_down(a, plan, signature) for a in args]
    named = {key: _down(a, plan, signature) for key, a in kwargs.items()} if kwargs else kwargs
    if plan.has_kernel:
        record.eager_kernels[name].add(tuple(signature))
    call: Any = op
    for place in plan.tensors:
        if place < len(args) and not isinstance(args[place], Tensor) and args[place] is not None:
            call = op.overloadpacket  # which finds the overload for a number, where this one wants a tensor
    result = call(*hosts, **named)
    for place in plan.written:
        if isinstance(place, int):
            target, host = args[place], hosts[place]
        else:
            target, host = kwargs.get(place), named.get(place)
        if isinstance(target, Tensor) and isinstance(host, Tensor) and (target.shape != host.shape or target.stride() != host.stride()):
            _resized(target, host)
    aliases = plan.aliases
    if isinstance(result, Tensor):
        place = aliases[0]
        if place is not None:
            return args[place] if isinstance(place, int) else kwargs[place]
        return device_tensor(result)
    if isinstance(result, (tuple, list)):
        if len(aliases) == len(result) and any(place is not None for place in aliases):
            return tuple(
                _up(r) if place is None else args[place] if isinstance(place, int) else kwargs[place]
                for r, place in zip(result, aliases, strict=True)
            )
        return type(result)(_up(r) for r in result) if type(result) in (tuple, list) else tuple(_up(r) for r in result)
    return result


def _down(value: Any, plan: _Plan, signature: list[Any]) -> Any:
    """An argument for the CPU; what kind of tensor it is is added to the signature."""
    if isinstance(value, Tensor):
        if value.is_cpu:
            if value.dim():  # a number in a tensor may come along
                raise _mixed(plan)
            return value
        signature += (value.shape, value.dtype)
        return host_tensor(value)
    if isinstance(value, (list, tuple)):
        if not value or isinstance(value[0], (int, float)):
            return value
        if plan.is_indexed:
            return [host_tensor(v) if isinstance(v, Tensor) else v for v in value]
        return [_down(v, plan, signature) for v in value]
    return CPU if isinstance(value, torch.device) else value


def _up(value: Any) -> Any:
    return device_tensor(value) if isinstance(value, Tensor) else value


def _mixed(plan: _Plan) -> RuntimeError:
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, neuron:0 and cpu! "
        f"(when checking arguments of {plan.name})"
    )


def _note_fallback(name: str, in_graph: bool = False) -> None:
    if not RECORD.lacks(name):
        return
    if in_graph:
        raise NotImplementedError(f"neuronx-cc: {name} is not supported")
    if RECORD.strict:
        raise NotImplementedError(f"{name} is not implemented for device neuron, and fallback to the CPU is switched off")
    RECORD.fallbacks[name] += 1


def _resized(tensor: Tensor, host: Tensor) -> None:
    """Follow a result that has grown, on the CPU in its place: a storage of the device cannot, and another takes over."""
    memory = memory_of(tensor.untyped_storage())
    if _nbytes(memory.storage) != _nbytes(tensor.untyped_storage()):
        memory.resize(0)
        memory.storage._on_neuron = None  # type: ignore[attr-defined]
    _point(tensor, host)


def _view(op: OpOverload) -> Callable[..., Any]:
    name = str(op._schema.name) + (f".{op._schema.overload_name}" if op._schema.overload_name else "")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        RECORD.operations[name] += 1
        return op.redispatch(_ON_CPU, *args, **kwargs)

    return kernel


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """`target.copy_(source)` with either on the device."""
    host_tensor(target).copy_(host_tensor(source))
    if not (source.is_cpu or target.is_cpu):
        RECORD.eager_kernels["aten::copy_"].add((source.shape, source.dtype, target.dtype))
    RECORD.operations["aten::copy_"] += 1
    return target


def _copy_from_and_resize(source: Tensor, target: Tensor) -> Tensor:
    host = host_tensor(target).resize_(source.shape).copy_(host_tensor(source))
    if not target.is_cpu:
        _resized(target, host)
    return target


def _to_copy(
    self: Tensor, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None, non_blocking: bool = False,
    memory_format: Any = None,
) -> Tensor:  # fmt: skip
    """`self.to(..., copy=True)` of a tensor on the device."""
    if pin_memory:
        refuse_pinned()
    host = host_tensor(self).to(dtype=dtype or self.dtype, copy=True, memory_format=memory_format or torch.preserve_format)
    if device is not None and device.type == "cpu":
        return host
    result = device_tensor(host)
    RECORD.operations["aten::_to_copy"] += 1
    if dtype is not None and dtype != self.dtype:
        RECORD.eager_kernels["aten::_to_copy"].add((self.shape, self.dtype, dtype))
    return result


def refuse_pinned(*args: Any, **kwargs: Any) -> Any:
    """What asks for pinned memory gets this.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("pin_memory: there is no pinned memory for device neuron; leave it out")


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention`: one kernel where the chip has one (causal, no mask, FLASH_HEAD_DIMS), else its parts."""
    if RECORD.unsupported:
        _note_fallback(SDPA, in_graph=isinstance(query, FakeTensor))
    fused = is_causal and attn_mask is None and not dropout_p and query.dim() == 4 and query.shape[-1] == value.shape[-1]
    if fused and query.shape[-1] in FLASH_HEAD_DIMS and query.shape[-2] == key.shape[-2] and query.numel():
        if enable_gqa and query.shape[1] != key.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return _aten._scaled_dot_product_flash_attention_for_cpu.default(query, key, value, 0.0, True, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    return _aten._scaled_dot_product_attention_math.default(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _autocast(op: OpOverload, low: bool) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("neuron") if low else torch.float32
        args, kwargs = tuple(_cast(a, dtype) for a in args), {key: _cast(a, dtype) for key, a in kwargs.items()}
        with torch._C._ExcludeDispatchKeyGuard(_UNDER_AUTOCAST):
            return op(*args, **kwargs)

    return kernel


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value if value.dtype == dtype or not value.is_floating_point() or value.device.type != "neuron" else value.to(dtype)
    return [_cast(v, dtype) for v in value] if isinstance(value, (list, tuple)) else value


def _overload(name: str) -> OpOverload:
    base, _, overload = name.removeprefix("aten::").partition(".")
    return getattr(getattr(_aten, base), overload or "default")


def register_kernels() -> list[torch.library.Library]:
    """Tell torch's dispatcher of the above; it holds for as long as what is returned is kept."""
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(run_operation, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    taken = {"_copy_from": _copy_from, "_copy_from_and_resize": _copy_from_and_resize, "_to_copy": _to_copy}
    taken |= {name: _view(_overload(name)) for name in _VIEWS}
    for name, kernel in taken.items():
        aten.impl(name, kernel, "PrivateUse1")
    # Where the CPU has a kernel, the device has one: without, torch makes the operation of others, slower and with other roundings.
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        short = name.removeprefix("aten::")
        made_of_others = has(name, "CompositeExplicitAutogradNonFunctional") or has(name, "CompositeExplicitAutograd")
        if name.startswith("aten::") and short not in taken and made_of_others and has(name, "CPU"):
            give_kernel(name, aten)
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        aten.impl(SDPA.removeprefix("aten::"), _attention, key)
    for names, low in ((_LOW_PRECISION, True), (_FULL_PRECISION, False)):
        for name in names:
            aten.impl(name, _autocast(_overload(name), low), "AutocastPrivateUse1")
    return [everything, aten]


def give_kernel(name: str, aten: torch.library.Library) -> None:
    """Have an operation arrive at the device whole, which torch would else make of others."""
    op = _overload(name)
    aten.impl(name.removeprefix("aten::"), lambda *args, **kwargs: run_operation(op, *args, **kwargs), "PrivateUse1")


def refuse_operations(names: frozenset[str], aten: torch.library.Library) -> None:
    """Have the named operations arrive at the device whole, to be refused or counted there."""
    for name in names:
        for overload in overloads_of(name):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(overload, "PrivateUse1") and overload != SDPA:
                give_kernel(overload, aten)
