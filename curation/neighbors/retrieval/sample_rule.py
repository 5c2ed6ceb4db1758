"""Rule sample: the k nearest images of each seed of a set. Q seeds, K candidates of each."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from curation import storage
from curation.neighbors.index.vector_index import VectorIndex, search_in
from curation.neighbors.kernels.selection import ranks_within
from curation.neighbors.retrieval.hit_files import HitWriter
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.search.matching import Matching
from curation.neighbors.search.search import Search
from curation.stage import Engine

Collision = Literal["keep", "next"]
"""What to do when two seeds retrieve the same image: leave it to both, or take the next free."""
_CANDIDATES_PER_HIT = 4
"""Where seeds take the next free image, 4 k + 4 candidates are fetched for each of them."""


@dataclass(frozen=True)
class SampleRule:
    """The search for the hits of one seed set."""

    index: VectorIndex
    """Of the pool."""
    seeds: RowFiles
    """In the order of their ids."""
    k: int
    on_collision: Collision
    folder: str

    def run(self, hits: HitWriter, engine: Engine) -> dict[str, Any]:
        """Find and write the hits; give the figures of the set."""
        num_seeds, num_rows = self.seeds.num_rows, self.index.files.num_rows
        wanted = self.k if self.on_collision == "keep" else _CANDIDATES_PER_HIT * (self.k + 1)
        k = max(1, min(wanted, num_rows))
        search, figures = search_in(self.index, self.seeds, k, self.folder, engine)
        matching = Matching(search, self.k) if self.on_collision == "next" else None
        if matching:
            figures |= matching.run(engine)
        task, written = (
            _WriteHits(search, self.k, matching, hits),
            storage.join(self.folder, "hits"),
        )
        found = sum(run_file_tasks(engine, task, self.seeds.num_partitions, written, "write hits"))
        counts = {"seeds": num_seeds, "hits": found, "shortfall": self.k * num_seeds - found}
        return {**counts, **figures}


@dataclass(frozen=True)
class _WriteHits(FileTask[None, int]):
    """The hits of the seeds of one partition; gives their number."""

    search: Search
    k: int
    matching: Matching | None
    """Which candidates each seed gets; None: the k nearest."""
    hits: HitWriter

    def __call__(self, item: int, opened: None) -> TaskResult[int]:
        positions, similarities = self.search.nearest(item)  # (Q, K)
        if self.matching:
            chosen = self.matching.chosen(item)
        else:
            chosen = (positions >= 0) & (np.arange(self.search.k) < self.k)
        seeds, columns = np.nonzero(chosen)
        files = self.hits.write(
            item,
            positions[seeds, columns],
            1 + ranks_within(seeds),
            similarities[seeds, columns],
            seeds=self.search.queries.ids(item)[seeds],
        )
        return TaskResult(files, len(seeds))
