"""Limits per host that hold for all workers of one user on one machine together.

A slot of a host is a byte of one file, and who has locked it holds it: the system gives the slots
of a killed worker back. What a host's name hashes to says where its bytes are; nothing is written.
"""

import fcntl
import hashlib
import os
import struct
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

from curation.errors import StageError

_MAX_SLOTS = 1 << 10
"""Bytes that belong to one host."""
_POLL_S = 0.05
"""When to ask again for a slot that another process holds."""
_NUM_STARTS = 1 << 20
"""Hosts that share one of so many clocks wait for each other: seldom, and never too little."""


class MachineSlots:
    """Slots and clocks of hosts, shared through two files in a folder of the user's.

    One a process: the system locks for processes, not for threads.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise StageError(f"{folder}: belongs to another user; remove it, or set TMPDIR")
        self._slots = os.open(folder / "slots", os.O_RDWR | os.O_CREAT, 0o600)
        self._starts = os.open(folder / "starts", os.O_RDWR | os.O_CREAT, 0o600)
        self._held: dict[str, set[int]] = {}
        self._lock = threading.Lock()

    def try_start(self, host: str, per_host: int, delay_s: float) -> float:
        """Seconds until the host may be asked again; 0: now, and a slot of it is held."""
        number = _number_of(host)
        with self._lock:
            slot = self._take_slot(host, number, per_host)
            if slot is None:
                return _POLL_S
            wait_s = self._take_start(number, delay_s) if delay_s else 0.0
            if wait_s:
                self._free_slot(host, number, slot)
            return wait_s

    def end(self, host: str) -> None:
        """Give a slot of a host back."""
        with self._lock:
            self._free_slot(host, _number_of(host), max(self._held[host]))

    def _take_slot(self, host: str, number: int, per_host: int) -> int | None:
        held = self._held.setdefault(host, set())
        for slot in range(min(per_host, _MAX_SLOTS)):
            if slot in held:
                continue
            try:
                place = number * _MAX_SLOTS + slot
                fcntl.lockf(self._slots, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError:
                continue  # another process holds it
            held.add(slot)
            return slot
        if not held:
            del self._held[host]
        return None

    def _free_slot(self, host: str, number: int, slot: int) -> None:
        fcntl.lockf(self._slots, fcntl.LOCK_UN, 1, number * _MAX_SLOTS + slot)
        self._held[host].discard(slot)
        if not self._held[host]:
            del self._held[host]

    def _take_start(self, number: int, delay_s: float) -> float:
        """Seconds until the delay is over; 0: it is, and the next one has begun."""
        place = number % _NUM_STARTS * 8
        fcntl.lockf(self._starts, fcntl.LOCK_EX, 8, place)
        try:
            now = time.monotonic()
            (last,) = struct.unpack("<d", os.pread(self._starts, 8, place).ljust(8, b"\0"))
            wait_s = float(last) + delay_s - now
            if 0 < wait_s <= delay_s:  # a later time was written before the machine was started
                return wait_s
            os.pwrite(self._starts, struct.pack("<d", now), place)
            return 0.0
        finally:
            fcntl.lockf(self._starts, fcntl.LOCK_UN, 8, place)


@cache
def machine_slots() -> MachineSlots:
    """The slots of this machine, for this process."""
    return MachineSlots(Path(tempfile.gettempdir()) / f"curate-hosts-{os.getuid()}")


def _number_of(host: str) -> int:
    """48 bits, so that every slot's place is a file offset."""
    return int.from_bytes(hashlib.blake2b(host.encode(), digest_size=6).digest(), "little")
