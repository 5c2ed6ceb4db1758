"""How many rows would miss their twin: a sample of rows is compared with all others.

Then it is known within which probe margin a row meets its most similar other row. The margin is
chosen for the share that was asked for, of all rows and of those with a single partner, which are
the commonest and hardest to find; what would still be missed is reported. Rows are
compared as sketches, and as 8-bit integers where these are alike: a cosine is off by 0.0006, and of
the pairs at the threshold one in 740 is not seen, met or not. Most rows may have no twin, so rows
are drawn until enough of them have one. Q sampled rows, N rows, H pairs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.index.probe_margin import (
    TELLING_ROWS,
    ProbeMargin,
    narrowest_margin,
    recall_within,
    rows_wanted,
)
from curation.neighbors.join.join import Join
from curation.neighbors.kernels.id_hashes import hash_ids, share_bound
from curation.neighbors.kernels.quantized import (
    integer_products,
    lengths_of,
    pair_products,
    quantize_rows,
)
from curation.neighbors.kernels.sketches import least_product, sketches_of
from curation.neighbors.kernels.threads import in_threads
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.routes import Routes
from curation.stage import Engine

_FIRST_ROWS, _MOST_ROWS = 1 << 12, 1 << 15
"""Rows of the first round, and of all: 1.1 ns a pair of rows, so at most 36 s of CPU a million."""
_MORE = 1.15
"""Times as many rows as should suffice, so that a third round is rare."""
_ROWS_AT_ONCE, _PRODUCTS = 1 << 13, 1 << 18
_DENSE = 1 / 64
"""Share of the sketches that look alike from which on all rows are multiplied whole."""
_PARTNERS = {"1": 1, "2-3": 2, "4-10": 4, "more": 11}
"""Groups of rows by their number of partners, and the least of each."""

_TWINS = np.dtype([("row", "i8"), ("cosine", "f4"), ("margin", "f2"), ("partners", "i8")])
"""A sampled row, the cosine of its twin, the margin within which it meets it, its partners."""
_MARGINS = np.dtype([("margin", "f2"), ("pairs", "i8")])
"""A margin, and how many pairs need it."""


@dataclass(frozen=True)
class Recall:
    """What a sample says about a join by lists."""

    chosen: ProbeMargin
    lists_met: float
    """Lists that a row meets on average, its own included."""
    sampled_rows: int
    twins: np.ndarray
    """(T,) of the sampled rows that have one."""
    margins: np.ndarray
    """(M,) of their pairs."""
    estimated_pairs: float
    """Pairs above the threshold in all rows."""

    def figures(self) -> dict[str, Any]:
        """What the report says."""
        pairs = int(self.margins["pairs"].sum())
        met = self.margins["margin"] <= np.float16(self.chosen.margin)
        share = float(self.margins["pairs"][met].sum() / pairs) if pairs else None
        missed = None if share is None else round((1 - share) * self.estimated_pairs)
        return {
            "probe_margin": self.chosen.margin,
            "lists_met": round(self.lists_met, 2),
            "measured_recall": self.chosen.recall,
            "recall_at_least": self.chosen.at_least,
            "recall_by_partners": self._by_partners(),
            "sampled_rows": self.sampled_rows,
            "sampled_twins": len(self.twins),
            "pair_recall": share,
            "sampled_pairs": pairs,
            "estimated_pairs": round(self.estimated_pairs),
            "estimated_missed_pairs": missed,
        }

    def _by_partners(self) -> dict[str, dict[str, float]]:
        """Rows and twin recall of those with one partner, two or three, and so on."""
        groups = np.searchsorted(list(_PARTNERS.values()), self.twins["partners"], "right") - 1
        met = self.twins["margin"] <= np.float16(self.chosen.margin)
        return {
            name: {"rows": int(rows.sum()), "recall": float(met[rows].mean())}
            for number, name in enumerate(_PARTNERS)
            if (rows := groups == number).any()
        }


def measure_recall(
    join: Join, target: float, widest: float, engine: Engine, *, seed: int, threads: int
) -> Recall:
    """Choose the smallest margin whose twin recall on a sample is what was asked.

    Rows are drawn until enough have a twin, or all are drawn, or as many as may be.
    widest: the largest margin of a probe.
    """
    draw = _Draw(join, seed)
    partitions = join.files.num_partitions
    run_file_tasks(engine, draw, partitions, draw.folder, "draw a sample")
    sample = draw.read()
    twins, margins = np.empty(0, _TWINS), np.empty(0, _MARGINS)
    start, stop, with_exempt = 0, min(_FIRST_ROWS, len(sample.codes)), 0
    while start < stop:
        compare = _Compare(draw, range(start, stop), threads)
        with_exempt += sum(
            run_file_tasks(engine, compare, partitions, compare.folder, "compare the sample")
        )
        found = [compare.read(item) for item in range(partitions)]
        twins = np.concatenate([twins, _nearest(np.concatenate([some for some, _ in found]))])
        margins = np.concatenate([margins, *(some for _, some in found)])
        missing = _MORE * (rows_wanted(target) - len(twins)) * stop / max(1, len(twins))
        start, stop = stop, min(len(sample.codes), stop + max(0, round(missing)))
    pairs = int(margins["pairs"].sum())
    estimated = (pairs + with_exempt) / 2 * draw.num_rows / max(1, stop)  # the others stand twice
    is_sample = stop < draw.num_rows
    chosen = narrowest_margin(twins["margin"], target, widest, is_sample=is_sample)
    single = twins["margin"][twins["partners"] == 1]
    if len(single) >= TELLING_ROWS:
        wider = narrowest_margin(single, target, widest, is_sample=is_sample).margin
        chosen = recall_within(twins["margin"], max(wider, chosen.margin), is_sample=is_sample)
    met = sample.routes.lists_met(chosen.margin)
    return Recall(chosen, met, stop, twins, margins, estimated)


@dataclass(frozen=True)
class _Sample:
    """The drawn rows, in the order of their hashes."""

    positions: np.ndarray
    """(Q,) int64."""
    codes: np.ndarray
    """(Q, D) int8."""
    routes: Routes


@dataclass(frozen=True)
class _Draw(FileTask[None, None]):
    """The drawn rows of one partition: those with the smallest hash of (seed, id)."""

    join: Join
    seed: int

    @property
    def folder(self) -> str:
        return storage.join(self.join.folder, "recall")

    @property
    def num_rows(self) -> int:
        """Rows that are drawn from: all but those that are exempt."""
        total = self.join.files.num_rows
        return total - int(self.join.rows_apart(np.arange(total)).sum())

    def path(self, kind: str, partition: int) -> str:
        return storage.join(self.folder, f"{kind}-{partition:06d}.bin")

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        files = self.join.files
        hashes = hash_ids(files.ids(item), "recall", self.seed)
        rows = np.flatnonzero(hashes <= share_bound(_MOST_ROWS / max(1, self.num_rows)))
        rows = rows[~self.join.rows_apart(rows + files.starts[item])]
        codes = quantize_rows(files.vectors(item)[rows])
        routes = Routes.read(files.path("routes", item), files.size(item))
        paths = [self.path(kind, item) for kind in ("rows", "routes")]
        drawn = {"hash": hashes[rows], "position": rows + files.starts[item], "code": codes}
        write_columns(paths[0], drawn)
        routes.take(rows).write(paths[1])
        return TaskResult(paths, None)

    def read(self) -> _Sample:
        """Those of all partitions."""
        partitions = range(self.join.files.num_partitions)
        parts = storage.gather(self._read, partitions, self.folder)
        hashes, positions, codes, routes = zip(*parts, strict=True)
        order = np.argsort(np.concatenate(hashes), kind="stable")
        return _Sample(
            np.concatenate(positions)[order],
            np.concatenate(codes)[order],
            Routes.joined(routes).take(order),
        )

    def _read(self, partition: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Routes]:
        file = ColumnFile.open(self.path("rows", partition))
        routes = Routes.read(self.path("routes", partition), file.num_rows("hash"))
        return file["hash"], file["position"], file["code"], routes


@dataclass(frozen=True)
class _Compare(FileTask["_AlikeRows", int]):
    """Some drawn rows against all rows of one partition.

    Of identical rows, which share their lists, one is compared and all are counted.
    """

    draw: _Draw
    drawn: range
    threads: int

    @property
    def folder(self) -> str:
        return storage.join(self.draw.folder, f"from-{self.drawn.start}")

    def path(self, item: int) -> str:
        return storage.join(self.folder, f"found-{item:06d}.bin")

    def open(self) -> "_AlikeRows":
        """The drawn rows, ready to be compared."""
        sample, drawn = self.draw.read(), np.array(self.drawn)
        some = _Sample(sample.positions[drawn], sample.codes[drawn], sample.routes.take(drawn))
        return _AlikeRows.to(some, self.draw.join.threshold)

    def __call__(self, item: int, opened: "_AlikeRows") -> TaskResult[int]:
        join, sample = self.draw.join, opened.sample
        files = join.files
        routes = Routes.read(files.path("routes", item), files.size(item))
        first = np.asarray(files.rows(item)["first"])
        copies = np.bincount(first, minlength=len(first))
        exempt = join.rows_apart(np.arange(*files.starts[item : item + 2]))
        exempt_copies = np.bincount(first[exempt], minlength=len(first))
        uniques, vectors = np.unique(first), files.vectors(item)
        own = sample.positions - files.starts[item]
        here = np.flatnonzero((own >= 0) & (own < len(first)))
        own = np.full(len(own), -1)
        own[here] = first[sample.positions[here] - files.starts[item]]
        twins, margins, with_exempt = [np.empty(0, _TWINS)], [np.empty(0, _MARGINS)], 0

        def of_block(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            rows = uniques[start : start + _ROWS_AT_ONCE]
            a, b, cosines = opened.pairs(quantize_rows(vectors[rows]))
            return a, rows[b], cosines

        blocks = range(0, len(uniques), _ROWS_AT_ONCE)
        for a, b, cosines in in_threads(of_block, blocks, self.threads):
            there = sample.routes.margins_to(a, routes.home[b])
            back = routes.margins_to(b, sample.routes.home[a])
            found = np.empty(len(a), _TWINS)
            found["row"], found["cosine"] = a + self.drawn.start, cosines
            found["margin"] = np.minimum(there, back)
            found["partners"] = copies[b] - (own[a] == b)  # no row is a pair with itself
            found = found[found["partners"] > 0]
            with_exempt += int(exempt_copies[b].sum())
            twins.append(_nearest(found))
            margins.append(_by_margin(found["margin"], found["partners"]))
        every = np.concatenate(margins)
        nearest, pairs = (
            _nearest(np.concatenate(twins)),
            _by_margin(every["margin"], every["pairs"]),
        )
        columns = {name: nearest[name] for name in _TWINS.names or ()}
        columns |= {"pair_margin": pairs["margin"], "pairs": pairs["pairs"]}
        write_columns(self.path(item), columns)
        return TaskResult([self.path(item)], with_exempt)

    def read(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Twins and margins that one item found."""
        file = ColumnFile.open(self.path(item))
        twins = np.rec.fromarrays([file[name] for name in _TWINS.names or ()], dtype=_TWINS)
        return twins, np.rec.fromarrays([file["pair_margin"], file["pairs"]], dtype=_MARGINS)


