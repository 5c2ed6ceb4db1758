"""Writes the catalog that `curate serve` reads: every row once, and sorted lists to find it by."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from curation import storage
from curation.dataset import Dataset
from curation.digest import digest_of
from curation.errors import ConfigError, DatasetError, StorageError
from curation.lock import locked
from pipelines.audit.dataset_stats import open_any
from pipelines.audit.explain import path_of
from pipelines.audit.run_stats import score_columns, thresholds
from pipelines.audit.tables import Tables, host_of, named, quoted
from pipelines.audit.work_folder import CATALOG_FILE, FinishedStage, WorkFolder
from pipelines.run.run_record import POOL
from pipelines.web.serving.catalog import BINS, FACETS, Catalog, Score

FORMAT = 1
NUMBERS = ("width", "height", "original_width", "original_height", "num_bytes", "similarity")
"""Numbers of a plain data set that can be filtered and sorted by; a run has its scores."""
KEPT = "kept"
"""The stage of rows that no stage dropped."""
_FIELDS = {
    **dict.fromkeys(("flow", "id", "source", "host", "stage", "reason"), "varchar"),
    **dict.fromkeys(("source_set", "seed_set", "format", "alt"), "varchar"),
    **dict.fromkeys(("component", "twin", "twin_set"), "varchar"),
    **dict.fromkeys(("width", "height", "component_size"), "integer"),
    **dict.fromkeys(("veiled", "hidden"), "boolean"),
}
"""Columns of `images` and their types, before the scores."""
_SIDE_CARS = {"rows": ("source", "source_set", "alt"), "images": ("format", "width", "height")}
"""Columns of `images` that side-cars hold."""
_ROWS_AT_ONCE = 400_000
"""Rows of all stages that are joined at once."""


def catalog_of(path: str, file: str | None = None) -> str:
    """The catalog of a run or a data set, made where it is missing or outdated; give its path.

    Raises:
        ConfigError: the data lies on an object store, or its path holds a '?', and no file for
            the catalog was named.
        DatasetError: neither a run nor a data set is there.
    """
    if file is None and not storage.is_local(path):
        raise ConfigError(f"{path} is no local folder: name a file for the catalog, --catalog FILE")
    target = file or storage.join(path, CATALOG_FILE)
    if "?" in storage.full_path(target):
        raise ConfigError(
            f"{target}: DuckDB opens nothing where a '?' is in the path; name another file for "
            "the catalog, --catalog FILE"
        )
    key = key_of(path)
    if not storage.exists(target) or _key_in(target) != key:
        with contextlib.nullcontext() if file else locked(path):
            write_catalog(path, target, key)
    return target


def key_of(path: str) -> str:
    """Digest of what a catalog is made from: another one, and it must be made anew."""
    if not WorkFolder.is_one(path):
        manifest = open_any(path).manifest
        return digest_of(FORMAT, manifest.content_digest, manifest.num_rows)
    work = WorkFolder(path)
    keys = [
        [stage.entry.folder, stage.decisions.manifest.content_digest, stage.entry.record.rows_in]
        for stage in work.all_stages()
    ]
    return digest_of(FORMAT, keys)


def write_catalog(path: str, target: str, key: str) -> None:
    """Make a catalog; it appears whole or not at all.

    Raises:
        StorageError: it cannot be written there.
    """
    partial = Path(f"{target}.partial")
    _check_can_be_written(partial)
    with Tables() as tables:
        tables.attach(str(partial), "catalog")
        if WorkFolder.is_one(path):
            work = WorkFolder(path)
            scores = [
                Score(f"{stage.name}.{name}", stage.name, name, tuple(thresholds(stage, name)))
                for stage in work.stages(POOL)
                for name in score_columns(stage)
            ]
            scores = list({score.name: score for score in scores}.values())
            _create_images(tables, scores)
            for flow in work.flows:
                for shards in _batches(path_of(work, flow)[0], flow):
                    _fill(work, flow, tables, scores, shards)
            _copy_hits(work, tables)
        else:
            dataset = open_any(path)
            scores = [Score(f"data.{n}", "", n) for n in NUMBERS if n in dataset.columns]
            _create_images(tables, scores)
            _fill_from_dataset(dataset, tables, scores)
        _sort(tables, scores)
        facts = {"key": key, "scores": [vars(score) for score in scores]}
        tables.run("create table facts as select ? as json", [json.dumps(facts)])
    partial.replace(target)


def _check_can_be_written(partial: Path) -> None:
    """Say in one line where a catalog may lie instead; leave nothing of an earlier attempt."""
    try:
        with storage.storage_errors(str(partial)):
            partial.touch()
            partial.unlink()
    except StorageError as error:
        raise StorageError(f"{error}; name another file for the catalog, --catalog FILE") from error


def _key_in(file: str) -> str:
    """Key of an existing catalog.

    Raises:
        ConfigError: the file is something else, and so is left alone.
    """
    try:
        with Catalog(file) as catalog:
            return str(catalog.facts["key"])
    except (DatasetError, StorageError) as error:
        raise ConfigError(
            f"{file}: is no catalog ({error}); remove it, or name another with --catalog"
        ) from error


def _create_images(tables: Tables, scores: list[Score]) -> None:
    columns = [f"{name} {kind}" for name, kind in _FIELDS.items()]
    columns += [f"{named(score.name)} float" for score in scores]
    tables.run(f"create table images ({', '.join(columns)})")


def _fill_from_dataset(dataset: Dataset, tables: Tables, scores: list[Score]) -> None:
    """One insertion that keeps the order of the files."""
    if not tables.add("one", dataset):
        return
    there = tables.columns("one")
    known = {name: name for name in _FIELDS if name in there}
    known |= {"flow": quoted(POOL), "stage": quoted(KEPT), "hidden": "false", "veiled": "false"}
    if "source" in there:
        known["host"] = host_of()
    values = [known.get(name, "null") for name in _FIELDS]
    values += [named(score.column) for score in scores]
    tables.run(f"insert into images select {', '.join(values)} from one")


def _batches(stage: FinishedStage, flow: str) -> Iterator[range]:
    """Ranges of shards, numbered within the flow, that hold few enough rows each."""
    first, number = stage.ranges[flow]
    begin, rows = 0, 0
    for shard in range(number):
        rows += stage.decisions.manifest.shards[first + shard].num_rows
        if rows >= _ROWS_AT_ONCE or shard == number - 1:
            yield range(begin, shard + 1)
            begin, rows = shard + 1, 0


def _fill(work: WorkFolder, flow: str, tables: Tables, scores: list[Score], shards: range) -> None:
    """Insert some shards of a flow: what every stage said of each row, joined by id."""
    views: dict[str, FinishedStage] = {}
    for number, stage in enumerate(path_of(work, flow)):
        first = stage.ranges[flow][0]
        own = range(first + shards.start, first + shards.stop)
        if tables.add(f"d{number}", stage.decisions, shards=own):
            views[f"d{number}"] = stage
    if not views:
        return
    values = {"flow": quoted(flow), **_decided(views)}
    first_view, *joined = views
    for name, wanted in _SIDE_CARS.items():
        dataset, view = work.output(flow, name), f"side_{name}"
        if dataset is not None and tables.add(view, dataset, shards=shards):
            columns = tables.columns(view)
            values |= {column: f"{view}.{column}" for column in wanted if column in columns}
            joined.append(view)
    if "source" in values:
        values["host"] = host_of(values["source"])
    for view, stage in views.items():
        for score in scores:
            if score.stage == stage.name and score.column in stage.decisions.columns:
                values[score.name] = f"{view}.{named(score.column)}"
    chosen = ", ".join(values.get(name, "null") for name in (*_FIELDS, *(s.name for s in scores)))
    joins = " ".join(
        f"left join {view} on {first_view}.keep and {view}.id = {first_view}.id" for view in joined
    )
    tables.run(
        f"insert into images select {chosen} from {first_view} {joins} "
        f"order by {first_view}.id, {first_view}.keep desc"
    )


def _decided(views: dict[str, FinishedStage]) -> dict[str, str]:
    """SQL of the columns that decisions tell, by name of column. views: of each stage."""
    fallen = " ".join(f"when not {v}.keep then {quoted(stage.name)}" for v, stage in views.items())
    values = {
        "id": f"{next(iter(views))}.id",
        "stage": f"case {fallen} else {quoted(KEPT)} end",
        "reason": f"coalesce({', '.join(f'{view}.reason' for view in views)})",
    }
    for view, stage in views.items():
        if stage.entry.kind.shows_dropped != "clear":  # veiled or hidden
            values[stage.entry.kind.shows_dropped] = f"coalesce(not {view}.keep, false)"
        if "component" in stage.decisions.columns:
            for name in ("component", "component_size"):
                values[name] = f"case when {view}.component_size > 1 then {view}.{name} end"
        if "seed_set" in stage.decisions.columns:
            values["seed_set"] = f"{view}.seed_set"
    for column in ("twin", "twin_set"):
        having = {v: set(s.decisions.columns) for v, s in views.items()}
        having = {view: columns for view, columns in having.items() if column in columns}
        if having:
            near = next((v for v, columns in having.items() if "component" in columns), None)
            named_by = " ".join(f"when not {view}.keep then {view}.{column}" for view in having)
            values[column] = f"case {named_by} else {near or next(iter(having))}.{column} end"
    return values


def _copy_hits(work: WorkFolder, tables: Tables) -> None:
    """What retrieval fetched, sorted so that each seed's images lie together."""
    if work.hits is None or not tables.add("found", work.hits):
        return
    tables.run(
        "create table hits as select seed_set, rule, seed_id, cluster, rank, similarity, id "
        "from found order by seed_set, rule, seed_id, cluster, rank, similarity desc, id"
    )
    tables.run(
        "create table seeds as select seed_set, rule, seed_id, cluster, min(rowid) as first, "
        "count(*) as rows from hits group by all order by first"
    )


