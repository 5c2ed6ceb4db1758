"""A run as tables of SQL: `curate sql`."""

import re
from dataclasses import dataclass

from curation.dataset import Dataset
from curation.errors import ConfigError
from embedder.errors import one_line
from pipelines.audit.tables import Row, Tables, host_of, named, quoted
from pipelines.audit.work_folder import WorkFolder

_SIDE_CARS = ("rows", "images", "fetches", "hits", "faces")
"""Outputs of stages that become views of the same name, with the flow as a column."""


@dataclass(frozen=True)
class Answer:
    """The first rows of a query's result."""

    rows: list[Row]
    more: bool
    """Whether rows were left out."""


def ask(path: str, query: str, limit: int, *, allow_files: bool = False) -> Answer:
    """Run one SELECT on the views of a run.

    allow_files: let it read files outside the work folder, too.

    Raises:
        ConfigError: the query is no single SELECT.
        DatasetError: no run there, or DuckDB refuses the query.
    """
    check_select(query)
    with Tables() as tables:
        define_views(WorkFolder(path.rstrip("/")), tables)
        if not allow_files:
            tables.confine(path)
        rows: list[Row] = []
        for row in tables.batches(query):
            if len(rows) == limit:
                return Answer(rows, True)
            rows.append(row)
    return Answer(rows, False)


def views_of(path: str) -> dict[str, list[str]]:
    """Names of the views of a run, and of their columns."""
    with Tables() as tables:
        names = define_views(WorkFolder(path.rstrip("/")), tables)
        return {name: list(tables.columns(name)) for name in names}


def define_views(work: WorkFolder, tables: Tables) -> list[str]:
    """Make the views of a run; give their names. Empty side-cars have none."""
    parts: dict[str, list[tuple[Dataset, str]]] = {"decisions": []}
    for stage in work.all_stages():
        named_alike = {"decisions": stage.decisions}
        hits = ["hits"] if stage.has("hits") else []
        for name in (*stage.entry.record.outputs, *hits):
            if name in _SIDE_CARS and stage.has(name):
                named_alike[name] = stage.output(name)
            elif name in stage.embeddings:
                named_alike["embedding_" + re.sub(r"\W", "_", name)] = stage.output(name)
        for view, dataset in named_alike.items():
            parts.setdefault(view, []).append((dataset, stage.flow))
    for name, found in (("manifest", work.manifest), ("packed", work.packed)):
        if found is not None:
            parts[name] = [(found, "")]
    made = []
    for name, some in parts.items():
        labels = [{"flow": flow} for _, flow in some] if some and some[0][1] else []
        if tables.add(name, *(dataset for dataset, _ in some), labels=labels):
            made.append(name)
    _define_stages(work, tables)
    tables.run(f"create macro host(url) as {host_of('url')}")
    return [*made, "stages"]


def check_select(query: str) -> None:
    """Refuse whatever is not one SELECT.

    Raises:
        ConfigError: it is none, or several.
    """
    import duckdb

    try:
        statements = duckdb.extract_statements(query)
    except duckdb.Error as error:
        raise ConfigError(f"curate sql: {one_line(error)}") from error
    kinds = [statement.type for statement in statements]
    if kinds != [duckdb.StatementType.SELECT]:
        raise ConfigError("curate sql: give one SELECT; data of a run is never changed")


def _define_stages(work: WorkFolder, tables: Tables) -> None:
    """Every stage of every flow: rows in, rows out, seconds, and its folder."""
    names = ("flow", "stage", "number", "rows_in", "rows_out", "seconds", "folder")
    values = []
    for flow in work.flows:
        for number, stage in enumerate(work.stages(flow)):
            done = stage.entry.record
            row = (flow, stage.name, number, done.rows_in, done.rows_out, done.seconds)
            values.append(f"({', '.join(quoted(one) for one in (*row, stage.entry.folder))})")
    columns = ", ".join(named(name) for name in names)
    listed = f"(values {', '.join(values)}) as t({columns})"
    tables.run(f"create temp view stages as select * from {listed}")
