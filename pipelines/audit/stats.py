"""Counts of a run or a data set: rows, reasons, sizes, hosts, scores, copies.

Footers, manifests and records answer what they can; DuckDB reads only the columns of the rest.
"""

from collections.abc import Iterator
from typing import Any

from curation import storage
from curation.dataset import Dataset, open_foreign
from curation.errors import ConfigError
from pipelines.audit.funnel import funnel, set_funnels
from pipelines.audit.languages import alt_languages
from pipelines.audit.tables import Row, Tables, host_of, named
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL, open_manifest

Stats = dict[str, Any]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SAMPLED_ROWS = 2_000_000
"""Quantiles of larger tables are those of a sample of about so many rows."""
_MOST_COMMON = 20
_ALL_HOSTS = 1_000_000
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
_BULKY = ("BLOB", "[]", "[", "MAP", "STRUCT")
_NO_SCORE = ("rank", "cluster", "component_size", "threshold")
_LIMITS = {
    "short_side": "min_side",
    "aspect": "max_aspect",
    "contrast": "min_contrast",
    "entropy": "min_entropy",
    "sharpness": "min_sharpness",
}
"""Scores of `quality`, and the setting that each is judged by."""


def stats_of(path: str) -> Stats:
    """Everything that `curate stats` says of a work folder or a data set.

    Raises:
        DatasetError: neither is there.
    """
    if WorkFolder.is_one(path):
        return run_stats(WorkFolder(path))
    return dataset_stats(open_any(path))


def open_any(path: str) -> Dataset:
    """A data set of ours, or any Parquet, with or without ids."""
    if Dataset.is_finished(path):
        return Dataset.open(path)
    return open_foreign(path, id_column=_any_column(path))


def run_stats(work: WorkFolder) -> Stats:
    """Statistics of a finished run."""
    record = work.record
    rows = funnel(record)
    return {
        "path": work.path,
        "kind": "run",
        "recipe": record.recipe,
        "seed": record.seed,
        "rows_in": rows[0].rows_in if rows else 0,
        "rows_out": rows[-1].rows_out if rows else 0,
        "content_digest": work.manifest.manifest.content_digest if work.manifest else None,
        "funnel": [vars(row) for row in rows],
        "sets": {name: [vars(r) for r in found] for name, found in set_funnels(record).items()},
        "reasons": reasons(work),
        "scores": [score for stage in work.stages(POOL) for score in stage_scores(stage)],
        "duplicates": duplicates(work),
        "seed_sets": retrieved(work),
        "fetches": fetches(work),
        "hosts": hosts(work),
        "images": image_stats(work),
        "languages": languages(work),
        "manifest": dataset_stats(work.manifest) if work.manifest else None,
        "parts": parts_of_set(work),
        "failed_shards": failed_shards(work),
        "timing": timing(work),
    }


def reasons(work: WorkFolder) -> list[Row]:
    """Dropped rows by flow, stage and reason, with their share of the flow's input."""
    found = []
    for stage in work.all_stages():
        total = max(work.flows[stage.flow][0].record.rows_in, 1)
        found += [
            {
                "flow": stage.flow,
                "stage": stage.name,
                "reason": reason,
                "rows": count,
                "share": count / total,
            }
            for reason, count in stage.entry.record.dropped.items()
        ]
    return found


def failed_shards(work: WorkFolder) -> list[Row]:
    """Shards that kept failing and were accepted, with the cause."""
    return [
        {"flow": stage.flow, "stage": stage.name, "shard": shard, "cause": cause}
        for stage in work.all_stages()
        for shard, cause in stage.entry.record.failed_shards.items()
    ]


def parts_of_set(work: WorkFolder) -> list[Row]:
    """Images of the finished set by seed set or source set, with their share."""
    if work.manifest is None:
        return []
    with Tables() as tables:
        if not tables.add("manifest", work.manifest):
            return []
        rows = tables.rows(
            "select coalesce(seed_set, source_set) as part, seed_set is null as as_is, "
            "count(*) as n from manifest group by all order by n desc, part"
        )
    total = sum(row["n"] for row in rows)
    return [{**row, "share": row["n"] / max(total, 1)} for row in rows]


def timing(work: WorkFolder) -> list[Row]:
    """Wall time of every stage."""
    return [
        {
            "flow": stage.flow,
            "stage": stage.name,
            "seconds": stage.entry.record.seconds,
            "rows_per_second": stage.entry.record.rows_in / max(stage.entry.record.seconds, 1e-3),
        }
        for stage in work.all_stages()
    ]


