from collections import Counter
from pathlib import Path

import pytest

from curation.errors import DatasetError
from pretrain.order import Order, WeightedOrder, permute
from pretrain.sources import open_source
from tests.pretrain.small_runs import jpeg, write_shards


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_permute__is_a_permutation(size: int) -> None:
    assert sorted(permute(i, size, key=7) for i in range(size)) == list(range(size))


def test_permute__depends_on_key_and_scatters() -> None:
    a, b = ([permute(i, 1000, key) for i in range(1000)] for key in (1, 2))
    assert a != b
    neighbors = sum(abs(x - y) < 10 for x, y in zip(a, a[1:], strict=False))
    assert neighbors < 60  # 20 of 1,000 expected by chance


@pytest.mark.parametrize("window", [1, 2, 100])
def test_order__every_image_once_an_epoch(window: int) -> None:
    sizes = [3, 0, 5, 1, 4]
    order = Order(sizes, seed=0, window_shards=window)
    everything = {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}
    epochs = [[tuple(order[e * 13 + i]) for i in range(13)] for e in range(3)]
    assert all(set(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_order__reads_a_window_of_shards_at_a_time() -> None:
    order = Order([10] * 20, seed=3, window_shards=4)
    for start in range(0, 200, 40):
        assert len({order[i].shard for i in range(start, start + 40)}) == 4


def test_order__depends_on_the_seed_alone() -> None:
    first, again, other = (Order([50, 50], seed, 64) for seed in (1, 1, 2))
    assert [first[i] for i in range(100)] == [again[i] for i in reversed(range(100))][::-1]
    assert [first[i] for i in range(100)] != [other[i] for i in range(100)]


def test_weighted_order__takes_each_set_by_its_share(tmp_path: Path) -> None:
    images = [(f"{i:032x}", jpeg(i), "rare" if i == 7 else None) for i in range(10)]
    source = open_source(str(write_shards(tmp_path / "packed", [images[:5], images[5:]])))
    order = WeightedOrder(source, seed=0, weights={"rare": 1.0, "none": 1.0})
    counts = Counter(tuple(order[i]) for i in range(400))
    assert 160 < counts[(1, 2)] < 240
    assert len(counts) == 10


def test_weighted_order__unknown_set(tmp_path: Path) -> None:
    source = open_source(str(write_shards(tmp_path / "packed", [[("0" * 32, jpeg(0), None)]])))
    with pytest.raises(DatasetError, match="no image has the seed set 'missing'"):
        WeightedOrder(source, seed=0, weights={"missing": 1.0})
