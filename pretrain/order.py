"""The endless order in which images are trained on.

An order maps any position 0, 1, 2, … to an image without state, so that a run can go on anywhere.
Shards are shuffled in each epoch, and images among a window of neighboring shards by a keyed
permutation: nothing of the pool's size is held, and reading stays within a few shards at a time.
"""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from curation.errors import DatasetError
from pretrain.random_streams import Purpose, stream
from pretrain.sources import Source


class Place(NamedTuple):
    """Where one image lies."""

    shard: int
    row: int


class Order:
    """The endless order of a source: every image once an epoch, in windows of shuffled shards."""

    def __init__(self, sizes: list[int], seed: int, window_shards: int) -> None:
        self._sizes = np.asarray(sizes, np.int64)
        self._seed = seed
        self._window = window_shards
        self._total = int(self._sizes.sum())
        self._epoch = lru_cache(maxsize=4)(self._draw_epoch)

    def __getitem__(self, position: int) -> Place:
        """Give the image at a position, counted from 0 over all epochs."""
        epoch, position = divmod(position, self._total)
        shards, ends, windows = self._epoch(epoch)
        window = int(np.searchsorted(windows, position, side="right"))
        start = int(windows[window - 1]) if window else 0
        size = int(windows[window]) - start
        key = int(stream(self._seed, Purpose.ORDER, epoch, window).integers(2**63))
        position = start + permute(position - start, size, key)
        slot = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[slot])
        return Place(shard, position - int(ends[slot] - self._sizes[shard]))

    def _draw_epoch(self, epoch: int) -> tuple[NDArray[np.int64], ...]:
        """Give the shards in order, the ends of each, and the ends of each window."""
        shards = stream(self._seed, Purpose.ORDER, epoch).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[shards])
        last = np.arange(self._window, len(shards) + self._window, self._window) - 1
        return shards, ends, ends[last.clip(max=len(shards) - 1)]


class WeightedOrder:
    """An endless order that takes each seed set by its share, images of a set with replacement."""

    def __init__(self, source: Source, seed: int, weights: dict[str, float]) -> None:
        self._source = source
        self._seed = seed
        counts = self._count(source, set(weights))
        empty = sorted(name for name in weights if not sum(counts[name]))
        if empty:
            raise DatasetError(f"data.seed_set_weights: no image has the seed set '{empty[0]}'")
        self._names = list(weights)
        self._share = np.asarray([weights[name] for name in self._names]) / sum(weights.values())
        self._ends = {name: list(accumulate(counts[name])) for name in self._names}

    def __getitem__(self, position: int) -> Place:
        """Give the image at a position."""
        rng = stream(self._seed, Purpose.SAMPLING, position)
        name = self._names[int(rng.choice(len(self._names), p=self._share))]
        ends = self._ends[name]
        chosen = int(rng.integers(ends[-1]))
        shard = int(np.searchsorted(ends, chosen, side="right"))
        rows = np.flatnonzero(self._source.seed_sets(shard) == name)
        return Place(shard, int(rows[chosen - (ends[shard - 1] if shard else 0)]))

    @staticmethod
    def _count(source: Source, names: set[str]) -> dict[str, list[int]]:
        sets = (source.seed_sets(shard) for shard in range(len(source.sizes)))
        table = [{name: int((found == name).sum()) for name in names} for found in sets]
        return {name: [row[name] for row in table] for name in names}


def permute(position: int, size: int, key: int) -> int:
    """Map 0 … size - 1 onto itself in an order that `key` decides, in constant memory.

    Four rounds of a Feistel network on the next even number of bits, walked until inside.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    while True:
        left, right = position >> half, position & low
        for turn in range(4):
            left, right = right, left ^ (_mix(right, key, turn) & low)
        position = left << half | right
        if position < size:
            return position


def _mix(value: int, key: int, turn: int) -> int:
    """Scatter a number over 64 bits (the finalizer of splitmix64)."""
    x = (value + key + (turn + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
