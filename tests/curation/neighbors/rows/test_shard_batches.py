from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from curation.ledger import finished_shards
from curation.neighbors.rows import shard_batches
from curation.neighbors.rows.shard_batches import (
    BatchExchange,
    DecideBatch,
    batches_of,
    decide_shards,
    of_shard,
)
from curation.stage import DatasetStage, StageFolder, reject
from pipelines.engines.local_engine import LocalEngine

SIZES = [3, 0, 5, 2, 4, 1, 1, 6]


class Odd(DatasetStage):
    """Drops the rows that are told to be odd."""

    reasons = ("odd",)

    def run(self, inputs, folder, engine):
        raise AssertionError("only its decisions are of interest")


@dataclass(frozen=True)
class DropOdd(DecideBatch[pa.Table, None]):
    by_shard: BatchExchange

    def read(self, batch):
        return self.by_shard.read(batch, 2)

    def decide(self, shard, found, opened):
        rows = of_shard(found, shard.index)
        odd = np.zeros(shard.num_rows, bool)
        odd[np.asarray(rows["row"])] = np.asarray(rows["number"]) % 2 == 1
        reject(shard, odd, "odd")


@pytest.mark.parametrize("fewest", [1, 3, 32])
def test_batches_of__hold_every_shard_once_in_order(embed, monkeypatch, fewest):
    monkeypatch.setattr(shard_batches, "_FEWEST_BATCHES", fewest)
    pool = embed(np.ones((sum(SIZES), 4)), sizes=SIZES)
    batches = batches_of(pool)
    assert [shard for batch in batches for shard in batch.shards] == list(range(8))
    assert [batch.number for batch in batches] == list(range(len(batches)))
    assert len(batches) == BatchExchange.of(pool, "memory://x").num_buckets
    assert len(batches) >= min(fewest, 8)


@pytest.mark.parametrize("fewest", [1, 3, 32])
def test_decide_shards__every_row_is_decided_in_its_own_shard_and_once(
    embed, tmp_path, monkeypatch, fewest
):
    monkeypatch.setattr(shard_batches, "_FEWEST_BATCHES", fewest)
    pool = embed(np.ones((sum(SIZES), 4)), sizes=SIZES)
    shards = np.repeat(np.arange(8), SIZES)
    rows = np.concatenate([np.arange(size) for size in SIZES])
    told = pa.table({"shard": shards, "row": rows, "number": np.arange(len(rows))})
    by_shard = BatchExchange.of(pool, str(tmp_path / "x"))
    for item, start in enumerate((0, 11)):  # as two tasks found them
        by_shard.send(item, told.slice(start, 11))
    folder = StageFolder(str(tmp_path / "stage"), "odd")
    task = DropOdd(Odd(), pool, folder, by_shard)
    decide_shards(task, LocalEngine())
    receipts = finished_shards(folder)
    numbers = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    assert {index: receipts[index].dropped.get("odd", 0) for index in range(8)} == {
        index: int((own % 2).sum()) for index, own in enumerate(numbers)
    }
    (tmp_path / "x" / "mapped" / "000000.bin").unlink()  # nothing is decided again
    decide_shards(task, LocalEngine())
