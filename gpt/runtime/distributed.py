"""The processes of a run: how they meet, which part of the work each has, and what they tell each other.

One process per device. They are started by `gpt.launch`, `torchrun` or `accelerate launch`, which all say in the environment who is
who. A run in one process has a `World` of size 1, in which nothing is sent.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gpt.config import ParallelConfig
from gpt.errors import UserError
from gpt.runtime.device import Device

T = TypeVar("T")

_COLLECTIVES = {
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all_single", "barrier", "broadcast",
    "broadcast_object_list", "new_group", "init_process_group", "reduce_scatter_tensor",
}  # fmt: skip
_FIRST_FAILURE = "gpt/failed"  # key of the store in which processes count their failures


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is.

    Attributes:
        rank, size: this process among all.
        local_rank: among those of this machine; its device.
        local_size: processes of this machine.
        data_rank, data_size: which part of every batch it works on, of how many. Processes that split matrices between them (tensor
            parallelism) work on the same part.
        mesh: (replicate, shard, tensor) layout of the processes; None for one.
        is_divided: whether each process holds only a part of the parameters.
        is_restart: whether a launcher, on any machine, has started them again after a failure.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    data_rank: int = 0
    data_size: int = 1
    mesh: DeviceMesh | None = None
    is_divided: bool = False
    is_restart: bool = False
    _control: Any = None  # process group of CPU tensors, for what the host must know

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def work_mesh(self) -> DeviceMesh | None:
        """The mesh without dimensions of one process, but for that of the parameters, to divide work over all processes; None for one."""
        if self.mesh is None:
            return None
        names = self.mesh.mesh_dim_names or ()
        kept = tuple(name for name in names if self.mesh[name].size() > 1 or (self.is_divided and name == "shard"))
        return self.mesh[kept]

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The processes that divide a batch; None: all."""
        if self.mesh is None or self.mesh["tensor"].size() == 1:
            return None
        return self.mesh["replicate", "shard"]._flatten("data").get_group()

    def share(self, make: Callable[[], T]) -> T:
        """What `make` returns in the main process, in all of them; it must be picklable."""
        if self.size == 1:
            return make()
        found = [make() if self.is_main else None]
        dist.broadcast_object_list(found, src=0, group=self._control)
        return cast(T, found[0])

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, in all of them; it must be picklable."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._control)
        return found

    def sum_over_data(self, values: Tensor) -> Tensor:
        """The sum of the processes' values, in place; those of tensor parallelism, which have the same, count once."""
        if self.data_size > 1:
            dist.all_reduce(values, group=self.data_group)
        return values

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of the processes' numbers in fp64, by way of the host; those of tensor parallelism, which have the same, count once."""
        if self.data_size == 1:
            return list(values)
        counts = self.rank % (self.size // self.data_size) == 0
        totals = torch.tensor(values, dtype=torch.float64) if counts else torch.zeros(len(values), dtype=torch.float64)
        dist.all_reduce(totals, group=self._control)
        return totals.tolist()

    def least(self, value: int) -> int:
        """The least of the processes' values."""
        if self.size == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, op=dist.ReduceOp.MIN, group=self._control)
        return int(values)

    def main_first(self, work: Callable[[], T]) -> T:
        """Do some work that the others on this machine can profit from in one process first, however long it takes."""
        if self.local_size == 1 or self.size == 1:
            return work()
        key = f"gpt/first/{self.rank // self.local_size}"
        store = dist.distributed_c10d._get_default_store()
        if self.local_rank:
            store.wait([key], datetime.timedelta(days=7))
            return work()
        result = work()
        store.set(key, "done")
        return result

    def leave(self) -> None:
        """End the connections."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class Agreement:
    """What the processes decide together at every step: small numbers, of which each gets the largest, one step late.

    One step late, because then no process waits for another: the exchange goes on during the step. In one process there is nothing to
    wait for, and the numbers come back at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._values: Tensor | None = None
        self._work: dist.Work | None = None

    def exchange(self, *values: float) -> list[float]:
        """Give this process's numbers, get the largest of those that the processes gave at the call before; the first call waits."""
        if self._world.size == 1:
            return list(values)
        if self._work is None:
            self._send(values)
        assert self._work is not None
        assert self._values is not None
        self._work.wait()
        agreed = self._values.tolist()
        self._send(values)
        return agreed

    def _send(self, values: Sequence[float]) -> None:
        self._values = torch.tensor(values, dtype=torch.float64)
        self._work = dist.all_reduce(self._values, op=dist.ReduceOp.MAX, group=self._world._control, async_op=True)


