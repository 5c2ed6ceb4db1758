import numpy as np
import pytest

from curation.neighbors.index.vector_index import Comparison
from curation.neighbors.join import list_join
from curation.neighbors.join.list_join import pieces, short_together
from curation.neighbors.rows.row_files import RowFiles, RowReader
from curation.schema import make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.near_dedup import NearDedup
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage

WIDTH = 48
LISTS = Comparison(method="lists", recall=0.999)


@pytest.fixture
def dedup(tmp_path):
    def run(pool, sets=None, *, name="out", workers=1, **settings):
        return run_stage(
            NearDedup(embeddings="copy", **settings),
            StageInputs(pool, sets or {}),
            StageFolder(str(tmp_path / name), "near_dedup"),
            LocalEngine(workers),
            Silent(),
        )

    return run


def crowd(seed, count=1500):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(count // 25, WIDTH))
    rows = centers[rng.integers(0, len(centers), count)] + 1.6 * rng.normal(size=(count, WIDTH))
    rows[: count // 10] = rows[-(count // 10) :] + 0.4 * rng.normal(size=(count // 10, WIDTH))
    return rows


def test_join_by_lists__finds_what_exhaustive_comparison_finds(embed, dedup):
    pool = embed(crowd(0))
    exact, exactly = dedup(pool, name="all", comparison=Comparison(method="all"))
    record, outputs = dedup(pool, name="lists", comparison=LISTS)
    assert record.figures["compared"] == "lists"
    assert record.figures["measured_recall"] >= 0.999
    assert record.figures["sampled_pairs"] > 100
    a, b = (found["decisions"].read().to_pandas() for found in (exactly, outputs))
    found = (a["twin"] == b["twin"]) | (a["twin"].isna() & b["twin"].isna())
    assert found.mean() > 0.995
    same = found & a["twin"].notna()
    assert (a["similarity"][same] == b["similarity"][same]).all()
    assert abs(record.rows_out - exact.rows_out) <= 0.002 * exact.rows_in


def test_join_by_lists__recall_that_is_not_reached_is_said(embed, dedup, caplog):
    rows = np.random.default_rng(0).normal(size=(6000, 24))  # no groups, so lists say little
    few = {"threshold": 0.5, "max_component_share": 1.0}
    found = []
    for probes in (1, 16):
        how = Comparison(method="lists", recall=0.99, probes=probes)
        record, _ = dedup(embed(rows), name=f"{probes}", comparison=how, **few)
        found.append(record.figures["measured_recall"])
        assert record.figures["asked_recall"] == 0.99
    assert found[0] < 0.6
    assert found[0] < found[1]
    assert f"recall is {found[0]:.3f} where 0.99 was asked" in caplog.text


def test_join_by_lists__content_does_not_depend_on_shards_order_or_workers(embed, dedup):
    rng = np.random.default_rng(1)
    rows, ids = crowd(1), [make_id(str(i)) for i in range(1500)]
    bench = {"bench": embed(rows[50:90] + 0.1, "bench")}
    pools = [
        embed(rows, ids=ids),
        embed(rows, ids=ids, sizes=[11, 0, 1489], order=rng.permutation(1500)),
    ]
    digests = set()
    for number, workers in ((0, 1), (1, 1), (1, 2)):
        _, outputs = dedup(
            pools[number],
            bench,
            name=f"{number}-{workers}",
            workers=workers,
            against=("bench",),
            comparison=Comparison(method="lists", recall=0.9),
        )
        digests.add(outputs["decisions"].manifest.content_digest)
    assert len(digests) == 1


def test_join_by_lists__identical_rows_cost_linear(embed, dedup):
    rows = np.concatenate([np.ones((3000, 8)), np.eye(8)])
    record, outputs = dedup(embed(rows), comparison=LISTS, threshold=0.9, max_component_share=1.0)
    assert record.dropped == {"near_duplicate": 2999}
    ids = sorted(outputs["decisions"].read()["id"].to_pylist()[:3000])
    kept = outputs["decisions"].read().to_pandas().query("keep and component_size > 1")
    assert kept["id"].tolist() == ids[:1]
    assert kept["twin"].tolist() == ids[1:2]


def test_join_by_lists__few_rows_and_bad_rows(embed, dedup):
    rows = np.random.default_rng(0).normal(size=(9, WIDTH))
    rows[3] = 0
    rows[4] = rows[5]
    record, _ = dedup(embed(rows, sizes=[4, 0, 5]), comparison=LISTS)
    assert record.dropped == {"bad_vector": 1, "near_duplicate": 1}


def test_join_by_lists__only_bad_rows_and_no_rows(embed, dedup):
    record, _ = dedup(embed(np.zeros((3, WIDTH))), comparison=LISTS)
    assert record.dropped == {"bad_vector": 3}
    record, _ = dedup(embed(np.empty((0, WIDTH))), comparison=LISTS, name="none")
    assert record.rows_in == 0


def test_join_by_lists__damaged_scratch_is_noticed_and_made_again(
    embed, dedup, tmp_path, monkeypatch
):
    pool = embed(crowd(3), sizes=[700, 800])
    whole = dedup(pool, name="whole", comparison=LISTS)[1]["decisions"].manifest.content_digest
    monkeypatch.setattr("curation.stages.near_dedup.decide_shards", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        dedup(pool, comparison=LISTS)
    monkeypatch.undo()
    scratch = tmp_path / "out" / "_scratch"
    files = sorted(path for path in scratch.rglob("*") if path.suffix in (".bin", ".arrow"))
    for number, path in enumerate(files):
        if number % 2:
            path.unlink()
        elif path.stat().st_size:
            path.write_bytes(path.read_bytes()[:-1])
    again = dedup(pool, comparison=LISTS)[1]["decisions"].manifest.content_digest
    assert again == whole


def _interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_join_by_lists__partitions_follow_the_memory_and_content_does_not(embed, dedup, tmp_path):
    rows = crowd(5, 2000)
    pool = embed(rows)
    digests, partitions = set(), []
    for name, workers in (("one", 1), ("many", 1000)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalEngine, "workers", workers)
            patch.setattr("curation.neighbors.rows.arrange._TASK_ROWS", (1 << 10, 1 << 10))
            patch.setattr("curation.stages.near_dedup.decide_shards", _interrupted)
            settings = {"method": "lists", "memory_gb": 0.3}
            with pytest.raises(KeyboardInterrupt):
                dedup(pool, name=name, comparison=Comparison(**settings))
        arranged = tmp_path / name / "_scratch" / "rows" / "arranged"
        partitions.append(len(list(arranged.glob("rows-*.bin"))))
        _, outputs = dedup(pool, name=name, comparison=Comparison(**settings))
        digests.add(outputs["decisions"].manifest.content_digest)
    assert partitions[0] < partitions[1]
    assert len(digests) == 1


@pytest.mark.parametrize("sizes", [(3, 4), (9, 0), (25, 3), (3, 25), (40, 41), (0, 50)])
@pytest.mark.parametrize("meet", [True, False])
def test_pieces__hold_every_pair_once_and_no_more_than_fits(monkeypatch, sizes, meet):
    monkeypatch.setattr(list_join, "_ROWS_HELD", 10)
    residents, visitors = np.arange(sizes[0]), 100 + np.arange(sizes[1])
    met = []
    for own, others, among in pieces(residents, visitors, meet=meet):
        assert len(own) + len(others) <= 10
        met += [(a, b) for a in own for b in others]
        met += [(a, b) for a in own for b in own if a < b] if among else []
    expected = {(a, b) for a in residents for b in visitors}
    expected |= {(a, b) for a in residents for b in residents if a < b} if meet else set()
    assert len(met) == len(set(met))
    assert set(met) == expected


def test_short_together__runs_of_short_lists_and_long_ones_alone():
    ends = np.cumsum([100, 100, 100, 300, 10, 256, 1])
    lists = [(int(end - 5), int(end - 1), int(end), True) for end in ends]
    lists = [(start, *one[1:]) for start, one in zip([0, *ends[:-1]], lists, strict=True)]
    runs = list(short_together(lists))
    assert [one for run in runs for one in run] == lists
    assert [len(run) for run in runs] == [2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("setting", "number"), [("_ROWS_HELD", 40), ("_ROWS_TOGETHER", 0)])
def test_join_by_lists__content_is_the_same_however_lists_are_held(
    embed, dedup, monkeypatch, setting, number
):
    old = embed(crowd(4), "old")  # rows of a set are not compared with each other
    settings = {"comparison": LISTS, "neighbors": 3, "against": ("old",)}
    pool = embed(crowd(3))
    record, whole = dedup(pool, {"old": old}, name="whole", **settings)
    monkeypatch.setattr(list_join, setting, number)
    same, cut = dedup(pool, {"old": old}, name="cut", **settings)
    assert record.figures == same.figures
    contents = [one["decisions"].manifest.content_digest for one in (whole, cut)]
    assert contents[0] == contents[1]


def test_row_reader__gives_rows_in_the_order_asked(tmp_path):
    rows = np.arange(40, dtype=np.float16).reshape(20, 2)
    files = RowFiles(str(tmp_path), 2, "float16", (0, 20), (0, 1))
    files.write(0, rows, np.zeros((20, 16), np.uint8))
    for asked in ([4, 5, 6], [2, 9, 5, 11], [7, 3, 3, 0], [0, 3, 1, 2, 8]):
        assert RowReader(files).gather(np.array(asked)).tolist() == rows[asked].tolist()
