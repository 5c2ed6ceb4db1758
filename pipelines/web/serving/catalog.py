"""Reads a catalog: pages of rows, in a bounded time, whatever is asked."""

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from curation.errors import ConfigError
from pipelines.audit.tables import Row, duckdb_errors, named
from pipelines.web.serving.catalog_file import BINS, FACETS, Score

Order = Literal["stored", "lowest", "highest"]

_MEMORY = "1GB"
_THREADS = 2
_PATIENCE_S = 20.0
"""A query that takes longer is stopped."""


@dataclass(frozen=True)
class Filter:
    """Which rows, and in what order."""

    texts: dict[str, str] = field(default_factory=dict)
    """Facet -> its value."""
    score: str | None = None
    low: float | None = None
    high: float | None = None
    order: Order = "stored"
    """As stored (by flow and id, which is as good as at random), or by the score."""


@dataclass(frozen=True)
class Page:
    """Some rows of a filter."""

    rows: list[Row]
    total: int | None
    """Rows of the whole filter; None where counting them would take a scan."""
    after: int | None
    """Where the next page begins; None at the end."""


class Catalog:
    """A catalog, open for reading; may be used from many threads at once."""

    def __init__(self, file: str) -> None:
        import duckdb

        with duckdb_errors():
            self._connection = duckdb.connect(
                file,
                read_only=True,
                config={
                    "memory_limit": _MEMORY,
                    "threads": _THREADS,
                    # whatever a query may hold, it reads no other file and changes no setting
                    "enable_external_access": False,
                    "lock_configuration": True,
                },
            )

    def __enter__(self) -> "Catalog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the catalog was made from.

        Raises:
            DatasetError: the file is no catalog.
        """
        found: dict[str, Any] = json.loads(self.rows("select json from facts")[0]["json"])
        return found

    @property
    def key(self) -> str:
        """Digest of the data that it was made from."""
        return str(self.facts["key"])

    @cached_property
    def scores(self) -> dict[str, Score]:
        """The scores that rows can be filtered and sorted by, by name."""
        return {one["name"]: Score(**one) for one in self.facts["scores"]}

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """Run a query; give its rows, which must be few.

        Raises:
            TimeoutError: it took too long.
        """
        with self._cursor() as cursor:
            result = cursor.execute(query, list(parameters))
            names = [column[0] for column in result.description]
            return [dict(zip(names, values, strict=True)) for values in result.fetchall()]

    def values(self, facet: str, limit: int = 50) -> list[Row]:
        """The most common values of a facet and their rows."""
        return self.rows(
            "select value, rows from facets where facet = ? order by rows desc, value limit ?",
            [facet, limit],
        )

    def page(self, wanted: Filter, after: int = -1, limit: int = 50) -> Page:
        """A page of the rows that a filter leaves.

        after: the row to go on behind, as the page before gave it.

        Raises:
            ConfigError: a score that the catalog does not hold, or an order without one.
        """
        if wanted.score is not None and wanted.score not in self.scores:
            raise ConfigError(f"no score '{wanted.score}'; there are: {', '.join(self.scores)}")
        if wanted.order != "stored" and wanted.score is None:
            raise ConfigError(f"order '{wanted.order}' needs a score")
        wanted = self._with_order(wanted)
        if wanted.score is None and not wanted.texts:
            return self._all(after, limit)
        if wanted.score is None and len(wanted.texts) == 1:
            return self._listed(*next(iter(wanted.texts.items())), after, limit)
        if wanted.score is not None and not wanted.texts:
            return self._scored(wanted, after, limit)
        return self._scanned(wanted, after, limit)

    def at(self, positions: Sequence[int]) -> list[Row]:
        """The rows at some positions, in their order."""
        # joined, DuckDB reads the blocks of these rows alone; `in (?, …)` would read the table
        found = self.rows(
            "select i.rowid as position, i.* from (select unnest(?::bigint[]) as wanted) "
            "join images i on i.rowid = wanted",
            [list(positions)],
        )
        by_position = {row.pop("position"): row for row in found}
        return [self._shaped(dict(by_position[position])) for position in positions]

    def find(self, flow: str, row_id: str) -> Row | None:
        """A row by its id: that which stayed, where its source was listed twice."""
        found = self.rows("select * from images where id = ? and flow = ? limit 1", [row_id, flow])
        return self._shaped(found[0]) if found else None

    def find_anywhere(self, row_id: str) -> Row | None:
        """A row by its id, of whatever flow."""
        found = self.rows("select * from images where id = ? limit 1", [row_id])
        return self._shaped(found[0]) if found else None

    def histogram(self, score: str) -> tuple[float, float, list[int], list[int]] | None:
        """Ends of a score, and its kept and dropped rows by bin; None where it has one value."""
        number = list(self.scores).index(score)
        low, high = self.ends(score)
        if low == high:
            return None
        kept, dropped = [0] * BINS, [0] * BINS
        for row in self.rows("select * from bins where score = ?", [number]):
            kept[row["bin"]], dropped[row["bin"]] = row["kept"], row["dropped"]
        return low, high, kept, dropped

    def ends(self, score: str) -> tuple[float, float]:
        """Its least and greatest value."""
        table = self._table_of(score)
        found = self.rows(f"select min(value) as low, max(value) as high from {table}")[0]
        return found["low"] or 0.0, found["high"] or 0.0

    def size(self, score: str) -> int:
        """How many rows have it."""
        return int(self.rows(f"select count(*) as n from {self._table_of(score)}")[0]["n"])

    def rank(self, score: str, bound: float) -> int:
        """How many rows have less."""
        return self._rank(self._table_of(score), ">=", bound)

    def rank_above(self, score: str, bound: float) -> int:
        """How many rows have that or less."""
        return self._rank(self._table_of(score), ">", bound)

    def at_rank(self, score: str, rank: int) -> Row:
        """The row at a place in the order of a score, the lowest first."""
        return self.at(self._positions(self._table_of(score), range(rank, rank + 1)))[0]

    def components(self, after: int = -1, limit: int = 20) -> Page:
        """Groups of near-duplicates, the largest first."""
        return self._ranked("components", after, limit)

    def seeds(self, seed_set: str | None = None, after: int = -1, limit: int = 10) -> Page:
        """Seeds and clusters that fetched images, each with its number in `seed`."""
        if not self._has("seeds"):
            return Page([], 0, None)
        if seed_set is None:
            return self._ranked("seeds", after, limit)
        rows = self.rows(
            "select rowid as rank, * from seeds where seed_set = ? and rowid > ? order by rowid "
            "limit ?",
            [seed_set, after, limit + 1],
        )
        total = self.rows("select count(*) as n from seeds where seed_set = ?", [seed_set])[0]["n"]
        more = len(rows) > limit
        return Page(rows[:limit], total, rows[limit - 1]["rank"] if more else None)

    def seed(self, number: int) -> Row | None:
        """One of the seeds."""
        rows = self._has("seeds") and self.rows(
            "select rowid as rank, * from seeds where rowid = ?", [number]
        )
        return rows[0] if rows else None

    def hits(self, seed: Row, after: int = -1, limit: int = 8) -> Page:
        """What one seed fetched, the nearest first."""
        first, total = seed["first"], seed["rows"]
        ranks = range(first + min(after + 1, total), first + min(after + 1 + limit, total))
        rows = self.rows(
            "select * from hits where rowid between ? and ? order by rowid",
            [ranks.start, ranks.stop - 1],
        )
        return Page(rows, total, ranks.stop - first - 1 if ranks.stop - first < total else None)

    def seed_sets(self) -> list[Row]:
        """Rules and what they fetched."""
        if not self._has("seeds"):
            return []
        return self.rows(
            "select seed_set, rule, count(*) as seeds, sum(rows)::bigint as rows from seeds "
            "group by all order by all"
        )

    def _ranked(self, table: str, after: int, limit: int) -> Page:
        total = int(self.rows(f"select count(*) as n from {table}")[0]["n"])
        rows = self.rows(
            f"select rowid as rank, * from {table} where rowid between ? and ? order by rowid",
            [after + 1, after + limit],
        )
        return Page(rows, total, after + limit if after + limit + 1 < total else None)

    def _has(self, table: str) -> bool:
        return bool(self.rows("select 1 from duckdb_tables() where table_name = ?", [table]))

    def count(self) -> int:
        """All rows."""
        return int(self.rows("select count(*) as n from images")[0]["n"])

    def _with_order(self, wanted: Filter) -> Filter:
        """Rows of a range of scores come by that score: they lie so."""
        ranged = wanted.low is not None or wanted.high is not None
        if wanted.score is None:
            return replace(wanted, low=None, high=None)
        if wanted.order == "stored":
            return replace(wanted, order="lowest") if ranged else replace(wanted, score=None)
        return wanted

    def _all(self, after: int, limit: int) -> Page:
        total = self.count()
        positions = range(after + 1, min(after + 1 + limit, total))
        return self._page(list(positions), total, positions.stop, total)

    def _listed(self, facet: str, value: str, after: int, limit: int) -> Page:
        """Rows with one value: a range of its list."""
        found = self.rows(
            "select first, rows from facets where facet = ? and value = ?", [facet, value]
        )
        if not found:
            return Page([], 0, None)
        table, first, total = f"facet_{FACETS.index(facet)}", found[0]["first"], found[0]["rows"]
        ranks = range(first + after + 1, first + min(after + 1 + limit, total))
        return self._page(self._positions(table, ranks), total, ranks.stop - first, total)

    def _scored(self, wanted: Filter, after: int, limit: int) -> Page:
        """Rows by a score: a range of its list, from either end."""
        table = self._table_of(str(wanted.score))
        low = 0 if wanted.low is None else self._rank(table, ">=", wanted.low)
        high = self._rank(table, ">", float("inf") if wanted.high is None else wanted.high)
        total = max(high - low, 0)
        begin, end = min(after + 1, total), min(after + 1 + limit, total)
        if wanted.order == "lowest":
            positions = self._positions(table, range(low + begin, low + end))
        else:
            positions = self._positions(table, range(high - end, high - begin))[::-1]
        return self._page(positions, total, end, total)

    def _scanned(self, wanted: Filter, after: int, limit: int) -> Page:
        """Rows of several filters: the columns asked for are read from where it went on."""
        terms = [f"{name} = ?" for name in wanted.texts]
        values: list[Any] = list(wanted.texts.values())
        column, ranged = "rowid", wanted.score is not None
        if wanted.score is not None:
            column = named(wanted.score)
            terms += [f"{column} is not null", f"not isnan({column})"]
            for sign, bound in ((">=", wanted.low), ("<=", wanted.high)):
                if bound is not None:
                    terms.append(f"{column} {sign} ?")
                    values.append(bound)
        falling = wanted.order == "highest"
        if after >= 0:
            terms.append(_behind(column, falling, ranged))
            values += [after] * (3 if ranged else 1)
        order = f"{column} {'desc' if falling else 'asc'}, rowid" if ranged else "rowid"
        found = self.rows(
            f"select rowid as position from images where {' and '.join(terms)} "
            f"order by {order} limit ?",
            [*values, limit + 1],
        )
        positions = [row["position"] for row in found]
        more = len(positions) > limit
        return Page(self.at(positions[:limit]), None, positions[limit - 1] if more else None)

    def _page(self, positions: list[int], total: int, end: int, last: int) -> Page:
        return Page(self.at(positions), total, end - 1 if positions and end < last else None)

    def _positions(self, table: str, ranks: range) -> list[int]:
        if not ranks:
            return []
        found = self.rows(
            f"select position from {table} where rowid between ? and ? order by rowid",
            [ranks.start, ranks.stop - 1],
        )
        return [row["position"] for row in found]

    def _rank(self, table: str, sign: str, bound: float) -> int:
        """Rank of the first value on one side of a bound: the first hit of a sorted scan."""
        found = self.rows(
            f"select rowid as rank from {table} where value {sign} ?::float limit 1", [bound]
        )
        if found:
            return int(found[0]["rank"])
        return int(self.rows(f"select count(*) as n from {table}")[0]["n"])

    def _table_of(self, score: str) -> str:
        return f"score_{list(self.scores).index(score)}"

    def _shaped(self, row: Row) -> Row:
        """A row with its scores apart."""
        scores = {name: row.pop(name) for name in self.scores if name in row}
        return {**row, "scores": {k: v for k, v in scores.items() if v is not None and v == v}}

    @contextlib.contextmanager
    def _cursor(self) -> Iterator[Any]:
        """A connection of one thread, stopped when it takes too long."""
        cursor = self._connection.cursor()
        timer = threading.Timer(_PATIENCE_S, cursor.interrupt)
        timer.start()
        try:
            with duckdb_errors(), _patience():
                yield cursor
        finally:
            timer.cancel()
            cursor.close()


def _behind(column: str, falling: bool, scored: bool) -> str:
    """SQL for the rows that come after one position in the order of the page."""
    if not scored:
        return "rowid > ?"
    there = f"(select {column} from images where rowid = ?)"
    sign = "<" if falling else ">"
    return f"({column} {sign} {there} or ({column} = {there} and rowid > ?))"


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    import duckdb

    try:
        yield
    except duckdb.InterruptException as error:
        raise TimeoutError(f"no answer within {_PATIENCE_S:g} s; ask for less") from error
