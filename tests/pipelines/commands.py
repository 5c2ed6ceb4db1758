"""The command line as users meet it: what it prints, and the one line of a failure."""

import subprocess
import sys
from dataclasses import dataclass

from curation.stage import Engine
from pipelines.cli.options import ShardOptions
from pipelines.engines.local_engine import LocalEngine

CURATE = [sys.executable, "-c", "from pipelines.cli.app import main; main()"]


def curate(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([*CURATE, *map(str, words)], capture_output=True, text=True, check=False)


def succeeds(*words: object) -> str:
    done = curate(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(code: int, *words: object) -> str:
    """The one line on stderr of a verb that fails with a code."""
    done = curate(*words)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("curate: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@dataclass(frozen=True)
class Here(ShardOptions):
    """This process as the engine of a command, with all that a test has changed in it."""

    def start(self) -> Engine:
        return LocalEngine()
