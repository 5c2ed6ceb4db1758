from email.message import Message

import pytest

from curation.fetching.optouts import check_headers, directives_for
from curation.fetching.outcomes import FetchError

DIRECTIVES = ("noai", "noindex")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("noai", {"noai"}),
        ("noindex, NoAI", {"noindex", "noai"}),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST, noai", {"unavailable_after", "noai"}),
        ("otherbot: noai, noindex", set()),
        ("mybot: noai", {"noai"}),
        ("otherbot: noai, mybot: noindex", {"noindex"}),
        ("", {""}),
    ],
)
def test_directives_for__values(value, expected):
    assert directives_for(value, "mybot") == expected


def test_check_headers__several_headers_and_tdm():
    headers = Message()
    headers["X-Robots-Tag"] = "all"
    headers["x-robots-tag"] = "noai"
    with pytest.raises(FetchError, match="opted_out:noai"):
        check_headers(headers, "mybot/1", DIRECTIVES, tdm=True)
    check_headers(headers, "mybot/1", (), tdm=True)
    headers["TDM-Reservation"] = "1"
    with pytest.raises(FetchError, match="opted_out:tdm"):
        check_headers(headers, "mybot/1", (), tdm=True)
    check_headers(headers, "mybot/1", (), tdm=False)
