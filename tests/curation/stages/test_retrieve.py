import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from curation.dataset import Dataset
from curation.errors import DatasetError, SpaceError
from curation.neighbors.rows import shard_batches as runs
from curation.schema import make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.retrieve import Retrieve, SeedRule
from pipelines.engines.local_engine import LocalEngine
from pipelines.engines.ray_engine import RayEngine
from pipelines.run.stage_runner import Silent, run_stage
from tests.curation.conftest import with_shard

WIDTH = 24


@pytest.fixture
def retrieve(tmp_path):
    def run(pool, sets, *rules, name="out", workers=0, seed=0, engine=None, **settings):
        folder = StageFolder(str(tmp_path / name), "retrieve")
        stage = Retrieve(embeddings="copy", seeds=rules, **settings)
        inputs = StageInputs(pool, sets, seed)
        engine = engine or LocalEngine(workers)
        record, outputs = run_stage(stage, inputs, folder, engine, Silent())
        return record, outputs["decisions"], Dataset.open(folder.output("hits"))

    return run


def sample(name, k=4):
    return SeedRule(set=name, rule="sample", k=k)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def unit(rows):
    rows = rows.astype(np.float16).astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_retrieve__sample_gives_the_k_nearest_of_every_seed(embed, retrieve):
    rows, seeds = normal(0, 300, WIDTH), normal(1, 20, WIDTH)
    pool, queries = embed(rows), embed(seeds, "seeds")
    record, decisions, hits = retrieve(pool, {"seeds": queries}, sample("seeds"))
    scores = (unit(seeds) @ unit(rows).T).astype(np.float32)
    ids, seed_ids = pool.live_ids(0).to_pylist(), queries.live_ids(0).to_pylist()
    expected = {
        (seed_ids[q], rank + 1, ids[row], scores[q, row])
        for q in range(20)
        for rank, row in enumerate(np.argsort(-scores[q])[:4])
    }
    found = hits.read().to_pylist()
    assert {(h["seed_id"], h["rank"], h["id"], h["similarity"]) for h in found} == expected
    assert hits.num_rows == 80  # k·|Q|: collisions are not removed
    kept = {row["id"] for row in decisions.read().to_pylist() if row["keep"]}
    assert kept == {hit["id"] for hit in found}
    assert record.dropped == {"not_retrieved": 300 - len(kept)}
    assert record.counters["collisions_within_sets"] == 80 - len(kept)
    assert [h["id"] for h in found] == sorted(h["id"] for h in found)


def test_retrieve__decisions_carry_the_best_hit(embed, retrieve):
    rows = np.eye(3, WIDTH)
    sets = {"a": embed(rows[:1] + 0.3, "a"), "b": embed(rows[:1] + 0.1, "b")}
    _, decisions, _ = retrieve(embed(rows), sets, sample("a", 1), sample("b", 1))
    row = decisions.read().to_pylist()[0]
    assert (row["keep"], row["seed_set"], row["rule"], row["rank"]) == (True, "b", "sample", 1)
    assert row["seed_id"] == sets["b"].live_ids(0)[0].as_py()
    assert row["cluster"] is None


