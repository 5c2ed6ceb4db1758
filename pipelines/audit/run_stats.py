"""Counts of a finished run: rows, reasons, scores, copies, retrieval, downloads, hosts, time."""

from pipelines.audit.dataset_stats import (
    Stats,
    dataset_stats,
    host_counts,
    number_stats,
    quantiles,
)
from pipelines.audit.funnel import funnel, set_funnels
from pipelines.audit.languages import alt_languages
from pipelines.audit.tables import Row, named, opened, select
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL

_MOST_COMMON = 20
_ALL_HOSTS = 1_000_000
_NO_SCORE = ("rank", "cluster", "component_size", "threshold", "score")


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
        "languages": alt_languages(work.output(POOL, "rows")),
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
    rows = select(
        work.manifest,
        "select coalesce(seed_set, source_set) as part, seed_set is null as as_is, "
        "count(*) as n from rows group by all order by n desc, part",
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
    with opened(stage.decisions) as tables:
        names = score_columns(stage) if tables else []
        if not tables or not names:
            return []
        asked = ", ".join(f"count({named(name)}) as n{i}" for i, name in enumerate(names))
        filled = tables.first(f"select {asked} from rows")
        measured = quantiles(tables, names)
    return [
        {
            "stage": stage.name,
            "score": name,
            "rows": filled[f"n{number}"],
            "quantiles": measured[name],
            "thresholds": thresholds(stage, name),
        }
        for number, name in enumerate(names)
        if filled[f"n{number}"]
    ]


def score_columns(stage: FinishedStage) -> list[str]:
    """Names of a stage's scores; `score` where it has no other; none without decisions."""
    with opened(stage.decisions) as tables:
        if not tables:
            return []
        own = [
            name
            for name, kind in tables.columns("rows").items()
            if kind in ("FLOAT", "DOUBLE", "INTEGER") and name not in _NO_SCORE
        ]
        known = own or tables.first("select count(score) as n from rows")["n"]
    return own or (["score"] if known else [])


def thresholds(stage: FinishedStage, score: str) -> list[float]:
    """What a score was judged by; none where it is only noted."""
    for limit in stage.entry.kind.limits:
        if limit.score == score:
            value = stage.entry.record.settings.get(limit.setting)
            return [] if value is None else [float(value)]
    found = select(
        stage.decisions,
        "select threshold, count(*) as n from rows where threshold is not null "
        f"and {named(score)} is not null group by threshold order by n desc limit 3",
    )
    return [round(row["threshold"], 7) for row in found]


def duplicates(work: WorkFolder) -> list[Row]:
    """Components of near-duplicates by size: how many, and how many rows they hold."""
    return [
        row
        for stage in work.stages(POOL)
        if "component_size" in stage.decisions.columns
        for row in select(
            stage.decisions,
            "select component_size, count(*) as rows, count(*) // component_size as components "
            "from rows where component_size is not null group by 1 order by 1",
        )
    ]


def retrieved(work: WorkFolder) -> list[Row]:
    """Hits and different images by seed set."""
    return select(
        work.hits,
        "select seed_set, rule, count(*) as hits, count(distinct id) as images, "
        "count(distinct coalesce(seed_id, cluster::varchar)) as sources, "
        "median(similarity) as median_similarity from rows group by all order by all",
    )


def fetches(work: WorkFolder) -> list[Row]:
    """How downloads ended."""
    return select(
        work.output(POOL, "fetches"),
        "select status, count(*) as rows, sum(num_bytes) as bytes, "
        "round(avg(attempts), 2) as attempts, round(median(seconds), 4) as median_seconds "
        "from rows group by status order by rows desc, status",
    )


def hosts(work: WorkFolder) -> list[Row]:
    """The hosts with most rows: how many URLs were listed, and how many images are in the set."""
    if work.manifest is None:
        return []
    with opened(work.output(POOL, "rows")) as tables:
        listed = host_counts(tables, _MOST_COMMON + 1) if tables else []
    with opened(work.manifest) as tables:
        counts = host_counts(tables, _ALL_HOSTS) if tables and listed else []
    kept = {row["value"]: row["rows"] for row in counts}
    return [
        {"host": row["value"], "rows": row["rows"], "kept": kept.get(row["value"], 0)}
        for row in [row for row in listed if row["value"]][:_MOST_COMMON]
    ]


def image_stats(work: WorkFolder) -> Row | None:
    """Formats and sizes of the pool's readable images."""
    with opened(work.output(POOL, "images")) as tables:
        if not tables:
            return None
        formats = "select format as value, count(*) as rows from rows group by 1 order by 2 desc, 1"
        sides = ("original_width", "original_height", "num_bytes")
        return {"formats": tables.rows(formats), "sides": number_stats(tables, sides)}
