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
from curation.neighbors.kernels.id_hashes import hash_ids, share_bound
from curation.neighbors.rows.arrange import ShardRun, shard_runs
from curation.neighbors.rows.vectors import VectorSource, bad_rows, check_widths, default_threshold
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
    drawn = dict(engine.map(draw, range(len(runs)), "draw a sample"))
    paths = tuple(drawn[number] for number in range(len(runs)))
    ((_, tail),) = engine.map(_FitTail(paths, threshold), ["tail"], "fit the unrelated tail")
    return tail


_READ_BYTES = 1 << 30
"""What one task reads at a time."""


@dataclass(frozen=True)
class _DrawSample(Task[int, None, str]):
    """Writes the sampled rows of one run of shards, each after its hash; gives the path."""

    sources: tuple[VectorSource, ...]
    runs: tuple[ShardRun, ...]
    share: float
    folder: str
    seed: int

    def __call__(self, item: int, opened: None) -> str:
        number, first, end = self.runs[item]
        source, widths = self.sources[number], []
        hashes, rows = [], []
        for shard in range(first, end):
            ids, vectors = source.read(shard)
            if not len(ids):
                continue
            widths.append((source.where(shard), vectors.shape[1]))
            check_widths(widths)
            drawn = hash_ids(ids, self.seed, "unrelated")
            kept = (drawn <= share_bound(self.share)) & ~bad_rows(vectors)
            if kept.any():  # a shard without one vector has no width
                hashes.append(drawn[kept])
                rows.append(vectors[kept].astype(np.float32))
        path = storage.join(self.folder, f"sample-{item:06d}.npz")
        with storage.open_whole(path) as file:
            if rows:
                np.savez(file, hashes=np.concatenate(hashes), rows=np.concatenate(rows))
            else:
                np.savez(file, hashes=np.empty(0, np.uint64), rows=np.empty((0, 0), np.float32))
        return path


@dataclass(frozen=True)
class _FitTail(Task[str, None, UnrelatedTail | None]):
    """Fits the tail of the sample."""

    paths: tuple[str, ...]
    threshold: float

    def __call__(self, item: str, opened: None) -> UnrelatedTail | None:
        parts = []
        for path in self.paths:
            with storage.open_read(path) as file:
                parts.append(dict(np.load(file)))
        parts = [part for part in parts if len(part["hashes"])]
        if len({part["rows"].shape[1] for part in parts}) != 1:  # none; or the index names which
            return None
        order = np.argsort(np.concatenate([part["hashes"] for part in parts]), kind="stable")
        rows = np.concatenate([part["rows"] for part in parts])[order[:SAMPLE_ROWS]]
        return fit_unrelated_tail(unit_rows(rows).astype(np.float32), self.threshold)
