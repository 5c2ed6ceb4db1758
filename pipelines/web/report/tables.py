"""The tables of the page that are more than rows of the statistics."""

from pipelines.audit.dataset_stats import Stats
from pipelines.audit.tables import Row
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.web.rendering import size

_LARGEST = 12
_SIDES = {"original_width": "width, px", "original_height": "height, px", "num_bytes": "file"}


def page_tables(work: WorkFolder, stats: Stats) -> dict[str, list[Row]]:
    """Rows of each table, by names that the page's template knows."""
    images = stats["images"] or {"formats": [], "sides": []}
    groups = [{**row, "size": f"{row['component_size']:,}"} for row in stats["duplicates"]]
    if len(groups) > _LARGEST:
        half, gap = _LARGEST // 2, {"size": "…", "components": "", "rows": ""}
        groups = [*groups[:half], gap, *groups[-half:]]
    return {
        "duplicates": groups,
        "formats": [{**row, "value": row["value"] or "unknown"} for row in images["formats"]],
        "sides": [_side(row) for row in images["sides"]],
        "hosts": [{**row, "share": row["kept"] / row["rows"]} for row in stats["hosts"]],
        "fetches": [{**row, "status": row["status"] or "not fetched"} for row in stats["fetches"]],
        "searches": [
            _search(stage)
            for stage in work.all_stages()
            if "measured_recall" in stage.entry.record.figures
        ],
        "failures": [
            {**row, "where": f"{row['flow']}: {row['stage']}"} for row in stats["failed_shards"]
        ],
    }


def _side(row: Row) -> Row:
    values = {**(row["quantiles"] or dict.fromkeys(("0.05", "0.5", "0.95"))), "max": row["max"]}
    if row["column"] == "num_bytes":
        values = {name: size(value) for name, value in values.items()}
    return {"measure": _SIDES[row["column"]], **values}


def _search(stage: FinishedStage) -> Row:
    """How completely a search for neighbors was done, as it was measured."""
    figures = stage.entry.record.figures
    recall, asked = figures["measured_recall"], figures.get("asked_recall", 0)
    if recall is not None and recall < asked:
        recall = f"{recall:.4f} of {asked:.4g} asked"
    return {
        "where": f"{stage.flow}: {stage.name}",
        "compared": figures.get("compared", ""),
        "recall": recall,
        "by_partners": ", ".join(
            f"{partners}: {found['recall']:.4f}"
            for partners, found in figures.get("recall_by_partners", {}).items()
        ),
        "pair_recall": figures.get("pair_recall"),
        "missed": figures.get("estimated_missed_pairs"),
    }