def stage_scores(stage: FinishedStage) -> list[Row]:
    """Quantiles of every score that a stage's decisions hold, with what it was judged by."""
    with Tables() as tables:
        if not tables.add("verdicts", stage.decisions):
            return []
        columns = score_columns(stage, tables)
        if not columns:
            return []
        asked = ", ".join(f"count({named(name)}) as n{i}" for i, name in enumerate(columns))
        values = tables.first(f"select {asked} from verdicts")
        quantiles = _quantiles_of(tables, "verdicts", columns)
        limits = {name: thresholds(stage, name, tables) for name in columns}
    return [
        {
            "stage": stage.name,
            "score": name,
            "rows": values[f"n{number}"],
            "quantiles": quantiles[name],
            "thresholds": limits[name],
        }
        for number, name in enumerate(columns)
        if values[f"n{number}"]
    ]


def score_columns(stage: FinishedStage, tables: Tables) -> list[str]:
    """Names of a stage's scores in the view `verdicts`; `score` where it has no other."""
    columns = tables.columns("verdicts")
    own = [
        name
        for name, kind in columns.items()
        if kind in ("FLOAT", "DOUBLE", "INTEGER") and name not in (*_NO_SCORE, "score")
    ]
    known = tables.first("select count(score) as n from verdicts")["n"]
    return own or (["score"] if known else [])


def thresholds(stage: FinishedStage, score: str, tables: Tables) -> list[float]:
    """What a score was judged by; none where it is only noted."""
    settings = stage.entry.record.settings
    if score in _LIMITS:
        limit = settings.get(_LIMITS[score])
        return [] if limit is None else [float(limit)]
    found = tables.rows(
        "select threshold, count(*) as n from verdicts where threshold is not null "
        f"and {named(score)} is not null group by threshold order by n desc limit 3"
    )
    return [round(row["threshold"], 7) for row in found]


def duplicates(work: WorkFolder) -> list[Row]:
    """Components of near-duplicates by size: how many, and how many rows they hold."""
    found: list[Row] = []
    for stage in work.stages(POOL):
        if "component_size" not in stage.decisions.columns:
            continue
        with Tables() as tables:
            if tables.add("verdicts", stage.decisions):
                found += tables.rows(
                    "select component_size, count(*) as rows, "
                    "count(*) // component_size as components from verdicts "
                    "where component_size is not null group by component_size "
                    "order by component_size"
                )
    return found


def retrieved(work: WorkFolder) -> list[Row]:
    """Hits and different images by seed set."""
    stage = work.stage(POOL, "retrieve")
    if stage is None or not stage.has("hits"):
        return []
    with Tables() as tables:
        if not tables.add("hits", stage.output("hits")):
            return []
        return tables.rows(
            "select seed_set, rule, count(*) as hits, count(distinct id) as images, "
            "count(distinct coalesce(seed_id, cluster::varchar)) as sources, "
            "median(similarity) as median_similarity from hits group by all order by all"
        )


def fetches(work: WorkFolder) -> list[Row]:
    """How downloads ended."""
    stage = work.making(POOL, "fetches")
    if stage is None:
        return []
    with Tables() as tables:
        if not tables.add("fetches", stage.output("fetches")):
            return []
        return tables.rows(
            "select status, count(*) as rows, sum(num_bytes) as bytes, "
            "round(avg(attempts), 2) as attempts, round(median(seconds), 4) as median_seconds "
            "from fetches group by status order by rows desc, status"
        )


def hosts(work: WorkFolder) -> list[Row]:
    """The hosts with most rows: how many URLs were listed, and how many images are in the set."""
    stage = work.making(POOL, "rows")
    if stage is None or work.manifest is None:
        return []
    with Tables() as tables:
        if not tables.add("listed", stage.output("rows")):
            return []
        listed = [row for row in host_counts(tables, "listed", _MOST_COMMON + 1) if row["value"]]
        kept = {}
        if tables.add("manifest", work.manifest):
            counts = host_counts(tables, "manifest", _ALL_HOSTS)
            kept = {row["value"]: row["rows"] for row in counts}
    return [
        {"host": row["value"], "rows": row["rows"], "kept": kept.get(row["value"], 0)}
        for row in listed[:_MOST_COMMON]
    ]


