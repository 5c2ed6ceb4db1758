"""Decisions on the shards of a pool, a run of shards at a time.

What was found out about rows waits in files, one for each task that found it; whoever decides reads
a part of every file. Those of a run of shards are read at once: a small part takes as long.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation.exchange import Exchange
from curation.ledger import commit_shard, finished_shards
from curation.pool import Pool
from curation.stage import DatasetStage, Engine, Shard, StageFolder, Task

_ROWS_TOGETHER, _FEWEST_RUNS = 1 << 17, 32
"""Rows of a run at most, as long as there are so many runs for workers to share."""


def shards_together(pool: Pool) -> int:
    """Shards of a run."""
    most = _ROWS_TOGETHER * pool.num_shards // max(1, pool.num_rows)
    return max(1, min(most, pool.num_shards // _FEWEST_RUNS))


def num_runs(pool: Pool) -> int:
    """Runs of the shards of a pool, at least one."""
    return max(1, -(-pool.num_shards // shards_together(pool)))


def of_shard(rows: pa.Table, shard: int) -> pa.Table:
    """Those of the rows that stand in one shard."""
    return rows.filter(pa.array(np.asarray(rows["shard"]) == shard))


@dataclass(frozen=True)
class ByRun(Exchange):
    """Rows on their way back to the shards of a pool, a run of shards in each bucket."""

    together: int = 1
    """Shards of a run."""

    @classmethod
    def of(cls, pool: Pool, folder: str) -> "ByRun":
        """One for a pool. folder: of its files."""
        return cls(folder, num_runs(pool), together=shards_together(pool))

    def send(self, item: int, rows: pa.Table) -> None:
        """Write one item's rows, which have a column `shard`."""
        self.write(item, rows, np.asarray(rows["shard"]) // self.together)


@dataclass(frozen=True)
class DecideRun(Task[tuple[str, int, range], int]):
    """Decisions on the shards of one run, and their receipts.

    An item is the name of a run, by which a failure is reported, its number, and its shards.
    """

    stage: DatasetStage
    pool: Pool
    folder: StageFolder

    @abstractmethod
    def read(self, run: int) -> Any:
        """What was found out about the rows of a run."""

    @abstractmethod
    def decide(self, shard: Shard, found: Any, opened: Any) -> None:
        """Reject and describe the rows of a shard. opened: what `open` gave."""

    def __call__(self, item: tuple[str, int, range], opened: Any) -> int:
        """Decide on the shards of a run; give their number."""
        _, run, shards = item
        found = self.read(run)
        for index in shards:
            shard = Shard(self.pool.read(index, []), index)
            self.decide(shard, found, opened)
            commit_shard(self.stage, self.folder, shard)
        return len(shards)


def decide_shards(task: DecideRun, engine: Engine) -> None:
    """Commit every run of which a shard has no receipt yet."""
    done, together = finished_shards(task.folder), shards_together(task.pool)
    every, items = range(task.pool.num_shards), []
    for run, first in enumerate(every[::together]):
        shards = every[first : first + together]
        if any(shard not in done for shard in shards):
            name = f"{shards[0]} to {shards[-1]}" if len(shards) > 1 else str(shards[0])
            items.append((name, run, shards))
    for _ in engine.map(task, items, task.folder.stage):
        pass
