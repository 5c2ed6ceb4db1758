"""The tables of the page: rows of texts, ready to show."""

from typing import Any

from pipelines.audit.dataset_stats import Stats
from pipelines.audit.funnel import FunnelRow, funnel, set_funnels
from pipelines.audit.work_folder import WorkFolder
from pipelines.web.report.units import count, percent, size

TableRows = list[tuple[Any, ...]]

_LARGEST = 12


def page_tables(work: WorkFolder, facts: Stats) -> dict[str, Any]:
    """Every table of the page, by name."""
    return {
        "funnel_rows": [_funnel_row(row) for row in funnel(work.record)],
        "set_rows": {
            name: [_set_row(row) for row in rows] for name, rows in set_funnels(work.record).items()
        },
        "reason_rows": _reasons(facts),
        "seed_rows": _seeds(facts),
        "duplicate_rows": _duplicates(facts),
        "format_rows": _formats(facts),
        "side_rows": _sides(facts),
        "host_rows": _hosts(facts),
        "fetch_rows": _fetches(facts),
        "language_rows": [
            (row["language"], count(row["rows_of_sample"]), percent(row["share"]))
            for row in facts["languages"]
        ],
        "search_rows": _searches(work),
        "failure_rows": [
            (f"{row['flow']}: {row['stage']}", row["shard"], row["cause"])
            for row in facts["failed_shards"]
        ],
    }


def _funnel_row(row: FunnelRow) -> tuple[Any, ...]:
    added = f"+{row.added:,}" if row.added else ""
    dropped = count(sum(row.dropped.values()))
    return (row.stage, count(row.rows_in), added, dropped, count(row.rows_out), _listed(row))


def _set_row(row: FunnelRow) -> tuple[Any, ...]:
    dropped = count(sum(row.dropped.values()))
    return (row.stage, count(row.rows_in), dropped, count(row.rows_out), _listed(row))


def _listed(row: FunnelRow) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in row.dropped.items())


def _reasons(facts: Stats) -> TableRows:
    return [
        (row["flow"], row["stage"], row["reason"], count(row["rows"]), percent(row["share"]))
        for row in facts["reasons"]
    ]


def _seeds(facts: Stats) -> TableRows:
    return [
        (
            row["seed_set"],
            row["rule"],
            count(row["hits"]),
            count(row["images"]),
            f"{row['median_similarity'] or 0:.3f}",
        )
        for row in facts["seed_sets"]
    ]


def _duplicates(facts: Stats) -> TableRows:
    rows = [
        (count(row["component_size"]), count(row["components"]), count(row["rows"]))
        for row in facts["duplicates"]
    ]
    if len(rows) <= _LARGEST:
        return rows
    return [*rows[: _LARGEST // 2], ("…", "", ""), *rows[-_LARGEST // 2 :]]


def _formats(facts: Stats) -> TableRows:
    images = facts["images"] or {"formats": []}
    return [(row["value"] or "unknown", count(row["rows"])) for row in images["formats"]]


def _sides(facts: Stats) -> TableRows:
    images = facts["images"] or {"sides": []}
    names = {"original_width": "width, px", "original_height": "height, px", "num_bytes": "file"}
    made = []
    for row in images["sides"]:
        quantiles = row["quantiles"] or {}
        shown = size if row["column"] == "num_bytes" else count
        values = [quantiles.get("0.05"), quantiles.get("0.5"), quantiles.get("0.95"), row["max"]]
        made.append((names[row["column"]], *(shown(value) for value in values)))
    return made


def _hosts(facts: Stats) -> TableRows:
    return [
        (row["host"], count(row["rows"]), count(row["kept"]), percent(row["kept"] / row["rows"]))
        for row in facts["hosts"]
    ]


def _searches(work: WorkFolder) -> TableRows:
    """How completely each search for neighbours was done, as it was measured."""
    rows = []
    for stage in work.all_stages():
        figures = stage.entry.record.figures
        if "measured_recall" in figures:
            recall, missed = figures["measured_recall"], figures.get("estimated_missed_pairs")
            rows.append(
                (
                    f"{stage.flow}: {stage.name}",
                    figures.get("compared", ""),
                    "–" if recall is None else _recall(recall, figures.get("asked_recall", 0)),
                    "–" if missed is None else count(missed),
                )
            )
    return rows


def _recall(measured: float, asked: float) -> str:
    return f"{measured:.4f}" + (f" of {asked:.4g} asked" if measured < asked else "")


def _fetches(facts: Stats) -> TableRows:
    return [
        (
            row["status"] or "not fetched",
            count(row["rows"]),
            size(row["bytes"]),
            "–" if row["attempts"] is None else f"{row['attempts']:.2f}",
            "–" if row["median_seconds"] is None else f"{row['median_seconds']:.3f}",
        )
        for row in facts["fetches"]
    ]
