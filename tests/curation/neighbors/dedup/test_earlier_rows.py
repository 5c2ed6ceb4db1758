"""A new delivery against what an earlier one kept."""

import numpy as np
import pyarrow as pa
import pytest

from curation.neighbors.index.vector_index import Comparison
from curation.neighbors.kernels.products import Products
from curation.schema import make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.near_dedup import NearDedup
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage, stage_key

WIDTH = 32
THRESHOLD = np.float32(0.6)
LISTS = Comparison(method="lists", recall=1.0, probes=100)
ALL = Comparison(method="all")


@pytest.fixture
def dedup(tmp_path):
    def run(pool, name, *, base=(), sets=None, workers=0, **settings):
        folder = StageFolder(str(tmp_path / name), "near_dedup")
        stage = NearDedup(embeddings="copy", **settings)
        inputs = StageInputs(pool, sets or {}, base=tuple(base))
        record, outputs = run_stage(stage, inputs, folder, LocalEngine(workers), Silent())
        return record, outputs["decisions"]

    return run


def kept(pool, decisions):
    """What a delivery kept, as a base for the next."""
    return pool.with_stage({}, decisions)


def units(rows):
    rows = rows.astype(np.float16).astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def deliveries(seed, counts=(300, 300), copies=80):
    """Rows of deliveries; some are near-copies of random rows of all, some are identical."""
    rng = np.random.default_rng(seed)
    rows = units(rng.normal(size=(sum(counts), WIDTH)))
    targets = rng.choice(len(rows), (2, copies))
    rows[targets[0]] = rows[targets[1]] + 0.1 * rng.normal(size=(copies, WIDTH))
    rows[rng.choice(len(rows), 8)] = rows[rng.choice(len(rows), 8)]
    return np.split(units(rows), np.cumsum(counts)[:-1])


def verdicts(decisions):
    return {row["id"]: row for row in decisions.read().to_pylist()}


def staying(pool):
    return pool.live_ids(0).to_pylist()


def vectors_of(pools):
    return {
        one: row
        for pool in pools
        for one, row in zip(
            pool.live_ids(0).to_pylist(),
            units(np.array(pool.read(0, ["embedding"])["embedding"].to_pylist())),
            strict=True,
        )
    }


@pytest.mark.parametrize("comparison", [ALL, LISTS], ids=["all", "lists"])
@pytest.mark.parametrize("seed", range(2))
def test_base__no_new_row_stays_within_the_threshold_of_a_kept_one(embed, dedup, seed, comparison):
    first, second = (embed(rows, f"{seed}{n}") for n, rows in enumerate(deliveries(seed)))
    old = kept(first, dedup(first, "old", comparison=comparison)[1])
    record, decisions = dedup(second, "new", base=[old], comparison=comparison)
    assert record.rows_in == 300 == record.rows_out + sum(record.dropped.values())
    assert record.figures["base_rows"] == old.num_rows
    found, vectors = verdicts(decisions), vectors_of([old, second])
    assert set(found) == set(second.live_ids(0).to_pylist())
    published = set(old.live_ids(0).to_pylist())
    new = [one for one, row in found.items() if row["keep"]]
    everyone = np.array([vectors[one] for one in [*new, *published]])
    scores = np.array([vectors[one] for one in new]) @ everyone.T
    np.fill_diagonal(scores, -1)
    assert scores.max() <= THRESHOLD
    for row in found.values():
        if row["component"] in published:
            assert (row["keep"], row["reason"]) == (False, "near_duplicate")
        if row["twin"] is not None:
            assert row["twin_set"] == ("base" if row["twin"] in published else None)
            assert row["similarity"] == np.float32(vectors[row["id"]] @ vectors[row["twin"]])


def test_base__gives_what_dedup_of_all_gives_where_no_chain_bridges(embed, dedup):
    rng = np.random.default_rng(5)
    groups = units(rng.normal(size=(150, WIDTH)))
    groups = groups[(groups @ groups.T > 0.3).sum(axis=1) == 1]  # far from each other
    ids = [f"{n:032x}" for n in range(2 * len(groups))]  # old ids are smaller: they would stay too
    near = groups + 0.01 * rng.normal(size=groups.shape)
    fresh = rng.random(len(groups)) < 0.5
    near[fresh] = -groups[fresh]
    parts = [
        embed(groups, "a", ids=ids[: len(groups)]),
        embed(near, "b", ids=ids[len(groups) :]),
    ]
    old = kept(parts[0], dedup(parts[0], "a")[1])
    staying = {
        one for one, row in verdicts(dedup(parts[1], "b", base=[old])[1]).items() if row["keep"]
    }
    both = verdicts(dedup(embed(np.concatenate([groups, near]), "c", ids=ids), "c")[1])
    assert staying | set(old.live_ids(0).to_pylist()) == {
        i for i, row in both.items() if row["keep"]
    }


@pytest.mark.parametrize("comparison", [ALL, LISTS], ids=["all", "lists"])
def test_base__old_rows_are_not_compared_with_each_other(embed, dedup, comparison, monkeypatch):
    rng = np.random.default_rng(7)
    first = embed(units(rng.normal(size=(900, WIDTH))), "a")
    rows = units(rng.normal(size=(60, WIDTH)))
    old = kept(first, dedup(first, "a", threshold=0.95)[1])
    known = {units(row[None]).astype(np.float32)[0].tobytes() for row in vectors_of([old]).values()}
    met, old_pairs = [], []
    monkeypatch.setattr(Products, "best_for", classmethod(lambda cls, _: cls()))
    plain = Products.above

    def counting(self, left, right, bound):
        are_old = [np.array([_closest(row, table) for row in side], bool) for side in (left, right)]
        met.append(len(left) * len(right))
        old_pairs.append(int(are_old[0].sum()) * int(are_old[1].sum()))
        return plain(self, left, right, bound)

    table = np.array([np.frombuffer(one, np.float32) for one in known])
    monkeypatch.setattr(Products, "above", counting)
    dedup(embed(rows, "b"), "b", base=[old], threshold=0.95, comparison=comparison)
    assert sum(met) > 0
    assert sum(old_pairs) == 0


