"""The pages of `curate serve`, as text: they share templates, style and script with the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pipelines.audit.funnel import funnel
from pipelines.audit.tables import Row
from pipelines.audit.work_folder import WorkFolder
from pipelines.run.run_record import POOL
from pipelines.web.report import charts
from pipelines.web.report.galleries import Group, Shown, veil_together
from pipelines.web.report.page import environment
from pipelines.web.report.pictures import Picture
from pipelines.web.serving.catalog import Catalog, Filter, Page
from pipelines.web.serving.catalog_file import KEPT

TEMPLATES = Path(__file__).parent / "templates"
REPORT_TEMPLATES = Path(charts.__file__).parent / "templates"
_CHOICES = ("flow", "stage", "reason", "source_set", "seed_set", "format")
"""Facets with few enough values to choose from."""
_MANY = 200
_MEMBERS, _HITS, _LEAKS = 9, 8, 60
_FACTS = ("stage", "reason", "seed_set", "alt", "component_size", "twin")


class Album:
    """Pictures of rows by key, as the templates ask for them."""

    def __init__(self, catalog: Catalog, work: WorkFolder | None) -> None:
        self._catalog = catalog
        self._has_pictures = work is not None
        self._held: dict[tuple[str, str], Picture] = {}

    def get(self, key: tuple[str, str]) -> Picture:
        """A picture that was put in."""
        return self._held.get(key) or Picture(*key)

    def show(self, row: Row, role: str = "", **facts: Any) -> Shown:
        """Put a row in; give it as an image of a group."""
        key = (row["flow"], row["id"])
        self._held[key] = self._picture(row)
        known = {name: row[name] for name in _FACTS if row.get(name) is not None}
        shown = known | {k: v for k, v in facts.items() if v is not None} | row["scores"]
        return Shown(key, role, {k: _rounded(v) for k, v in shown.items()})

    def find(self, flow: str, row_id: str, role: str = "", **facts: Any) -> Shown:
        """Put a row in by its id: of that flow, or of a set that joined the pool."""
        row = self._catalog.find(flow, row_id) or self._catalog.find_anywhere(row_id)
        return self.show(row, role, **facts) if row else Shown((flow, row_id), role, facts)

    def _picture(self, row: Row) -> Picture:
        flow, row_id = row["flow"], row["id"]
        address = f"/pictures/{flow}/{row_id}"
        held = Picture(flow, row_id, row["source"] or "", row["width"] or 0, row["height"] or 0)
        held.veiled, held.hidden = bool(row["veiled"]), bool(row["hidden"])
        if self._has_pictures and row["width"] and not held.hidden:
            held.data, held.full = address, f"{address}?size=full&reveal=true"
            held.page = f"/images/{flow}/{row_id}"
        return held


class Pages:
    """Every page, from the catalog and the records of the run."""

    def __init__(self, catalog: Catalog, work: WorkFolder | None, path: str) -> None:
        self._catalog = catalog
        self._work = work
        self._title = work.record.recipe if work else Path(path).name
        self._environment = environment(TEMPLATES)
        self._environment.globals |= {"with_changes": with_changes}

    def overview(self) -> str:
        """The funnel, the reasons and the scores."""
        record = self._work.record if self._work else None
        rows = funnel(record) if record else []
        joining = ", ".join(record.as_is) if record else ""
        manifest = self._work.manifest if self._work else None
        return self.render(
            "overview",
            funnels=[
                ("wide", charts.funnel_chart(rows, 1040, joining)),
                ("narrow", charts.funnel_chart(rows, 340, joining)),
            ]
            if rows
            else [],
            rows=rows,
            total=self._catalog.count(),
            in_set=manifest.num_rows if manifest else None,
            digest=manifest.manifest.content_digest if manifest else None,
            facets={name: self._catalog.values(name, 20) for name in (*_CHOICES, "host")},
            histograms=self._histograms(),
        )

    def images(self, page: Page, query: Row) -> str:
        """A page of rows, and the form that asks for others."""
        album = self.album()
        items = [
            album.show(row, _role(row), score=_score(row, query["score"])) for row in page.rows
        ]
        return self.render(
            "images",
            page=page,
            query=query,
            items=list(zip(items, page.rows, strict=True)),
            album=album,
            choices={name: self._catalog.values(name, _MANY) for name in _CHOICES},
            hosts=self._catalog.values("host", _MANY),
            scores=list(self._catalog.scores),
        )

    def life(self, row: Row, life: Row) -> str:
        """One image's whole life."""
        album = self.album()
        items = [album.show(row, _role(row))]
        if row["twin"]:
            items.append(album.find(row["twin_set"] or row["flow"], row["twin"], "its likest"))
        group = Group(items, kind="pair")
        veil_together([group], album)
        return self.render("life", life=life, row=row, group=group, album=album)

    def components(self, page: Page) -> str:
        """Groups of near-duplicates."""
        album = self.album()
        groups = []
        for one in page.rows:
            found = self._catalog.page(Filter({"component": one["component"]}), -1, _MEMBERS)
            items = [album.show(row, _role(row)) for row in found.rows]
            group = Group(items, f"{one['rows']:,} images", one["component"])
            groups.append((group, f"/images?component={one['component']}"))
        return self.render("components", page=page, groups=groups, album=album)

    def leaks(self, benchmark: str | None, after: int, limit: int) -> str:
        """Leaked images beside those of the benchmark."""
        reasons = self._catalog.values("reason", 10_000)
        found = [row for row in reasons if row["value"].startswith("leak:")]
        names = [{"name": r["value"].removeprefix("leak:"), "rows": r["rows"]} for r in found]
        chosen = benchmark or (names[0]["name"] if names else "")
        page = self._catalog.page(Filter({"reason": f"leak:{chosen}"}), after, limit)
        album = self.album()
        groups = [self._pair(album, row) for row in page.rows]
        return self.render(
            "leaks", page=page, names=names, chosen=chosen, groups=groups, album=album
        )

    def retrieval(self, page: Page, seed_set: str | None) -> str:
        """Seeds and the first images that each fetched."""
        album = self.album()
        groups = []
        for seed in page.rows:
            hits = self._catalog.hits(seed, -1, _HITS)
            groups.append((self._seed_group(album, seed, hits.rows), f"/retrieval/{seed['rank']}"))
        sets = self._catalog.seed_sets()
        return self.render(
            "retrieval", page=page, sets=sets, chosen=seed_set, groups=groups, album=album
        )

    def seed(self, seed: Row, after: int) -> str:
        """All images that one seed fetched."""
        album = self.album()
        hits = self._catalog.hits(seed, after, _LEAKS)
        group = self._seed_group(album, seed, hits.rows)
        return self.render("seed", page=hits, seed=seed, group=group, album=album)

    def problem(self, status: int, detail: str) -> str:
        """What was wrong with a request."""
        return self.render("problem", status=status, detail=detail)

    def _pair(self, album: Album, row: Row) -> Group:
        items = [album.show(row, "dropped")]
        if row["twin"]:
            flow = row["twin_set"] or row["flow"]
            items.append(album.find(flow, row["twin"], f"in {flow}"))
        score = _score(row, f"{row['stage']}.similarity")
        group = Group(items, note="" if score is None else f"similarity {score:.4f}", kind="pair")
        veil_together([group], album)
        return group

    def _seed_group(self, album: Album, seed: Row, hits: Sequence[Row]) -> Group:
        name = seed["seed_set"]
        items = [album.find(name, seed["seed_id"], "seed")] if seed["seed_id"] else []
        for hit in hits:
            role = f"#{hit['rank']}" if hit["rank"] is not None else ""
            items.append(album.find(POOL, hit["id"], role, similarity=hit["similarity"]))
        what = "one seed" if seed["seed_id"] else f"cluster {seed['cluster']}"
        return Group(items, f"{name}: {seed['rows']:,} images of {what}", seed["rule"], "seed")

    def _histograms(self) -> list[Row]:
        made = []
        for name, score in self._catalog.scores.items():
            found = self._catalog.histogram(name)
            if found is not None:
                low, high, kept, dropped = found
                limits = list(score.thresholds)
                chart = charts.histogram_chart(low, high, kept, dropped, limits, name)
                made.append({"score": name, "chart": chart})
        return made

    def album(self) -> Album:
        """An empty album for one page."""
        return Album(self._catalog, self._work)

    def render(self, name: str, **values: Any) -> str:
        """A page by the name of its template."""
        template = self._environment.get_template(f"{name}.html.j2")
        text: str = template.render(title=self._title, is_run=self._work is not None, **values)
        return text


def with_changes(query: Row, **changes: Any) -> str:
    """The query string of a page with some parameters changed; None takes one away."""
    return urlencode({k: v for k, v in (query | changes).items() if v not in (None, "")})


def _role(row: Row) -> str:
    return "kept" if row["stage"] == KEPT else "dropped"


def _score(row: Row, name: str | None) -> float | None:
    value = row["scores"].get(name)
    return None if value is None else float(value)


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
