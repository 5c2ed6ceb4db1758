"""Vectors as they come: of any length, with holes, and what is refused."""

import numpy as np
import pyarrow as pa
import pytest

from curation.errors import SchemaError, SpaceError
from curation.neighbors.index.vector_index import Comparison
from curation.neighbors.rows.vectors import bad_rows, vectors_of
from curation.stage import StageFolder, StageInputs
from curation.stages.cluster import Cluster
from curation.stages.leaks import Leaks
from curation.stages.near_dedup import NearDedup
from curation.stages.relevance import Relevance
from curation.stages.retrieve import Retrieve
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage

FLOATS = pa.list_(pa.float32())
LISTS = Comparison(method="lists", recall=1.0, probes=100)
STAGES = {
    "dedup": NearDedup(embeddings="copy", max_component_share=1.0),
    "dedup by lists": NearDedup(embeddings="copy", max_component_share=1.0, comparison=LISTS),
    "leaks": Leaks(embeddings="copy", against=("set",)),
    "retrieve": Retrieve(
        embeddings="copy", seeds=({"set": "set", "rule": "sample", "k": 3},), clusters=4
    ),
    "retrieve by cluster": Retrieve(
        embeddings="copy",
        seeds=({"set": "set", "rule": "cluster", "per_cluster": 20, "min_hits": 1},),
        clusters=4,
    ),
    "cluster": Cluster(embeddings="copy", levels=(12, 3)),
    "relevance": Relevance(embeddings="copy", seeds=("set",), max_text=None),
}


def chunked(rows, kind=FLOATS):
    return pa.chunked_array([pa.array(rows, kind)])


def outcome(tmp_path, name, embed, pool, others):
    """What a stage says of rows, whatever their lengths."""
    folder = StageFolder(str(tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"), name)
    inputs = StageInputs(
        embed(pool, "pool", kind=FLOATS), {"set": embed(others, "set", kind=FLOATS)}
    )
    record, outputs = run_stage(STAGES[name], inputs, folder, LocalEngine(), Silent())
    return record.outputs, record.dropped, outputs


def rows_with_copies(seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(160, 16)).astype(np.float32)
    rows[120:] = rows[:40] + 0.05 * rng.normal(size=(40, 16)).astype(np.float32)
    return rows, np.concatenate([rows[60:80], rng.normal(size=(20, 16)).astype(np.float32)])


@pytest.mark.parametrize("name", sorted(STAGES))
def test_stages__powers_of_two_change_no_bit_of_what_they_say(tmp_path, embed, name):
    pool, others = rows_with_copies(1)
    rng = np.random.default_rng(2)
    powers = rng.integers(-120, 120, 160)
    longer = np.ldexp(pool, powers[:, None])
    shorter = np.ldexp(others, -powers[:40, None])
    plain = outcome(tmp_path, name, embed, pool, others)
    assert outcome(tmp_path, name, embed, longer, shorter)[:2] == plain[:2]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["dedup", "leaks", "retrieve", "relevance"])
def test_stages__any_positive_length_gives_the_same_verdicts(tmp_path, embed, name, seed):
    pool, others = rows_with_copies(3)
    longer = pool * 10.0 ** np.random.default_rng(seed).uniform(-30, 30, (160, 1))
    said = [
        outcome(tmp_path, name, embed, rows, others)[2]["decisions"].read(["id", "keep", "reason"])
        for rows in (pool, longer.astype(np.float32))
    ]
    assert said[0].equals(said[1])


def test_cluster__one_short_row_ruins_nothing(tmp_path, embed):
    pool, others = rows_with_copies(4)
    pool[7] *= np.float32(1e-24)
    pool[8] *= np.float32(1e22)
    pool[9] = 0
    _, dropped, outputs = outcome(tmp_path, "cluster", embed, pool, others)
    assert dropped == {"bad_vector": 1}
    clusters = outputs["clusters"].read()
    assert clusters["similarity"].null_count == 0
    assert len(set(clusters["cluster"].to_pylist())) == 12


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.float16(), pa.int64(), pa.int8()])
def test_vectors_of__numbers_of_any_type(kind):
    found = vectors_of(chunked([[3, 4], [0, 0]], pa.list_(kind)), "here")
    assert found.dtype == (np.float16 if kind == pa.float16() else np.float32)
    assert bad_rows(found).tolist() == [False, True]


def test_vectors_of__doubles_beyond_float32_keep_their_direction():
    rows = [[3e300, 4e300], [3e-300, 4e-300], [5e-324, 0.0], [float("nan"), 1e300]]
    found = vectors_of(chunked(rows, pa.list_(pa.float64())), "here")
    assert np.allclose(found[:2] / np.linalg.norm(found[:2], axis=1, keepdims=True), [0.6, 0.8])
    assert bad_rows(found).tolist() == [False, False, False, True]


@pytest.mark.parametrize("kind", [FLOATS, pa.list_(pa.float32(), 2), pa.large_list(pa.float16())])
def test_vectors_of__holes_are_bad(kind):
    found = vectors_of(chunked([None, [1, 2], [None, 1], [float("inf"), 0], None], kind), "here")
    assert bad_rows(found).tolist() == [True, False, True, True, True]
    alone = vectors_of(chunked([None, None], kind), "here")
    assert bad_rows(alone).tolist() == [True, True]


def test_vectors_of__an_empty_list_is_bad_and_two_widths_are_refused():
    found = vectors_of(chunked([[], [1, 2]]), "here")
    assert bad_rows(found).tolist() == [True, False]
    assert bad_rows(vectors_of(chunked([[], []]), "here")).tolist() == [True, True]
    with pytest.raises(SpaceError, match="here: vectors of width 1 and of width 2"):
        vectors_of(chunked([[1], [1, 2]]), "here")


def test_vectors_of__other_columns_are_refused():
    with pytest.raises(SchemaError, match="here: embeddings are string"):
        vectors_of(chunked(["a"], pa.string()), "here")