@dataclass(frozen=True)
class _AlikeRows:
    """Finds which rows are alike to drawn ones: by sketches, then by their 8-bit integers."""

    sample: _Sample
    sketches: np.ndarray
    """(Q, 128) int8."""
    lengths: np.ndarray
    """(Q,) float64."""
    threshold: float

    @classmethod
    def to(cls, sample: _Sample, threshold: float) -> "_AlikeRows":
        """Those alike to a sample."""
        return cls(sample, sketches_of(sample.codes), lengths_of(sample.codes), threshold)

    def pairs(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers of drawn rows (H,) and of rows (H,) above the threshold, and their cosines."""
        sketches, lengths, least = (
            sketches_of(rows),
            lengths_of(rows),
            least_product(self.threshold),
        )
        step = max(1, _PRODUCTS // max(1, len(self.sketches)))
        parts = []
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            scores = integer_products(sketches[some], self.sketches).numpy()
            b, a = np.divmod(np.flatnonzero(scores > least), scores.shape[1])
            if len(a) < _DENSE * scores.size:
                products = pair_products(self.sample.codes, a, rows, b + start)
            else:
                whole = integer_products(rows[some], self.sample.codes).numpy()
                b, a = np.divmod(np.arange(whole.size), whole.shape[1])
                products = whole.reshape(-1)
            cosines = products / (self.lengths[a] * lengths[b + start])
            above = cosines > self.threshold
            parts.append((a[above], b[above] + start, cosines[above]))
        a, b, cosines = (np.concatenate(side) for side in zip(*parts, strict=True))
        return a, b, cosines


def _nearest(found: np.ndarray) -> np.ndarray:
    """Of each row its twin, of equals the one that needs most, and all partners together."""
    found = found[np.lexsort((found["margin"], found["cosine"], found["row"]))]
    firsts = np.flatnonzero(np.diff(found["row"], prepend=-1))
    best = found[np.append(firsts[1:], len(found))[: len(firsts)] - 1]
    if len(best):
        best["partners"] = np.add.reduceat(found["partners"], firsts)
    return np.asarray(best)


def _by_margin(margins: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """How many pairs need each margin."""
    known, numbers = np.unique(margins, return_inverse=True)
    found = np.empty(len(known), _MARGINS)
    found["margin"], found["pairs"] = known, np.bincount(numbers, pairs, len(known))
    return found
