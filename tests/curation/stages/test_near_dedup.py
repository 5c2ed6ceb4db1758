import numpy as np
import pyarrow as pa
import pytest

from curation.errors import (
    ConfigError,
    DatasetError,
    EngineError,
    FailedShardsError,
    SchemaError,
    SpaceError,
    StageError,
)
from curation.neighbors.dedup.judge_components import ComponentVerdicts
from curation.neighbors.index.vector_index import Comparison
from curation.neighbors.rows import shard_batches as runs_module
from curation.schema import make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.near_dedup import NearDedup
from pipelines.engines.local_engine import LocalEngine
from pipelines.engines.ray_engine import RayEngine
from pipelines.run.stage_runner import Silent, run_stage
from tests.curation.conftest import with_shard

WIDTH = 32


@pytest.fixture
def dedup(tmp_path):
    def run(pool, sets=None, *, engine=None, name="out", **settings):
        return run_stage(
            NearDedup(embeddings="copy", **settings),
            StageInputs(pool, sets or {}),
            StageFolder(str(tmp_path / name), "near_dedup"),
            engine or LocalEngine(),
            Silent(),
        )

    return run


def by_id(outputs):
    return {row["id"]: row for row in outputs["decisions"].read().to_pylist()}


def crowd(rng, count=400, copies=60):
    """Random rows, the last of which are noisy copies of the first."""
    rows = rng.normal(size=(count, WIDTH))
    rows[-copies:] = rows[:copies] + 0.25 * rng.normal(size=(copies, WIDTH))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cosines(rows):
    rows = rows.astype(np.float16).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = (rows @ rows.T).astype(np.float32)
    np.fill_diagonal(found, -1)
    return found


def test_near_dedup__every_row_has_its_component_and_most_similar_twin(embed, dedup):
    rows = crowd(np.random.default_rng(0))
    rows[7] = rows[9] = rows[11]  # identical, as bytes
    pool = embed(rows)
    record, outputs = dedup(pool)
    found, ids = by_id(outputs), pool.live_ids(0).to_pylist()
    scores = cosines(rows)
    links = scores > np.float32(0.6)
    reach = links | np.eye(len(rows), dtype=bool)
    for _ in range(9):
        reach = reach @ reach
    for i, one in enumerate(ids):
        members = [ids[j] for j in np.flatnonzero(reach[i])]
        assert (found[one]["component"], found[one]["component_size"]) == (
            min(members),
            len(members),
        )
        assert found[one]["keep"] == (one == min(members))
        if links[i].any():
            best = min(ids[j] for j in np.flatnonzero(scores[i] == scores[i].max()))
            assert (found[one]["twin"], found[one]["similarity"]) == (best, scores[i].max())
        else:
            assert found[one]["twin"] is None
            assert found[one]["similarity"] is None
    assert record.rows_in == 400
    assert record.rows_out == len({row["component"] for row in found.values()})
    assert record.dropped == {"near_duplicate": 400 - record.rows_out}


def test_near_dedup__most_original_pixels_then_most_bytes_then_smallest_id_stays(embed, dedup):
    row = np.ones((1, WIDTH))
    columns = {
        "original_width": pa.array([10, 20, 20, 20], pa.int32()),
        "original_height": pa.array([10, 10, 10, 10], pa.int32()),
        "num_bytes": pa.array([900, 5, 8, 8], pa.int64()),
    }
    pool = embed(np.repeat(row, 4, axis=0), columns=columns)
    record, outputs = dedup(pool)
    ids = pool.live_ids(0).to_pylist()
    kept = [one for one, verdict in by_id(outputs).items() if verdict["keep"]]
    assert kept == [min(ids[2], ids[3])]
    assert record.figures["representatives_by"] == [
        "most original pixels",
        "most bytes",
        "smallest id",
    ]


def test_near_dedup__content_does_not_depend_on_shards_order_or_workers(embed, dedup):
    rng = np.random.default_rng(1)
    rows = crowd(rng)
    rows[3] = rows[300]
    names = [make_id(str(i)) for i in range(len(rows))]
    bench = {"bench": embed(rows[20:24] + 0.01, "bench")}
    pools = [
        embed(rows, ids=names),
        embed(rows, ids=names, sizes=[7, 0, 393], order=rng.permutation(400)),
    ]
    digests = {
        dedup(pool, bench, engine=LocalEngine(workers), name=f"{i}-{workers}", against=("bench",))[
            1
        ]["decisions"].manifest.content_digest
        for i, pool in enumerate(pools)
        for workers in ((1,), (1, 2))[i]
    }
    assert len(digests) == 1


