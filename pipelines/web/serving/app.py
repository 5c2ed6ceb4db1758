"""The server: JSON under /api, pages for people beside it, nothing that changes anything.

Every parameter is declared, and so checked before a query sees it; texts reach DuckDB only as
parameters. `openapi.json` describes it all.
"""

import contextlib
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from curation.errors import ConfigError, CurateError
from pipelines.audit.explain import explain_row
from pipelines.audit.tables import plain
from pipelines.audit.work_folder import WorkFolder
from pipelines.web.serving import pages
from pipelines.web.serving.catalog import Catalog, Filter, Order
from pipelines.web.serving.catalog_file import FACETS
from pipelines.web.serving.photos import Size, picture

_STATIC = {
    "style.css": ("text/css", pages.REPORT_TEMPLATES),
    "page.js": ("text/javascript", pages.REPORT_TEMPLATES),
    "serve.css": ("text/css", pages.TEMPLATES),
    "calibrate.js": ("text/javascript", pages.TEMPLATES),
    "icon.svg": ("image/svg+xml", pages.TEMPLATES),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
_MAX_NUMBER = 2**53


def _empty_is_none(value: Any) -> Any:
    """An empty field of a form asks for nothing."""
    return None if value == "" else value


def _text(description: str) -> Any:
    return Field(None, max_length=1000, description=description)


Text = Annotated[str | None, BeforeValidator(_empty_is_none)]
Number = Annotated[float | None, BeforeValidator(_empty_is_none)]
After = Annotated[int, Field(ge=-1, le=_MAX_NUMBER, description="As the page before gave it.")]


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ImagesQuery(_Parameters):
    """Which rows, in what order, from where on."""

    flow: Text = _text("The pool, or the name of a set.")
    stage: Text = _text("The stage that dropped them; `kept`: none did.")
    reason: Text = _text("Why they were dropped.")
    host: Text = _text("Host of their address.")
    source_set: Text = _text("The list or set that they come from.")
    seed_set: Text = _text("The seed set that fetched them.")
    format: Text = _text("Format of the file.")
    component: Text = _text("Their group of near-duplicates.")
    score: Text = _text("A score, `stage.name`, to filter or sort by.")
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

    seed_set: Text = _text("Name of the seed set.")


class LeaksQuery(GroupsQuery):
    """Leaks of one benchmark."""

    benchmark: Text = _text("Name of the benchmark; the first if it is left out.")


class PictureQuery(_Parameters):
    """How a picture is wanted."""

    size: Size = "small"
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

    rows: list[dict[str, Any]]
    total: int | None
    after: int | None


class Problem(BaseModel):
    """What was wrong with a request."""

    detail: str


StaticFile = Literal["style.css", "page.js", "serve.css", "calibrate.js", "icon.svg"]
FlowName = Annotated[str, PathParameter(pattern=r"^[A-Za-z0-9_.\-]{1,100}$")]
RowId = Annotated[str, PathParameter(pattern="^[0-9a-f]{32}$")]
SeedNumber = Annotated[int, PathParameter(ge=0, le=_MAX_NUMBER)]
_MISSING: dict[int | str, dict[str, Any]] = {404: {"model": Problem}}


class Audit:
    """What the routes answer from: the run, where it is one, and its catalog."""

    def __init__(self, path: str, file: str) -> None:
        self.path = path
        self.catalog = Catalog(file)
        self.work = WorkFolder(path) if WorkFolder.is_one(path) else None
        self.pages = pages.Pages(self.catalog, self.work, path)

    def row(self, flow: str, row_id: str) -> dict[str, Any]:
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

    def life(self, flow: str, row_id: str) -> dict[str, Any]:
        """Everything known of a row."""
        self.row(flow, row_id)
        found: dict[str, Any] = plain(explain_row(self.run(), flow, row_id))
        return found


def make_app(path: str, file: str, hosts: tuple[str, ...] = ("127.0.0.1", "localhost")) -> FastAPI:
    """The server of one run or data set.

    file: its catalog. hosts: names under which browsers may reach it; others are refused, so that
    a foreign page cannot read it by pointing its own name here.
    """
    audit = Audit(path, file)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        audit.catalog.close()

    app = FastAPI(
        title="curate serve",
        version="1",
        description=__doc__ or "",
        docs_url=None,
        redoc_url=None,
        responses={code: {"model": Problem} for code in (422, 503)},
        lifespan=lifespan,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.state.audit = audit
    _add_answers_to_errors(app, audit)
    _add_api(app, audit)
    _add_pages(app, audit)
    _add_files(app, audit)
    return app


def _add_answers_to_errors(app: FastAPI, audit: Audit) -> None:
    @app.middleware("http")
    async def headers(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    def answer(request: Request, status: int, detail: str) -> Response:
        if request.url.path.startswith(("/api/", "/pictures/", "/static/")):
            return JSONResponse({"detail": detail}, status)
        return HTMLResponse(audit.pages.problem(status, detail), status)

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        answered = answer(request, error.status_code, str(error.detail))
        answered.headers.update(error.headers or {})
        return answered

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return answer(request, 422, f"{place}: {first['msg']}")

    @app.exception_handler(ConfigError)
    async def unknown(request: Request, error: ConfigError) -> Response:
        return answer(request, 422, str(error))

    @app.exception_handler(TimeoutError)
    async def late(request: Request, error: TimeoutError) -> Response:
        return answer(request, 503, str(error))

    @app.exception_handler(CurateError)
    async def damaged(request: Request, error: CurateError) -> Response:
        return answer(request, 503, str(error))


def _add_api(app: FastAPI, audit: Audit) -> None:
    @app.get("/api/images")
    def images(query: Annotated[ImagesQuery, Query()]) -> Images:
        """Rows by stage, reason, host, set and score."""
        page = audit.catalog.page(query.filter(), query.after, query.limit)
        return Images(**plain(vars(page)))

    @app.get("/api/images/{flow}/{row_id}", responses=_MISSING)
    def life(flow: FlowName, row_id: RowId) -> dict[str, Any]:
        """One image's whole life."""
        return audit.life(flow, row_id)

    @app.get("/api/components")
    def components(query: Annotated[GroupsQuery, Query()]) -> Rows:
        """Groups of near-duplicates, the largest first; /api/images gives their members."""
        return Rows(**plain(vars(audit.catalog.components(query.after, query.limit))))

    @app.get("/api/seeds")
    def seeds(query: Annotated[SeedsQuery, Query()]) -> Rows:
        """Seeds and clusters, and how many images each fetched."""
        found = audit.catalog.seeds(query.seed_set, query.after, query.limit)
        return Rows(**plain(vars(found)))

    @app.get("/api/seeds/{number}", responses=_MISSING)
    def hits(number: SeedNumber, query: Annotated[GroupsQuery, Query()]) -> Rows:
        """What one seed fetched, the nearest first."""
        seed = audit.catalog.seed(number)
        if seed is None:
            raise HTTPException(404, f"there is no seed {number}")
        return Rows(**plain(vars(audit.catalog.hits(seed, query.after, query.limit))))


def _add_pages(app: FastAPI, audit: Audit) -> None:
    @app.get("/", response_class=HTMLResponse)
    def overview() -> str:
        """The funnel, the reasons and the scores."""
        return audit.pages.overview()

    @app.get("/images", response_class=HTMLResponse)
    def images(query: Annotated[ImagesPageQuery, Query()]) -> str:
        """Rows by stage, reason, host, set and score."""
        page = audit.catalog.page(query.filter(), query.after, query.limit)
        return audit.pages.images(page, query.model_dump())

    @app.get("/images/{flow}/{row_id}", responses=_MISSING, response_class=HTMLResponse)
    def life(flow: FlowName, row_id: RowId) -> str:
        """One image's whole life."""
        return audit.pages.life(audit.row(flow, row_id), audit.life(flow, row_id))

    @app.get("/components", response_class=HTMLResponse)
    def components(query: Annotated[GroupsQuery, Query()]) -> str:
        """Groups of near-duplicates, the largest first."""
        return audit.pages.components(audit.catalog.components(query.after, query.limit))

    @app.get("/leaks", response_class=HTMLResponse)
    def leaks(query: Annotated[LeaksQuery, Query()]) -> str:
        """Images that a benchmark holds, too, beside its own."""
        return audit.pages.leaks(query.benchmark, query.after, query.limit)

    @app.get("/retrieval", response_class=HTMLResponse)
    def retrieval(query: Annotated[SeedsQuery, Query()]) -> str:
        """Seeds and what they fetched."""
        found = audit.catalog.seeds(query.seed_set, query.after, query.limit)
        return audit.pages.retrieval(found, query.seed_set)

    @app.get("/retrieval/{number}", responses=_MISSING, response_class=HTMLResponse)
    def seed(number: SeedNumber, query: Annotated[GroupsQuery, Query()]) -> str:
        """All that one seed fetched."""
        found = audit.catalog.seed(number)
        if found is None:
            raise HTTPException(404, f"there is no seed {number}")
        return audit.pages.seed(found, query.after)


def _add_files(app: FastAPI, audit: Audit) -> None:
    jpeg: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}}

    @app.get("/pictures/{flow}/{row_id}", responses=_MISSING | jpeg, response_class=Response)
    def picture_of(
        flow: FlowName, row_id: RowId, query: Annotated[PictureQuery, Query()]
    ) -> Response:
        """A picture, its faces blurred; a few blots where the NSFW filter dropped it."""
        row = audit.row(flow, row_id)
        data = picture(audit.run(), row, query.size, query.reveal)
        if data is None:
            raise HTTPException(404, "no picture of it is shown")
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private"})

    @app.get("/static/{name}", responses=_MISSING, response_class=Response)
    def static(
        name: Literal["style.css", "page.js", "serve.css", "calibrate.js", "icon.svg"],
    ) -> Response:
        """Style and script of the pages."""
        kind, folder = _STATIC[name]
        return Response((folder / name).read_bytes(), media_type=kind)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address is not ours, or taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port}: {error.strerror}; choose another with --host and --port"
        ) from error


def names_of(host: str, allowed: Sequence[str] = ()) -> tuple[str, ...]:
    """Names under which browsers may reach a server that listens on an address.

    Raises:
        ConfigError: the address is beyond this machine and no name is allowed, or one is no name.
    """
    if not _is_loopback(host) and not allowed:
        raise ConfigError(
            f"--host {host}: others can reach it; say under which name, --allow-host NAME, so that "
            "no foreign page can read it by pointing its own name here"
        )
    for name in allowed:
        if not re.fullmatch(r"[A-Za-z0-9._:-]+", name):
            raise ConfigError(f"--allow-host {name}: want the name or address of one host")
    return tuple(one.lower() for one in (host, "127.0.0.1", "localhost", *allowed))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until interrupted."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", server_header=False)
    uvicorn.Server(config).run(sockets=[listener])
