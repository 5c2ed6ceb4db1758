"""JSON under /api, and single pictures.

Every parameter is declared, and so checked before a query sees it.
"""

from typing import Annotated, Literal

from fastapi import APIRouter, HTTPException, Query, Response
from fastapi import Path as PathParameter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipelines.audit.explain import explain_row
from pipelines.audit.tables import Row, plain
from pipelines.web import pictures
from pipelines.web.serving.catalog import FACETS, Filter, Order, Page
from pipelines.web.serving.site import Served

_MAX_NUMBER = 2**53


_EmptyIsNone = BeforeValidator(lambda value: None if value == "" else value)
Text = Annotated[Annotated[str, Field(max_length=1000)] | None, _EmptyIsNone]
Number = Annotated[float | None, _EmptyIsNone]
After = Annotated[int, Field(ge=-1, le=_MAX_NUMBER, description="As the page before gave it.")]


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ImagesQuery(_Parameters):
    """Which rows, in what order, from where on."""

    flow: Text = Field(None, description="The pool, or the name of a set.")
    stage: Text = Field(None, description="The stage that dropped them; `kept`: none did.")
    reason: Text = Field(None, description="Why they were dropped.")
    host: Text = Field(None, description="Host of their address.")
    source_set: Text = Field(None, description="The list or set that they come from.")
    seed_set: Text = Field(None, description="The seed set that fetched them.")
    format: Text = Field(None, description="Format of the file.")
    component: Text = Field(None, description="Their group of near-duplicates.")
    score: Text = Field(None, description="A score, `stage.name`, to filter or sort by.")
    low: Number = Field(None, description="Least score.")
    high: Number = Field(None, description="Greatest score.")
    order: Order = "stored"
    after: After = -1
    limit: int = Field(48, ge=1, le=200)

    def filter(self) -> Filter:
        """The same for the catalog."""
        texts = {name: value for name in FACETS if (value := getattr(self, name))}
        return Filter(texts, self.score, self.low, self.high, self.order)


class ImagesPageQuery(ImagesQuery):
    """The same, and how to show them."""

    view: Literal["grid", "table"] = "grid"


class GroupsQuery(_Parameters):
    """Where a list goes on."""

    after: After = -1
    limit: int = Field(12, ge=1, le=100)


class SeedsQuery(GroupsQuery):
    """Seeds of one set, or of all."""

    seed_set: Text = Field(None, description="Name of the seed set.")


class LeaksQuery(GroupsQuery):
    """Leaks of one benchmark."""

    benchmark: Text = Field(None, description="Name of the benchmark; the first if it is left out.")


class PictureQuery(_Parameters):
    """How a picture is wanted."""

    size: pictures.Size = "small"
    reveal: bool = False
    """Also where the NSFW filter dropped it."""


class Image(BaseModel):
    """A row as the catalog holds it."""

    flow: str
    id: str
    source: str | None
    host: str | None
    alt: str | None
    stage: str
    reason: str | None
    source_set: str | None
    seed_set: str | None
    format: str | None
    width: int | None
    height: int | None
    component: str | None
    component_size: int | None
    twin: str | None
    twin_set: str | None
    scores: dict[str, float]


class Images(BaseModel):
    """A page of rows."""

    rows: list[Image]
    total: int | None
    """None where counting would take a scan."""
    after: int | None
    """Give it to have the next page; None at the end."""


class Rows(BaseModel):
    """A page of other things."""

    rows: list[Row]
    total: int | None
    after: int | None


class Problem(BaseModel):
    """What was wrong with a request."""

    detail: str


FlowName = Annotated[str, PathParameter(pattern=r"^[A-Za-z0-9_.\-]{1,100}$")]
RowId = Annotated[str, PathParameter(pattern="^[0-9a-f]{32}$")]
SeedNumber = Annotated[int, PathParameter(ge=0, le=_MAX_NUMBER)]
Groups = Annotated[GroupsQuery, Query()]
Seeds = Annotated[SeedsQuery, Query()]
Responses = dict[int | str, Row]
MISSING: Responses = {404: {"model": Problem}}
_JPEG: Responses = {200: {"content": {"image/jpeg": {}}}}

router = APIRouter()


@router.get("/api/images")
def images(site: Served, query: Annotated[ImagesQuery, Query()]) -> Images:
    """Rows by stage, reason, host, set and score."""
    page = site.catalog.page(query.filter(), query.after, query.limit)
    return Images(**plain(vars(page)))


@router.get("/api/images/{flow}/{row_id}", responses=MISSING)
def life(site: Served, flow: FlowName, row_id: RowId) -> Row:
    """One image's whole life."""
    site.row(flow, row_id)
    found: Row = plain(explain_row(site.run(), flow, row_id))
    return found


@router.get("/api/components")
def components(site: Served, query: Groups) -> Rows:
    """Groups of near-duplicates, the largest first; /api/images gives their members."""
    return _rows(site.catalog.components(query.after, query.limit))


@router.get("/api/seeds")
def seeds(site: Served, query: Seeds) -> Rows:
    """Seeds and clusters, and how many images each fetched."""
    return _rows(site.catalog.seeds(query.seed_set, query.after, query.limit))


@router.get("/api/seeds/{number}", responses=MISSING)
def hits(site: Served, number: SeedNumber, query: Groups) -> Rows:
    """What one seed fetched, the nearest first."""
    return _rows(site.catalog.hits(site.seed(number), query.after, query.limit))


def _rows(page: Page) -> Rows:
    return Rows(**plain(vars(page)))


@router.get("/pictures/{flow}/{row_id}", responses=MISSING | _JPEG, response_class=Response)
def picture_of(
    site: Served, flow: FlowName, row_id: RowId, query: Annotated[PictureQuery, Query()]
) -> Response:
    """A picture, its faces blurred; a few blots where the NSFW filter dropped it."""
    row = site.row(flow, row_id)
    data = pictures.picture_of(site.run(), row, query.size, query.reveal)
    if data is None:
        raise HTTPException(404, "no picture of it is shown")
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private"})
