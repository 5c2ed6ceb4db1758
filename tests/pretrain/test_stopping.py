"""Whoever stops a run signals all of its processes: it saves, and leaves none of them behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pretrain import checkpoint
from tests.pretrain.small_runs import write_folder

SCRIPT = """
import sys
import time
from pretrain.train import run
from tests.pretrain.small_runs import small_config

def progress(record):
    print(record["step"], flush=True)
    if record["step"] == 2 and sys.argv[3:]:
        time.sleep(1000)

config = small_config(optim={"steps": 100_000}, data={"workers": 2})
result = run(config, *sys.argv[1:3], progress=progress)
print("ended at", result.steps, flush=True)
"""


@contextmanager
def running(folder: Path, *launcher: str, busy: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A run of two loader workers in a process group of its own, after its second step."""
    images = folder / "images"
    if not images.exists():
        write_folder(images)
        (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, *launcher, str(folder / "script.py"), str(images), f"{folder}/out"]
    command += ["busy"] if busy else []
    path = {"PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **path},
    ) as process:
        assert process.stdout is not None
        try:
            assert any(line.strip() == "2" for line in process.stdout)
            yield process
        finally:
            with_group = [pid for pid in group_of(process.pid) if pid != process.pid]
            for pid in (process.pid, *with_group):
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)


def group_of(leader: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(") ")[2].split()[:3]
        except OSError:
            continue
        if int(group) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def all_end(group: int) -> bool:
    """Whether every process of a group is gone within ten seconds."""
    for _ in range(100):
        if not group_of(group):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_run__signal_to_all_processes_leaves_a_checkpoint(
    tmp_path: Path, kind: signal.Signals
) -> None:
    with running(tmp_path) as process:
        os.killpg(process.pid, kind)
        os.killpg(process.pid, kind)  # as `timeout` does: one request
        out, err = process.communicate(timeout=60)
        assert all_end(process.pid)
    assert process.returncode == 0, err
    (step,) = checkpoint.saved_steps(tmp_path / "out")
    assert f"ended at {step}" in out
    assert "Traceback" not in err


def test_run__workers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        assert len(group_of(process.pid)) >= 3
        process.kill()
        assert all_end(process.pid)
        process.communicate(timeout=10)  # nothing holds its output


def test_run__second_signal_ends_at_once(tmp_path: Path) -> None:
    with running(tmp_path, busy=True) as process:
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)
        assert all_end(process.pid)
    assert process.returncode == -signal.SIGTERM
    assert not checkpoint.saved_steps(tmp_path / "out")


@pytest.mark.slow
def test_run__signal_to_torchrun_and_its_processes(tmp_path: Path) -> None:
    with running(tmp_path, "-m", "torch.distributed.run", "--nproc-per-node=2") as process:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=100)
        assert all_end(process.pid)
    assert len(checkpoint.saved_steps(tmp_path / "out")) == 1