def test_near_dedup__content_is_the_same_where_verdicts_of_shards_travel_together(
    embed, dedup, monkeypatch
):
    rows = crowd(np.random.default_rng(1))
    bench = {"bench": embed(rows[20:24] + 0.01, "bench")}
    pool = embed(rows, sizes=[26] * 15 + [10])
    alone, outputs = dedup(pool, bench, name="alone", against=("bench",))
    assert alone.dropped.keys() == {"near_duplicate", "leak:bench"}
    runs, read = [], ComponentVerdicts.read
    monkeypatch.setattr(
        ComponentVerdicts, "read", lambda self, run: runs.append(run) or read(self, run)
    )
    monkeypatch.setattr(runs_module, "_FEWEST_BATCHES", 5)
    together, others = dedup(pool, bench, name="together", against=("bench",))
    assert sorted(runs) == sorted([*range(6), *range(6)])  # 16 shards, three at a time
    assert together.dropped == alone.dropped
    digests = {found["decisions"].manifest.content_digest for found in (outputs, others)}
    assert len(digests) == 1

    def broken(self, run):
        raise OSError("no luck")

    monkeypatch.setattr(ComponentVerdicts, "read", broken)
    with pytest.raises(EngineError, match=r"6 of 6 shards.*0 to 2.*no luck") as caught:
        dedup(pool, name="broken", engine=LocalEngine(first_pause_s=0.01))
    assert not isinstance(caught.value, FailedShardsError)


@pytest.mark.slow
def test_near_dedup__ray_gives_the_same_content(embed, dedup):
    pool = embed(crowd(np.random.default_rng(1)), sizes=[100, 200, 100])
    here = dedup(pool)[1]["decisions"].manifest.content_digest
    assert (
        dedup(pool, engine=RayEngine(2), name="ray")[1]["decisions"].manifest.content_digest == here
    )


def test_near_dedup__chains_join_and_linkage_representative_breaks_them(embed, dedup):
    angles = np.deg2rad([0, 45, 90, 135])  # neighbors at cosine 0.71, others at most 0
    rows = np.zeros((4, WIDTH))
    rows[:, 0], rows[:, 1] = np.cos(angles), np.sin(angles)
    pool = embed(rows, ids=[f"{i:032x}" for i in range(4)])
    kept = {
        linkage: [
            row["id"][-1]
            for row in dedup(pool, name=linkage, linkage=linkage)[1]["decisions"].read().to_pylist()
            if row["keep"]
        ]
        for linkage in ("components", "representative")
    }
    assert kept == {"components": ["0"], "representative": ["0", "2"]}


def test_near_dedup__bad_vectors_go_and_are_nobodys_neighbor(embed, dedup):
    rows = np.ones((6, WIDTH))
    rows[0], rows[1, 3], rows[2, 5], rows[3] = 0, np.nan, np.inf, 0
    pool = embed(rows, kind=pa.list_(pa.float32()))
    record, outputs = dedup(pool)
    assert record.dropped == {"bad_vector": 4, "near_duplicate": 1}
    reasons = [row["reason"] for row in outputs["decisions"].read().to_pylist()]
    assert reasons[:4] == ["bad_vector"] * 4


def test_near_dedup__against_drops_whole_components_direct_and_chained(embed, dedup):
    angles = np.deg2rad([0, 60, 120, 200])  # cosine 0.5 between neighbors, less beyond
    rows = np.zeros((5, WIDTH))
    rows[:4, 0], rows[:4, 1], rows[4, 2] = np.cos(angles), np.sin(angles), 1
    pool = embed(rows, ids=[f"{i:032x}" for i in range(5)])
    image = np.zeros((1, WIDTH))
    image[0, :2] = np.cos(np.deg2rad(-5)), np.sin(np.deg2rad(-5))
    bench = embed(image, "bench")
    record, outputs = dedup(pool, {"bench": bench}, against=("bench",))
    found = list(by_id(outputs).values())
    assert [row["reason"] for row in found] == ["leak:bench"] * 3 + [None, None]
    assert [row["path"] for row in found] == ["direct", "chain", "chain", None, None]
    assert found[1]["twin"] == bench.live_ids(0)[0].as_py()
    assert found[1]["twin_set"] == "bench"
    assert found[1]["similarity"] == pytest.approx(np.cos(np.deg2rad(65)), abs=1e-3)
    assert [row["threshold"] for row in found[:2]] == [pytest.approx(0.45)] * 2
    assert record.figures["leaks"]["leaking_components"] == 1


