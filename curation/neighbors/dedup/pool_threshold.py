"""The threshold of duplicates, held against the size of the pool before anything is joined."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from curation import storage
from curation.neighbors.dedup.unrelated_tail import (
    DUBIOUS,
    MIN_ROWS,
    SAMPLE_ROWS,
    WANTED,
    UnrelatedTail,
    fit_unrelated_tail,
    largest_random_component,
)
from curation.neighbors.rows.arrange import ShardRun, shard_runs
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.vectors import (
    VectorSource,
    check_widths,
    default_threshold,
    draw_rows,
)
from curation.stage import Engine, Task
from embedder.rows import unit_rows

logger = logging.getLogger(__name__)

AUTO: Literal["auto"] = "auto"
_PAPERS = 0.6
"""Where the fit of `auto` begins for embeddings that record no threshold of their encoder."""
_SPARE = 1.1
"""Times as many rows are drawn as are fitted, since the hashes of few rows spread unevenly."""


@dataclass(frozen=True)
class PoolThreshold:
    """A threshold, and what the sample says of it."""

    value: float
    proposed: float | None
    """Threshold above which a row has 0.001 unrelated ones; None where the sample is too small."""
    figures: dict[str, Any]


def choose_threshold(
    sources: Sequence[VectorSource],
    given: float | Literal["auto"] | None,
    max_component: int,
    folder: str,
    engine: Engine,
    seed: int,
) -> PoolThreshold:
    """Take the threshold given, that of the encoder, or the one that suits the pool's size.

    The last with `auto`, and where none is given and that of the encoder would join unrelated rows
    into components that are not allowed; a warning says so.

    sources: the pool, then those whose rows take part in its components.

    Raises:
        ConfigError: none given, and the embeddings record none.
    """
    num_rows = sum(source.pool.num_rows for source in sources)
    own = _own_threshold(sources[0], given)
    tail = _tail_of(sources, own, folder, engine, seed)
    if tail is None:
        if given == AUTO:
            logger.warning("near_dedup: %s", _too_few(num_rows, own))
        return PoolThreshold(own, None, {})
    proposed = tail.threshold_for(WANTED, num_rows)
    at_own = _figures(tail, own, num_rows)
    raised = given is None and at_own["unrelated_largest_component"] > max_component
    if given == AUTO or raised:
        value, figures = proposed, _figures(tail, proposed, num_rows)
    else:
        value, figures = own, at_own
    if raised or figures["unrelated_per_row"] > DUBIOUS:
        logger.warning("near_dedup: %s", _doubt(own, proposed, at_own, raised))
    return PoolThreshold(value, proposed, {**figures, "proposed_threshold": proposed})


def _figures(tail: UnrelatedTail, threshold: float, num_rows: int) -> dict[str, Any]:
    expected = tail.expected(threshold, num_rows)
    return {
        "unrelated_per_row": expected,
        "unrelated_per_row_at_most": tail.upper_share_above(threshold) * max(0, num_rows - 1),
        "unrelated_largest_component": largest_random_component(num_rows, expected),
    }


def _own_threshold(source: VectorSource, given: float | Literal["auto"] | None) -> float:
    """What the fit starts from: `auto` needs no threshold of the encoder."""
    recorded = (source.dataset.attributes.get("thresholds") or {}).get("dedup")
    if given == AUTO:
        given = _PAPERS if recorded is None else None
    return default_threshold(source, given, "dedup")


def _too_few(num_rows: int, own: float) -> str:
    return (
        f"threshold auto: {num_rows} rows are too few to tell what unrelated ones look like "
        f"({MIN_ROWS} are needed); taken is {own:g}"
    )


def _doubt(own: float, proposed: float, figures: dict[str, Any], raised: bool) -> str:
    expected, most = figures["unrelated_per_row"], figures["unrelated_per_row_at_most"]
    ends = (
        f"so the threshold is {proposed:g}, where it is {WANTED:g} (set `threshold` to decide)"
        if raised
        else f"at {proposed:g} it would be {WANTED:g} (--threshold auto)"
    )
    return (
        f"above {own:g} a row of this pool has {expected:.3g} unrelated rows (at most {most:.3g}), "
        f"which join up to {figures['unrelated_largest_component']:,}; {ends}"
    )


def _tail_of(
    sources: Sequence[VectorSource], threshold: float, folder: str, engine: Engine, seed: int
) -> UnrelatedTail | None:
    """Fit the tail on the rows with the smallest hash of (seed, id)."""
    num_rows = sum(source.pool.num_rows for source in sources)
    share = _SPARE * SAMPLE_ROWS / max(1, num_rows)
    runs = tuple(shard_runs(sources, _READ_BYTES))
    draw = _DrawSample(tuple(sources), runs, share, folder, seed)
    run_file_tasks(engine, draw, len(runs), folder, "draw a sample")
    ((_, tail),) = engine.map(_FitTail(draw, threshold), ["tail"], "fit the unrelated tail")
    return tail


_READ_BYTES = 1 << 30
"""What one task reads at a time."""


@dataclass(frozen=True)
class _DrawSample(FileTask[None, None]):
    """The sampled rows of one run of shards, and their hashes."""

    sources: tuple[VectorSource, ...]
    runs: tuple[ShardRun, ...]
    share: float
    folder: str
    seed: int

    def path(self, item: int) -> str:
        """Where the rows of one run lie."""
        return storage.join(self.folder, f"sample-{item:06d}.bin")

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        number, first, end = self.runs[item]
        source, widths = self.sources[number], []
        hashes, rows = [], []
        for shard in range(first, end):
            ids, vectors = source.read(shard)
            if not len(ids):
                continue
            widths.append((source.where(shard), vectors.shape[1]))
            keys, drawn = draw_rows(ids, vectors, self.share, self.seed, "unrelated")
            if len(drawn):  # a shard without one vector has no width
                hashes.append(keys)
                rows.append(vectors[drawn].astype(np.float32))
        check_widths(widths)
        columns = {
            "hash": np.concatenate(hashes) if hashes else np.empty(0, np.uint64),
            "row": np.concatenate(rows) if rows else np.empty((0, 0), np.float32),
        }
        write_columns(self.path(item), columns)
        return TaskResult([self.path(item)], None)


@dataclass(frozen=True)
class _FitTail(Task[str, None, UnrelatedTail | None]):
    """Fits the tail of the sample."""

    sample: _DrawSample
    threshold: float

    def __call__(self, item: str, opened: None) -> UnrelatedTail | None:
        files = [ColumnFile.open(self.sample.path(run)) for run in range(len(self.sample.runs))]
        parts = [(file["hash"], file["row"]) for file in files if file.num_rows("hash")]
        if len({rows.shape[1] for _, rows in parts}) != 1:  # none; or the index names which
            return None
        order = np.argsort(np.concatenate([hashes for hashes, _ in parts]), kind="stable")
        rows = np.concatenate([rows for _, rows in parts])[order[:SAMPLE_ROWS]]
        return fit_unrelated_tail(unit_rows(rows).astype(np.float32), self.threshold)
