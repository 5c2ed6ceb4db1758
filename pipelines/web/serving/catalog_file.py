"""Writes the catalog that `curate serve` reads: every row once, and sorted lists to find it by.

The catalog is one DuckDB file. `images` holds the rows in the order of their flows and ids, so a
row's number in it is its *position*. Each column that can be filtered by has a list of positions,
sorted by value (`listed_N`, whose row numbers are *ranks*): a page of any such filter is a range
of ranks, found without reading the rest. `facets` says where a text's range begins.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
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
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL

FILE = "_catalog.duckdb"
FORMAT = 1
FACETS = ("flow", "stage", "reason", "host", "source_set", "seed_set", "format", "component")
"""Texts that can be filtered by."""
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
BINS = 40
"""Bins of a score's histogram."""
_ROWS_AT_ONCE = 400_000
"""Rows of all stages that are joined at once."""


@dataclass(frozen=True)
class Score:
    """A number that rows can be filtered and sorted by."""

    name: str
    """Its column: `stage.score` in a run."""
    stage: str
    column: str
    thresholds: tuple[float, ...] = ()
    """What it was judged by."""


def catalog_of(path: str, file: str | None = None) -> str:
    """The catalog of a run or a data set, made where it is missing or outdated; give its path.

    Raises:
        ConfigError: the data lies on an object store, and no file for the catalog was named.
        DatasetError: neither a run nor a data set is there.
    """
    if file is None and not storage.is_local(path):
        raise ConfigError(f"{path} is no local folder: name a file for the catalog, --catalog FILE")
    target = file or storage.join(path, FILE)
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
    is_run = WorkFolder.is_one(path)
    _check_can_be_written(partial)
    with Tables() as tables:
        tables.attach(str(partial), "catalog")
        scores = _scores_of_run(WorkFolder(path)) if is_run else _scores_of(open_any(path))
        _create_images(tables, scores)
        if is_run:
            _fill_from_run(WorkFolder(path), tables, scores)
            _copy_hits(WorkFolder(path), tables)
        else:
            _fill_from_dataset(open_any(path), tables, scores)
        facts = {"key": key, "scores": [vars(score) for score in scores], "is_run": is_run}
        _sort(tables, scores)
        tables.run("create table facts as select ? as json", [json.dumps(facts)])
    partial.replace(target)


def _check_can_be_written(partial: Path) -> None:
    """Say in one line where a catalog may lie instead; leave nothing of an earlier attempt."""
    if "?" in storage.full_path(str(partial)):
        raise ConfigError(
            f"{partial}: DuckDB writes nothing where a '?' is in the path; name another file for "
            "the catalog, --catalog FILE"
        )
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
    from pipelines.web.serving.catalog import Catalog

    try:
        with Catalog(file) as catalog:
            return catalog.key
    except (DatasetError, StorageError) as error:
        raise ConfigError(
            f"{file}: is no catalog ({error}); remove it, or name another with --catalog"
        ) from error


def _create_images(tables: Tables, scores: list[Score]) -> None:
    columns = [f"{name} {kind}" for name, kind in _FIELDS.items()]
    columns += [f"{named(score.name)} float" for score in scores]
    tables.run(f"create table images ({', '.join(columns)})")


def _scores_of_run(work: WorkFolder) -> list[Score]:
    """The scores of the pool's stages."""
    found = [
        Score(f"{stage.name}.{name}", stage.name, name, tuple(thresholds(stage, name)))
        for stage in work.stages(POOL)
        for name in score_columns(stage)
    ]
    return list({score.name: score for score in found}.values())


def _scores_of(dataset: Dataset) -> list[Score]:
    return [Score(f"data.{name}", "", name) for name in NUMBERS if name in dataset.columns]


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


def _fill_from_run(work: WorkFolder, tables: Tables, scores: list[Score]) -> None:
    for flow in work.flows:
        stages = path_of(work, flow)
        for first, last in _batches(stages[0], flow):
            _fill(work, flow, tables, scores, range(first, last))


def _batches(stage: FinishedStage, flow: str) -> Iterator[tuple[int, int]]:
    """Ranges of shards, numbered within the flow, that hold few enough rows each."""
    first, number = stage.ranges[flow]
    begin, rows = 0, 0
    for shard in range(number):
        rows += stage.decisions.manifest.shards[first + shard].num_rows
        if rows >= _ROWS_AT_ONCE:
            yield begin, shard + 1
            begin, rows = shard + 1, 0
    if begin < number:
        yield begin, number