def _closest(row, table):
    return float((table @ row).max()) > 0.99999


def circle(*degrees):
    rows = np.zeros((len(degrees), WIDTH))
    rows[:, 0], rows[:, 1] = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return rows


@pytest.mark.parametrize("linkage", ["components", "representative"])
def test_base__a_new_row_between_two_old_ones_goes_and_both_stay(embed, dedup, linkage):
    first = embed(circle(0, 60), "a", ids=["0" * 31 + "5", "0" * 31 + "7"])
    old = kept(first, dedup(first, "a", linkage=linkage)[1])
    assert old.num_rows == 2
    second = embed(circle(31), "b", ids=["0" * 31 + "1"])
    row = dedup(second, "b", base=[old], linkage=linkage)[1].read().to_pylist()[0]
    assert (row["keep"], row["component"][-1], row["component_size"]) == (False, "5", 3)
    assert (row["twin"][-1], row["twin_set"]) == ("7", "base")


def test_base__linkage_representative_keeps_new_rows_that_no_kept_one_is_close_to(embed, dedup):
    first = embed(circle(0), "a")
    second = embed(circle(45, 90), "b")
    chained = dedup(second, "b", base=[first])[1].read()["keep"].to_pylist()
    apart = dedup(second, "c", base=[first], linkage="representative")[1].read()["keep"].to_pylist()
    assert (chained, apart) == ([False, False], [False, True])


def test_base__old_rows_win_whatever_their_size(embed, dedup):
    sizes = {
        "original_width": pa.array([10], pa.int32()),
        "original_height": pa.array([10], pa.int32()),
    }
    larger = {name: pa.array([99], pa.int32()) for name in sizes}
    first = embed(circle(0), "a", columns=sizes)
    row = dedup(embed(circle(1), "b", columns=larger), "b", base=[first])[1].read().to_pylist()[0]
    assert not row["keep"]
    assert row["component"] == row["twin"] == first.live_ids(0)[0].as_py()


def test_base__the_same_id_again_and_identical_rows(embed, dedup):
    ids = [make_id(str(n)) for n in range(4)]
    first = embed(circle(0, 90, 180), "a", ids=ids[:3])
    second = embed(circle(0, 0, 270), "b", ids=[ids[0], ids[3], make_id("new")])
    found = dedup(second, "b", base=[first])[1].read().to_pylist()
    assert [row["keep"] for row in found] == [False, False, True]
    assert [row["component"] for row in found[:2]] == [ids[0]] * 2
    assert [row["similarity"] for row in found[:2]] == [1, 1]


def test_base__leaks_hold_for_new_rows_alone(embed, dedup):
    first, bench = embed(circle(0), "a"), embed(circle(180, 300), "bench")
    second = embed(circle(179, 90, 2), "b")
    _, decisions = dedup(second, "b", base=[first], sets={"bench": bench}, against=("bench",))
    found = decisions.read().to_pylist()
    assert [row["reason"] for row in found] == ["leak:bench", None, "near_duplicate"]
    assert [row["twin_set"] for row in found] == ["bench", None, "base"]
    # an old row joins no new one to a benchmark
    chained = dedup(
        embed(circle(30), "c"),
        "c",
        base=[embed(circle(345), "d")],
        sets={"bench": bench},
        against=("bench",),
        threshold=0.9,
    )[1]
    assert chained.read()["keep"].to_pylist() == [True]


def test_base__several_deliveries_before_and_none_with_rows(embed, dedup):
    parts = [embed(circle(angle), f"p{angle}") for angle in (0, 90)]
    new = embed(circle(1, 91, 180), "new")
    record, decisions = dedup(new, "b", base=parts)
    assert decisions.read()["keep"].to_pylist() == [False, False, True]
    assert record.figures["base_rows"] == 2
    nothing = embed(np.empty((0, WIDTH)), "nothing")
    assert dedup(new, "c", base=[nothing])[0].rows_out == 3
    assert dedup(nothing, "d", base=[new])[0].rows_in == 0


def test_base__content_depends_on_the_base_but_not_on_workers_or_shards(embed, dedup):
    first, second = deliveries(9)
    ids = [make_id(f"n{n}") for n in range(300)]
    old = [make_id(f"o{n}") for n in range(300)]
    order = np.random.default_rng(0).permutation(300)
    bases = [embed(first, ids=old), embed(first, ids=old, sizes=[100, 0, 200], order=order)]
    news = [embed(second, ids=ids), embed(second, ids=ids, sizes=[7, 293])]
    digests = {
        dedup(news[n], f"out{n}", base=[bases[n]], workers=1 + n, comparison=ALL)[
            1
        ].manifest.content_digest
        for n in (0, 1)
    }
    assert len(digests) == 1
    stage = NearDedup(embeddings="copy")
    keys = {stage_key(stage, StageInputs(news[0], base=one)) for one in ((), bases[:1], bases[1:])}
    assert len(keys) == 3
