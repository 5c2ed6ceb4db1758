import numpy as np
import pyarrow as pa
import pytest

from curation.ledger import finished_shards
from curation.neighbors.dedup.judge_components import ComponentVerdicts
from curation.neighbors.dedup.verdicts import BASE, DecideByVerdicts, Verdicts
from curation.neighbors.rows.arrange import arrange
from curation.neighbors.rows.packed_rows import pack_rows
from curation.neighbors.rows.routers import HashRouter
from curation.neighbors.rows.shard_batches import BatchExchange, decide_shards
from curation.neighbors.rows.vectors import VectorSource
from curation.schema import ids_to_bytes
from curation.stage import StageFolder
from curation.stages.near_dedup import NearDedup
from curation.storage import read_parquet
from pipelines.engines.local_engine import LocalEngine


@pytest.fixture
def decided(embed, tmp_path):
    """Decisions on seven rows in two shards, of which the last has no direction."""
    rows = np.eye(7)
    rows[6] = 0
    pool = embed(rows, sizes=[4, 3])
    ids = pool.live_ids(0).to_pylist() + pool.live_ids(1).to_pylist()
    packed = pack_rows(ids_to_bytes(pa.chunked_array([pa.array(ids)])))
    arrange([VectorSource(pool, "copy")], HashRouter(2), [0, 1, 2], str(tmp_path), LocalEngine())

    def sent(name, rows):
        table = pa.table({column: [row[column] for row in rows] for column in rows[0]})
        exchange = BatchExchange.of(pool, str(tmp_path / name))
        for name in {"component", "twin"} & set(table.column_names):
            found = packed.take(table[name])
            table = table.set_column(table.column_names.index(name), name, found)
        exchange.send(0, table)
        return ComponentVerdicts(exchange, 1)

    def decide(duplicates, leaks):
        verdicts = Verdicts(
            str(tmp_path), 0.5, sent("d", duplicates), 0.4, leaks and sent("l", leaks), ("bench",)
        )
        folder = StageFolder(str(tmp_path / "stage"), "near_dedup")
        stage = NearDedup(embeddings="copy", against=("bench",))
        decide_shards(DecideByVerdicts(stage, pool, folder, verdicts), LocalEngine())
        assert sorted(finished_shards(folder)) == [0, 1]
        parts = sorted((tmp_path / "stage" / "decisions").glob("*.parquet"))
        rows = [row for part in parts for row in read_parquet(str(part)).to_pylist()]
        assert [row["id"] for row in rows] == ids
        return ids, rows

    return decide


def duplicate(shard, row, keep, twin, similarity, twin_set=0):
    return {
        "shard": shard,
        "row": row,
        "keep": keep,
        "component": 1,
        "component_size": 3,
        "twin": twin,
        "twin_set": twin_set,
        "similarity": similarity,
    }


def test_decide__every_row_is_told_its_component_twin_and_reason(decided):
    ids, rows = decided(
        [duplicate(0, 1, True, 5, 0.75), duplicate(1, 1, False, 1, 0.75),
         duplicate(0, 3, False, 5, 0.625, twin_set=2)],
        [{"shard": 0, "row": 1, "twin": 2, "twin_set": 1, "similarity": 0.45, "direct": True},
         {"shard": 1, "row": 0, "twin": 2, "twin_set": 1, "similarity": 0.3, "direct": False}],
    )  # fmt: skip
    assert [row["reason"] for row in rows] == [
        None,
        "leak:bench",
        None,
        "near_duplicate",
        "leak:bench",
        "near_duplicate",
        "bad_vector",
    ]
    assert [row["keep"] for row in rows] == [row["reason"] is None for row in rows]
    sizes = [row["component_size"] for row in rows]
    assert sizes == [1, 3, 1, 3, 1, 3, None]
    components = [ids.index(row["component"]) if row["component"] else None for row in rows]
    assert components == [0, 1, 2, 1, 4, 1, None]
    assert [row["twin_set"] for row in rows] == [None, "bench", None, BASE, "bench", None, None]
    twins = [ids.index(row["twin"]) if row["twin"] else None for row in rows]
    assert twins == [None, 2, None, 5, 2, 1, None]
    assert [row["path"] for row in rows] == [None, "direct", None, None, "chain", None, None]
    scores = [None if row["score"] is None else round(row["score"], 3) for row in rows]
    assert scores == [None, 0.45, None, 0.625, 0.3, 0.75, None]
    thresholds = [round(row["threshold"], 2) for row in rows if row["score"] is not None]
    assert thresholds == [0.4, 0.5, 0.4, 0.5]


def test_decide__without_leaks_only_duplicates_go(decided):
    _, rows = decided([duplicate(0, 0, False, 5, 0.75)], None)
    assert [row["reason"] for row in rows] == ["near_duplicate", *[None] * 5, "bad_vector"]
