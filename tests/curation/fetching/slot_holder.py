"""Holds slots of a host in a process of its own until it is killed."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def holding(folder: Path, host: str, count: int) -> Iterator[None]:
    """Have another process hold `count` slots; it is killed at the end."""
    command = [sys.executable, __file__, str(folder), host, str(count)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    with job, job.stdout:
        assert job.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            job.kill()


def main() -> None:
    sys.path.insert(0, ".")
    from curation.fetching.machine import MachineSlots

    folder, host, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    slots = MachineSlots(folder)
    assert [slots.try_start(host, count, 0) for _ in range(count)] == [0] * count
    sys.stdout.write("held\n")
    sys.stdout.flush()
    time.sleep(60)


if __name__ == "__main__":
    main()
