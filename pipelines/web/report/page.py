"""The report of a run: one self-contained HTML page, without network and below 15 MB."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup

from curation import storage
from curation.errors import StorageError
from pipelines.audit.dataset_stats import Stats, balance
from pipelines.audit.funnel import funnel, set_funnels
from pipelines.audit.run_stats import run_stats, score_columns, thresholds
from pipelines.audit.tables import Row, Tables, named
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.operate.planner import PLAN_FILE
from pipelines.run.run_record import POOL
from pipelines.web.report import charts
from pipelines.web.report.embedding_map import EmbeddingMap, embedding_map
from pipelines.web.report.galleries import Gallery, GalleryMaker, veil_together
from pipelines.web.report.page_tables import page_tables
from pipelines.web.report.pictures import Pictures
from pipelines.web.report.units import count, percent, short, size

_TEMPLATES = Path(__file__).parent / "templates"
_BINS = 40
_WIDE, _NARROW = 1040, 340
"""Widths of the funnel on a desk and on a phone, in pixels."""
_LINES = {
    "loss": "total",
    "dino_global_crops_loss": "DINO, global",
    "dino_local_crops_loss": "DINO, local",
    "ibot_loss": "iBOT",
    "koleo_loss": "KoLeo",
}
_MAX_POINTS = 400
"""Points of a loss curve; more steps are averaged into so many."""


@dataclass
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
    facts = run_stats(work)
    parts = facts["parts"]
    template = environment().get_template("page.html.j2")
    page: str = template.render(
        stats=facts,
        tables=page_tables(work, facts),
        parts=parts,
        kept_share=_kept_share(work),
        balance=balance([part["n"] for part in parts]),
        record=work.record,
        sections=sections,
        pictures=pictures,
        map=points.chart(pictures) if points else None,
        spread=_spread(points),
        planned=planned_seconds(work),
        funnels=_funnels(work),
        set_funnels=set_funnels(work.record),
        histograms=histograms(work),
        timing=_slowest(facts),
        configuration=_configuration(work),
        marks=_marks(work),
        loss=loss_curve(work),
        evaluation=_evaluation(work),
        style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup((_TEMPLATES / "page.js").read_text(encoding="utf-8")),
    )
    return page


def gallery_sections(work: WorkFolder, pictures: Pictures) -> list[Section]:
    """All galleries, in the order of the page."""
    maker = GalleryMaker(work, pictures)
    sections = [
        Section(
            "copies", "Duplicates", "Copies of images that are in the set already.", maker.copies()
        ),
        Section(
            "leaks",
            "Benchmark leaks",
            "Images that a benchmark holds, too, and so must not be trained on.",
            maker.leaks(),
        ),
        Section(
            "retrieval",
            "Retrieval",
            "What curated seed images fetched from the pool.",
            maker.retrieval(),
        ),
        Section(
            "filtered",
            "Filtered images",
            "A sample of what was dropped, by reason.",
            [*maker.filtered(), *maker.faces()],
        ),
        Section("final", "The finished set", "A sample of what is in the set.", maker.final()),
    ]
    return [section for section in sections if section.galleries]


def histograms(work: WorkFolder) -> list[Row]:
    """A chart of every score of the pool's stages."""
    made = []
    for stage in work.stages(POOL):
        with Tables() as tables:
            if tables.add("verdicts", stage.decisions):
                for score in score_columns(stage):
                    made += _histogram(stage, score, tables)
    return made


def _histogram(stage: FinishedStage, score: str, tables: Tables) -> list[Row]:
    column = named(score)
    ends = tables.first(
        f"select min({column}) as low, max({column}) as high, count({column}) as n from verdicts"
    )
    if not ends["n"] or ends["low"] == ends["high"]:
        return []
    limits = thresholds(stage, score)
    low, high = float(min([ends["low"], *limits])), float(max([ends["high"], *limits]))
    counted = tables.rows(
        f"select least(floor(({column} - ?) / ? * {_BINS}), {_BINS - 1})::int as bin, keep, "
        f"count(*) as n from verdicts where {column} is not null group by all",
        [low, high - low],
    )
    counts = {True: [0] * _BINS, False: [0] * _BINS}
    for row in counted:
        counts[row["keep"]][row["bin"]] = row["n"]
    chart = charts.histogram_chart(low, high, counts[True], counts[False], limits, score)
    return [{"stage": stage.name, "score": score, "chart": chart, "limits": limits}]


