import numpy as np
import pytest
from pydantic import ValidationError

from curation.stage import StageFolder, StageInputs
from curation.stages.leaks import Leaks
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage

WIDTH = 32


@pytest.fixture
def leaks(tmp_path):
    def run(pool, sets, *, name="out", workers=1, **settings):
        return run_stage(
            Leaks(embeddings="copy", against=tuple(sets), **settings),
            StageInputs(pool, sets),
            StageFolder(str(tmp_path / name), "leaks"),
            LocalEngine(workers),
            Silent(),
        )

    return run


def test_leaks__names_the_set_of_the_nearest_benchmark_image(embed, leaks):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, WIDTH))
    far, near = rows[:1] + 0.6 * rng.normal(size=(1, WIDTH)), rows[:1] + 0.05
    sets = {"far": embed(far, "far"), "near": embed(near, "near")}
    record, outputs = leaks(embed(rows), sets, threshold=0.6)
    assert record.dropped == {"leak:near": 1}
    found = outputs["decisions"].read().to_pylist()[0]
    assert (found["twin_set"], found["path"]) == ("near", "direct")
    assert found["twin"] == sets["near"].live_ids(0)[0].as_py()
    assert found["score"] == found["similarity"] > 0.99
    assert found["threshold"] == pytest.approx(0.6)


def test_leaks__a_chain_of_pool_images_falls_as_a_whole(embed, leaks):
    angles = np.deg2rad([0, 40, 80, 120, 180])
    rows = np.zeros((5, WIDTH))
    rows[:, 0], rows[:, 1] = np.cos(angles), np.sin(angles)
    record, outputs = leaks(embed(rows), {"bench": embed(rows[:1], "bench")}, threshold=0.7)
    assert record.dropped == {"leak:bench": 4}
    paths = [row["path"] for row in outputs["decisions"].read().to_pylist()]
    assert paths == ["direct", "direct", "chain", "chain", None]


def test_leaks__default_threshold_is_the_encoders(embed, leaks):
    rows = np.eye(2, WIDTH)
    bench = np.array([[0.5, 0, 0.866] + [0] * (WIDTH - 3)])
    record, _ = leaks(embed(rows), {"bench": embed(bench, "bench")})
    assert record.figures["threshold"] == 0.45
    assert record.dropped == {"leak:bench": 1}


def test_leaks__an_empty_benchmark_drops_nothing(embed, leaks):
    rows = np.repeat(np.eye(2, WIDTH), 3, axis=0)
    record, _ = leaks(embed(rows), {"bench": embed(np.empty((0, WIDTH)), "bench")})
    assert record.dropped == {}


def test_leaks__needs_a_benchmark():
    with pytest.raises(ValidationError, match="against"):
        Leaks(embeddings="copy", against=())


def test_leaks__same_ids_in_pool_and_benchmark_are_two_rows(embed, leaks):
    rows, ids = np.eye(3, WIDTH), [f"{i:032x}" for i in range(3)]
    bench = embed(rows[:1], "bench", ids=ids[:1])
    record, outputs = leaks(embed(rows, ids=ids), {"bench": bench})
    assert record.dropped == {"leak:bench": 1}
    assert outputs["decisions"].read()["twin"].to_pylist() == [ids[0], None, None]
