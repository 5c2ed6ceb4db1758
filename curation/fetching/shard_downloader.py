"""Drives img2dataset's Downloader over one shard, through the seams that it offers.

It fetches with urllib's global opener: ours answers "tickets" instead of URLs. A ticket stands for
whichever row is next by the schedule, so no thread waits for a busy host. Its resizer seam checks
headers, and its writer seam keeps the bytes in memory: our ledger commits, or nobody does.
"""

import contextlib
import io
import logging
import os
import sys
import tempfile
import time
import types
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pyarrow as pa

from curation.errors import StageError
from curation.fetching.client import Client
from curation.fetching.outcomes import FetchError, Trail
from curation.fetching.schedule import HostSchedule
from embedder.errors import ImageError
from embedder.images import Limits, read_header

_TICKET = "curate-ticket"
_MAX_BACK_OFF_S = 60.0
_SECONDS_BETWEEN_LINES = 30.0

progress = logging.getLogger("curation.progress")


@dataclass
class Outcome:
    """How the fetch of one row ended."""

    reason: str | None = "unfetched"
    """None where the bytes arrived."""
    body: bytes | None = None
    trail: Trail = field(default_factory=Trail)
    attempts: int = 0
    num_bytes: int | None = None
    ended_at: float = 0.0
    """Seconds since the epoch."""
    seconds: float = 0.0
    """Of the last attempt."""


class _Progress:
    """Says twice a minute how far a shard is: ten thousand rows take a while."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._began = self._spoke = time.monotonic()
        self._done = self._failed = 0

    def advance(self, failed: bool) -> None:
        """Count a row that ended; only one thread calls this."""
        self._done += 1
        self._failed += failed
        now = time.monotonic()
        if now - self._spoke < _SECONDS_BETWEEN_LINES or self._done == self._total:
            return
        self._spoke = now
        rate = self._done / (now - self._began)
        progress.info(
            "download: %d of %d rows of this shard, %.0f rows/s, %d failed, %.0f s left",
            *(self._done, self._total, rate, self._failed, (self._total - self._done) / rate),
        )


@dataclass(frozen=True)
class ShardDownloader:
    """Fetches the URLs of a shard with img2dataset's threads and our rules."""

    client: Client
    limits: Limits
    threads: int
    retries: int
    """Further attempts after a temporary failure."""
    back_off_s: float
    """Pause before the first retry, about; doubles with each."""
    per_host: int
    delay_s: float

    def download(self, urls: Sequence[str]) -> list[Outcome]:
        """Fetch every URL; give an outcome for each, in order. Leaves no connection open.

        Raises:
            StageError: img2dataset lost a row.
        """
        if not urls:
            return []
        tickets = _Tickets(self, urls)
        with tempfile.TemporaryDirectory(prefix="curate-download-") as folder, tickets.installed():
            listed = _write_tickets(Path(folder), len(urls))
            self._img2dataset(folder, len(urls), tickets).download_shard((0, str(listed)))
        if tickets.failure is not None:
            raise tickets.failure
        lost = sum(outcome.reason == "unfetched" for outcome in tickets.outcomes)
        if lost:
            raise StageError(f"img2dataset lost {lost} of {len(urls)} rows of a shard")
        self.client.rest()
        self._fetch_doubtful(urls, tickets.outcomes)
        return tickets.outcomes

    def _fetch_doubtful(self, urls: Sequence[str], outcomes: list[Outcome]) -> None:
        """Fetch again what a connection brought that later proved to be out of step."""
        rows = [row for row, outcome in enumerate(outcomes) if outcome.trail.is_doubtful]
        for row, again in zip(rows, self.download([urls[row] for row in rows]), strict=True):
            again.attempts += outcomes[row].attempts
            outcomes[row] = again

    def _img2dataset(self, folder: str, num_rows: int, tickets: "_Tickets") -> Any:
        return load_downloader()(
            sample_writer_class=tickets.writer,
            resizer=lambda stream, _boxes: _check_header(stream, self.limits),
            thread_count=min(self.threads, num_rows),
            save_caption=False,
            extract_exif=False,
            output_folder=folder,
            column_list=["url"],
            timeout=None,
            number_sample_per_shard=num_rows,
            oom_shard_count=5,
            compute_hash=None,
            verify_hash_type=None,
            encode_format="jpg",
            retries=0,
            user_agent_token=None,
            disallowed_header_directives=None,
        )

    def pause_s(self, row: int, attempts: int, error: FetchError) -> float:
        """Seconds until a row's next attempt: doubling, spread, and what the server asked for."""
        spread = 0.5 + row * 0.618034 % 1  # rows that failed together do not come back together
        doubled = self.back_off_s * 2 ** (attempts - 1) * spread
        return float(min(max(doubled, error.retry_after_s or 0.0), _MAX_BACK_OFF_S))


