"""Which way to compare: how rows are laid out, and which join or search runs over them.

Few rows are compared all with all, which is exact. More are arranged into lists, and rows are
compared with those of the lists that they visit; then recall is measured and reported.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from curation import storage
from curation.config import Settings
from curation.errors import ConfigError
from curation.neighbors.index.quantizer import QuantizerRouter
from curation.neighbors.index.seed_groups import LEAST_COSINE
from curation.neighbors.index.train_quantizer import Budget, train_router
from curation.neighbors.join.join import Join, Joined, join_exhaustively
from curation.neighbors.join.list_join import join_by_lists
from curation.neighbors.join.recall import measure_recall
from curation.neighbors.kernels.products import Products
from curation.neighbors.rows.arrange import WorkerBudget, arrange
from curation.neighbors.rows.routers import HashRouter, IdRouter
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.rows.vectors import VectorSource, check_spaces, check_widths
from curation.neighbors.search.list_search import ListSearch
from curation.neighbors.search.search import Search, search_exhaustively
from curation.pool import Pool
from curation.stage import Engine, StageInputs
from embedder.encoder import available_cpus

logger = logging.getLogger(__name__)

SEARCHED = 256
"""Sampled rows a list for a pool that is searched: each query gains by lists that fit closely."""
_ROWS_PER_PARTITION, _MOST_PARTITIONS = 25_000, 1 << 12
"""Where all rows meet all: so many, more where there would be more partitions."""


class Comparison(Settings):
    """How rows are compared with each other."""

    renamed = {"visits": "probes"}

    method: Literal["auto", "all", "lists"] = "auto"
    """all: every pair, exactly. lists: rows of near lists. auto: all, up to `exhaustive_rows`."""
    exhaustive_rows: int = Field(default=50_000, ge=0)
    """auto: rows up to which all pairs are compared."""
    recall: float = Field(default=0.99, gt=0, le=1)
    """lists: of the rows that have a partner, the share that finds its twin, measured on a sample;
    of a search, the share of the seeds that find all of their k nearest."""
    probes: int = Field(default=16, gt=0)
    """lists: further lists that a row may probe on average. Where they do not suffice for `recall`,
    a warning says so: more of them find more, in more time."""
    memory_gb: float = Field(default=4.0, gt=0)
    """Memory that the tasks of one machine may hold at once."""

    def by_lists(self, num_rows: int) -> bool:
        """Whether so many rows are compared by lists."""
        if self.method == "auto":
            return num_rows > self.exhaustive_rows
        return self.method == "lists"

    @property
    def memory(self) -> int:
        """The same in bytes."""
        return int(self.memory_gb * 1e9)

    def budget(self, rows_per_list: int, alike: float | None) -> Budget:
        """What the coarse part may cost."""
        return Budget(
            memory=self.memory,
            mean_probes=self.probes,
            most_probes=8 * self.probes,
            rows_per_list=rows_per_list,
            recall=self.recall,
            alike=alike if alike is not None and alike >= LEAST_COSINE else None,
        )


@dataclass(frozen=True)
class VectorIndex:
    """Arranged rows, and how they are to be compared."""

    files: RowFiles
    comparison: Comparison
    seed: int
    router: QuantizerRouter | None = None
    """How lists are found; None where all are compared with all."""
    threads: int = 0


def sources_of(
    inputs: StageInputs,
    names: Sequence[str],
    layer: str,
    column: str,
    *,
    assume_same_space: bool,
) -> tuple[VectorSource, ...]:
    """The pool's vectors, then those of the named sets, then of the base, all of one space.

    Raises:
        ConfigError: there is no set of a name.
        SpaceError: embeddings of different spaces.
    """
    pools = [inputs.pool, *(_set_of(inputs, name) for name in names), *inputs.base]
    sources = tuple(VectorSource(pool, layer, column) for pool in pools)
    check_spaces(sources, assume_same_space=assume_same_space)
    return sources


def build_index(
    sources: Sequence[VectorSource],
    folder: str,
    engine: Engine,
    *,
    comparison: Comparison,
    seed: int,
    rows_per_list: int = Budget.rows_per_list,
    alike: float | None = None,
) -> VectorIndex:
    """Arrange the rows of all sources: by lists, or scattered where all are compared with all.

    rows_per_list: sampled rows a list that it is trained on. alike: cosine above which rows will
    be joined; those that are get lists of their own.
    """
    num_rows = sum(source.pool.num_rows for source in sources)
    threads, trained = threads_of(engine), None
    share = WorkerBudget(threads, comparison.memory // engine.workers_per_node)
    if num_rows and comparison.by_lists(num_rows):
        trained = train_router(
            tuple(sources),
            storage.join(folder, "coarse"),
            engine,
            seed=seed,
            budget=comparison.budget(rows_per_list, alike),
            threads=threads,
        )
    if trained is None:
        count = _partitions_of(num_rows)
        files = arrange(sources, HashRouter(count), range(count + 1), folder, engine, share)
        return VectorIndex(files, comparison, seed, None, threads)
    router, list_starts = trained
    files = arrange(sources, router, list_starts, folder, engine, share)
    return VectorIndex(files, comparison, seed, router, threads)


def arrange_queries(source: VectorSource, rows: RowFiles, folder: str, engine: Engine) -> RowFiles:
    """Arrange queries in the order of their ids.

    Raises:
        SpaceError: their width differs from that of the rows that they search.
    """
    count = _partitions_of(source.pool.num_rows)
    queries = arrange([source], IdRouter(count), range(count + 1), folder, engine)
    check_widths([(source.dataset.path, queries.width), ("the pool", rows.width)])
    return queries


def self_join(
    index: VectorIndex,
    threshold: float,
    folder: str,
    engine: Engine,
    active: str | None = None,
    apart: str | None = None,
    neighbors: int = 0,
) -> tuple[Joined, dict[str, Any]]:
    """Join arranged rows with themselves above a threshold; give what it found, and figures.

    active: file of the rows that take part. apart: file of those not compared with each other.
    neighbors: how many of the most similar other rows are listed for each row.
    """
    files = index.files
    products = Products.best_for(files.num_rows)
    join = Join(files, threshold, folder, products, active, apart, neighbors)
    if index.router is None:
        joined = join_exhaustively(join, engine)
        return joined, {"compared": "all", "measured_recall": 1.0, "estimated_missed_pairs": 0}
    recall = measure_recall(
        join,
        index.comparison.recall,
        index.router.limits.margin,
        engine,
        seed=index.seed,
        threads=index.threads,
    )
    joined = join_by_lists(join, recall.chosen.margin, engine, index.threads)
    _warn_of_recall(recall.chosen.recall, index.comparison)
    return joined, _by_lists(index.comparison, recall.figures())


def search_in(
    index: VectorIndex, queries: RowFiles, k: int, folder: str, engine: Engine
) -> tuple[Search, dict[str, Any]]:
    """The k nearest arranged rows of every query, and figures."""
    search = Search(index.files, queries, k, folder, Products.best_for(index.files.num_rows))
    if index.router is None:
        search_exhaustively(search, engine)
        return search, {"compared": "all", "measured_recall": 1.0}
    by_lists = ListSearch(search, index.router, index.comparison.recall, index.seed, index.threads)
    return search, _by_lists(index.comparison, by_lists.run(engine))


def _by_lists(comparison: Comparison, figures: dict[str, Any]) -> dict[str, Any]:
    return {"compared": "lists", "asked_recall": comparison.recall, **figures}


def _warn_of_recall(measured: float | None, comparison: Comparison) -> None:
    if measured is not None and measured < comparison.recall:
        logger.warning(
            "recall is %.3f where %.3g was asked: the rows form no groups that lists could "
            "follow further; comparison.probes above %d finds more, in more time",
            measured,
            comparison.recall,
            comparison.probes,
        )


def _partitions_of(num_rows: int) -> int:
    """Partitions of rows that lie in no order of lists."""
    return 1 + min(num_rows // _ROWS_PER_PARTITION, _MOST_PARTITIONS)


def threads_of(engine: Engine) -> int:
    """Threads of one worker, so that all workers together use the machine once."""
    return max(1, available_cpus() // max(1, engine.workers_per_node))


def _set_of(inputs: StageInputs, name: str) -> Pool:
    if name not in inputs.sets:
        known = ", ".join(sorted(inputs.sets)) or "none"
        raise ConfigError(f"there is no set '{name}'; there are: {known}")
    return inputs.sets[name]