def loss_curve(work: WorkFolder) -> Markup | None:
    """The losses of pretraining, where it ran."""
    lines = _read_lines(storage.join(work.path, "pretrain", "log.jsonl"))
    series = []
    for name, shown in _LINES.items():
        points = [(float(one["step"]), float(one[name])) for one in lines if name in one]
        if len(points) > 1:
            series.append(charts.Series(shown, _thin(points)))
    return charts.line_chart(series, "step", "loss") if series else None


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbours so that few enough points are left."""
    if len(points) <= _MAX_POINTS:
        return points
    cuts = [round(i * len(points) / _MAX_POINTS) for i in range(_MAX_POINTS + 1)]
    runs = [points[a:b] for a, b in pairwise(cuts)]
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def _read_lines(path: str) -> list[Row]:
    """JSON lines; a half-written last one is left out.

    Raises:
        StorageError: they are damaged.
    """
    if not storage.exists(path):
        return []
    lines = storage.read_bytes(path).split(b"\n")[:-1]
    try:
        rows: list[Row] = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{path}: is damaged: a line is no JSON; `curate verify` says more"
        ) from error
    return rows


def _funnels(work: WorkFolder) -> list[tuple[str, Markup]]:
    """The funnel for wide and for narrow windows; the style sheet shows the one that fits."""
    rows = funnel(work.record)
    joining = ", ".join(work.record.as_is)
    return [
        ("wide", charts.funnel_chart(rows, _WIDE, joining)),
        ("narrow", charts.funnel_chart(rows, _NARROW, joining)),
    ]


def _kept_share(work: WorkFolder) -> float:
    """Share of the pool's rows that are in the set, without what joined later."""
    rows = funnel(work.record)
    kept = rows[-1].rows_out - sum(row.added for row in rows)
    return max(kept, 0) / max(rows[0].rows_in, 1)


def _spread(points: EmbeddingMap | None) -> Row | None:
    """How evenly groups of like images are filled, in the pool and in the set."""
    groups = points.clusters if points else None
    if groups is None:
        return None
    return {
        "before": balance(groups.before),
        "after": balance(groups.after),
        "chart": charts.paired_bars(groups.before, groups.after),
    }


def planned_seconds(work: WorkFolder) -> dict[str, float]:
    """Seconds by stage of the pool that `curate plan --out WORK/plan.json` predicted."""
    path = storage.join(work.path, PLAN_FILE)
    if not storage.exists(path):
        return {}
    stages = storage.read_json(path)["stages"]
    wall = {one["stage"]: (one["wall_s"], one["rows"]) for one in stages}
    planned = {}
    for entry in work.record.pool:
        seconds, rows = wall.get(entry.stage, (0.0, 0.0))
        if rows:
            planned[entry.stage] = seconds * entry.record.rows_in / rows
    return planned


def _slowest(facts: Stats) -> list[Row]:
    """Wall time by stage, sets and pool together, the longest first."""
    total: dict[str, Row] = {}
    for row in facts["timing"]:
        mine = total.setdefault(row["stage"], {"stage": row["stage"], "seconds": 0.0})
        mine["seconds"] += row["seconds"]
    return sorted(total.values(), key=lambda row: -row["seconds"])


def _configuration(work: WorkFolder) -> list[Row]:
    """Settings, figures and digests of every stage of the pool."""
    return [
        {
            "stage": stage.name,
            "version": stage.entry.record.version,
            "key": stage.entry.record.key,
            "settings": _shown(stage.entry.record.settings),
            "figures": _shown(stage.entry.record.figures),
            "counters": _shown(stage.entry.record.counters),
            "outputs": stage.entry.record.outputs,
        }
        for stage in work.stages(POOL)
    ]


def _shown(values: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value, default=str) for name, value in values.items()}


def _marks(work: WorkFolder) -> dict[str, dict[str, Any]] | None:
    """How the demo's planted troubles fared, where there are any."""
    truth = Path(work.path) / "site" / "truth.parquet"
    if not truth.is_file():
        return None
    from pipelines.run.demo_marks import mark

    return mark(work.record, work.path, truth)


def _evaluation(work: WorkFolder) -> Row | None:
    path = storage.join(work.path, "evaluate", "_step.json")
    if not storage.exists(path):
        return None
    result: Row = storage.read_json(path).get("result") or {}
    return result


def environment(*folders: Path) -> Any:
    """Where templates come from; all that they show is escaped. folders: before our own."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, _TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "percent": percent, "size": size, "short": short}
    return environment
