"""Which row is fetched next: hosts take turns, none gets too much, back-off holds no thread."""

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from curation.fetching.machine import MachineSlots, machine_slots


@dataclass
class _Host:
    active: int = 0
    parked: deque[int] = field(default_factory=deque)


class HostSchedule:
    """Hands rows out to threads.

    A row of a host that is busy waits without a thread; so does one that is to be tried again.
    Hosts are busy for all processes of the machine together.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        per_host: int,
        delay_s: float,
        machine: MachineSlots | None = None,
    ) -> None:
        self._row_hosts = hosts
        self._per_host = per_host
        self._delay_s = delay_s
        self._machine = machine or machine_slots()
        self._hosts = {host: _Host() for host in hosts}
        self._order = itertools.count()
        self._condition = threading.Condition()
        # (ready at, tie-break, row, whether it counts as active and only waits for the machine)
        self._heap = [(0.0, next(self._order), row, False) for row in _in_turns(hosts)]
        heapq.heapify(self._heap)

    def take(self) -> int:
        """Give a row whose turn it is; waits for one. Call it once a row, and once a retry."""
        with self._condition:
            while True:
                now = time.monotonic()
                if self._heap and self._heap[0][0] <= now:
                    row = self._start(now)
                    if row is not None:
                        return row
                else:
                    self._condition.wait(self._heap[0][0] - now if self._heap else None)

    def give_back(self, row: int, retry_in_s: float | None = None) -> None:
        """End a row's attempt; its host's slot goes to the next."""
        with self._condition:
            name = self._row_hosts[row]
            host = self._hosts[name]
            host.active -= 1
            self._machine.end(name)
            if host.parked:
                self._push(time.monotonic(), host.parked.popleft(), is_active=False)
            if retry_in_s is not None:
                self._push(time.monotonic() + retry_in_s, row, is_active=False)

    def _start(self, now: float) -> int | None:
        """The first row of the heap, unless its host is busy or must be left alone for a while."""
        _, _, row, is_active = heapq.heappop(self._heap)
        name = self._row_hosts[row]
        host = self._hosts[name]
        if not is_active:
            if host.active >= self._per_host:
                host.parked.append(row)
                return None
            host.active += 1
        wait_s = self._machine.try_start(name, self._per_host, self._delay_s)
        if wait_s:
            self._push(now + wait_s, row, is_active=True)
            return None
        return row

    def _push(self, ready_at: float, row: int, *, is_active: bool) -> None:
        heapq.heappush(self._heap, (ready_at, next(self._order), row, is_active))
        self._condition.notify()


def _in_turns(hosts: Sequence[str]) -> list[int]:
    """Rows so that hosts take turns: the first row of each, then the second of each, and so on."""
    turns: dict[str, int] = {}
    keys = []
    for host in hosts:
        turns[host] = turns.get(host, -1) + 1
        keys.append(turns[host])
    return sorted(range(len(hosts)), key=keys.__getitem__)
