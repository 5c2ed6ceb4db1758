import pytest

from curation.fetching.connections import Head
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
    robots = {b"x-robots-tag": [b"all", b"noai"]}
    with pytest.raises(FetchError, match="opted_out:noai"):
        check_headers(Head(200, robots), "mybot/1", DIRECTIVES, tdm=True)
    check_headers(Head(200, robots), "mybot/1", (), tdm=True)
    reserved = Head(200, {**robots, b"tdm-reservation": [b"1"]})
    with pytest.raises(FetchError, match="opted_out:tdm"):
        check_headers(reserved, "mybot/1", (), tdm=True)
    check_headers(reserved, "mybot/1", (), tdm=False)
