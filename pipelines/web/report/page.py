"""The report of a run: one self-contained HTML page, without network and below 15 MB."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markupsafe import Markup

from curation import storage
from curation.errors import StorageError
from pipelines.audit.dataset_stats import balance
from pipelines.audit.funnel import funnel, set_funnels
from pipelines.audit.run_stats import run_stats, score_columns, thresholds
from pipelines.audit.tables import Row, named, opened
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.operate.planner import PLAN_FILE
from pipelines.run.run_record import POOL, RunRecord
from pipelines.web import charts
from pipelines.web.galleries import veil_together
from pipelines.web.pictures import Pictures
from pipelines.web.rendering import TEMPLATES, environment
from pipelines.web.report.embedding_map import embedding_map
from pipelines.web.report.galleries import Gallery, GalleryMaker
from pipelines.web.report.tables import page_tables

_BINS = 40
_LINES = {
    "loss": "total",
    "dino_global_crops_loss": "DINO, global",
    "dino_local_crops_loss": "DINO, local",
    "ibot_loss": "iBOT",
    "koleo_loss": "KoLeo",
}
_MAX_POINTS = 400
"""Points of a loss curve; more steps are averaged into so many."""


@dataclass(frozen=True)
class Section:
    """A part of the page that holds galleries."""

    key: str
    title: str
    intro: str
    galleries: list[Gallery]


def write_page(work: str, out: str) -> str:
    """Write the report of a run to a file; give its path.

    Raises:
        DatasetError: no run has finished there.
    """
    folder = WorkFolder(work.rstrip("/"))
    storage.write_bytes(out, render(folder).encode())
    return out


def render(work: WorkFolder) -> str:
    """The whole page as text."""
    pictures = Pictures(work)
    sections = gallery_sections(work, pictures)
    points = embedding_map(work, pictures)
    pictures.load()
    for section in sections:
        for gallery in section.galleries:
            veil_together(gallery.groups, pictures)
    stats, rows = run_stats(work), funnel(work.record)
    added = sum(row.added for row in rows)
    seconds: Counter[str] = Counter()
    for row in stats["timing"]:
        seconds[row["stage"]] += row["seconds"]
    evaluation = storage.join(work.path, "evaluate", "_step.json")
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            stats=stats,
            tables=page_tables(work, stats),
            funnel=rows,
            funnels=charts.funnel_charts(rows, work.record.as_is),
            set_funnels=set_funnels(work.record),
            kept_share=max(rows[-1].rows_out - added, 0) / max(rows[0].rows_in, 1),
            balance=balance([part["n"] for part in stats["parts"]]),
            record=work.record,
            sections=sections,
            pictures=pictures,
            map=points.chart(pictures) if points else None,
            spread=points.spread() if points else None,
            planned=planned_seconds(work),
            histograms=histograms(work),
            timing=[{"stage": name, "seconds": took} for name, took in seconds.most_common()],
            marks=_marks(work.record, work.path),
            loss=loss_curve(work),
            evaluation=storage.exists(evaluation) and storage.read_json(evaluation).get("result"),
            style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
            script=Markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
        )
    )


def gallery_sections(work: WorkFolder, pictures: Pictures) -> list[Section]:
    """All galleries, in the order of the page."""
    maker = GalleryMaker(work, pictures)
    copies = "Copies of images that are in the set already."
    leaks = "Images that a benchmark holds, too, and so must not be trained on."
    retrieval = "What curated seed images fetched from the pool."
    filtered = "A sample of what was dropped, by reason."
    sections = [
        Section("copies", "Duplicates", copies, maker.copies()),
        Section("leaks", "Benchmark leaks", leaks, maker.leaks()),
        Section("retrieval", "Retrieval", retrieval, maker.retrieval()),
        Section("filtered", "Filtered images", filtered, [*maker.filtered(), *maker.faces()]),
        Section("final", "The finished set", "A sample of what is in the set.", maker.final()),
    ]
    return [section for section in sections if section.galleries]


def histograms(work: WorkFolder) -> list[Row]:
    """A chart of every score of the pool's stages."""
    return [
        {"stage": stage.name, "score": score, "chart": chart}
        for stage in work.stages(POOL)
        for score in score_columns(stage)
        if (chart := _histogram(stage, score)) is not None
    ]


def _histogram(stage: FinishedStage, score: str) -> Markup | None:
    column, limits = named(score), thresholds(stage, score)
    with opened(stage.decisions) as tables:
        assert tables is not None, "it has scores"
        ends = tables.first(f"select min({column}) as low, max({column}) as high from rows")
        if ends["low"] == ends["high"]:
            return None
        low, high = float(min([ends["low"], *limits])), float(max([ends["high"], *limits]))
        counted = tables.rows(
            f"select least(floor(({column} - ?) / ? * {_BINS}), {_BINS - 1})::int as bin, keep, "
            f"count(*) as n from rows where {column} is not null group by all",
            [low, high - low],
        )
    counts = {True: [0] * _BINS, False: [0] * _BINS}
    for row in counted:
        counts[row["keep"]][row["bin"]] = row["n"]
    return charts.histogram_chart(low, high, counts[True], counts[False], limits, score)


def loss_curve(work: WorkFolder) -> Markup | None:
    """The losses of pretraining, where it ran.

    Raises:
        StorageError: its log is damaged; only a half-written last line is left out.
    """
    path = storage.join(work.path, "pretrain", "log.jsonl")
    lines = storage.read_bytes(path).split(b"\n")[:-1] if storage.exists(path) else []
    try:
        steps: list[dict[str, float]] = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{path}: is damaged: a line is no JSON; `curate verify` says more"
        ) from error
    series = []
    for name, shown in _LINES.items():
        points = [(float(one["step"]), float(one[name])) for one in steps if name in one]
        if len(points) > 1:
            series.append(charts.Series(shown, _thin(points)))
    return charts.line_chart(series, "step", "loss") if series else None


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbors so that few enough points are left."""
    if len(points) <= _MAX_POINTS:
        return points
    cuts = [round(i * len(points) / _MAX_POINTS) for i in range(_MAX_POINTS + 1)]
    runs = [points[a:b] for a, b in pairwise(cuts)]
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def planned_seconds(work: WorkFolder) -> dict[str, float]:
    """Seconds by stage of the pool that `curate plan --out WORK/plan.json` predicted."""
    path = storage.join(work.path, PLAN_FILE)
    stages = storage.read_json(path)["stages"] if storage.exists(path) else []
    wall = {one["stage"]: one["wall_s"] / one["rows"] for one in stages if one["rows"]}
    return {
        entry.stage: wall[entry.stage] * entry.record.rows_in
        for entry in work.record.pool
        if entry.stage in wall
    }


def _marks(record: RunRecord, work: str) -> dict[str, Row] | None:
    """How the demo's planted troubles fared, where there are any."""
    truth = Path(work) / "site" / "truth.parquet"
    if not truth.is_file():
        return None
    from pipelines.run.demo_marks import mark

    return mark(record, work, truth)
