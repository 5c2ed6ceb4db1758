"""Fetches the bytes behind each URL, safely and politely, with img2dataset's Downloader."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from curation.fetching.client import Client, FetchPolicy
from curation.fetching.outcomes import REASONS, status_of
from curation.fetching.shard_downloader import Outcome, ShardDownloader, load_downloader
from curation.schema import FETCH_COLUMNS, SOURCE_COLUMNS, binary_column, schema_of
from curation.stage import Resources, Shard, ShardStage, reject
from embedder.images import Limits

_LOCAL_USER_AGENT = "lvd-curate/0.1 (local)"


class Download(ShardStage):
    """One row a URL: its bytes arrive, or it is dropped for one reason of a closed list."""

    user_agent: str | None = Field(None, pattern=r"^[\x20-\x7e]+$")
    """Who you are and where to reach you, such as "examplebot/1.0 (+https://example.org/bot)".
    Required to crawl publicly; its leading letters are the token that robots.txt files name."""
    allow_private: bool = False
    """Whether private, loopback and link-local addresses may be fetched from."""
    threads: int = Field(32, ge=1, le=1024)
    """Fetches at once in each worker."""
    per_host: int = Field(8, ge=1, le=1024)
    """Fetches at once from one host, by all workers of a machine together."""
    host_delay_s: float = Field(0.0, ge=0)
    """Least time between the starts of two fetches from one host, by a machine's workers."""
    retries: int = Field(2, ge=0, le=10)
    """Further attempts after a failure that may pass."""
    back_off_s: float = Field(1.0, ge=0)
    """Pause before the first retry, about; doubles with each. Retry-After makes it longer."""
    connect_timeout_s: float = Field(5.0, gt=0)
    """Time for one connection, and for its TLS handshake."""
    read_timeout_s: float = Field(10.0, gt=0)
    """Longest silence of a server."""
    total_timeout_s: float = Field(30.0, gt=0)
    """Time for one attempt with all its redirects, however steadily bytes drip."""
    max_bytes: int = Field(20 << 20, ge=1)
    """Larger bodies are refused, also where they only unpack to more."""
    max_bytes_in_flight: int = Field(128 << 20, ge=1)
    """Room that bodies over 1 MiB share while they are read; what finds none waits."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Images whose header announces more are refused before anything is decoded."""
    max_redirects: int = Field(5, ge=0, le=20)
    """Longer chains are refused."""
    robots: bool = True
    """Whether robots.txt (RFC 9309) is read and respected."""
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of X-Robots-Tag that opt out."""
    tdm: bool = True
    """Whether the header tdm-reservation: 1 opts out."""
    ca_file: str | None = None
    """PEM file of certificates to trust beside the system's."""

    reasons = REASONS
    fetches = True

    @model_validator(mode="after")
    def _crawlers_say_who_they_are(self) -> "Download":
        if self.user_agent is None and not self.allow_private:
            raise ValueError(
                "user_agent is missing; say who crawls and where to reach you, such as "
                "'examplebot/1.0 (+https://example.org/bot)' (allow_private needs none)"
            )
        return self

    def required_columns(self) -> tuple[str, ...]:
        """The URL."""
        return ("source",)

    def optional_columns(self) -> tuple[str, ...]:
        """The set that a row belongs to."""
        return ("source_set",)

    def outputs(self) -> dict[str, pa.Schema]:
        """The bytes that arrived, and how each fetch went."""
        raw = schema_of(["id", *SOURCE_COLUMNS, "raw"])
        return {"raw": raw, "fetches": schema_of(FETCH_COLUMNS)}

    def varying_outputs(self) -> tuple[str, ...]:
        """Times and attempts differ from run to run."""
        return ("fetches",)

    def resources(self) -> Resources:
        """What one shard's task needs."""
        return Resources(cpus=1, memory=3 << 30, time_limit_s=24 * 3600)

    def open(self) -> Client:
        """Make the client that a worker uses for all of its shards."""
        load_downloader()
        return Client(self.policy)

    @property
    def policy(self) -> FetchPolicy:
        """What one fetch may do."""
        return FetchPolicy(
            user_agent=self.user_agent or _LOCAL_USER_AGENT,
            allow_private=self.allow_private,
            allow_public=self.user_agent is not None,
            max_bytes=self.max_bytes,
            max_bytes_in_flight=self.max_bytes_in_flight,
            max_redirects=self.max_redirects,
            connect_timeout_s=self.connect_timeout_s,
            read_timeout_s=self.read_timeout_s,
            total_timeout_s=self.total_timeout_s,
            robots=self.robots,
            robots_failure_s=self.back_off_s / 2,  # the shortest pause of a row that tries again
            directives=tuple(name.lower() for name in self.opt_out_directives),
            tdm=self.tdm,
            ca_file=self.ca_file,
        )

    def process(self, shard: Shard, opened: Client) -> None:
        """Fetch every row of the shard."""
        downloader = ShardDownloader(
            client=opened,
            limits=Limits(self.max_bytes, self.max_pixels),
            threads=self.threads,
            retries=self.retries,
            back_off_s=self.back_off_s,
            per_host=self.per_host,
            delay_s=self.host_delay_s,
        )
        outcomes = downloader.download([url or "" for url in shard.values("source")])
        shard.emit("raw", {"raw": _take_bodies(outcomes)})
        shard.emit("fetches", _fetch_columns(outcomes), rejected_too=True)
        shard.count("bytes", sum(outcome.num_bytes or 0 for outcome in outcomes))
        _reject_failures(shard, outcomes)


def _take_bodies(outcomes: list[Outcome]) -> pa.ChunkedArray:
    """The bodies as a column, taken out of the outcomes: a shard is in memory once, not twice."""
    bodies = [outcome.body for outcome in outcomes]
    for outcome in outcomes:
        outcome.body = None
    return binary_column(bodies)


def _reject_failures(shard: Shard, outcomes: list[Outcome]) -> None:
    reasons = np.array([outcome.reason or "" for outcome in outcomes], dtype=object)
    for reason in sorted(set(reasons) - {""}):
        reject(shard, reasons == reason, reason)


def _fetch_columns(outcomes: list[Outcome]) -> dict[str, list[Any]]:
    return {
        "status": [status_of(one.reason) for one in outcomes],
        "attempts": [one.attempts for one in outcomes],
        "http_status": [one.trail.http_status for one in outcomes],
        "final_url": [one.trail.final_url or None for one in outcomes],
        "content_type": [one.trail.content_type for one in outcomes],
        "num_bytes": [one.num_bytes for one in outcomes],
        "fetched_at": [datetime.fromtimestamp(one.ended_at, UTC) for one in outcomes],
        "seconds": [one.seconds for one in outcomes],
    }
