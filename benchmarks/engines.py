"""What each engine costs on one machine: its start, and what it adds to an item.

    python benchmarks/engines.py [--rounds 3] [--workers 2] [--items 1000]

One row an engine: wall and core seconds until each of the workers has answered one empty item, then
of a further item (the mean over --items empty ones), and the processes and the memory (proportional
set sizes) that the engine holds then. Every round is a process of its own; the least counts, since
other work on the machine only adds.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil

from curation.stage import Task
from pipelines.engines.local_engine import LocalEngine
from pipelines.engines.ray_engine import RayEngine

ENGINES = {"local": LocalEngine, "ray": RayEngine}


@dataclass(frozen=True)
class Nothing(Task[int, None, int]):
    """Gives an item back."""

    def __call__(self, item, opened):
        """Do nothing with it."""
        return item


def core_seconds() -> float:
    """Core seconds of this process and of all that it has started."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(one.cpu_times()[:4]) for one in family)


def measure(kind: str, workers: int, items: int) -> dict[str, float]:
    """Run in a process of its own."""
    began, before = time.perf_counter(), core_seconds()
    engine = ENGINES[kind](workers)
    list(engine.map(Nothing(), range(workers), "start"))
    started, after = time.perf_counter(), core_seconds()
    list(engine.map(Nothing(), range(items), "items"))
    ended, last = time.perf_counter(), core_seconds()
    family = psutil.Process().children(recursive=True)
    return {
        "start wall s": started - began,
        "start core s": after - before,
        "item wall ms": 1000 * (ended - started) / items,
        "item core ms": 1000 * (last - after) / items,
        "processes": len(family),
        "memory GB": sum(one.memory_full_info().pss for one in family) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--one", choices=list(ENGINES))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.workers, options.items)))
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for kind in ENGINES:
            command = [sys.executable, __file__, "--one", kind]
            command += ["--workers", str(options.workers), "--items", str(options.items)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            known = best.setdefault(kind, found)
            best[kind] = {name: min(known[name], value) for name, value in found.items()}
    print(f"| engine | {' | '.join(best['local'])} |")
    print(f"|---|{'---|' * len(best['local'])}")
    for kind, found in best.items():
        print(f"| {kind} | {' | '.join(f'{value:.3g}' for value in found.values())} |")


if __name__ == "__main__":
    main()
