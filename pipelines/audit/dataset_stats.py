"""Counts of a data set: rows, bytes, columns, hosts, how even its groups are.

Footers and manifests answer what they can; DuckDB reads only the columns of the rest.
"""

from collections.abc import Sequence

from numpy.typing import ArrayLike

from curation import storage
from curation.dataset import Dataset, open_foreign
from curation.errors import ConfigError
from pipelines.audit.languages import alt_languages
from pipelines.audit.tables import Row, Tables, host_of, named, opened

Stats = Row

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SAMPLED_ROWS = 2_000_000
"""Quantiles of larger tables are those of a sample of about so many rows."""
MOST_COMMON = 20
"""So many values of a column are told."""
_FEW_VALUES = 200
"""Text columns with at most so many values are counted by value,"""
_REPEATED = 4
"""if each stands there so often on average,"""
_REPEATING_BYTES = 12.0
"""and the file stores so few bytes a row that values must repeat."""
_QUICK_ROWS = 10_000
"""Texts of fewer rows are counted whatever the file stores: what each page costs hides it."""
_GROUPS = ("source_set", "seed_set", "cluster")
"""Columns whose balance is told."""
_BULKY = ("BLOB", "[", "MAP", "STRUCT")
_NUMBERS = ("INT", "FLOAT", "DOUBLE", "DECIMAL")
"""What DuckDB's names of large types and of numbers hold."""


def open_any(path: str) -> Dataset:
    """A data set of ours, or any Parquet, with or without ids."""
    if Dataset.is_finished(path):
        return Dataset.open(path)
    first = [path] if path.endswith(".parquet") else storage.list_files(path, ".parquet")[:1]
    if not first:
        return open_foreign(path)
    with storage.open_parquet(path if first == [path] else storage.join(path, first[0])) as file:
        some_column = str(file.schema_arrow.names[0])  # nothing here asks for ids
    return open_foreign(path, id_column=some_column)


def dataset_stats(dataset: Dataset) -> Stats:
    """Rows, bytes and columns of a data set."""
    is_foreign = bool(dataset.attributes.get("foreign"))
    found: Stats = {
        "path": dataset.path,
        "kind": "dataset",
        "rows": dataset.num_rows,
        "shards": dataset.num_shards,
        "bytes": sum(shard.num_bytes for shard in dataset.manifest.shards),
        "content_digest": None if is_foreign else dataset.manifest.content_digest,
        "attributes": dataset.attributes,
    }
    with opened(dataset) as tables:
        if not tables:
            return {**found, "columns": []}
        columns = tables.columns("rows")
        found["columns"] = column_stats(tables, columns)
        found["balance"] = balances(tables, columns)
        if "source" in columns:
            found["hosts"] = host_counts(tables, MOST_COMMON)
    found["languages"] = alt_languages(dataset)
    return found


def column_stats(tables: Tables, columns: dict[str, str]) -> list[Row]:
    """What each column of the view `rows` holds; large values are only named with their type."""
    light = {n: kind for n, kind in columns.items() if not any(word in kind for word in _BULKY)}
    numbers = [n for n, kind in light.items() if any(word in kind for word in _NUMBERS)]
    texts = [name for name, kind in light.items() if kind == "VARCHAR"]
    found = {row["column"]: row for row in number_stats(tables, numbers)}
    found |= _text_stats(tables, texts)
    return [{"column": name, "type": kind, **found.get(name, {})} for name, kind in columns.items()]


def count_by(tables: Tables, by: str, limit: int = MOST_COMMON) -> list[Row]:
    """Rows of the view `rows` by a column, the most common first.

    by: a column, `host` (of the source), or `source` (the list or set that a row is of).

    Raises:
        ConfigError: there is no such column.
    """
    if by == "host":
        return host_counts(tables, limit)
    columns = tables.columns("rows")
    if by == "source" and "source_set" in columns:
        by = "source_set"
    if by not in columns:
        raise ConfigError(f"--by {by}: no such column; there are: host, {', '.join(columns)}")
    return _value_counts(tables, by, limit)


def _value_counts(tables: Tables, column: str, limit: int) -> list[Row]:
    return tables.rows(
        f"select {named(column)} as value, count(*) as rows from rows group by 1 "
        "order by rows desc, value limit ?",
        [limit],
    )


