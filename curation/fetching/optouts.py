"""What a response's headers say about its use for training."""

from collections.abc import Collection

from curation.fetching.connections import Head
from curation.fetching.outcomes import FetchError
from curation.fetching.robots import product_token


def check_headers(head: Head, user_agent: str, directives: Collection[str], *, tdm: bool) -> None:
    """Respect X-Robots-Tag and the TDM Reservation Protocol.

    Raises:
        FetchError: opted_out:noai or opted_out:tdm.
    """
    token = product_token(user_agent)
    for value in head.get_all(b"x-robots-tag"):
        if not directives_for(value, token).isdisjoint(directives):
            raise FetchError("opted_out:noai")
    if tdm and "1" in head.get_all(b"tdm-reservation"):
        raise FetchError("opted_out:tdm")


def directives_for(value: str, token: str) -> set[str]:
    """Directives of one X-Robots-Tag that hold for a crawler.

    `noai`, `otherbot: noindex, nofollow` and `unavailable_after: <date>` all are valid values.
    """
    found = set()
    agent = ""
    for part in value.lower().split(","):
        before, colon, after = part.partition(":")
        name = before.strip()
        if colon and name not in _WITH_VALUES:
            agent, name = name, after.partition(":")[0].strip()
        if agent in ("", "*", token):
            found.add(name)
    return found


_WITH_VALUES = frozenset(
    ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
)
