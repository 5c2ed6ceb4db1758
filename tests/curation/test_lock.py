"""Locks between real processes, on a disk and on an object store."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from curation import storage
from curation.errors import LockError
from curation.lock import LOCK_FILE, Owner, Pace, locked

FAST = Pace(beat_s=0.1, silent_s=100.0, last_writes_s=0.1)

HOLD = """
import sys, time
from curation.lock import Pace, locked
with locked(sys.argv[1], Pace(beat_s=0.1, silent_s=1.0, last_writes_s=0.1)):
    print("mine", flush=True)
    time.sleep(float(sys.argv[2]))
print("over", flush=True)
"""


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """A folder whose file system has locks, one whose has not, or one in a bucket."""
    kind = getattr(request, "param", "disk")
    if kind == "bucket":
        sys.path.insert(0, "tests/pipelines")
        from object_store import served_bucket

        with served_bucket(monkeypatch) as bucket:
            yield f"{bucket}/work"
        return
    if kind == "no locks":
        monkeypatch.setattr(fcntl, "flock", _no_locks)
    yield str(tmp_path / "work")


def _no_locks(*_):
    raise OSError(37, "No locks available")


@contextmanager
def holder(folder, script=HOLD):
    """A process that has the lock, and the first line that it says."""
    command = [sys.executable, "-c", script, folder, "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def write_owner(folder, **changes):
    """Leave the lock of some other owner."""
    owner = replace(Owner.here(), **changes)
    storage.write_bytes(storage.join(folder, LOCK_FILE), owner.data())
    return owner


MINE = 'print("mine", flush=True)'
everywhere = pytest.mark.parametrize("folder", ["disk", "no locks", "bucket"], indirect=True)
shared = pytest.mark.parametrize("folder", ["disk", "bucket"], indirect=True)


@everywhere
def test_locked__leaves_nothing(folder):
    for _ in range(2):
        with locked(folder, FAST):
            assert storage.exists(storage.join(folder, LOCK_FILE))
        assert not storage.exists(storage.join(folder, LOCK_FILE))


@shared
def test_locked__a_second_process_is_told_who_holds_it(folder):
    with holder(folder) as (process, _):
        with pytest.raises(LockError) as caught, locked(folder, FAST):
            pass
        line, who = str(caught.value), f"process {process.pid} on {os.uname().nodename}"
        assert line.startswith(f"{folder}: is in use by {who}, since 20")
        assert "last heard of" in line
    with locked(folder, FAST):  # the same host: at once
        owner = Owner.parse(storage.read_bytes(storage.join(folder, LOCK_FILE)))
    assert owner.process == os.getpid()


@everywhere
def test_locked__this_process_locks_itself_out_too(folder):
    with locked(folder, FAST), pytest.raises(LockError, match="is in use"), locked(folder, FAST):
        pass


@everywhere
def test_locked__a_number_that_another_process_has_now_is_no_owner(folder):
    write_owner(folder, started=time.time() - 1e6)
    with locked(folder, FAST):
        pass


@everywhere
def test_locked__another_machine_is_believed_as_long_as_it_is_heard_of(folder):
    owner = write_owner(folder, machine="elsewhere", host="far")
    with pytest.raises(LockError, match="on far"), locked(folder, FAST):
        pass
    write_owner(folder, **asdict(owner) | {"beat": time.time() - 1000})
    with locked(folder, FAST):
        pass


@pytest.mark.parametrize("folder", ["no locks", "bucket"], indirect=True)
def test_locked__another_machine_whose_clock_is_late_is_watched(folder):
    owner = write_owner(folder, machine="elsewhere", beat=time.time() - 1000)
    late = replace(owner, beat=owner.beat + 1).data()
    path = storage.join(folder, LOCK_FILE)
    beat = threading.Timer(0.3, storage.write_bytes, (path, late))
    beat.start()
    pace = Pace(beat_s=1.0)
    with pytest.raises(LockError, match="is in use"), locked(folder, pace):
        pass
    beat.join()


@everywhere
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"host": 3}', b"\xff"])
def test_locked__what_is_no_owner_is_taken_over(folder, data):
    storage.write_bytes(storage.join(folder, LOCK_FILE), data)
    with locked(folder, FAST):
        pass


@shared
def test_locked__who_is_taken_over_ends(folder):
    with holder(folder) as (process, _):
        path = storage.join(folder, LOCK_FILE)
        other = Owner.here().data()
        if storage.is_local(path):
            with Path(path).open("r+b") as file:
                file.write(other + b" " * 100)
        else:
            storage.write_bytes(path, other)
        assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 1


def test_locked__what_a_dead_owner_started_holds_it_on(folder):
    fork = "child = os.fork()\n    child or time.sleep(60)\n    print(child, flush=True)"
    script = HOLD.replace("import sys", "import os, sys").replace(MINE, fork)
    with holder(folder, script) as (process, child):
        process.kill()
        process.wait()
        words = "it has ended, but what it started has not"
        with pytest.raises(LockError, match=words), locked(folder, FAST):
            pass
        os.kill(int(child), signal.SIGKILL)


def test_locked__the_owner_is_plain_json(folder):
    with locked(folder, FAST):
        found = json.loads(storage.read_bytes(storage.join(folder, LOCK_FILE)))
    assert set(found) == {"token", "host", "process", "started", "machine", "since", "beat"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_locked__where_nothing_may_be_written_there_is_no_lock(folder):
    Path(folder).mkdir(mode=0o500)
    with locked(folder, FAST):
        pass
