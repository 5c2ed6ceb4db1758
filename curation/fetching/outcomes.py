"""How a fetch can end: a closed list of reasons, and which of them may succeed later."""

from http import HTTPStatus

from embedder.images import REASONS as IMAGE_REASONS

OPTED_OUT = ("opted_out:robots", "opted_out:noai", "opted_out:tdm")
"""The owner does not want it: robots.txt, X-Robots-Tag, tdm-reservation. Not failures."""

_HTTP = tuple(f"http_{status.value}" for status in HTTPStatus if status >= 400)

TEMPORARY = (
    *("dns_unavailable", "connection", "timeout", "truncated", "bad_response"),
    *("robots_unreachable", "http_408", "http_425", "http_429", "http_5xx"),
    *(reason for reason in _HTTP if reason >= "http_500"),
)
"""What another attempt may cure, now or on another day."""

PERMANENT = (
    *("bad_url", "bad_scheme", "private_address", "public_address", "dns", "tls", "bad_encoding"),
    *("too_many_redirects", "http_3xx", "http_4xx"),
    *(reason for reason in _HTTP if reason < "http_500" and reason not in TEMPORARY),
)

REASONS = tuple(dict.fromkeys((*OPTED_OUT, *TEMPORARY, *PERMANENT, *IMAGE_REASONS)))
"""Every reason for which a row does not arrive."""


class FetchError(Exception):
    """A fetch that ended without an image; its text is the reason, one of `REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s: float | None = None

    @property
    def is_temporary(self) -> bool:
        """Whether another attempt may succeed."""
        return self.reason in TEMPORARY


def http_reason(status: int) -> str:
    """Reason for a status that is no success; codes that no standard names share one a class."""
    reason = f"http_{status}"
    if reason in REASONS:
        return reason
    return f"http_{min(max(status // 100, 3), 5)}xx"


def status_of(reason: str | None) -> str:
    """Status of a row: arrived, opted_out or failed."""
    if reason is None:
        return "arrived"
    return "opted_out" if reason in OPTED_OUT else "failed"
