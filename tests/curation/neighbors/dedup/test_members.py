import numpy as np
import pyarrow as pa
import pytest

from curation.exchange import Exchange
from curation.neighbors.dedup.members import GatherMembers, Members
from curation.neighbors.rows.file_tasks import run_file_tasks
from pipelines.engines.local_engine import LocalEngine
from tests.curation.neighbors.dedup.conftest import crowd


def gathered(one, folder, num_buckets=3):
    """All members, bucket by bucket."""
    exchange = Exchange(str(folder), num_buckets)
    parts, task = one.graph.files.num_partitions, GatherMembers(one.graph, exchange)
    run_file_tasks(LocalEngine(), task, parts, exchange.folder, "gather")
    return [exchange.read(bucket, parts) for bucket in range(num_buckets)]


def test_gather_members__brings_whole_components_together_with_their_twins(made, tmp_path):
    one = made(crowd(0))
    buckets, labels = gathered(one, tmp_path), one.labels()
    seen = np.concatenate([np.asarray(bucket["position"]) for bucket in buckets])
    assert sorted(seen.tolist()) == np.flatnonzero(one.partners.any(axis=1)).tolist()
    owners = [set(np.asarray(bucket["label"]).tolist()) for bucket in buckets]
    assert not owners[0] & owners[1] | owners[1] & owners[2] | owners[0] & owners[2]
    cosines = np.where(one.partners, one.cosines, -2)
    for row in pa.concat_tables(buckets).to_pylist():
        position = row["position"]
        assert row["label"] == labels[position]
        assert row["id"] == one.ids[position].tobytes()
        best = np.flatnonzero(cosines[position] == cosines[position].max())
        assert row["twin"] == min(one.ids[twin].tobytes() for twin in best)
        assert row["similarity"] == np.float32(cosines[position].max())


@pytest.mark.parametrize("first_base", [None, 2])
def test_members__lie_in_the_order_of_the_rule(first_base):
    rng = np.random.default_rng(0)
    columns = {
        "label": rng.integers(0, 4, 60),
        "pixels": rng.integers(0, 3, 60),
        "num_bytes": rng.integers(0, 3, 60),
        "set": rng.integers(0, 4, 60),
        "position": np.arange(60),
    }
    ids = rng.integers(0, 256, (60, 16), np.uint8)
    table = pa.table({**columns, "id": pa.array([row.tobytes() for row in ids], pa.binary(16))})
    members = Members.ordered(table, first_base, None)

    def key(row):
        is_new = first_base is None or row["set"] < first_base
        return row["label"], is_new, -row["pixels"], -row["num_bytes"], row["id"]

    wanted = sorted(table.to_pylist(), key=key)
    assert members.table.to_pylist() == wanted
    assert members.published.tolist() == [not key(row)[1] for row in wanted]
    parts = [members["label"][part] for part in members.components()]
    assert [set(part.tolist()) for part in parts] == [{label} for label in range(4)]
    assert members.sizes.tolist() == np.bincount(columns["label"]).tolist()
    assert members.firsts.tolist() == np.searchsorted(members["label"], members["label"]).tolist()
    some = members.take(np.isin(members["label"], [1, 3]))
    assert (len(some), set(some["label"].tolist())) == (sum(members.sizes[[1, 3]]), {1, 3})
    none = members.take(np.zeros(60, bool))
    assert (len(none), none.sizes.tolist(), list(none.components())) == (0, [], [])


def test_similarities__are_the_cosines_of_pairs(made, tmp_path, monkeypatch):
    monkeypatch.setattr("curation.neighbors.dedup.members._ROWS_AT_ONCE", 7)
    one = made(crowd(1))
    members = Members.ordered(gathered(one, tmp_path, 1)[0], None, one.graph.files)
    left, right = np.random.default_rng(0).integers(0, len(members), (2, 50))
    positions = members["position"]
    wanted = one.cosines[positions[left], positions[right]]
    np.testing.assert_allclose(members.similarities(left, right), wanted, rtol=2e-7)
