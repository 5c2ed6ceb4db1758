"""An engine that measures the work it hands on: seconds, core-seconds and memory of each item."""

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from curation.stage import Engine, Item, Opened, Resources, Result, Task

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class Usage:
    """What items took, added up."""

    items: int = 0
    """Items done."""
    open_s: float = 0.0
    """Seconds of opening models and the like."""
    item_s: float = 0.0
    """Seconds in which workers were at work on items."""
    cpu_s: float = 0.0
    """Seconds of cores inside these; with several threads more than `item_s`."""
    wait_s: float = 0.0
    """Seconds of items in which no core worked for them: they waited for disk or network."""
    peak_bytes: int = 0
    """Memory of the largest worker at its peak."""
    grown_bytes: int = 0
    """By how much the memory of a worker grew for one item at most."""
    retries: int = 0
    """Failures that were tried again."""

    def add(self, other: "Usage") -> None:
        """Add what another item or step took."""
        self.items += other.items
        self.open_s += other.open_s
        self.item_s += other.item_s
        self.cpu_s += other.cpu_s
        self.wait_s += other.wait_s
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.grown_bytes = max(self.grown_bytes, other.grown_bytes)
        self.retries += other.retries


@dataclass
class MeteredEngine(Engine):
    """Hands tasks on to another engine, and tells a listener what each item took."""

    engine: Engine
    listener: Callable[[str, int, Usage], None]
    """Hears the label of the step, how many items it has, and what one of them took."""

    @property
    def workers(self) -> int:
        """Tasks that run at once."""
        return self.engine.workers

    @property
    def workers_per_node(self) -> int:
        """Those of one machine."""
        return self.engine.workers_per_node

    @property
    def is_one_machine(self) -> bool:
        """Whether all work is done on one machine."""
        return self.engine.is_one_machine

    def everywhere(self, task: Task[None, Opened, Result], label: str) -> list[tuple[str, Result]]:
        """Run a task once in every worker or node."""
        return self.engine.everywhere(task, label)

    def map(
        self, task: Task[Item, Opened, Result], items: Sequence[Item], label: str
    ) -> Iterator[tuple[Item, Result]]:
        """Run a task on every item (see `Engine.map`)."""
        before = self.engine.retries
        try:
            for item, (result, usage) in self.engine.map(_Timed(task), items, label):
                self.listener(label, len(items), usage)
                yield item, result
        finally:
            retries = self.engine.retries - before
            if retries:
                self.listener(label, len(items), Usage(retries=retries))


@dataclass(frozen=True)
class _Timed(Task[Item, "_OpenedTask[Opened]", tuple[Result, Usage]]):
    """A task that also says what it took."""

    task: Task[Item, Opened, Result]

    @property
    def resources(self) -> Resources:
        return self.task.resources

    def name_of(self, item: Item) -> str:
        return self.task.name_of(item)

    def open(self) -> "_OpenedTask[Opened]":
        began = time.perf_counter()
        opened = self.task.open()
        return _OpenedTask(opened, time.perf_counter() - began)

    def __call__(self, item: Item, opened: "_OpenedTask[Opened]") -> tuple[Result, Usage]:
        open_s, opened.open_s = opened.open_s, 0.0  # once
        forget_peak()
        held = peak_bytes()
        began, cpu_began = time.perf_counter(), time.process_time()
        result = self.task(item, opened.opened)
        item_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        waited = max(0.0, item_s - cpu_s)
        peak = peak_bytes()
        return result, Usage(1, open_s, item_s, cpu_s, waited, peak, max(0, peak - held))


@dataclass
class _OpenedTask(Generic[Opened]):
    """What a task opened."""

    opened: Opened
    open_s: float
    """Seconds that it took, until an item has told them."""


def peak_bytes() -> int:
    """Most memory that this process has held (on Linux since `forget_peak`)."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def forget_peak() -> None:
    """Let `peak_bytes` begin anew, where the system offers that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(_CLEAR_REFS, os.O_WRONLY)
        try:
            os.write(descriptor, b"5")
        finally:
            os.close(descriptor)