def test_near_dedup__near_duplicate_takes_precedence_over_leak(embed, dedup):
    pool = embed(np.ones((3, WIDTH)))
    _, outputs = dedup(pool, {"bench": embed(np.ones((1, WIDTH)), "bench")}, against=("bench",))
    reasons = sorted(row["reason"] for row in by_id(outputs).values())
    assert reasons == ["leak:bench", "near_duplicate", "near_duplicate"]


def test_near_dedup__giant_component_fails_the_run_unless_allowed(embed, dedup):
    pool = embed(np.ones((1200, WIDTH)))
    with pytest.raises(StageError, match="holds 1200 of 1200 rows, allowed are 1000"):
        dedup(pool)
    record, _ = dedup(pool, name="allowed", max_component_share=1.0)
    assert record.rows_out == 1


@pytest.mark.parametrize("method", ["all", pytest.param("lists", marks=pytest.mark.slow)])
def test_near_dedup__100_000_identical_rows_cost_linear(embed, dedup, method):
    comparison = Comparison(method=method)
    pool = embed(np.ones((100_000, 8)))
    record, outputs = dedup(pool, max_component_share=1.0, comparison=comparison)
    assert record.dropped == {"near_duplicate": 99_999}
    found = outputs["decisions"].read(["id", "twin", "keep"]).to_pylist()
    first, second = sorted(row["id"] for row in found)[:2]
    assert {row["twin"] for row in found if not row["keep"]} == {first}
    assert [row["twin"] for row in found if row["keep"]] == [second]


def test_near_dedup__duplicate_id_is_named(embed, dedup):
    ids = [make_id("a"), make_id("b"), make_id("a")]
    with pytest.raises(DatasetError, match=f"id {make_id('a')} occurs twice"):
        dedup(embed(np.eye(3, WIDTH), ids=ids, sizes=[2, 1]))


def test_near_dedup__no_threshold_known(embed, dedup):
    with pytest.raises(ConfigError, match="records no 'dedup' threshold"):
        dedup(embed(np.eye(3, WIDTH), attributes={}))


def test_near_dedup__spaces_differ(embed, dedup):
    pool = embed(np.eye(3, WIDTH))
    other = embed(np.eye(2, WIDTH), "bench", attributes={"space": "another"})
    with pytest.raises(SpaceError, match=r"embedding space another, but .* has a space"):
        dedup(pool, {"bench": other}, against=("bench",))
    record, _ = dedup(
        pool, {"bench": other}, against=("bench",), assume_same_space=True, name="assumed"
    )
    assert record.dropped == {"leak:bench": 2}


def test_near_dedup__widths_differ(embed, dedup):
    pool = embed(np.eye(3, WIDTH))
    with pytest.raises(SpaceError, match=r"width 16, but .* has width 32"):
        dedup(pool, {"bench": embed(np.eye(3, 16), "bench")}, against=("bench",))


def test_near_dedup__widths_differ_between_shards(embed, dedup):
    pool = embed(np.eye(6, WIDTH), sizes=[3, 3], kind=pa.list_(pa.float32()))
    narrow = embed(np.eye(3, 5), "narrow", kind=pa.list_(pa.float32()))
    pool = with_shard(pool, 1, narrow.layers["copy"].read_shard(0))
    with pytest.raises(SpaceError, match=r"width 5, but .* has width 32"):
        dedup(pool)


def test_near_dedup__widths_differ_within_a_shard(embed, dedup):
    rows = np.empty(2, object)
    rows[0], rows[1] = [1.0, 0.0], [1.0, 0.0, 0.0]
    pool = embed(np.eye(2, 3), kind=pa.list_(pa.float32()))
    vectors = pa.array(list(rows), pa.list_(pa.float32()))
    pool = with_shard(pool, 0, pa.table({"id": pool.live_ids(0), "embedding": vectors}))
    with pytest.raises(SpaceError, match="width 2 and of width 3"):
        dedup(pool)


