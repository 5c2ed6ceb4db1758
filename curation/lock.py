"""One writer a folder: a lock that names its owner, and that a run which restarts takes over.

On a file system the kernel holds it (flock) and lets go when its process ends, however it ends.
Where the kernel cannot, on object stores above all, a conditional write takes it. Everywhere the
owner says now and then that it is alive: machines that do not share a kernel judge by that alone.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import Protocol

import psutil

from curation import storage
from curation.errors import LockError, StorageError

logger = logging.getLogger(__name__)

LOCK_FILE = "_lock"
_CLOCK_S = 2.0
"""By which the start of one process may seem to differ, after its clock was set."""


@dataclass(frozen=True)
class Pace:
    """How often an owner is heard of, and how long it may be silent."""

    beat_s: float = 10.0
    """Between two signs of life."""
    silent_s: float = 60.0
    """Without one, an owner on another machine is taken for dead."""
    last_writes_s: float = 1.0
    """In which the workers of a killed run end with it."""


@dataclass(frozen=True)
class Owner:
    """The process that writes in a folder."""

    token: str
    """Of this lock alone."""
    host: str
    process: int
    started: float
    """When the process did, in seconds since 1970: numbers of processes are used again."""
    machine: str
    """Which processes can see each other: a kernel that was started once, and its namespace."""
    since: float
    beat: float
    """When it was last heard of."""

    @classmethod
    def here(cls) -> "Owner":
        """The process at hand."""
        now, me = time.time(), psutil.Process()
        started, machine = me.create_time(), _machine()
        return cls(secrets.token_hex(8), platform.node(), me.pid, started, machine, now, now)

    @classmethod
    def parse(cls, data: bytes) -> "Owner | None":
        """Read one; None where nothing whole is written."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def data(self) -> bytes:
        """The owner as JSON."""
        return json.dumps(asdict(self)).encode()

    @property
    def is_near(self) -> bool:
        """Whether it is a process that this one can see."""
        return self.machine == _machine()

    @property
    def is_alive(self) -> bool:
        """Whether a process that this one can see is still there."""
        try:
            started: float = psutil.Process(self.process).create_time()
        except psutil.Error:
            return False
        return abs(started - self.started) < _CLOCK_S

    def was_heard_of(self, pace: Pace) -> bool:
        """Whether it gave a sign of life lately, as far as clocks agree."""
        return abs(time.time() - self.beat) <= pace.silent_s

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        heard = f"last heard of {max(0.0, time.time() - self.beat):.0f} s ago"
        return f"process {self.process} on {self.host}, since {since}, {heard}"


class _Lock(Protocol):
    """A place for one owner."""

    def read(self) -> Owner | None:
        """Who it is."""

    def write(self, owner: Owner) -> None:
        """Say that it is alive."""

    def release(self) -> None:
        """Let go."""


@contextlib.contextmanager
def locked(folder: str, pace: Pace = Pace()) -> Iterator[None]:
    """Be the only one that writes in a folder.

    A process that may not write there gets no lock: it can do no harm.

    Raises:
        LockError: another does. The error names it.
    """
    owner = Owner.here()
    lock = _take(folder, owner, pace)
    if lock is None:
        yield
        return
    finished = threading.Event()
    words = (folder, lock, owner, finished, pace)
    heart = threading.Thread(target=_beat, args=words, daemon=True)
    heart.start()
    try:
        yield
    finally:
        finished.set()
        heart.join()
        lock.release()


def _take(folder: str, owner: Owner, pace: Pace) -> _Lock | None:
    """The lock that fits the folder, taken; None where this process may not write."""
    path = storage.join(folder, LOCK_FILE)
    try:
        storage.make_folder(folder)
        if storage.is_local(folder):
            kernels = _KernelLock(folder, path.removeprefix("file://"))
            with storage.storage_errors(path):
                if kernels.take(owner, pace):
                    return kernels
        lock = _WrittenLock(folder, path)
        lock.take(owner, pace)
    except StorageError as error:
        if not _is_forbidden(error.__cause__):
            raise
        return None
    return lock


def _is_forbidden(cause: BaseException | None) -> bool:
    forbidden = getattr(cause, "errno", None) == errno.EROFS
    return forbidden or isinstance(cause, PermissionError)


