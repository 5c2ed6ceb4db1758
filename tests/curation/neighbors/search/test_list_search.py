import numpy as np
import pytest

from curation.dataset import Dataset
from curation.neighbors.index.vector_index import Comparison
from curation.schema import make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.retrieve import Retrieve, SeedRule
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage

WIDTH = 32


@pytest.fixture
def retrieve(tmp_path):
    def run(pool, seeds, *, method, name, workers=1, recall=1.0, k=5):
        folder = StageFolder(str(tmp_path / name), "retrieve")
        stage = Retrieve(
            embeddings="copy",
            seeds=(SeedRule(set="s", rule="sample", k=k),),
            comparison=Comparison(method=method, recall=recall),
        )
        inputs = StageInputs(pool, {"s": seeds})
        record, _ = run_stage(stage, inputs, folder, LocalEngine(workers), Silent())
        return record, Dataset.open(folder.output("hits"))

    return run


def rows(seed, count):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(40, WIDTH))
    return centres[rng.integers(0, 40, count)] + 0.8 * rng.normal(size=(count, WIDTH))


def test_search_by_lists__finds_what_exhaustive_search_finds(embed, retrieve):
    pool, seeds = embed(rows(0, 3000)), embed(rows(1, 60), "s")
    _, exact = retrieve(pool, seeds, method="all", name="all")
    record, found = retrieve(pool, seeds, method="lists", name="lists")
    figures = record.figures["sets"]["s"]
    assert figures["measured_recall"] >= 0.999
    assert figures["sampled_neighbours"] == 300
    assert found.read().to_pylist() == exact.read().to_pylist()


def test_search_by_lists__recall_is_measured_on_half_of_the_rows_where_queries_are_many(
    embed, retrieve
):
    pool, seeds = embed(rows(0, 3000)), embed(rows(1, 600), "s")
    _, exact = retrieve(pool, seeds, method="all", name="all", k=16)
    record, found = retrieve(pool, seeds, method="lists", name="lists", recall=0.9, k=16)
    figures = record.figures["sets"]["s"]
    assert figures["sampled_neighbours"] == 512 * 8
    wanted, given = (
        set(zip(*(hits.read()[name].to_pylist() for name in ("seed_id", "id")), strict=True))
        for hits in (exact, found)
    )
    true = len(wanted & given) / len(wanted)
    assert 0.9 <= true < 1
    assert abs(figures["measured_recall"] - true) < 0.02


@pytest.mark.parametrize(("queries", "k"), [((25, 15), 5), ((400, 120), 16)])
def test_search_by_lists__content_does_not_depend_on_shards_or_workers(embed, retrieve, queries, k):
    ids = [make_id(str(i)) for i in range(1500)]
    seeds = embed(rows(1, sum(queries)), "s", sizes=list(queries))
    order = np.random.default_rng(0).permutation(1500)
    pools = [
        embed(rows(0, 1500), ids=ids),
        embed(rows(0, 1500), ids=ids, sizes=[700, 800], order=order),
    ]
    digests = {
        retrieve(pool, seeds, method="lists", name=f"{i}", workers=i + 1, recall=0.8, k=k)[
            1
        ].manifest.content_digest
        for i, pool in enumerate(pools)
    }
    assert len(digests) == 1


def test_search_by_lists__k_larger_than_the_pool(embed, retrieve):
    pool, seeds = embed(rows(0, 20)), embed(rows(1, 50), "s")
    record, found = retrieve(pool, seeds, method="lists", name="few", k=30)
    assert found.num_rows == 50 * 20
    assert record.figures["sets"]["s"]["shortfall"] == 50 * 10
