"""What the routes answer from: the run, where there is one, its catalog, and the templates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

from fastapi import Depends, HTTPException, Request

from pipelines.audit.tables import Row
from pipelines.audit.work_folder import WorkFolder
from pipelines.run.run_record import POOL
from pipelines.web.galleries import Group, Shown, pair_of, rank_of, rounded, veil_together
from pipelines.web.pictures import Key, Picture
from pipelines.web.rendering import environment
from pipelines.web.serving.catalog import Catalog
from pipelines.web.serving.catalog_file import KEPT

_FACTS = ("stage", "reason", "seed_set", "alt", "component_size", "twin")


class Album:
    """Pictures of rows by key, as the templates ask for them."""

    def __init__(self, catalog: Catalog, has_pictures: bool) -> None:
        self._catalog = catalog
        self._has_pictures = has_pictures
        self._held: dict[Key, Picture] = {}

    def get(self, key: Key) -> Picture:
        """A picture that was put in."""
        return self._held.get(key) or Picture(*key)

    def show(self, row: Row, role: str | None = None, **facts: float | None) -> Shown:
        """Put a row in; give it as an image of a group. role: what became of it by default."""
        flow, row_id = key = (row["flow"], row["id"])
        held = Picture(flow, row_id, row["source"] or "", row["width"] or 0, row["height"] or 0)
        held.veiled, held.hidden = bool(row["veiled"]), bool(row["hidden"])
        if self._has_pictures and row["width"] and not held.hidden:
            held.data = f"/pictures/{flow}/{row_id}"
            held.full, held.page = f"{held.data}?size=full&reveal=true", f"/images/{flow}/{row_id}"
        self._held[key] = held
        known = {name: row.get(name) for name in _FACTS}
        if role is None:
            role = "kept" if row["stage"] == KEPT else "dropped"
        return Shown(key, role, rounded({**known, **facts, **row["scores"]}))

    def find(self, flow: str, row_id: str, role: str = "", **facts: float | None) -> Shown:
        """Put a row in by its id: of that flow, or of a set that joined the pool."""
        row = self._catalog.find(flow, row_id) or self._catalog.find(None, row_id)
        return self.show(row, role, **facts) if row else Shown((flow, row_id), role, dict(facts))

    def seed_group(self, seed: Row, hits: Sequence[Row]) -> Group:
        """A seed, or none for a cluster, and what it fetched."""
        name = seed["seed_set"]
        items = [self.find(name, seed["seed_id"], "seed")] if seed["seed_id"] else []
        for hit in hits:
            shown = self.find(POOL, hit["id"], rank_of(hit), similarity=hit["similarity"])
            items.append(shown)
        what = "one seed" if seed["seed_id"] else f"cluster {seed['cluster']}"
        return Group(items, f"{name}: {seed['rows']:,} images of {what}", seed["rule"], "seed")

    def leak(self, row: Row) -> Group:
        """A leaked image beside the benchmark's."""
        items, flow = [self.show(row, "dropped")], row["twin_set"] or row["flow"]
        if row["twin"]:
            items.append(self.find(flow, row["twin"], f"in {flow}"))
        group = pair_of(items, row["scores"].get(f"{row['stage']}.similarity"))
        veil_together([group], self)
        return group


class Site:
    """A run, or a data set without one, that is served."""

    def __init__(self, path: str, file: str) -> None:
        self.catalog = Catalog(file)
        self.work = WorkFolder(path) if WorkFolder.is_one(path) else None
        self._title = self.work.record.recipe if self.work else Path(path).name

    def album(self) -> Album:
        """An empty album for one page."""
        return Album(self.catalog, self.work is not None)

    def render(self, name: str, **values: object) -> str:
        """A page by the name of its template."""
        shared = {"title": self._title, "is_run": self.work is not None}
        template = environment().get_template(f"{name}.html.j2")
        return template.render(with_changes=with_changes, **shared, **values)

    def row(self, flow: str, row_id: str) -> Row:
        """A row of the catalog.

        Raises:
            HTTPException: there is none.
        """
        row = self.catalog.find(flow, row_id)
        if row is None:
            raise HTTPException(404, f"'{flow}' has no image {row_id}")
        return row

    def run(self) -> WorkFolder:
        """The run.

        Raises:
            HTTPException: a plain data set is served.
        """
        if self.work is None:
            raise HTTPException(404, "this is a data set without a run: there are only its rows")
        return self.work

    def seed(self, number: int) -> Row:
        """One of the seeds.

        Raises:
            HTTPException: there is none of that number.
        """
        seed = self.catalog.seed(number)
        if seed is None:
            raise HTTPException(404, f"there is no seed {number}")
        return seed


def site_of(request: Request) -> Site:
    """What the server of a request serves."""
    site: Site = request.app.state.site
    return site


Served = Annotated[Site, Depends(site_of)]


def with_changes(query: Row, **changes: str | float | None) -> str:
    """The query string of a page with some parameters changed; None takes one away."""
    return urlencode({k: v for k, v in (query | changes).items() if v not in (None, "")})
