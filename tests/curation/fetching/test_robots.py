import time

import pytest

from curation.fetching.robots import RobotsRules, product_token


def allowed(text: str, path: str, agent: str = "examplebot/1.0 (+https://example.org)") -> bool:
    return RobotsRules.parse(text, agent).allows(path)


def test_robots__the_longest_match_decides_and_allow_wins_ties():
    text = "User-agent: *\nDisallow: /a\nAllow: /a/b\nDisallow: /a/b/c\nAllow: /tie\nDisallow: /tie"
    expected = {
        "/": True,
        "/a": False,
        "/a/b": True,
        "/a/b/c": False,
        "/tie": True,
        "/robots.txt": True,
    }
    assert {path: allowed(text, path) for path in expected} == expected


def test_robots__groups_of_the_token_are_merged_and_hide_the_default():
    text = (
        "User-agent: ExampleBot\nUser-agent: other\nDisallow: /x\n\nUser-agent: *\nDisallow: /\n"
        "user-agent:examplebot/2.0\ndisallow:/y # why\n"
    )
    expected = {"/": True, "/x": False, "/y": False, "/z": True}
    assert {path: allowed(text, path) for path in expected} == expected
    assert not allowed(text, "/z", "stranger/1.0")


@pytest.mark.parametrize(
    ("pattern", "path", "blocked"),
    [
        ("/*.gif$", "/a/b.gif", True),
        ("/*.gif$", "/a/b.gif?x", False),
        ("/fish*", "/fish.html", True),
        ("/*/private*/x", "/a/private1/x/y", True),
        ("/a*b$", "/ab", True),
        ("/a*b$", "/a", False),
        ("/%7Eann/", "/~ann/x", True),
        ("/caf%c3%a9", "/café", True),
        ("/café", "/caf%C3%A9", True),
        ("/a%2Fb", "/a/b", False),
        ("/x?y=*", "/x?y=1", True),
        ("$", "/x", False),
    ],
)
def test_robots__patterns(pattern, path, blocked):
    assert allowed(f"User-agent: *\nDisallow: {pattern}", path) != blocked


@pytest.mark.parametrize(
    "text", ["", "Disallow: /", "User-agent: *\nDisallow:", "\x00\xff junk : :"]
)
def test_robots__nothing_that_binds_allows_all(text):
    assert allowed(text, "/x")


def test_robots__odd_line_ends_and_a_byte_order_mark():
    assert not allowed("\ufeffUser-agent: *\rDisallow: /x\r\nSitemap: y", "/x")


def test_robots__hostile_patterns_take_no_time():
    text = "User-agent: *\n" + "".join(f"Disallow: /{'*a' * 500}{i}\n" for i in range(300))
    began = time.monotonic()
    assert allowed(text, "/" + "a" * 4000)
    assert time.monotonic() - began < 5


def test_disallow_all__allows_nothing_but_itself():
    assert not RobotsRules.disallow_all().allows("/x")
    assert RobotsRules.disallow_all().allows("/robots.txt")


def test_product_token__leading_letters():
    assert product_token("Example-Bot_x/1.0 (y)") == "example-bot_x"
    assert product_token("1.0") == ""
