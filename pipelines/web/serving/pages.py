"""The pages of `curate serve`: they share templates, style and script with the report."""

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse

from pipelines.audit.funnel import funnel
from pipelines.web import charts
from pipelines.web.galleries import Group, veil_together
from pipelines.web.serving import api
from pipelines.web.serving.catalog import Filter
from pipelines.web.serving.site import Served

_CHOICES = ("flow", "stage", "reason", "source_set", "seed_set", "format")
"""Facets with few enough values to choose from."""
_MANY = 200
_MEMBERS, _HITS, _ALL_HITS = 9, 8, 60

router = APIRouter(default_response_class=HTMLResponse)


@router.get("/")
def overview(site: Served) -> str:
    """The funnel, the reasons and the scores."""
    catalog, record = site.catalog, site.work.record if site.work else None
    rows = funnel(record) if record else []
    manifest = site.work.manifest if site.work else None
    return site.render(
        "overview",
        funnels=charts.funnel_charts(rows, record.as_is) if record else [],
        rows=rows,
        total=catalog.size(),
        in_set=manifest.num_rows if manifest else None,
        digest=manifest.manifest.content_digest if manifest else None,
        facets={name: catalog.values(name, 20) for name in (*_CHOICES, "host")},
        histograms=[
            {"score": name, "chart": charts.histogram_chart(*bins, score.thresholds, name)}
            for name, score in catalog.scores.items()
            if (bins := catalog.histogram(name)) is not None
        ],
    )


@router.get("/images")
def images(site: Served, query: Annotated[api.ImagesPageQuery, Query()]) -> str:
    """Rows by stage, reason, host, set and score."""
    page = site.catalog.page(query.filter(), query.after, query.limit)
    album = site.album()
    items = [album.show(row, score=row["scores"].get(query.score)) for row in page.rows]
    return site.render(
        "images",
        page=page,
        query=query.model_dump(),
        items=list(zip(items, page.rows, strict=True)),
        album=album,
        choices={name: site.catalog.values(name, _MANY) for name in _CHOICES},
        hosts=site.catalog.values("host", _MANY),
        scores=list(site.catalog.scores),
    )


@router.get("/images/{flow}/{row_id}", responses=api.MISSING)
def life(site: Served, flow: api.FlowName, row_id: api.RowId) -> str:
    """One image's whole life."""
    row, album = site.row(flow, row_id), site.album()
    items = [album.show(row)]
    if row["twin"]:
        items.append(album.find(row["twin_set"] or row["flow"], row["twin"], "most similar"))
    group = Group(items, kind="pair")
    veil_together([group], album)
    told = api.life(site, flow, row_id)
    return site.render("life", life=told, row=row, group=group, album=album)


@router.get("/components")
def components(site: Served, query: api.Groups) -> str:
    """Groups of near-duplicates, the largest first."""
    page, album = site.catalog.components(query.after, query.limit), site.album()
    groups = []
    for one in page.rows:
        found = site.catalog.page(Filter({"component": one["component"]}), -1, _MEMBERS)
        items = [album.show(row) for row in found.rows]
        group = Group(items, f"{one['rows']:,} images", one["component"])
        groups.append((group, f"/images?component={one['component']}"))
    return site.render("components", page=page, groups=groups, album=album)


@router.get("/leaks")
def leaks(site: Served, query: Annotated[api.LeaksQuery, Query()]) -> str:
    """Images that a benchmark holds, too, beside its own."""
    names = [
        {"name": row["value"].removeprefix("leak:"), "rows": row["rows"]}
        for row in site.catalog.values("reason", 10_000)
        if row["value"].startswith("leak:")
    ]
    chosen = query.benchmark or (names[0]["name"] if names else "")
    page = site.catalog.page(Filter({"reason": f"leak:{chosen}"}), query.after, query.limit)
    album = site.album()
    values = {"chosen": chosen, "groups": [album.leak(row) for row in page.rows]}
    return site.render("leaks", page=page, names=names, album=album, **values)


@router.get("/retrieval")
def retrieval(site: Served, query: api.Seeds) -> str:
    """Seeds and what they fetched."""
    page, album = site.catalog.seeds(query.seed_set, query.after, query.limit), site.album()
    groups = []
    for seed in page.rows:
        hits = site.catalog.hits(seed, -1, _HITS)
        groups.append((album.seed_group(seed, hits.rows), f"/retrieval/{seed['rank']}"))
    values = {"sets": site.catalog.seed_sets(), "chosen": query.seed_set}
    return site.render("retrieval", page=page, groups=groups, album=album, **values)


@router.get("/retrieval/{number}", responses=api.MISSING)
def seed(site: Served, number: api.SeedNumber, query: api.Groups) -> str:
    """All that one seed fetched."""
    found, album = site.seed(number), site.album()
    hits = site.catalog.hits(found, query.after, _ALL_HITS)
    group = album.seed_group(found, hits.rows)
    return site.render("seed", page=hits, seed=found, group=group, album=album)
