"""How a fetch can end: a closed list of reasons, and which of them may succeed later."""

from dataclasses import dataclass
from http import HTTPStatus

from embedder.images import REASONS as IMAGE_REASONS

OPTED_OUT = ("opted_out:robots", "opted_out:noai", "opted_out:tdm")
"""The owner does not want it: robots.txt, X-Robots-Tag, tdm-reservation. Not failures."""

_HTTP = {status.value: f"http_{status.value}" for status in HTTPStatus if status >= 400}
_MAY_PASS = frozenset({408, 425, 429, *range(500, 600)} - {501, 505, 506, 510})
"""Too early, too often, or the server's trouble of the hour; not what it will never do."""

TEMPORARY = (
    *("dns_unavailable", "connection", "timeout", "truncated", "bad_response"),
    *("robots_unreachable", "http_5xx"),
    *(reason for status, reason in _HTTP.items() if status in _MAY_PASS),
)
"""What another attempt may cure, now or on another day."""

PERMANENT = (
    *("bad_url", "bad_scheme", "private_address", "public_address", "dns", "tls", "bad_encoding"),
    *("too_many_redirects", "http_3xx", "http_4xx", "http_other"),
    *(reason for status, reason in _HTTP.items() if status not in _MAY_PASS),
)

REASONS = tuple(dict.fromkeys((*OPTED_OUT, *TEMPORARY, *PERMANENT, *IMAGE_REASONS)))
"""Every reason for which a row does not arrive."""


@dataclass
class Trail:
    """How far a fetch got; filled in as it goes, so that failures can tell."""

    final_url: str = ""
    http_status: int | None = None
    content_type: str | None = None
    is_doubtful: bool = False
    """Whether its answer may be that to another request, as its connection showed later."""


class FetchError(Exception):
    """A fetch that ended without an image; its text is the reason, one of `REASONS`.

    retry_after_s: how long the server asks to be left alone.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s

    @property
    def is_temporary(self) -> bool:
        """Whether another attempt may succeed."""
        return self.reason in TEMPORARY


class HostError(FetchError):
    """No connection to a host could be made, whatever was to be asked of it."""


def http_reason(status: int) -> str:
    """Reason for a status that is no success; codes that no standard names share one a class."""
    if status in _HTTP:
        return _HTTP[status]
    return f"http_{status // 100}xx" if 300 <= status < 600 else "http_other"


def status_of(reason: str | None) -> str:
    """Status of a row: arrived, opted_out or failed."""
    if reason is None:
        return "arrived"
    return "opted_out" if reason in OPTED_OUT else "failed"
