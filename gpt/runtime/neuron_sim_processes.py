"""The process group `neuron` of the simulated device: gloo, on CPU tensors that share the bytes of the device's."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.runtime.neuron_sim_kernels import host_tensor

# The collectives of c10d's ProcessGroup, which take (tensors or lists of tensors, ..., options). torch 2.13 calls some by two names.
_COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "_allgather_base", "reduce_scatter", "_reduce_scatter_base",
    "gather", "scatter", "alltoall", "alltoall_base", "send", "recv", "recv_anysource",
)  # fmt: skip
_SAME = {
    "all_gather_single": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
}
_MANY = {
    "allgather_into_tensor_coalesced": "_allgather_base",
    "all_gather_single_coalesced": "_allgather_base",
    "reduce_scatter_tensor_coalesced": "_reduce_scatter_base",
    "reduce_scatter_single_coalesced": "_reduce_scatter_base",
}


class NeuronWork(dist.Work):
    """Collectives under way, whose results are tensors of the device."""

    def __init__(self, works: Sequence[dist.Work], results: list[Tensor], divisor: int = 1) -> None:
        super().__init__()
        self._works, self._results, self._divisor = works, results, divisor
        self._lock = threading.Lock()  # a future's callback runs in a thread of gloo
        self._future: torch.futures.Future[list[Tensor]] | None = None

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        """Block until all are done."""
        for work in self._works:
            work.wait() if timeout is None else work.wait(timeout)
        self._divide()
        return True

    def _divide(self) -> None:
        """Make a sum a mean, which gloo does not."""
        with self._lock:
            divisor, self._divisor = self._divisor, 1
        if divisor != 1:
            for result in self._results:
                host_tensor(result).div_(divisor)

    def is_completed(self) -> bool:
        """Whether all are done."""
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        """Whether all are done and none failed."""
        return all(work.is_success() for work in self._works)

    def exception(self) -> Any:
        """What the first that failed failed of."""
        return next((e for work in self._works if (e := work.exception()) is not None), None)

    def result(self) -> list[Tensor]:
        """The tensors that are written to."""
        return self._results

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """What will be the tensors that are written to."""
        if self._future is None:
            future: torch.futures.Future[Any] = torch.futures.Future()
            first, results = self._works[0].get_future(), self._results

            def done(finished: torch.futures.Future[Any]) -> None:
                try:
                    finished.value()
                    for work in self._works[1:]:
                        work.wait()
                    self._divide()
                except Exception as error:
                    future.set_exception(error)
                else:
                    future.set_result(results)

            first.add_done_callback(done)
            self._future = future
        return self._future


class NeuronProcessGroup(dist.ProcessGroup):
    """Collectives among devices; those of CPU tensors work, too, as in a group "cpu:gloo,neuron:neuron"."""

    def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._coalesced: list[NeuronWork] | None = None

    def getBackendName(self) -> str:  # noqa: N802
        """Neuron."""
        return "neuron"

    @property
    def group_name(self) -> Any:
        """What torch calls this group."""
        return dist.distributed_c10d._world.pg_names[self]

    def barrier(self, opts: Any = None) -> dist.Work:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Wait for all."""
        return self._gloo.barrier(opts) if opts is not None else self._gloo.barrier()

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        works, self._coalesced = self._coalesced or [], None
        return NeuronWork(works, [r for work in works for r in work.result()])

    def _begun(self, works: Sequence[dist.Work], results: list[Tensor], divisor: int = 1) -> dist.Work:
        work = NeuronWork(works, results, divisor)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work


def _hosts(value: Any) -> Any:
    if isinstance(value, Tensor):
        return host_tensor(value)
    return [_hosts(v) for v in value] if isinstance(value, (list, tuple)) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _summing(options: Sequence[Any], size: int) -> int:
    """Have a reduction to a mean make a sum; what to divide it by."""
    for option in options:
        operation = getattr(option, "reduceOp", None)
        if operation == dist.ReduceOp.PREMUL_SUM:
            raise RuntimeError("ReduceOp.PREMUL_SUM is NCCL's alone; with FSDP, module.set_force_sum_reduction_for_comms(True) avoids it")
        if operation == dist.ReduceOp.AVG:
            option.reduceOp = dist.ReduceOp.SUM
            return size
    return 1


def _collective(name: str) -> Callable[..., dist.Work]:
    def run(self: NeuronProcessGroup, written: Any, *args: Any, **kwargs: Any) -> dist.Work:
        divisor = _summing((*args, *kwargs.values()), self.size())
        work = getattr(self._gloo, name)(_hosts(written), *map(_hosts, args), **kwargs)
        return self._begun([work], _tensors(written), divisor)

    return run


def _many(name: str) -> Callable[..., dist.Work]:
    def run(self: NeuronProcessGroup, written: Sequence[Tensor], read: Sequence[Tensor], *options: Any) -> dist.Work:
        divisor, one = _summing(options, self.size()), getattr(self._gloo, name)
        works = [one(host_tensor(target), host_tensor(source), *options) for target, source in zip(written, read, strict=True)]
        return self._begun(works, list(written), divisor)

    return run


for _name in _COLLECTIVES:
    setattr(NeuronProcessGroup, _name, _collective(_name))
for _name, _other in _SAME.items():
    setattr(NeuronProcessGroup, _name, _collective(_other))
for _name, _other in _MANY.items():
    setattr(NeuronProcessGroup, _name, _many(_other))


def register_process_group() -> None:
    """Have torch.distributed know the backend `neuron`."""

    def make(store: Any, rank: int, size: int, timeout: datetime.timedelta) -> NeuronProcessGroup:
        return NeuronProcessGroup(store, rank, size, timeout)

    dist.Backend.register_backend("neuron", make, devices=["neuron"])
