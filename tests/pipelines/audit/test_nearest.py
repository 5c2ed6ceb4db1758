"""The nearest kept row of every benchmark row, against all products in double precision."""

import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from curation.dataset import write_dataset
from curation.neighbors.kernels.products import FLOAT32, Products
from curation.neighbors.rows.vectors import VectorSource
from curation.pool import Pool
from curation.schema import ids_from_bytes, make_id
from pipelines.audit import nearest
from pipelines.audit.nearest import Comparison, Nearest
from pipelines.engines.local_engine import LocalEngine


def source(folder, vectors, name, sizes=(1000,)):
    ids = sorted(make_id(f"{name} {row}") for row in range(len(vectors)))
    kind = pa.list_(pa.float16(), vectors.shape[1])
    table = pa.table({"id": ids, "embedding": pa.array(list(vectors), kind)})
    cuts = [0, *np.minimum(np.cumsum(sizes), len(ids)), len(ids)]
    tables = [table.slice(a, b - a) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    dataset = write_dataset(str(folder / name), tables, table.schema, {"space": "s"})
    return VectorSource(Pool(name, {"copy": dataset}), "copy")


def vectors(count, width=24, seed=0):
    """Rows in a few dense groups, some equal, one without a direction."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(8, width))[rng.integers(0, 8, count)] + rng.normal(
        size=(count, width)
    ) * rng.choice([0, 1e-3, 0.5], (count, 1))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[count // 2] = 0
    return rows.astype(np.float16)


def brute(benchmark, kept):
    """Nearest by float64 products of all pairs, rounded once; ties to the smallest id."""
    sides = []
    for one in (benchmark, kept):
        read = [one.read(index) for index in range(one.pool.num_shards)]
        ids = np.concatenate([ids_from_bytes(i).to_pylist() for i, _ in read if len(i)])
        rows = np.concatenate([v for _, v in read]).astype(np.float64)
        lengths = np.linalg.norm(rows, axis=1)
        sides.append((ids[lengths > 0], rows[lengths > 0] / lengths[lengths > 0, None]))
    (names, left), (others, right) = sides
    scores = (left @ right.T).astype(np.float32)
    return {
        name: (min(others[row == row.max()].tolist()), row.max())
        for name, row in zip(names, scores, strict=True)
    }


def found_by(comparison, engine=None):
    rows = comparison.find(engine or LocalEngine()).read().to_pylist()
    return {row["id"]: (row["kept"], row["similarity"]) for row in rows}


@pytest.mark.parametrize(("block_rows", "run_rows"), [(64, 90), (1 << 16, 1 << 20), (7, 1)])
def test_find__is_that_of_all_pairs_in_whatever_pieces(tmp_path, monkeypatch, block_rows, run_rows):
    monkeypatch.setattr(nearest, "TILE", 32)
    monkeypatch.setattr(nearest, "QUERIES", 16)
    benchmark = source(tmp_path, vectors(101), "bench", (13, 0, 40, 25))
    kept = source(tmp_path, vectors(307, seed=1), "kept", (100, 0, 0, 7, 150))
    folder = str(tmp_path / "found")
    found = found_by(Comparison(benchmark, kept, folder, block_rows, run_rows))
    expected = brute(benchmark, kept)
    (lonely,) = set(found) - set(expected)
    assert found.pop(lonely) == (None, None)
    assert {name: kept for name, (kept, _) in found.items()} == {
        name: kept for name, (kept, _) in expected.items()
    }
    assert [found[name][1] for name in found] == pytest.approx(
        [expected[name][1] for name in found], abs=6e-8
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_meet__precision_of_the_products_does_not_show(precision):
    block, rows = vectors(50, 64), vectors(400, 64, 2)
    ids = np.random.default_rng(3).integers(0, 256, (400, 16), np.uint8)
    found = Nearest(block, Products(precision))
    found.meet(ids[:150], rows[:150])
    found.meet(ids[150:], rows[150:])
    other = Nearest(block, FLOAT32)
    order = np.random.default_rng(4).permutation(400)
    other.meet(ids[order], rows[order])
    assert np.array_equal(found.best.scores, other.best.scores)
    assert np.array_equal(found.best.ids, other.best.ids)


class StoppedError(Exception):
    """The process ends here."""


class Mortal(LocalEngine):
    """Counts the items that it hands out, and ends after some of them."""

    def __init__(self, lives):
        super().__init__(1)
        self.lives, self.items = lives, 0

    def map(self, task, items, label):
        for number, result in enumerate(super().map(task, items, label)):
            if number == self.lives:
                raise StoppedError
            self.items += 1
            yield result


def test_find__goes_on_where_it_was_killed(tmp_path):
    benchmark = source(tmp_path, vectors(60), "bench", (20, 20))
    kept = source(tmp_path, vectors(90, seed=1), "kept", (30, 30))
    whole = found_by(Comparison(benchmark, kept, str(tmp_path / "whole"), 20, 30))
    comparison = Comparison(benchmark, kept, str(tmp_path / "cut"), 20, 30)
    first, second = Mortal(4), Mortal(99)
    with pytest.raises(StoppedError):
        comparison.find(first)
    assert found_by(comparison, second) == whole
    assert first.items == 4
    assert second.items == 9 - 5 + 3  # the fifth was written when it was killed; 3 blocks


def peak_bytes(block, shards):
    """Most bytes of arrays that one task holds beside its shard."""
    found = Nearest(block, FLOAT32)
    tracemalloc.start()
    try:
        for ids, rows in shards:
            found.meet(ids, rows)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_meet__holds_a_tile_whatever_the_size_of_both_sides():
    """16,384 benchmark rows with a shard of 16,384: a gigabyte of products if taken at once."""
    rng = np.random.default_rng(0)
    block = rng.normal(size=(16384, 16)).astype(np.float16)
    ids, rows = rng.integers(0, 256, (16384, 16), np.uint8), rng.normal(size=(16384, 16))
    shard = (ids, rows.astype(np.float16))
    small = peak_bytes(block[:4096], [(ids[:8192], shard[1][:8192])])
    large = peak_bytes(block, [shard, shard])
    tile = 4 * nearest.QUERIES * nearest.TILE
    assert small < 4 * tile
    assert large < 1.25 * small + (2 << 20)


def test_memory__a_task_declares_its_tiles_not_its_products(tmp_path):
    benchmark = source(tmp_path, vectors(200), "bench", (100,))
    kept = source(tmp_path, vectors(300, seed=1), "kept", (150,))
    task = Comparison(benchmark, kept, "f")
    assert task._memory() < (1 << 29) + 16 * nearest.QUERIES * nearest.TILE + (1 << 20)
    imagenet, shard, width = 1_281_167, 10_000, 512
    declared = (1 << 29) + 3 * 4 * width * (nearest._BLOCK_ROWS + 2 * shard)
    assert declared + 16 * nearest.QUERIES * nearest.TILE < 2 << 30 < 4 * imagenet * shard


@pytest.mark.slow
def test_find__is_the_same_on_ray_and_in_processes(tmp_path):
    ray = pytest.importorskip("ray")
    from pipelines.engines.ray_engine import RayEngine

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    benchmark = source(tmp_path, vectors(60), "bench", (20, 20))
    kept = source(tmp_path, vectors(90, seed=1), "kept", (30, 30))
    digests = set()
    engines = (LocalEngine(), LocalEngine(2), RayEngine(2))
    for number, engine in enumerate(engines):
        comparison = Comparison(benchmark, kept, str(tmp_path / f"{number}"), 20 + number, 30)
        digests.add(comparison.find(engine).manifest.content_digest)
    ray.shutdown()
    assert len(digests) == 1
