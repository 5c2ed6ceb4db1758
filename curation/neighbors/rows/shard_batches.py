"""Decisions on the shards of a pool, a batch of shards at a time.

What was found out about rows waits in files, one for each task that found it; whoever decides reads
a part of every file. The parts of a batch of shards are read at once: a small one takes as long.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from curation.exchange import Exchange
from curation.ledger import commit_shard, finished_shards
from curation.pool import Pool
from curation.stage import DatasetStage, Engine, Opened, Shard, StageFolder, Task

Findings = TypeVar("Findings")

_MOST_ROWS, _FEWEST_BATCHES = 1 << 17, 32
"""Rows of a batch at most, as long as there are so many batches for workers to share."""


class ShardBatch(NamedTuple):
    """Some shards of a pool that follow each other."""

    label: str
    """By which a failure is reported."""
    number: int
    """From 0."""
    shards: range


def shards_per_batch(pool: Pool) -> int:
    """Shards of a batch, but for the last."""
    most = _MOST_ROWS * pool.num_shards // max(1, pool.num_rows)
    return max(1, min(most, pool.num_shards // _FEWEST_BATCHES))


def batches_of(pool: Pool) -> list[ShardBatch]:
    """All shards of a pool, batch by batch."""
    size, every = shards_per_batch(pool), range(pool.num_shards)
    parts = [every[first : first + size] for first in every[::size]]
    return [
        ShardBatch(f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]), number, part)
        for number, part in enumerate(parts)
    ]


def of_shard(rows: pa.Table, shard: int) -> pa.Table:
    """Those of the rows that stand in one shard."""
    return rows.filter(pa.array(np.asarray(rows["shard"]) == shard))


@dataclass(frozen=True)
class BatchExchange(Exchange):
    """Rows on their way back to the shards of a pool, a batch of shards in each bucket."""

    shards_per_batch: int = 1

    @classmethod
    def of(cls, pool: Pool, folder: str) -> "BatchExchange":
        """One for a pool. folder: of its files."""
        size = shards_per_batch(pool)
        return cls(folder, max(1, -(-pool.num_shards // size)), shards_per_batch=size)

    def send(self, item: int, rows: pa.Table) -> None:
        """Write one item's rows, which have a column `shard`."""
        self.write(item, rows, np.asarray(rows["shard"]) // self.shards_per_batch)


@dataclass(frozen=True)
class DecideBatch(Task[ShardBatch, Opened, int], Generic[Findings, Opened]):
    """Decisions on the shards of one batch, and their receipts."""

    stage: DatasetStage
    pool: Pool
    folder: StageFolder

    @abstractmethod
    def read(self, batch: int) -> Findings:
        """What was found out about the rows of a batch."""

    @abstractmethod
    def decide(self, shard: Shard, found: Findings, opened: Opened) -> None:
        """Reject and describe the rows of a shard. found: of its batch."""

    def __call__(self, item: ShardBatch, opened: Opened) -> int:
        """Decide on the shards of a batch; give their number."""
        found = self.read(item.number)
        for index in item.shards:
            shard = Shard(self.pool.read(index, []), index)
            self.decide(shard, found, opened)
            commit_shard(self.stage, self.folder, shard)
        return len(item.shards)


def decide_shards(task: DecideBatch[Findings, Opened], engine: Engine) -> None:
    """Commit every batch of which a shard has no receipt yet."""
    done = finished_shards(task.folder)
    waiting = [batch for batch in batches_of(task.pool) if not done.keys() >= {*batch.shards}]
    for _ in engine.map(task, waiting, task.folder.stage):
        pass
