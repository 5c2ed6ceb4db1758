"""The server: JSON under /api, pages for people beside it, nothing that changes anything.

Every parameter is declared, and so checked before a query sees it; texts reach DuckDB only as
parameters. `openapi.json` describes it all.
"""

import contextlib
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from curation.errors import ConfigError, CurateError
from pipelines.web.rendering import TEMPLATES
from pipelines.web.serving import api, pages
from pipelines.web.serving.site import Site, site_of

_STATIC = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter()


def make_app(path: str, file: str, hosts: tuple[str, ...] = ("127.0.0.1", "localhost")) -> FastAPI:
    """The server of one run or data set.

    file: its catalog. hosts: names under which browsers may reach it; others are refused, so that
    a foreign page cannot read it by pointing its own name here.
    """
    site = Site(path, file)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        site.catalog.close()

    app = FastAPI(
        title="curate serve",
        version="1",
        description=__doc__ or "",
        docs_url=None,
        redoc_url=None,
        responses={code: {"model": api.Problem} for code in (422, 503)},
        lifespan=lifespan,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.state.site = site
    app.middleware("http")(_with_headers)
    for kind in (StarletteHTTPException, RequestValidationError, CurateError, TimeoutError):
        app.add_exception_handler(kind, _explained)
    for routes in (api.router, pages.router, router):
        app.include_router(routes)
    return app


async def _with_headers(
    request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    response = await call_next(request)
    response.headers.update(_HEADERS)
    return response


async def _explained(request: Request, error: Exception) -> Response:
    """What was wrong with a request: as JSON, or as a page where pages are asked for."""
    status, detail = 422 if isinstance(error, ConfigError) else 503, str(error)
    headers: Mapping[str, str] = {}
    if isinstance(error, StarletteHTTPException):
        status, detail, headers = error.status_code, str(error.detail), error.headers or {}
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        status, detail = 422, f"{place}: {first['msg']}"
    if request.url.path.startswith(("/api/", "/pictures/", "/static/")):
        return JSONResponse({"detail": detail}, status, headers)
    page = site_of(request).render("problem", status=status, detail=detail)
    return HTMLResponse(page, status, headers)


@router.get("/static/{name}", responses=api.MISSING, response_class=Response)
def static(
    name: Literal["style.css", "page.js", "serve.css", "calibrate.js", "icon.svg"],
) -> Response:
    """Style and script of the pages."""
    file = TEMPLATES / name
    return Response(file.read_bytes(), media_type=_STATIC[file.suffix])


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
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host.lower() == "localhost"
    if not is_loopback and not allowed:
        raise ConfigError(
            f"--host {host}: others can reach it; say under which name, --allow-host NAME, so that "
            "no foreign page can read it by pointing its own name here"
        )
    for name in allowed:
        if not re.fullmatch(r"[A-Za-z0-9._:-]+", name):
            raise ConfigError(f"--allow-host {name}: want the name or address of one host")
    return tuple(one.lower() for one in (host, "127.0.0.1", "localhost", *allowed))


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until interrupted."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", server_header=False)
    uvicorn.Server(config).run(sockets=[listener])