def host_counts(tables: Tables, limit: int) -> list[Row]:
    """Rows by the host of their source: first by what stands between slashes, which is quick."""
    host = host_of("('any://' || place)")
    return tables.rows(
        f"select {host} as value, sum(rows)::bigint as rows from ("
        "select case when contains(source, '://') then split_part(source, '/', 3) end as place, "
        "count(*) as rows from rows group by 1) group by 1 order by rows desc, value limit ?",
        [limit],
    )


def balances(tables: Tables, columns: dict[str, str]) -> list[Row]:
    """How evenly the rows of the view `rows` lie in sets and clusters, where these are known."""
    found = []
    for name in _GROUPS:
        if name not in columns:
            continue
        counts = tables.columns_of(
            f"select count(*) as n from rows where {named(name)} is not null group by {named(name)}"
        )["n"]
        if len(counts):
            row = {"by": name, "groups": len(counts), "rows": int(counts.sum())}
            found.append(row | {"largest": int(counts.max())} | balance(counts))
    return found


def balance(counts: ArrayLike) -> dict[str, float]:
    """How even some counts are: entropy as a share of its maximum, and Gini (0: all equal)."""
    import numpy as np

    values = np.sort(np.asarray(counts, np.float64))
    values = values[values > 0]
    if len(values) < 2:
        return {"entropy": 1.0, "gini": 0.0}
    shares = values / values.sum()
    entropy = float(-(shares * np.log(shares)).sum() / np.log(len(shares)))
    ranks = np.arange(1, len(shares) + 1)
    gini = float((2 * ranks - len(shares) - 1) @ shares / len(shares))
    return {"entropy": entropy, "gini": gini}


def number_stats(tables: Tables, columns: Sequence[str]) -> list[Row]:
    """Count, ends, mean and quantiles of columns of the view `rows` that hold numbers."""
    if not columns:
        return []
    asked = ", ".join(
        f"count({named(name)}) as n{number}, min({named(name)}) as a{number}, "
        f"max({named(name)}) as b{number}, avg({named(name)}) as m{number}"
        for number, name in enumerate(columns)
    )
    values = tables.first(f"select {asked} from rows")
    measured = quantiles(tables, columns)
    return [
        {
            "column": name,
            "rows": values[f"n{number}"],
            "min": values[f"a{number}"],
            "max": values[f"b{number}"],
            "mean": values[f"m{number}"],
            "quantiles": measured[name],
        }
        for number, name in enumerate(columns)
    ]


def quantiles(tables: Tables, columns: Sequence[str]) -> dict[str, dict[str, float] | None]:
    """Quantiles of some columns; beyond SAMPLED_ROWS rows, those of a fixed sample."""
    rows = tables.first("select count(*) as n from rows")["n"]
    source = "rows"
    if rows > SAMPLED_ROWS:
        names = ", ".join(named(name) for name in columns)
        percent = 100 * SAMPLED_ROWS / rows
        sample = f"tablesample system({percent:.6f} percent) repeatable(1)"
        source = f"(select {names} from rows {sample})"
    listed = ", ".join(str(value) for value in QUANTILES)
    asked = ", ".join(
        f"approx_quantile({named(name)}, [{listed}]) as q{number}"
        for number, name in enumerate(columns)
    )
    found = tables.first(f"select {asked} from {source}").values()
    keys = [f"{q:g}" for q in QUANTILES]
    return {
        name: values and {q: round(float(v), 6) for q, v in zip(keys, values, strict=True)}
        for name, values in zip(columns, found, strict=True)
    }


def _text_stats(tables: Tables, columns: list[str]) -> dict[str, Row]:
    """How many texts are there, and counts by value where these are few.

    The footers tell which columns repeat their values: those are stored in a dictionary, with a
    few bytes a row before compression. Only they are read.
    """
    footers = tables.rows(
        "select path_in_schema as name, sum(num_values) - sum(coalesce(stats_null_count, 0)) as n, "
        "sum(total_uncompressed_size) / greatest(sum(num_values), 1) as bytes "
        "from parquet_metadata(?) group by all",
        [tables.files("rows")],
    )
    known = {row["name"]: (int(row["n"]), float(row["bytes"])) for row in footers}
    found: dict[str, Row] = {}
    for name in [name for name in columns if name in known]:
        filled, bytes_a_row = known[name]
        found[name] = {"rows": filled}
        if 0 < filled < _QUICK_ROWS or bytes_a_row < _REPEATING_BYTES:
            values = _value_counts(tables, name, _FEW_VALUES + 1)
            if len(values) <= min(_FEW_VALUES, filled // _REPEATED):
                found[name]["values"] = values[:MOST_COMMON]
    return found