def languages(work: WorkFolder) -> list[Row]:
    """Languages of the alternative texts that the pool's list gave."""
    stage = work.making(POOL, "rows")
    if stage is None:
        return []
    with Tables() as tables:
        if not tables.add("listed", stage.output("rows")):
            return []
        return alt_languages(tables, "listed", tables.columns("listed"))


def image_stats(work: WorkFolder) -> Row | None:
    """Formats and sizes of the pool's readable images."""
    stage = work.making(POOL, "images")
    if stage is None:
        return None
    with Tables() as tables:
        if not tables.add("images", stage.output("images")):
            return None
        return {
            "formats": tables.rows(
                "select format as value, count(*) as rows from images group by 1 order by 2 desc, 1"
            ),
            "sides": _quantiles(
                tables, "images", ("original_width", "original_height", "num_bytes")
            ),
        }


def dataset_stats(dataset: Dataset, by: str | None = None) -> Stats:
    """Rows, bytes and columns of a data set; by: also counts by a column, or by `host`."""
    shards = dataset.manifest.shards
    found: Stats = {
        "path": dataset.path,
        "kind": "dataset",
        "rows": dataset.num_rows,
        "shards": dataset.num_shards,
        "bytes": sum(shard.num_bytes for shard in shards),
        "content_digest": dataset.manifest.content_digest if not _foreign(dataset) else None,
        "attributes": dataset.attributes,
    }
    with Tables() as tables:
        if not tables.add("rows", dataset):
            return {**found, "columns": []}
        columns = tables.columns("rows")
        found["columns"] = column_stats(tables, columns)
        found["balance"] = balances(tables, columns)
        if "source" in columns:
            found["hosts"] = count_by(tables, "host", columns)
        found["languages"] = alt_languages(tables, "rows", columns)
        if by is not None:
            found["by"] = {"column": by, "values": count_by(tables, by, columns)}
    return found


def column_stats(tables: Tables, columns: dict[str, str]) -> list[Row]:
    """What each column of the view `rows` holds; large values are only named with their type."""
    light = {name: kind for name, kind in columns.items() if not _is_bulky(kind)}
    numbers = [name for name, kind in light.items() if _is_number(kind)]
    texts = [name for name, kind in light.items() if kind == "VARCHAR"]
    found = {row["column"]: row for row in _quantiles(tables, "rows", numbers)}
    found |= _text_stats(tables, texts)
    return [{"column": name, "type": kind, **found.get(name, {})} for name, kind in columns.items()]


def count_by(
    tables: Tables, by: str, columns: dict[str, str], limit: int = _MOST_COMMON
) -> list[Row]:
    """Rows of the view `rows` by a column, the most common first.

    by: a column, `host` (of the source), or `source` (the list or set that a row is of).

    Raises:
        ConfigError: there is no such column.
    """
    if by == "source" and "source_set" in columns:
        by = "source_set"
    if by != "host" and by not in columns:
        raise ConfigError(f"--by {by}: no such column; there are: host, {', '.join(columns)}")
    if by == "host":
        return host_counts(tables, "rows", limit)
    return tables.rows(
        f"select {named(by)} as value, count(*) as rows from rows group by 1 "
        "order by rows desc, value limit ?",
        [limit],
    )