def _fill(work: WorkFolder, flow: str, tables: Tables, scores: list[Score], shards: range) -> None:
    """Insert some shards of a flow: what every stage said of each row, joined by id."""
    judged: dict[str, _Judge] = {}
    for number, stage in enumerate(path_of(work, flow)):
        first = stage.ranges[flow][0]
        own = range(first + shards.start, first + shards.stop)
        if tables.add(f"d{number}", stage.decisions, shards=own):
            shows, columns = stage.entry.kind.shows_dropped, set(stage.decisions.columns)
            judged[stage.name] = _Judge(stage.name, f"d{number}", columns, shows)
    if not judged:
        return
    values = _of_judges(list(judged.values()))
    joins = [judge.view for judge in list(judged.values())[1:]]
    for name in ("rows", "images"):
        made = work.making(flow, name)
        view = f"side_{name}"
        if made is not None and tables.add(view, made.output(name), shards=shards):
            values |= _of_side_car(name, view, tables.columns(view))
            joins.append(view)
    values |= {
        score.name: f"{judged[score.stage].view}.{named(score.column)}"
        for score in scores
        if score.stage in judged and score.column in judged[score.stage].columns
    }
    values["flow"] = quoted(flow)
    chosen = ", ".join(values.get(name, "null") for name in _column_names(scores))
    first_view = next(iter(judged.values())).view
    joined = " ".join(
        f"left join {view} on {first_view}.keep and {view}.id = {first_view}.id" for view in joins
    )
    tables.run(
        f"insert into images select {chosen} from {first_view} {joined} "
        f"order by {first_view}.id, {first_view}.keep desc"
    )


@dataclass(frozen=True)
class _Judge:
    """The view of one stage's decisions."""

    stage: str
    view: str
    columns: set[str]
    shows_dropped: str
    """How people see what it drops: a mark of `images`, or clear."""


def _of_judges(judges: list[_Judge]) -> dict[str, str]:
    """SQL of the columns that decisions tell, by name of column."""
    fallen = " ".join(f"when not {j.view}.keep then {quoted(j.stage)}" for j in judges)
    values = {
        "id": f"{judges[0].view}.id",
        "stage": f"case {fallen} else {quoted(KEPT)} end",
        "reason": f"coalesce({', '.join(f'{j.view}.reason' for j in judges)})",
    }
    for judge in judges:
        if judge.shows_dropped != "clear":
            values[judge.shows_dropped] = f"coalesce(not {judge.view}.keep, false)"
        if "component" in judge.columns:
            grouped = f"case when {judge.view}.component_size > 1 then {judge.view}"
            values["component"] = f"{grouped}.component end"
            values["component_size"] = f"{grouped}.component_size end"
        if "seed_set" in judge.columns:
            values["seed_set"] = f"{judge.view}.seed_set"
    for column in ("twin", "twin_set"):
        having = [j for j in judges if column in j.columns]
        if having:
            near = next((j for j in having if "component" in j.columns), having[0])
            named_by = " ".join(f"when not {j.view}.keep then {j.view}.{column}" for j in having)
            values[column] = f"case {named_by} else {near.view}.{column} end"
    return values


def _of_side_car(name: str, view: str, columns: dict[str, str]) -> dict[str, str]:
    wanted = ("source", "source_set", "alt") if name == "rows" else ("format", "width", "height")
    values = {column: f"{view}.{column}" for column in wanted if column in columns}
    if "source" in values:
        values["host"] = host_of(f"{view}.source")
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
    for number, score in enumerate(scores):
        column = named(score.name)
        tables.run(
            f"create table score_{number} as select {column} as value, rowid as position "
            f"from images where {column} is not null and not isnan({column}) order by 1, 2"
        )
        _count_bins(tables, number, score)
    tables.run(
        "create table components as select value as component, rows from facets "
        "where facet = 'component' order by rows desc, value"
    )


def _count_bins(tables: Tables, number: int, score: Score) -> None:
    """Kept and dropped rows of a score, in equal bins between its ends."""
    column = named(score.name)
    low = f"(select min(value) from score_{number})"
    span = f"nullif((select max(value) from score_{number}) - {low}, 0)"
    tables.run(
        "create table if not exists bins (score integer, bin integer, kept bigint, dropped bigint)"
    )
    tables.run(
        f"insert into bins select {number}, "
        f"least(coalesce(floor(({column} - {low}) / {span} * {BINS}), 0), {BINS - 1})::int as bin, "
        "count(*) filter (stage != ?), count(*) filter (stage = ?) from images "
        f"where {column} is not null and not isnan({column}) group by bin",
        [score.stage, score.stage],
    )


def _column_names(scores: list[Score]) -> list[str]:
    return [*_FIELDS, *(score.name for score in scores)]
