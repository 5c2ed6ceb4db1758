import numpy as np
import pytest

from curation.dataset import Dataset
from curation.neighbors.index.vector_index import Comparison
from curation.neighbors.search import list_search
from curation.schema import make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.retrieve import Retrieve, SeedRule
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage

WIDTH = 32


@pytest.fixture
def retrieve(tmp_path):
    def run(pool, seeds, *, method, name, workers=0, recall=1.0, k=5):
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
    centers = np.random.default_rng(9).normal(size=(40, WIDTH))
    return centers[rng.integers(0, 40, count)] + 0.8 * rng.normal(size=(count, WIDTH))


def test_search_by_lists__finds_what_exhaustive_search_finds(embed, retrieve):
    pool, seeds = embed(rows(0, 3000)), embed(rows(1, 60), "s")
    _, exact = retrieve(pool, seeds, method="all", name="all")
    record, found = retrieve(pool, seeds, method="lists", name="lists")
    figures = record.figures["sets"]["s"]
    assert figures["measured_recall"] == figures["recall_at_least"] == 1
    assert figures["sampled_seeds"] == 60
    assert found.read().to_pylist() == exact.read().to_pylist()


def test_search_by_lists__recall_is_that_of_seeds_that_find_all_of_their_k(embed, retrieve):
    pool, seeds = embed(rows(0, 3000)), embed(rows(1, 900), "s")
    _, exact = retrieve(pool, seeds, method="all", name="all", k=8)
    record, found = retrieve(pool, seeds, method="lists", name="lists", recall=0.9, k=8)
    figures = record.figures["sets"]["s"]
    assert figures["sampled_seeds"] == 512
    wanted, given = (
        set(zip(*(hits.read()[name].to_pylist() for name in ("seed_id", "id")), strict=True))
        for hits in (exact, found)
    )
    hit_recall = len(wanted & given) / len(wanted)
    complete = 1 - len({seed for seed, _ in wanted - given}) / 900
    assert 0.9 <= complete < hit_recall < 1
    assert figures["recall_at_least"] <= complete
    assert abs(figures["measured_recall"] - complete) < 0.03
    assert abs(figures["hit_recall"] - hit_recall) < 0.01


def test_search_by_lists__a_recall_that_lists_cannot_give_is_said(
    embed, retrieve, caplog, monkeypatch
):
    monkeypatch.setattr(list_search, "_MEAN_PROBES", 4)
    pool = embed(np.random.default_rng(0).normal(size=(3000, WIDTH)))
    seeds = embed(np.random.default_rng(1).normal(size=(700, WIDTH)), "s")
    record, _ = retrieve(pool, seeds, method="lists", name="lists", k=20)
    measured = record.figures["sets"]["s"]["measured_recall"]
    assert measured < 1
    assert f"{measured:.3f} of the seeds find all of their 20 nearest where 1 was" in caplog.text


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
        retrieve(pool, seeds, method="lists", name=f"{i}", workers=i, recall=0.8, k=k)[
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