def test_near_dedup__foreign_lists_of_float32_and_empty_shards(embed, dedup):
    rows = crowd(np.random.default_rng(2), 60, 20) * 3.0  # not unit rows
    kind = pa.large_list(pa.float32())
    record, _ = dedup(embed(rows, kind=kind, sizes=[0, 30, 0, 30]), threshold=0.6)
    assert record.dropped == {"near_duplicate": 20}


def test_near_dedup__empty_pool(embed, dedup):
    record, outputs = dedup(embed(np.empty((0, WIDTH))))
    assert (record.rows_in, outputs["decisions"].num_rows) == (0, 0)
    bench = {"bench": embed(np.eye(2, WIDTH), "bench")}
    assert dedup(embed(np.empty((0, WIDTH))), bench, against=("bench",), name="b")[0].rows_in == 0


def test_near_dedup__unknown_side_car_or_set(embed, dedup):
    pool = embed(np.eye(3, WIDTH))
    with pytest.raises(ConfigError, match="there is no set 'bench'"):
        dedup(pool, against=("bench",))
    with pytest.raises(SchemaError, match="column 'vec' is missing"):
        dedup(pool, embedding_column="vec", name="other")


def test_near_dedup__damaged_scratch_is_noticed_and_made_again(embed, dedup, tmp_path, monkeypatch):
    pool = embed(crowd(np.random.default_rng(3)), sizes=[150, 250])
    whole = dedup(pool, name="whole")[1]["decisions"].manifest.content_digest
    monkeypatch.setattr("curation.stages.near_dedup.decide_shards", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        dedup(pool)
    monkeypatch.undo()
    scratch = tmp_path / "out" / "_scratch"
    files = sorted(path for path in scratch.rglob("*") if path.suffix in (".bin", ".arrow"))
    assert len(files) > 5
    for number, path in enumerate(files):
        if number % 2:
            path.unlink()
        elif path.stat().st_size:
            path.write_bytes(path.read_bytes()[:-1])
    assert dedup(pool)[1]["decisions"].manifest.content_digest == whole


def _interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def alike_strangers(count: int) -> np.ndarray:
    """Unrelated rows of 16 dimensions: each has some ten above 0.6."""
    rows = np.zeros((count, WIDTH))
    rows[:, :16] = np.random.default_rng(0).normal(size=(count, 16))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_near_dedup__the_encoder_s_threshold_is_raised_where_strangers_would_be_joined(
    embed, dedup, caplog
):
    pool = embed(alike_strangers(1500))
    record, _ = dedup(pool)
    figures = record.figures
    assert figures["threshold"] == figures["proposed_threshold"] > 0.75
    assert figures["largest_component"] < 20
    assert figures["unrelated_per_row"] <= 0.00101
    (warning,) = [one.message for one in caplog.records if "unrelated" in one.message]
    assert warning.startswith("near_dedup: above 0.6 a row of this pool has ")
    assert f"so the threshold is {figures['threshold']:g}" in warning
    same, _ = dedup(pool, name="auto", threshold="auto")
    assert same.figures["threshold"] == figures["threshold"]


def test_near_dedup__a_threshold_that_is_given_stays_and_the_guard_names_a_better_one(
    embed, dedup, caplog
):
    pool = embed(alike_strangers(1500))
    with pytest.raises(StageError, match=r"raise the threshold to 0\.[89]\d* \(--threshold auto\)"):
        dedup(pool, threshold=0.6)
    (warning,) = [one.message for one in caplog.records if "unrelated" in one.message]
    assert "it would be 0.001 (--threshold auto)" in warning
    record, _ = dedup(pool, name="kept", threshold=0.6, linkage="representative")
    assert record.figures["threshold"] == 0.6


def test_near_dedup__auto_of_few_rows_takes_the_encoder_s_threshold_and_says_so(
    embed, dedup, caplog
):
    record, _ = dedup(embed(crowd(np.random.default_rng(0), 100, 10)), threshold="auto")
    assert record.figures["threshold"] == 0.6
    assert "100 rows are too few" in caplog.text