def host_counts(tables: Tables, view: str, limit: int) -> list[Row]:
    """Rows by the host of their source: first by what stands between slashes, which is quick."""
    host = host_of("('any://' || place)")
    return tables.rows(
        f"select {host} as value, sum(rows)::bigint as rows from ("
        "select case when contains(source, '://') then split_part(source, '/', 3) end as place, "
        f"count(*) as rows from {view} group by 1) group by 1 order by rows desc, value limit ?",
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


def balance(counts: Any) -> dict[str, float]:
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


def _quantiles(tables: Tables, view: str, columns: Any) -> list[Row]:
    """Count, ends, mean and quantiles of numbers."""
    if not columns:
        return []
    asked = ", ".join(
        f"count({named(name)}) as n{number}, min({named(name)}) as a{number}, "
        f"max({named(name)}) as b{number}, avg({named(name)}) as m{number}"
        for number, name in enumerate(columns)
    )
    values = tables.first(f"select {asked} from {view}")
    quantiles = _quantiles_of(tables, view, columns)
    return [
        {
            "column": name,
            "rows": values[f"n{number}"],
            "min": values[f"a{number}"],
            "max": values[f"b{number}"],
            "mean": values[f"m{number}"],
            "quantiles": quantiles[name],
        }
        for number, name in enumerate(columns)
    ]


def _quantiles_of(tables: Tables, view: str, columns: Any) -> dict[str, dict[str, float] | None]:
    """Quantiles of some columns; beyond SAMPLED_ROWS rows, those of a fixed sample."""
    rows = tables.first(f"select count(*) as n from {view}")["n"]
    source = view
    if rows > SAMPLED_ROWS:
        names = ", ".join(named(name) for name in columns)
        percent = 100 * SAMPLED_ROWS / rows
        sample = f"tablesample system({percent:.6f} percent) repeatable(1)"
        source = f"(select {names} from {view} {sample})"
    listed = ", ".join(str(value) for value in QUANTILES)
    asked = ", ".join(
        f"approx_quantile({named(name)}, [{listed}]) as q{number}"
        for number, name in enumerate(columns)
    )
    values = tables.first(f"select {asked} from {source}")
    return {name: _quantile_names(values[f"q{i}"]) for i, name in enumerate(columns)}


def _quantile_names(values: list[float] | None) -> dict[str, float] | None:
    if values is None:
        return None
    return {f"{q:g}": round(float(v), 6) for q, v in zip(QUANTILES, values, strict=True)}


def _text_stats(tables: Tables, texts: list[str]) -> dict[str, Row]:
    """How many texts are there, and counts by value where these are few.

    The footers tell which columns repeat their values: those are stored in a dictionary, with a
    few bytes a row. Only they are read.
    """
    found: dict[str, Row] = {}
    for name, (filled, bytes_a_row) in _footers(tables, texts).items():
        found[name] = {"rows": filled}
        if 0 < filled < _QUICK_ROWS or bytes_a_row < _REPEATING_BYTES:
            values = count_by(tables, name, {name: "VARCHAR"}, _FEW_VALUES + 1)
            if len(values) <= min(_FEW_VALUES, filled // _REPEATED):
                found[name]["values"] = values[:_MOST_COMMON]
    return found


def _footers(tables: Tables, columns: list[str]) -> dict[str, tuple[int, float]]:
    """Filled rows, and stored bytes a row before compression, of some columns."""
    files = tables.files("rows")
    rows = tables.rows(
        "select path_in_schema as name, sum(num_values) - sum(coalesce(stats_null_count, 0)) as n, "
        "sum(total_uncompressed_size) / greatest(sum(num_values), 1) as bytes "
        "from parquet_metadata(?) group by all",
        [files],
    )
    known = {row["name"]: (int(row["n"]), float(row["bytes"])) for row in rows}
    return {name: known[name] for name in columns if name in known}


def _any_column(path: str) -> str:
    """A column that the foreign Parquet surely has: statistics need no ids."""
    if path.endswith(".parquet"):
        first = path
    else:
        names = storage.list_files(path, ".parquet")
        if not names:
            return "id"
        first = storage.join(path, names[0])
    with storage.open_parquet(first) as file:
        return str(file.schema_arrow.names[0])


def _is_number(kind: str) -> bool:
    return any(word in kind for word in ("INT", "FLOAT", "DOUBLE", "DECIMAL"))


def _is_bulky(kind: str) -> bool:
    return any(word in kind for word in _BULKY)


def _foreign(dataset: Dataset) -> bool:
    return bool(dataset.attributes.get("foreign"))


def count_by_column(path: str, by: str) -> list[Row]:
    """Rows of a data set, or of a run's manifest, by a column or by `host`.

    Raises:
        ConfigError: there is no such column.
        DatasetError: the run has no manifest.
    """
    dataset = open_manifest(path) if WorkFolder.is_one(path) else open_any(path)
    with Tables() as tables:
        if not tables.add("rows", dataset):
            return []
        return count_by(tables, by, tables.columns("rows"))


def write_csv(found: Any, out: str) -> str:
    """Write statistics as CSV, one figure a line: its place, then its value; give the path."""
    import csv
    import io

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("figure", "value"))
    writer.writerows(_flat(found, ""))
    storage.write_bytes(out, buffer.getvalue().encode())
    return out


def _flat(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """(a.b.0.c, value) of everything inside."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from _flat(inner, f"{place}.{key}" if place else str(key))
    elif value is not None:
        yield place, value
