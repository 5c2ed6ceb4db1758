"""Training the coarse centroids: a sample of all rows, the lists, and the partitions.

The sample is the rows with the smallest hash of (seed, id), in its order, so the lists depend on
the rows and the seed alone. N rows, S sampled rows, D width, L lists, P partitions.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.index.coarse_training import FLAT, lists_of
from curation.neighbors.index.quantizer import FIRST_GROUPS, CoarseQuantizer, QuantizerRouter
from curation.neighbors.index.seed_groups import sample_duplicate_groups
from curation.neighbors.kernels.quantized import quantize_rows
from curation.neighbors.kernels.threads import in_threads
from curation.neighbors.rows.arrange import rows_per_task, shard_runs
from curation.neighbors.rows.file_tasks import (
    FileTask,
    TaskResult,
    finished_summaries,
    run_file_tasks,
)
from curation.neighbors.rows.routes import ProbeLimits
from curation.neighbors.rows.row_files import map_array, write_array
from curation.neighbors.rows.vectors import VectorSource, check_widths, draw_rows, storage_dtype
from curation.stage import Engine, Resources
from embedder.encoder import all_cpus

_ROWS_PER_LIST = 256
_LONGEST = 2048
"""Rows a list up to which there is one level of them."""
_MOST_LISTS = 1 << 18
_ROWS_ASKED = 1 << 12
"""Sampled rows, held out from training, that say how many lists lie within a margin."""
_COUNTED, _COUNTED_PER_LIST = 1 << 16, 64
"""Sampled rows that say how many rows each list will hold, at most."""
_NEAR = 0.8
"""Of the cosine of alike rows: members of a group are at least as near to its mean."""
_SHARE_FOR_GROUPS = 0.2
"""Share of the rows that is sampled where groups are sought: some rows of each."""
_FINDING_GROUPS = 256
"""Bytes that finding groups takes for a sampled row: its sketch, its neighbors."""


@dataclass(frozen=True)
class Budget:
    """What the coarse part may cost."""

    memory: int = 4 * 10**9
    """Bytes that all tasks of a machine may hold at once."""
    mean_probes: int = 16
    """Probes of a row that are written down, on average; a join uses those its recall needs."""
    most_probes: int = 128
    """Probes of one row, and those as near as the last of them."""
    rows_per_list: int = 96
    """Sampled rows a list that it is trained on."""
    recall: float = 0.99
    """Share of the pairs of alike rows that visits are to find."""
    alike: float | None = None
    """Cosine above which rows are sought: groups of such rows get lists of their own."""

    @property
    def near(self) -> float:
        """Cosine to the mean of a group from which a row belongs there."""
        return np.inf if self.alike is None else _NEAR * self.alike


@dataclass(frozen=True)
class Training:
    """A sample of the rows of some sources, and the centroids trained on it."""

    sources: tuple[VectorSource, ...]
    groups: tuple[tuple[int, int, int], ...]
    folder: str
    seed: int
    share: float
    """Share of the rows that are sampled."""
    num_lists: int
    dtype: str
    budget: Budget
    num_rows: int
    threads: int
    workers: int

    def sample_path(self, item: int) -> str:
        """File of the sample of one run of shards."""
        return storage.join(self.folder, "sampled", f"sample-{item:06d}.bin")

    def most_rows(self, width: int) -> int:
        """Sampled rows that fit into half of the memory, with what finds groups."""
        return max(self.num_lists, self.budget.memory // (2 * (width + _FINDING_GROUPS)))

    @property
    def coarse_path(self) -> str:
        """File of the centroids."""
        return storage.join(self.folder, "coarse.bin")


def train_router(
    sources: tuple[VectorSource, ...],
    folder: str,
    engine: Engine,
    *,
    seed: int,
    budget: Budget,
    threads: int,
) -> tuple[QuantizerRouter, list[int]] | None:
    """Train coarse centroids; give the router and the first list of each partition.

    Gives None where no row has a direction, so that there is nothing to be trained on.
    """
    num_rows = sum(source.pool.num_rows for source in sources)
    num_lists = lists_for(num_rows)
    least_share = 0.0 if budget.alike is None else _SHARE_FOR_GROUPS
    training = Training(
        sources=sources,
        groups=tuple(shard_runs(sources, budget.memory // engine.workers_per_node)),
        folder=folder,
        seed=seed,
        share=min(1.0, max(least_share, budget.rows_per_list * num_lists / num_rows)),
        num_lists=num_lists,
        dtype=storage_dtype(sources),
        budget=budget,
        num_rows=num_rows,
        threads=threads,
        workers=engine.workers_per_node,
    )
    facts = finished_summaries(storage.join(folder, "trained"), 1) or _train(training, engine)
    if facts is None:
        return None
    found = facts[0]
    router = QuantizerRouter(
        training.coarse_path,
        found["width"],
        found["groups"],
        found["lists"],
        ProbeLimits(
            found["margin"], budget.most_probes, found["groups_met"], budget.near, found["least"]
        ),
        threads,
    )
    return router, found["list_starts"]


def lists_for(num_rows: int) -> int:
    """How many lists so many rows get.

    As long as one level of lists does, they grow longer before there are two: two lose neighbors
    where rows form no large groups.
    """
    wanted = int(np.clip(num_rows // _ROWS_PER_LIST, 16, _MOST_LISTS))
    return min(wanted, FLAT) if num_rows <= FLAT * _LONGEST else wanted


def _train(training: Training, engine: Engine) -> list[dict[str, Any]] | None:
    """Sample rows and train on them; the sample goes when that has finished."""
    sampled = storage.join(training.folder, "sampled")
    facts = run_file_tasks(engine, _Sample(training), len(training.groups), sampled, "sample rows")
    width = check_widths([(fact["where"], fact["width"]) for fact in facts])
    if not width:
        return None
    train, folder = _TrainCoarse(training, width), storage.join(training.folder, "trained")
    found = run_file_tasks(engine, train, 1, folder, "train centroids")
    storage.remove(sampled)
    return found


_Sampled = tuple[np.ndarray, np.ndarray, tuple[str, int]]
"""Hashes (S,) and rows of 8-bit integers (S, D); where they are from, and their width."""


@dataclass(frozen=True)
class _Sample(FileTask[None, dict[str, Any]]):
    """The sampled rows of some shards: (S,) uint64 hashes, then (S, D) int8."""

    training: Training

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        number, first, end = self.training.groups[item]
        source, shards = self.training.sources[number], range(first, end)
        read = partial(self._read, source)
        found = [some for some in in_threads(read, shards, self.training.threads) if some]
        hashes, rows, widths = zip(*found, strict=True) if found else ((), (), ())
        width = check_widths(widths)
        write_array(self.training.sample_path(item), *hashes, *rows)
        where = source.dataset.path
        return TaskResult([self.training.sample_path(item)], {"where": where, "width": width})

    def _read(self, source: VectorSource, shard: int) -> _Sampled | None:
        """The sampled rows of one shard; None where there are none."""
        ids, vectors = source.read(shard)
        share = self._share(vectors.shape[1])
        hashes, drawn = draw_rows(ids, vectors, share, "coarse", self.training.seed)
        if not len(drawn):
            return None
        rows = quantize_rows(vectors[drawn])
        return hashes, rows, (source.where(shard), vectors.shape[1])

    def _share(self, width: int) -> float:
        """Of the rows that are sampled: a little more than will be used, as rows are by chance."""
        share = 1.05 * self.training.most_rows(width) / self.training.num_rows
        return min(self.training.share, share)


@dataclass(frozen=True)
class _TrainCoarse(FileTask[None, dict[str, Any]]):
    """The centroids of lists and of their groups, and how many rows each list will hold."""

    training: Training
    width: int

    @property
    def resources(self) -> Resources:
        return Resources(memory=self.training.budget.memory, time_limit_s=24 * 3600)

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        sample = self._sample()
        held = min(_ROWS_ASKED, len(sample) // 8)
        asked, rows = sample[:held], sample[held:]  # those trained on lie too near their lists
        rng = np.random.default_rng(self.training.seed)
        # The other workers wait for the lists, so that their cores are free where they are here.
        threads = min(all_cpus(), self.training.workers * self.training.threads)
        budget = self.training.budget
        groups = (
            None
            if budget.alike is None
            else sample_duplicate_groups(rows, budget.alike, rng, threads)
        )
        coarse = CoarseQuantizer.of(
            *lists_of(rows, self.training.num_lists, rng, threads, groups), rng, threads
        )
        coarse.write(self.training.coarse_path)
        limits = self._limits(coarse, asked, threads)
        few = rows[: min(_COUNTED, _COUNTED_PER_LIST * coarse.num_lists)]
        homes = coarse.route(few, replace(limits, margin=0.0, most=0), threads).home
        counts = np.bincount(homes, minlength=coarse.num_lists)
        expected = counts * (self.training.num_rows / max(1, len(few)))
        facts = {
            "width": self.width,
            "groups": len(coarse.groups),
            "groups_met": limits.groups,
            "least": limits.least,
            "lists": coarse.num_lists,
            "margin": limits.margin,
            "list_starts": split_evenly(expected, self._rows_per_partition()),
        }
        return TaskResult([self.training.coarse_path], facts)

    def _limits(self, coarse: CoarseQuantizer, asked: np.ndarray, threads: int) -> ProbeLimits:
        """How far rows are to look for lists, by what those held out need."""
        budget = self.training.budget
        limits = ProbeLimits(np.inf, budget.most_probes, near=budget.near)
        if budget.alike is not None and coarse.has_loose:
            least = coarse.least_of_sketches(asked)
            limits = replace(limits, groups=FIRST_GROUPS, least=least)
        else:
            limits = replace(limits, groups=coarse.groups_to_meet(asked, budget.recall))
        margin = coarse.margin_of_probes(asked, budget.mean_probes, limits, threads)
        return replace(limits, margin=margin)

    def _rows_per_partition(self) -> int:
        row_bytes = self.width * np.dtype(self.training.dtype).itemsize
        memory = self.training.budget.memory // self.training.workers
        return rows_per_task(self.training.num_rows, row_bytes, memory)

    def _sample(self) -> np.ndarray:
        """(S, D) sampled rows in the order of their hashes."""
        bound, items = self._bound(), range(len(self.training.groups))
        hashes = np.concatenate([self._read(item)[0] for item in items])
        hashes = hashes[hashes <= bound]
        places = np.empty(len(hashes), np.int64)
        places[np.argsort(hashes, kind="stable")] = np.arange(len(hashes))
        rows, first = np.empty((len(hashes), self.width), np.int8), 0
        for item in items:
            keys, found = self._read(item)
            some = np.flatnonzero(keys <= bound)
            rows[places[first : first + len(some)]] = found[some]
            first += len(some)
        return rows

    def _bound(self) -> np.uint64:
        """The largest hash of a sampled row, so that the sample fits into the memory."""
        items = range(len(self.training.groups))
        hashes = np.sort(np.concatenate([self._read(item)[0] for item in items]))
        most = self.training.most_rows(self.width)
        return np.uint64(hashes[min(most, len(hashes)) - 1])

    def _read(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes (S,) and rows (S, D) int8 of one file of the sample."""
        path = self.training.sample_path(item)
        count = storage.size_of(path) // (8 + self.width)
        hashes = map_array(path, "uint64", 0, (count,))
        return hashes, map_array(path, "int8", 8 * count, (count, self.width))


def split_evenly(expected: np.ndarray, rows_per_partition: int) -> list[int]:
    """First list of each partition, and the number of lists: about so many rows in each.

    expected: (L,) rows of each list. A longer list is a partition of its own.
    """
    before = np.concatenate([[0.0], np.cumsum(expected)[:-1]])
    count = max(1, round(expected.sum() / rows_per_partition))
    owner = np.minimum((before / max(1.0, expected.sum()) * count).astype(np.int64), count - 1)
    firsts = np.flatnonzero(np.diff(owner, prepend=-1) > 0)
    return [*(int(first) for first in firsts), len(expected)]