def test_retrieve__on_collision_next_gives_different_images(embed, retrieve):
    rows, seeds = normal(0, 60, WIDTH), np.repeat(normal(1, 1, WIDTH), 5, axis=0)
    record, _, hits = retrieve(
        embed(rows), {"s": embed(seeds, "s")}, sample("s", 3), on_collision="next"
    )
    ids = hits.read()["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 15
    best = np.argsort(-(unit(seeds)[0] @ unit(rows).T))[:15]
    assert set(ids) == {make_id(f"pool {row}") for row in best}
    found = record.figures["sets"]["s"]
    assert (found["seeds"], found["hits"], found["shortfall"]) == (5, 15, 0)
    assert found["collisions"] == 3 + 6 + 9 + 12  # each seed asks for what those before it have


def test_retrieve__a_shortfall_is_reported(embed, retrieve):
    pool, seeds = embed(normal(0, 5, WIDTH)), {"s": embed(normal(1, 8, WIDTH), "s")}
    record, _, hits = retrieve(pool, seeds, sample("s", 2), on_collision="next")
    assert hits.num_rows == 5
    assert record.figures["sets"]["s"]["shortfall"] == 11
    record, _, hits = retrieve(pool, seeds, sample("s", 9), name="large k")
    assert hits.num_rows == 40
    assert record.figures["sets"]["s"]["shortfall"] == 8 * 9 - 40


def groups(seed, sizes):
    """Rows around well separated directions."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.eye(len(sizes), WIDTH)[labels] + 0.02 * normal(seed, len(labels), WIDTH)
    return labels, rows


def test_retrieve__cluster_takes_from_clusters_with_enough_seeds(embed, retrieve):
    labels, rows = groups(0, [40, 40, 40, 8])
    _, seeds = groups(1, [4, 3, 5, 4])
    pool = embed(rows, sizes=[50, 78])
    rule = SeedRule(set="s", rule="cluster", per_cluster=10, min_hits=4, cap=100)
    record, _, hits = retrieve(pool, {"s": embed(seeds, "s")}, rule, clusters=4)
    label_of = {make_id(f"pool {row}"): label for row, label in enumerate(labels)}
    taken = np.bincount([label_of[one] for one in hits.read()["id"].to_pylist()], minlength=4)
    assert taken.tolist() == [10, 0, 10, 8]
    assert record.figures["sets"]["s"] == {
        "seeds": 16,
        "clusters": 3,
        "before_cap": 28,
        "hits": 28,
    }
    row = hits.read().to_pylist()[0]
    assert (row["rule"], row["seed_id"]) == ("cluster", None)
    assert row["cluster"] is not None
    assert row["similarity"] > 0.9


def test_retrieve__cluster_cap_and_seed(embed, retrieve):
    _, rows = groups(0, [60, 60])
    pool, sets = embed(rows), {"s": embed(groups(1, [5, 5])[1], "s")}
    rule = SeedRule(set="s", rule="cluster", per_cluster=20, cap=25)
    taken = [
        set(retrieve(pool, sets, rule, clusters=2, name=f"{n}", seed=s)[2].read()["id"].to_pylist())
        for n, s in enumerate((0, 0, 1))
    ]
    assert [len(one) for one in taken] == [25] * 3
    assert taken[0] == taken[1] != taken[2]


def test_retrieve__content_does_not_depend_on_shards_order_or_workers(embed, retrieve):
    rng = np.random.default_rng(5)
    rows, ids = normal(0, 200, WIDTH), [make_id(str(i)) for i in range(200)]
    sets = {"a": embed(normal(1, 12, WIDTH), "a"), "b": embed(rows[:40] + 0.2, "b")}
    rules = (sample("a"), SeedRule(set="b", rule="cluster", per_cluster=9, min_hits=2, cap=30))
    pools = [
        embed(rows, ids=ids),
        embed(rows, ids=ids, sizes=[3, 0, 197], order=rng.permutation(200)),
    ]
    digests = set()
    for number, workers in ((0, 1), (1, 1), (1, 2)):
        name = f"{number}-{workers}"
        found = retrieve(pools[number], sets, *rules, name=name, workers=workers, clusters=8)
        digests.add(tuple(one.manifest.content_digest for one in found[1:]))
    assert len(digests) == 1


def test_retrieve__content_is_the_same_where_hits_of_shards_travel_together(
    embed, retrieve, monkeypatch
):
    pool = embed(normal(0, 300, WIDTH), sizes=[20] * 15)
    seeds = {"seeds": embed(normal(1, 20, WIDTH), "seeds")}
    _, alone, _ = retrieve(pool, seeds, sample("seeds"), name="alone")
    monkeypatch.setattr(runs, "_FEWEST_BATCHES", 4)
    assert (runs.shards_per_batch(pool), len(runs.batches_of(pool))) == (3, 5)
    _, together, _ = retrieve(pool, seeds, sample("seeds"), name="together")
    assert together.manifest.content_digest == alone.manifest.content_digest


def test_retrieve__identical_rows_are_taken_by_smallest_id(embed, retrieve):
    pool = embed(np.ones((500, WIDTH)))
    _, _, hits = retrieve(pool, {"s": embed(np.ones((1, WIDTH)), "s")}, sample("s", 3))
    assert hits.read()["id"].to_pylist() == sorted(pool.live_ids(0).to_pylist())[:3]


def test_retrieve__bad_vectors_are_never_hit_and_never_seeds(embed, retrieve):
    rows, seeds = normal(0, 6, WIDTH), normal(1, 3, WIDTH)
    rows[2], rows[3, 4], rows[4, 0], seeds[1], seeds[2, 7] = 0, np.nan, -np.inf, 0, np.inf
    record, decisions, hits = retrieve(
        embed(rows), {"s": embed(seeds, "s")}, sample("s", 6), clusters=2
    )
    assert hits.num_rows == 1 * 3
    assert decisions.read()["keep"].to_pylist() == [True, True, False, False, False, True]
    assert record.dropped == {"not_retrieved": 3}


def test_retrieve__empty_pool_and_empty_seeds(embed, retrieve):
    nothing, some = np.empty((0, WIDTH)), normal(0, 4, WIDTH)
    rules = (sample("a"), SeedRule(set="b", rule="cluster"))
    sets = {"a": embed(some, "a"), "b": embed(some, "b")}
    record, _, hits = retrieve(embed(nothing), sets, *rules)
    assert (record.rows_in, hits.num_rows) == (0, 0)
    sets = {"a": embed(nothing, "a"), "b": embed(nothing, "b")}
    record, _, hits = retrieve(embed(some), sets, *rules, name="no seeds")
    assert (record.rows_out, hits.num_rows) == (0, 0)


def test_retrieve__spaces_and_widths_must_agree(embed, retrieve):
    pool = embed(normal(0, 4, WIDTH))
    with pytest.raises(SpaceError, match="embedding space elsewhere"):
        retrieve(
            pool,
            {"s": embed(normal(1, 2, WIDTH), "s", attributes={"space": "elsewhere"})},
            sample("s"),
        )
    with pytest.raises(SpaceError, match="width 24"):
        retrieve(pool, {"s": embed(normal(1, 2, 8), "s")}, sample("s"), name="width")


def test_retrieve__one_rule_a_set():
    with pytest.raises(ValidationError, match="set 'a' has two rules"):
        Retrieve(embeddings="copy", seeds=(sample("a"), sample("a")))


@pytest.mark.slow
def test_retrieve__100_000_identical_rows_cost_linear(embed, retrieve):
    pool, seeds = embed(np.ones((100_000, 8))), embed(np.ones((3, 8)), "s")
    record, _, hits = retrieve(pool, {"s": seeds}, sample("s", 5), on_collision="next")
    assert hits.read()["id"].to_pylist() == sorted(pool.live_ids(0).to_pylist())[:15]
    assert record.figures["sets"]["s"]["shortfall"] == 0


def test_retrieve__more_seeds_than_images(embed, retrieve):
    rows = normal(0, 7, WIDTH)
    pool, seeds = embed(rows, sizes=[0, 7, 0]), {"s": embed(normal(1, 90, WIDTH), "s")}
    record, _, hits = retrieve(pool, seeds, sample("s", 20))
    assert hits.num_rows == 90 * 7
    assert record.figures["sets"]["s"]["shortfall"] == 90 * 13
    record, _, hits = retrieve(pool, seeds, sample("s", 1), name="next", on_collision="next")
    assert (hits.num_rows, record.figures["sets"]["s"]["shortfall"]) == (7, 83)


@pytest.mark.parametrize("twice_in", ["pool", "seeds"])
def test_retrieve__duplicate_id_is_named(embed, retrieve, twice_in):
    ids = [make_id("a"), make_id("b"), make_id("a")]
    pools = {
        name: embed(np.eye(3, WIDTH), name, ids=ids if name == twice_in else None, sizes=[2, 1])
        for name in ("pool", "seeds")
    }
    with pytest.raises(DatasetError, match=f"id {make_id('a')} occurs twice"):
        retrieve(pools["pool"], {"seeds": pools["seeds"]}, sample("seeds"))


def test_retrieve__widths_differ_between_shards(embed, retrieve):
    pool = embed(np.eye(6, WIDTH), sizes=[3, 3], kind=pa.list_(pa.float32()))
    narrow = embed(np.eye(3, 5), "narrow", kind=pa.list_(pa.float32()))
    pool = with_shard(pool, 1, narrow.layers["copy"].read_shard(0))
    with pytest.raises(SpaceError, match=r"width 5, but .* has width 24"):
        retrieve(pool, {"s": embed(np.eye(2, WIDTH), "s")}, sample("s"))


def test_retrieve__damaged_scratch_is_noticed_and_made_again(
    embed, retrieve, tmp_path, monkeypatch
):
    pool, seeds = embed(normal(0, 80, WIDTH)), {"s": embed(normal(1, 9, WIDTH), "s")}
    rules = (sample("s", 4),)
    whole = retrieve(pool, seeds, *rules, name="whole", on_collision="next")
    monkeypatch.setattr("curation.stages.retrieve.write_hits", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        retrieve(pool, seeds, *rules, on_collision="next")
    monkeypatch.undo()
    scratch = tmp_path / "out" / "_scratch"
    files = sorted(path for path in scratch.rglob("*") if path.suffix in (".bin", ".arrow"))
    assert len(files) > 5
    for number, path in enumerate(files):
        if number % 2:
            path.unlink()
        elif path.stat().st_size:
            path.write_bytes(path.read_bytes()[:-1])
    found = retrieve(pool, seeds, *rules, on_collision="next")
    for one, other in zip(found[1:], whole[1:], strict=True):
        assert one.manifest.content_digest == other.manifest.content_digest


def _interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_retrieve__ray_gives_the_same_content(embed, retrieve):
    pool, seeds = embed(normal(0, 300, WIDTH), sizes=[100, 200]), embed(normal(1, 50, WIDTH), "s")
    digests = {
        tuple(
            one.manifest.content_digest
            for one in retrieve(
                pool, {"s": seeds}, sample("s"), name=name, engine=engine, on_collision="next"
            )[1:]
        )
        for name, engine in (("here", LocalEngine()), ("ray", RayEngine(2)))
    }
    assert len(digests) == 1
