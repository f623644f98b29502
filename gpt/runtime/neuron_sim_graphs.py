"""What the simulated device does with torch.compile(backend="neuron"): record the graph, refuse what the chip's compiler refuses, run it.

AOTAutograd makes a graph of ATen operations for the forward pass and one for the backward pass. Each runs on CPU tensors that share the
bytes of the device's, so a compiled step costs what it costs on a CPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from gpt.runtime.neuron_sim_kernels import CPU, RECORD, REFUSED_DTYPES, device_tensor, host_tensor
from gpt.runtime.neuron_sim_record import COUNTED_AS, Graph

_TORCH = str(Path(torch.__file__).parent)
_UNMARKED_VIEWS = {"aten::_unsafe_view", "aten::lift_fresh"}
_Kind = Literal["forward", "backward", "inference"]


class CompilationError(RuntimeError):
    """The chip's compiler would not take this graph."""


def compile_graph(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend that torch.compile calls for a graph.

    Args:
        module: what dynamo has traced.
        example_inputs: of it.
        options: must be None: TorchNeuron's are not known to the simulation.
        mode: default, as on the hardware.

    Raises:
        ValueError: another mode, or options.
        CompilationError: what the graph has that the chip lacks.
    """
    from torch._dynamo.backends.common import aot_autograd

    if options or mode not in (None, "default"):
        raise ValueError(f"torch.compile(backend='neuron') takes mode='default' and no options, not mode={mode!r}, options={options!r}")
    function, cause = _origin()

    def compiler(kind: _Kind) -> Callable[..., Any]:
        def compile_pass(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return _compile(graph, inputs, kind, function, cause)

        return compile_pass

    compiled = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=compiler("inference"),
        keep_inference_input_mutations=True,
    )
    return compiled(module, example_inputs)


def _origin() -> tuple[str, str]:
    """The function of ours that dynamo is compiling, and why it does."""
    from torch._dynamo.utils import guard_failures
    from torch._guards import CompileContext, TracingContext

    codes = TracingContext.get_traced_code() or []
    names = [c.co_qualname for c in codes if not c.co_filename.startswith(_TORCH)] or ["?"]
    function = names[0].replace("<locals>.", "")
    compiled = CompileContext.current_compile_id()
    if compiled is None or not compiled.frame_compile_id or not any(g.function == function for g in RECORD.graphs):
        return function, f"first call of {function}"
    reasons = [reason for code in codes for reason in guard_failures.get(code, [])[-1:]]
    # As in "0/0: tensor 'x' size mismatch at index 0. expected 4, actual 8"
    reason = reasons[0].splitlines()[0].partition(": ")[2].strip() if reasons else "torch does not say why"
    return function, f"{function} again: {reason}"


def _compile(module: fx.GraphModule, inputs: Sequence[Any], kind: _Kind, function: str, cause: str) -> Callable[..., Any]:
    tensors = [i for i in inputs if isinstance(i, Tensor)]
    for value in inputs:
        if _is_dynamic(value):
            shape = tuple(value.shape) if isinstance(value, Tensor) else value
            raise CompilationError(
                f"NCC_EMOD025: Dynamic shape is not supported: an input of {function} is {shape}; compile with dynamic=False"
            )
    operations: Counter[str] = Counter()
    for node in module.graph.nodes:
        _check(node, function)
        if name := _operation(node):
            operations[name] += 1
    outputs = list(tree_leaves(_output(module).args[0]))
    made, scratch = _bytes(module)
    shapes, dtypes = tuple(tuple(t.shape) for t in tensors), tuple(t.dtype for t in tensors)
    graph = Graph(kind, function, cause, shapes, dtypes, operations, operations.total(), made, scratch)
    RECORD.graphs.append(graph)
    on_device = [isinstance(o, fx.Node) and _on_device(o.meta.get("val")) for o in outputs]
    _move_to_cpu(module)
    return _runner(module, on_device, scratch)


def _runner(module: fx.GraphModule, on_device: list[bool], scratch: int) -> Callable[..., Any]:
    forward = module.forward

    def run(args: list[Any]) -> Any:
        RECORD.use(scratch)
        hosts = [host_tensor(a) if isinstance(a, Tensor) else a for a in args]
        with torch._C._AutoDispatchBelowAutograd():
            results = forward(*hosts)
        # A result that has the bytes of an input, or of another result, shares their storage on the device, too.
        lifted = [device_tensor(r) if up and isinstance(r, Tensor) else r for r, up in zip(results, on_device, strict=True)]
        args.clear()
        return lifted

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _check(node: fx.Node, function: str) -> None:
    name = _operation(node)
    if name is not None and RECORD.lacks(name):
        raise CompilationError(f"neuronx-cc: {name} is not supported (in {function}; {_where(node)})")
    for value in tree_leaves(node.meta.get("val")):
        if _is_dynamic(value):
            raise CompilationError(
                f"NCC_EMOD025: Dynamic shape is not supported: {name or node.name} in {function} makes one ({_where(node)})"
            )
        if _on_device(value) and value.dtype in REFUSED_DTYPES:
            kind = str(value.dtype).removeprefix("torch.")
            raise CompilationError(f"neuronx-cc: {kind} is not supported: {name or f'input {node.name}'} in {function} ({_where(node)})")


def _is_dynamic(value: Any) -> bool:
    """Whether it is a size that is not known, or a tensor of such; not the state of the CPU's generator, which dropout may keep."""
    return isinstance(value, torch.SymInt) or (_on_device(value) and any(isinstance(size, torch.SymInt) for size in value.shape))


def _operation(node: fx.Node) -> str | None:
    if node.op != "call_function":
        return None
    if isinstance(node.target, OpOverload):
        return COUNTED_AS.get(node.target._schema.name, node.target.name())
    for argument in node.args:  # such as that of which run_and_save_rng_state keeps the random numbers
        if isinstance(argument, OpOverload):
            return COUNTED_AS.get(argument._schema.name, argument.name())
    name = getattr(node.target, "__name__", str(node.target))
    return None if name == "getitem" else name


def _where(node: fx.Node) -> str:
    """The line of the user's code that a node comes of."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    return "{}:{}".format(*found[-1]) if found else "no line known"


def _output(module: fx.GraphModule) -> fx.Node:
    return next(iter(reversed(module.graph.nodes)))


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "neuron"


def _bytes(module: fx.GraphModule) -> tuple[int, int]:
    """Of the tensors that a graph makes on the device: those that it returns, and the most that are alive at once."""
    storages = _storages(module)
    last_use: dict[_Storage, int] = {}
    nodes = list(module.graph.nodes)
    for place, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            last_use.update((storage, place) for storage in tree_leaves(storages[used]) if storage is not None)
    alive = most = 0
    seen: set[_Storage] = set()
    for place, node in enumerate(nodes):
        for storage in {s for s in tree_leaves(storages[node]) if s is not None and s.is_made} - seen:
            alive += storage.size
            seen.add(storage)
        most = max(most, alive)
        used = {s for n in (node, *node.all_input_nodes) for s in tree_leaves(storages[n]) if s is not None and s.is_made}
        alive -= sum(s.size for s in used if last_use[s] == place)
    returned = {s for node in nodes[-1].all_input_nodes for s in tree_leaves(storages[node]) if s is not None and s.is_made}
    return sum(s.size for s in returned), most


@dataclass(eq=False)
class _Storage:
    size: int
    is_made: bool  # by the graph; else it is an input


def _storages(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """What each node's tensors lie in, in the structure of its value; traced tensors do not say, since functional ones share nothing."""
    found: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        value, target = node.meta.get("val"), node.target
        of = found.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if isinstance(of, (tuple, list)) and getattr(target, "__name__", "") == "getitem":
            found[node] = of[node.args[1]]
        elif isinstance(target, OpOverload) and (target.name() in _UNMARKED_VIEWS or any(r.alias_info for r in target._schema.returns)):
            base = next(iter(tree_leaves(found[node.all_input_nodes[0]])), None)
            found[node] = tree_map(lambda v, base=base: base if _on_device(v) else None, value)
        else:
            made = node.op == "call_function"
            found[node] = tree_map(lambda v, made=made: _Storage(v.numel() * v.element_size(), made) if _on_device(v) else None, value)
    return found


def _move_to_cpu(module: fx.GraphModule) -> None:
    """Have a graph make its tensors on the CPU."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args = tree_map_only(torch.device, lambda _: CPU, node.args)
                node.kwargs = tree_map_only(torch.device, lambda _: CPU, node.kwargs)
                if node.op == "get_attr" and isinstance(constant := getattr(part, str(node.target), None), Tensor):
                    with unset_fake_temporarily():
                        setattr(part, str(node.target), host_tensor(constant))
            part.recompile()