def _sort(tables: Tables, scores: list[Score]) -> None:
    """Make the sorted lists of positions."""
    tables.run("create table facets (facet varchar, value varchar, first bigint, rows bigint)")
    for number, name in enumerate(FACETS):
        tables.run(
            f"insert into facets select {quoted(name)}, {name}, "
            f"sum(count(*)) over (order by {name}) - count(*), count(*) from images "
            f"where {name} is not null group by {name} order by {name}"
        )
        tables.run(
            f"create table facet_{number} as select i.rowid as position from images i "
            f"join (from facets where facet = {quoted(name)}) f on i.{name} = f.value "
            "order by f.first, i.rowid"
        )
    tables.run("create table bins (score integer, bin integer, kept bigint, dropped bigint)")
    for number, score in enumerate(scores):
        column, table = named(score.name), f"score_{number}"
        told = f"from images where {column} is not null and not isnan({column})"
        tables.run(
            f"create table {table} as select {column} as value, rowid as position {told} "
            "order by 1, 2"
        )
        low = f"(select min(value) from {table})"
        span = f"nullif((select max(value) from {table}) - {low}, 0)"
        tables.run(
            f"insert into bins select {number}, least(coalesce("
            f"floor(({column} - {low}) / {span} * {BINS}), 0), {BINS - 1})::int as bin, "
            f"count(*) filter (stage != ?), count(*) filter (stage = ?) {told} group by bin",
            [score.stage, score.stage],
        )
    tables.run(
        "create table components as select value as component, rows from facets "
        "where facet = 'component' order by rows desc, value"
    )