def is_worker() -> bool:
    """Whether a launcher has started this process as one of several, or as one that may be restarted."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def join_world(config: ParallelConfig, device: Device, timeout_seconds: float) -> World:
    """Meet the other processes, if a launcher has started several.

    Args:
        config: what they do together.
        device: of this process.
        timeout_seconds: how long to wait for the others, now and later.

    Raises:
        UserError: the number of processes does not fit the config.
        TimeoutError: another process has not come.
    """
    size = int(os.environ["WORLD_SIZE"]) if is_worker() else 1
    if size == 1:
        return World(is_restart=_restarts() > 0)
    for name in ("torch.distributed.tensor", "torch.distributed._functional_collectives"):
        logging.getLogger(name).setLevel(logging.ERROR)  # how DTensors are sent could be faster on gloo, each process warns
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        device.claim(local_rank)
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        store = dist.PrefixStore(_name_meeting(store, rank, size, timeout_seconds), store)
        dist.init_process_group(device.process_group, store=store, rank=rank, world_size=size, timeout=timeout)
    if config.name == "none":
        raise UserError(f"parallel=none is one process, and {size} were started; add parallel=ddp or parallel=fsdp")
    if size % config.tensor:
        raise UserError(f"parallel.tensor={config.tensor} does not divide the {size} processes")
    if size // config.tensor % config.replicate:
        left = f"{size // config.tensor} groups of parallel.tensor={config.tensor}" if config.tensor > 1 else f"{size} processes"
        raise UserError(f"parallel.replicate={config.replicate} does not divide the {left}")
    control = dist.new_group(backend="gloo", timeout=timeout)  # whose own would be half an hour
    replicate = config.replicate if config.name == "fsdp" else size // config.tensor
    shape = (replicate, size // (replicate * config.tensor), config.tensor)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard", "tensor"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    is_divided = config.name == "fsdp" or config.tensor > 1
    restarts = torch.tensor(_restarts())
    dist.all_reduce(restarts, op=dist.ReduceOp.MAX, group=control)
    data_rank, data_size = rank // config.tensor, size // config.tensor
    return World(rank, size, local_rank, local_size, data_rank, data_size, mesh, is_divided, bool(restarts), control)


def _restarts() -> int:
    """How often the launcher of this machine has started its processes again; those of other machines may have counted otherwise."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _name_meeting(store: dist.Store, rank: int, size: int, timeout_seconds: float) -> str:
    """A name that these processes have in common with no earlier meeting, of which the store may hold addresses that nobody answers.

    The first process makes it up. Another one may find that of the meeting before: it says under that name that it is here, and looks again
    until it is answered. All are answered when all are here.

    Raises:
        TimeoutError: somebody has not come.
    """
    deadline = time.monotonic() + timeout_seconds
    own = uuid.uuid4().hex
    try:
        if rank == 0:
            store.set("gpt/meeting", own)
            others = [f"gpt/{own}/{other}" for other in range(1, size)]
            store.wait(others)
            for name in store.multi_get(others):
                store.set(f"gpt/{own}/{name.decode()}", "all are here")
            return f"gpt/{own}"
        while time.monotonic() < deadline:
            found = f"gpt/{store.get('gpt/meeting').decode()}"
            store.set(f"{found}/{rank}", own)
            if store.check([f"{found}/{own}"]):
                return found
            time.sleep(0.2)
    except dist.DistStoreError as error:
        if not waited_too_long(error):
            raise
    raise TimeoutError(f"process {rank} waited {timeout_seconds:g}s (launch.timeout) in vain for all {size} processes of the run to come")


def is_first_failure() -> bool:
    """Whether no other process of this run has failed before: only the first one's error is worth reading."""
    if not dist.is_initialized():
        return True
    with contextlib.suppress(RuntimeError):  # the store's own process is gone: then it has failed before
        return dist.distributed_c10d._get_default_store().add(_FIRST_FAILURE, 1) == 1
    return False


def lost_the_others(error: BaseException) -> bool:
    """Whether an error says that another process has closed its connections, and nothing about this one."""
    return isinstance(error, RuntimeError) and bool(
        re.search(r"Connection (closed|reset) by|Broken pipe|remote process has terminated|application that peer disconnected", str(error))
    )


def waited_too_long(error: BaseException) -> bool:
    """Whether an error says that another process did not come in time."""
    return isinstance(error, RuntimeError) and bool(re.search(r"[Tt]imed out|[Tt]imeout|wait timeout", str(error)))


def collective_of(error: BaseException) -> str:
    """Which exchange an error came out of, by the functions that it passed."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    if "exchange" in names:
        return "all_reduce (whether to stop)"
    if found := [name for name in names if name in _COLLECTIVES]:
        return found[-1]
    if "redistribute" in names:
        return "all_gather (the matrices that Muon divides among the processes)"
    return "all_reduce or reduce_scatter (gradients)" if "backward" in names else "all_gather (parameters)"
