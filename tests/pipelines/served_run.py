"""The audited run behind a real server on loopback, one image veiled and one hidden."""

import contextlib
import functools
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import uvicorn
from fastapi import FastAPI

from pipelines.web.serving.app import listening, make_app
from pipelines.web.serving.catalog_file import catalog_of
from tests.pipelines.audited_run import finished_run


@dataclass(frozen=True)
class Served:
    """Where the server is, and what is special in it."""

    url: str
    veiled: str
    """Id of an image that the NSFW filter is said to have dropped."""
    hidden: str
    """Id of an image that a blocklist is said to name."""


@functools.cache
def catalog_with_marks() -> tuple[str, str, str]:
    """A catalog of the audited run; ids of the veiled and of the hidden image in it."""
    folder = Path(tempfile.mkdtemp(prefix="served-"))
    file = shutil.copy(catalog_of(str(finished_run())), folder / "catalog.duckdb")
    with duckdb.connect(str(file)) as connection:
        ids = connection.execute(
            "select id from images where flow = 'pool' and stage = 'kept' order by id limit 2"
        ).fetchall()
        (veiled,), (hidden,) = ids
        connection.execute("update images set veiled = true where id = ?", [veiled])
        connection.execute("update images set hidden = true where id = ?", [hidden])
    return str(file), veiled, hidden


@contextlib.contextmanager
def served() -> Iterator[Served]:
    """Serve it while the block runs."""
    file, veiled, hidden = catalog_with_marks()
    with serving(make_app(str(finished_run()), file)) as url:
        yield Served(url, veiled, hidden)


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Address of an application that is served while the block runs."""
    listener = listening("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