def _beat(folder: str, lock: _Lock, owner: Owner, finished: threading.Event, pace: Pace) -> None:
    """Tell that the owner is alive; end this process if another took its place meanwhile."""
    while not finished.wait(pace.beat_s):
        with contextlib.suppress(StorageError, OSError):  # the next time may go better
            found = lock.read()
            if found is not None and found.token != owner.token:
                logger.critical("%s: was taken over by %s; this run ends", folder, found)
                os._exit(1)
            lock.write(replace(owner, beat=time.time()))


def _refusal(folder: str, owner: Owner | None) -> LockError:
    who = "another process" if owner is None else str(owner)
    if owner is not None and owner.is_near and not owner.is_alive:
        who += " (it has ended, but what it started has not)"
    return LockError(f"{folder}: is in use by {who}; wait until it ends, or stop it")


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class _Opened(Enum):
    """What became of opening a file to lock it."""

    locked = auto()
    replaced = auto()
    """It is no longer the one in the folder: its owner has just let go."""
    unlockable = auto()


class _KernelLock:
    """A file that the kernel keeps for one process."""

    def __init__(self, folder: str, path: str) -> None:
        self._folder, self._path = folder, path
        self._file = -1

    def take(self, owner: Owner, pace: Pace) -> bool:
        """Become the owner, or raise `LockError`; False where the kernel cannot lock."""
        while (state := self._open()) is _Opened.replaced:
            pass
        if state is _Opened.unlockable:
            return False
        found = self.read()
        if found is not None and not found.is_near and found.was_heard_of(pace):
            os.close(self._file)  # a file system whose locks end at each machine
            raise _refusal(self._folder, found)
        if found is not None:
            _take_over(self._folder, found, pace)
        self.write(owner)
        return True

    def _open(self) -> _Opened:
        """Open the file and lock it."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = self.read()
            os.close(self._file)
            raise _refusal(self._folder, found) from None
        except OSError as error:
            os.close(self._file)
            if error.errno not in _NO_LOCKS:
                raise
            return _Opened.unlockable
        if _is_file(self._file, self._path):
            return _Opened.locked
        os.close(self._file)
        return _Opened.replaced

    def read(self) -> Owner | None:
        return Owner.parse(os.pread(self._file, 1 << 16, 0))

    def write(self, owner: Owner) -> None:
        data = owner.data()
        os.pwrite(self._file, data, 0)
        os.ftruncate(self._file, len(data))

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if _is_file(self._file, self._path):
                Path(self._path).unlink()
        os.close(self._file)


class _WrittenLock:
    """An object that only one process can create."""

    def __init__(self, folder: str, path: str) -> None:
        self._folder, self._path = folder, path
        self._token = ""

    def take(self, owner: Owner, pace: Pace) -> None:
        """Become the owner, or raise `LockError`."""
        self._token = owner.token
        if not storage.create(self._path, owner.data()):
            found = self.read()
            if found is not None and self._is_alive(found, pace):
                raise _refusal(self._folder, found)
            if found is not None:
                _take_over(self._folder, found, pace)
            self.write(owner)
        found = self.read()  # a store without conditional writes lets two create it
        if found is None or found.token != owner.token:
            raise _refusal(self._folder, found)

    def _is_alive(self, owner: Owner, pace: Pace) -> bool:
        """Clocks may differ: one that seems silent is watched for a while."""
        if owner.is_near:
            return owner.is_alive
        if owner.was_heard_of(pace):
            return True
        time.sleep(2 * pace.beat_s)
        return self.read() not in (owner, None)

    def read(self) -> Owner | None:
        if not storage.exists(self._path):
            return None
        return Owner.parse(storage.read_bytes(self._path))

    def write(self, owner: Owner) -> None:
        storage.write_bytes(self._path, owner.data())

    def release(self) -> None:
        found = self.read()
        if found is not None and found.token == self._token:
            storage.remove(self._path)


def _take_over(folder: str, dead: Owner, pace: Pace) -> None:
    logger.warning("%s: takes over from %s, which has ended", folder, dead)
    time.sleep(pace.last_writes_s)


def _is_file(file: int, path: str) -> bool:
    """Whether an open file is the one under that path."""
    try:
        return os.path.samestat(os.fstat(file), Path(path).stat())
    except FileNotFoundError:
        return False


def _machine() -> str:
    """What processes share that can see each other by their numbers."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115  (no path, a text)
    return platform.node()