class _Tickets:
    """urllib's opener while a shard is fetched, and the writer that takes what arrives."""

    def __init__(self, settings: ShardDownloader, urls: Sequence[str]) -> None:
        self._settings = settings
        self._urls = urls
        self._schedule = HostSchedule(
            [_host_of(url) for url in urls],
            per_host=settings.per_host,
            delay_s=settings.delay_s,
        )
        self._rows: dict[str, int] = {}  # which row a ticket became
        self._previous: Any = None
        self.outcomes = [Outcome() for _ in urls]
        self._progress = _Progress(len(urls))
        self.failure: Exception | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Be urllib's global opener; the one before is put back whatever happens."""
        module = cast("Any", urllib.request)
        self._previous = module._opener
        module.install_opener(self)
        try:
            yield
        finally:
            module._opener = self._previous

    def open(self, request: Any, data: Any = None, timeout: Any = None) -> Any:
        """Answer `urllib.request.urlopen`.

        Raises:
            FetchError: its text is the reason.
        """
        if getattr(request, "type", None) != _TICKET:
            opener = self._previous or urllib.request.build_opener()
            return opener.open(request, data, timeout)
        try:
            return io.BytesIO(self._fetch_next(request.full_url))
        except FetchError:
            raise
        except Exception as error:
            # img2dataset would make a row's failure of our own mistake.
            self.failure = error
            raise

    def _fetch_next(self, ticket: str) -> bytes:
        while True:
            row = self._schedule.take()
            self._rows[ticket] = row
            outcome = self.outcomes[row]
            began = time.monotonic()
            outcome.attempts += 1
            retry_in_s = None
            try:
                outcome.trail = Trail()
                return self._settings.client.fetch(self._urls[row], outcome.trail).body
            except FetchError as error:
                if not error.is_temporary or outcome.attempts > self._settings.retries:
                    raise
                retry_in_s = self._settings.pause_s(row, outcome.attempts, error)
            finally:
                outcome.seconds = time.monotonic() - began
                outcome.ended_at = time.time()
                self._schedule.give_back(row, retry_in_s)

    def writer(self, *_args: Any) -> "_Tickets":
        """Stand in for img2dataset's writer class."""
        return self

    def write(self, body: bytes | None, _key: str, _caption: Any, meta: dict[str, Any]) -> None:
        """Take one ticket's result from img2dataset."""
        outcome = self.outcomes[self._rows[meta["url"]]]
        outcome.reason = meta["error_message"]
        outcome.body = body
        outcome.num_bytes = None if body is None else len(body)
        self._progress.advance(body is None)

    def close(self) -> None:
        """Nothing is left open."""


def _check_header(stream: io.BytesIO, limits: Limits) -> tuple[Any, ...]:
    """Stand in for img2dataset's resizer: bytes pass untouched if their header is acceptable."""
    data = stream.getvalue()
    try:
        header = read_header(data, limits)
    except ImageError as error:
        return None, None, None, None, None, error.reason
    return data, header.width, header.height, header.width, header.height, None


def _write_tickets(folder: Path, count: int) -> Path:
    path = folder / "tickets.arrow"
    table = pa.table({"url": [f"{_TICKET}:{number}" for number in range(count)]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return path


def _host_of(url: str) -> str:
    """The host that limits hold for, with its port where that is not the scheme's own."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        return host if parts.port in (None, 80, 443) else f"{host}:{parts.port}"
    except ValueError:
        return ""


def load_downloader() -> Callable[..., Any]:
    """img2dataset's Downloader class, without the rest of the package.

    Its `__init__` imports torch, cv2 and albumentations (0.8 GB, 7 s, and a look for updates on the
    network), its logger wandb (1 s a worker): empty modules stand in for the package and for wandb
    while the one module is imported.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # should anything import it all the same
    os.environ.setdefault("WANDB_MODE", "disabled")
    if "img2dataset" not in sys.modules and "img2dataset.downloader" not in sys.modules:
        spec = find_spec("img2dataset")
        if spec is None or spec.submodule_search_locations is None:
            raise StageError("img2dataset is not installed; run: pip install img2dataset")
        placeholder = types.ModuleType("img2dataset")
        placeholder.__path__ = list(spec.submodule_search_locations)
        with _standing_in(placeholder, types.ModuleType("wandb")):
            import_module("img2dataset.downloader")
    module = sys.modules.get("img2dataset.downloader") or import_module("img2dataset.downloader")
    return cast("Callable[..., Any]", cast("Any", module).Downloader)


@contextlib.contextmanager
def _standing_in(*modules: types.ModuleType) -> Iterator[None]:
    """Have modules imported that stand in for those of the same names, unless these are there."""
    mine = [module.__name__ for module in modules if module.__name__ not in sys.modules]
    sys.modules.update({one.__name__: one for one in modules if one.__name__ in mine})
    try:
        yield
    finally:
        for name in mine:
            del sys.modules[name]
