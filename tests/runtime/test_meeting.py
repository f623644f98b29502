"""How the processes of a run find each other where others have met before: a store outlives those that a restart replaces."""

from __future__ import annotations

import datetime
import threading
import time

import pytest
import torch
import torch.distributed as dist

from gpt.config import ParallelConfig
from gpt.runtime.cpu import Cpu
from gpt.runtime.distributed import _name_meeting, join_world


class Meeting:
    """A store, and a client of it for each process, as the agent of the first machine offers it to all attempts."""

    def __init__(self, size: int) -> None:
        second = datetime.timedelta(seconds=20)
        self.size = size
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=second)
        self.clients = [dist.TCPStore("127.0.0.1", self.server.port, is_master=False, timeout=second) for _ in range(size)]

    def come(self, *ranks: int, apart: float = 0.0, timeout: float = 20.0) -> dict[int, str | TimeoutError]:
        """What processes find that come in this order, each some seconds after the one before."""
        found: dict[int, str | TimeoutError] = {}

        def come(rank: int) -> None:
            self.clients[rank].set_timeout(datetime.timedelta(seconds=timeout))
            try:
                found[rank] = _name_meeting(self.clients[rank], rank, self.size, timeout)
            except TimeoutError as error:
                found[rank] = error

        threads = []
        for rank in ranks:
            threads.append(threading.Thread(target=come, args=(rank,)))
            threads[-1].start()
            time.sleep(apart)
        for thread in threads:
            thread.join()
        return found


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_all_find_one_name_that_no_meeting_before_had(order):
    meeting, before = Meeting(3), set()
    for _ in range(3):
        names = meeting.come(*order, apart=0.05)
        (name,) = set(names.values())
        assert len(names) == 3
        assert name not in before, "the addresses under it are of processes that are gone"
        before.add(name)


def test_who_died_while_the_others_waited_is_not_counted_as_here():
    meeting = Meeting(3)
    failed = meeting.come(0, 1, timeout=0.4)
    assert str(failed[0]) == "process 0 waited 0.4s (launch.timeout) in vain for all 3 processes of the run to come"
    assert str(failed[1]) == "process 1 waited 0.4s (launch.timeout) in vain for all 3 processes of the run to come"
    assert len(set(meeting.come(2, 1, 0, apart=0.05).values())) == 1


@pytest.mark.parametrize(("count", "is_restart"), [("0", False), ("1", True)])
def test_a_single_process_knows_that_it_was_started_again(count, is_restart, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    assert join_world(ParallelConfig("ddp"), Cpu("CPU", torch.float32), 1).is_restart is is_restart
