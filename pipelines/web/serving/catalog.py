"""Reads a catalog: pages of rows, in a bounded time, whatever is asked.

The catalog is one DuckDB file. `images` holds the rows in the order of their flows and ids, so a
row's number in it is its *position*. Each column that can be filtered by has a list of positions,
sorted by value (`facet_N`, `score_N`, whose row numbers are *ranks*): a page of any such filter is
a range of ranks, found without reading the rest. `facets` says where a text's range begins.
"""

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from curation.errors import ConfigError, DatasetError
from pipelines.audit.tables import Row, Value, duckdb_errors, named

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Order = Literal["stored", "lowest", "highest"]

FACETS = ("flow", "stage", "reason", "host", "source_set", "seed_set", "format", "component")
"""Texts that can be filtered by."""
BINS = 40
"""Bins of a score's histogram."""
_MEMORY = "1GB"
_THREADS = 2
_PATIENCE_S = 20.0
"""A query that takes longer is stopped."""


@dataclass(frozen=True)
class Score:
    """A number that rows can be filtered and sorted by."""

    name: str
    """Its column: `stage.score` in a run."""
    stage: str
    column: str
    thresholds: tuple[float, ...] = ()
    """What it was judged by."""


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

    def settled(self) -> "Filter":
        """Rows of a range of scores come by that score: they lie so."""
        ranged = self.low is not None or self.high is not None
        if self.score is None:
            return replace(self, low=None, high=None)
        if self.order == "stored":
            return replace(self, order="lowest") if ranged else replace(self, score=None)
        return self


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
    def facts(self) -> Row:
        """What the catalog was made from: `key` and `scores`.

        Raises:
            DatasetError: the file is no catalog.
        """
        found: Row = json.loads(self.rows("select json from facts")[0]["json"])
        return found

    @cached_property
    def scores(self) -> dict[str, Score]:
        """The scores that rows can be filtered and sorted by, by name."""
        return {one["name"]: Score(**one) for one in self.facts["scores"]}

    def rows(self, query: str, parameters: Sequence[Value] = ()) -> list[Row]:
        """Run a query; give its rows, which must be few.

        Raises:
            TimeoutError: it took too long.
        """
        with self._cursor() as cursor:
            result = cursor.execute(query, list(parameters))
            names = [column[0] for column in result.description or ()]
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
        wanted = wanted.settled()
        if len(wanted.texts) + (wanted.score is not None) > 1:
            return self._scanned(wanted, after, limit)
        table, low, high = self._range_of(wanted)
        total = max(high - low, 0)
        begin, end = min(after + 1, total), min(after + 1 + limit, total)
        ranks = range(low + begin, low + end)
        if wanted.order == "highest":
            ranks = range(high - end, high - begin)
        positions = self._positions(table, ranks)
        positions = positions[::-1] if wanted.order == "highest" else positions
        return Page(self.at(positions), total, end - 1 if positions and end < total else None)

    def _range_of(self, wanted: Filter) -> tuple[str, int, int]:
        """The list that a filter of one column is a range of, and the ends of that range."""
        for facet, value in wanted.texts.items():
            query = "select first, rows from facets where facet = ? and value = ?"
            found = self.rows(query, [facet, value]) or [{"first": 0, "rows": 0}]
            first = found[0]["first"]
            return f"facet_{FACETS.index(facet)}", first, first + found[0]["rows"]
        if wanted.score is None:
            return "images", 0, self.size()
        low = 0 if wanted.low is None else self.rank(wanted.score, wanted.low)
        high = float("inf") if wanted.high is None else wanted.high
        return self._table_of(wanted.score), low, self.rank(wanted.score, high, ">")

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

    def find(self, flow: str | None, row_id: str) -> Row | None:
        """A row of a flow, or of any, by its id: that which stayed, where it was listed twice."""
        of_flow = "" if flow is None else "and flow = ?"
        values = [one for one in (row_id, flow) if one is not None]
        found = self.rows(f"select * from images where id = ? {of_flow} limit 1", values)
        return self._shaped(found[0]) if found else None

    def histogram(self, score: str) -> tuple[float, float, list[int], list[int]] | None:
        """Ends of a score, and its kept and dropped rows by bin; None where it has one value."""
        low, high = self.ends(score)
        if low == high:
            return None
        kept, dropped = [0] * BINS, [0] * BINS
        number = list(self.scores).index(score)
        for row in self.rows("select * from bins where score = ?", [number]):
            kept[row["bin"]], dropped[row["bin"]] = row["kept"], row["dropped"]
        return low, high, kept, dropped

    def ends(self, score: str) -> tuple[float, float]:
        """Its least and greatest value."""
        table = self._table_of(score)
        found = self.rows(f"select min(value) as low, max(value) as high from {table}")[0]
        return found["low"] or 0.0, found["high"] or 0.0

    def size(self, score: str | None = None) -> int:
        """How many rows there are, or how many have a score."""
        return self._count("images" if score is None else self._table_of(score))

    def rank(self, score: str, bound: float, sign: Literal[">=", ">"] = ">=") -> int:
        """How many rows have a lower score; sign `>`: or just that."""
        # the first hit of a sorted scan
        table = self._table_of(score)
        query = f"select rowid as rank from {table} where value {sign} ?::float limit 1"
        found = self.rows(query, [bound])
        return int(found[0]["rank"]) if found else self.size(score)

    def at_rank(self, score: str, rank: int) -> Row:
        """The row at a place in the order of a score, the lowest first."""
        return self.at(self._positions(self._table_of(score), range(rank, rank + 1)))[0]

    def components(self, after: int = -1, limit: int = 20) -> Page:
        """Groups of near-duplicates, the largest first."""
        return self._stored("components", range(self._count("components")), after, limit)

    def seeds(self, seed_set: str | None = None, after: int = -1, limit: int = 10) -> Page:
        """Seeds and clusters that fetched images, each with its number in `rank`."""
        if not self._has_seeds:
            return Page([], 0, None)
        if seed_set is None:
            return self._stored("seeds", range(self._count("seeds")), after, limit)
        query = "select min(rowid) as first, count(*) as n from seeds where seed_set = ?"
        found = self.rows(query, [seed_set])[0]
        first = found["first"] or 0
        return self._stored("seeds", range(first, first + found["n"]), after, limit)

    def seed(self, number: int) -> Row | None:
        """One of the seeds."""
        if not self._has_seeds:
            return None
        rows = self.rows("select rowid as rank, * from seeds where rowid = ?", [number])
        return rows[0] if rows else None

    def hits(self, seed: Row, after: int = -1, limit: int = 8) -> Page:
        """What one seed fetched, the nearest first."""
        first = seed["first"]
        page = self._stored("hits", range(first, first + seed["rows"]), first + after, limit, "*")
        return replace(page, after=None if page.after is None else page.after - first)

    def seed_sets(self) -> list[Row]:
        """Rules and what they fetched."""
        query = (
            "select seed_set, rule, count(*) as seeds, sum(rows)::bigint as rows from seeds "
            "group by all order by all"
        )
        return self.rows(query) if self._has_seeds else []

    @cached_property
    def _has_seeds(self) -> bool:
        return bool(self.rows("select 1 from duckdb_tables() where table_name = 'seeds'"))

    def _stored(
        self, table: str, ranks: range, after: int, limit: int, columns: str = "rowid as rank, *"
    ) -> Page:
        """Rows of a table behind one of them, within a range."""
        begin = max(after + 1, ranks.start)
        stop = min(begin + limit, ranks.stop)
        rows = self.rows(
            f"select {columns} from {table} where rowid between ? and ? order by rowid",
            [begin, stop - 1],
        )
        return Page(rows, len(ranks), stop - 1 if stop < ranks.stop else None)

    def _scanned(self, wanted: Filter, after: int, limit: int) -> Page:
        """Rows of several filters: the columns asked for are read from where it went on."""
        terms = [f"{name} = ?" for name in wanted.texts]
        values: list[Value] = list(wanted.texts.values())
        order, behind = "rowid", "rowid > ?"
        if wanted.score is not None:
            column, falling = named(wanted.score), wanted.order == "highest"
            terms += [f"{column} is not null", f"not isnan({column})"]
            for sign, bound in ((">=", wanted.low), ("<=", wanted.high)):
                if bound is not None:
                    terms.append(f"{column} {sign} ?")
                    values.append(bound)
            order = f"{column} {'desc' if falling else 'asc'}, rowid"
            there = f"(select {column} from images where rowid = ?)"
            sign = "<" if falling else ">"
            behind = f"({column} {sign} {there} or ({column} = {there} and rowid > ?))"
        if after >= 0:
            terms.append(behind)
            values += [after] * behind.count("?")
        found = self.rows(
            f"select rowid as position from images where {' and '.join(terms)} "
            f"order by {order} limit ?",
            [*values, limit + 1],
        )
        positions = [row["position"] for row in found]
        more = len(positions) > limit
        return Page(self.at(positions[:limit]), None, positions[limit - 1] if more else None)

    def _count(self, table: str) -> int:
        return int(self.rows(f"select count(*) as n from {table}")[0]["n"])

    def _positions(self, table: str, ranks: range) -> list[int]:
        if not ranks or table == "images":
            return list(ranks)
        query = f"select position from {table} where rowid between ? and ? order by rowid"
        return [row["position"] for row in self.rows(query, [ranks.start, ranks.stop - 1])]

    def _table_of(self, score: str) -> str:
        return f"score_{list(self.scores).index(score)}"

    def _shaped(self, row: Row) -> Row:
        """A row with its scores apart."""
        scores = {name: row.pop(name) for name in self.scores if name in row}
        return {**row, "scores": {k: v for k, v in scores.items() if v is not None and v == v}}

    @contextlib.contextmanager
    def _cursor(self) -> Iterator["DuckDBPyConnection"]:
        """A connection of one thread, stopped when it takes too long."""
        import duckdb

        cursor = self._connection.cursor()
        timer = threading.Timer(_PATIENCE_S, cursor.interrupt)
        timer.start()
        try:
            with duckdb_errors():
                yield cursor
        except DatasetError as error:
            if isinstance(error.__cause__, duckdb.InterruptException):
                late = f"no answer within {_PATIENCE_S:g} s; ask for less"
                raise TimeoutError(late) from error
            raise
        finally:
            timer.cancel()
            cursor.close()
