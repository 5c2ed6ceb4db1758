import contextlib
import gzip
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.errors import ConfigError, DatasetError
from curation.url_entries import entries_of
from curation.url_lists import UrlLists


def judged(urls, pages=None, **settings):
    return UrlLists(**settings).judge(urls, pages or [None] * len(urls))


def a_list(tmp_path, *lines: str, name: str = "list.txt") -> str:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    data = "\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("entry", "listed", "passing"),
    [
        ("example.org", ["http://example.org/a", "https://a.b.example.org/"], ["http://example.or"]),
        ("Example.ORG.", ["http://example.org/a"], ["http://badexample.org/"]),
        ("*.example.org", ["http://a.example.org/", "http://a.b.example.org/"], ["http://example.org/"]),
        ("0.0.0.0 example.org # ads", ["http://example.org/"], ["http://0.0.0.0/"]),
        ("münchen.de", ["http://xn--mnchen-3ya.de/"], ["http://munchen.de/"]),
        ("http://example.org:80/x", ["https://example.org/x"], ["http://example.org/y"]),
        (
            "example.org/a/b/",
            ["http://example.org/a/b", "http://www.example.org/a/b/c.jpg?d", "http://example.org/a/b?q"],
            ["http://example.org/a/bc", "http://example.org/a", "http://a.example.org/a/b"],
        ),
        ("example.org/a?id=1", ["http://example.org/a?id=1"], ["http://example.org/a?id=2"]),
        ("1.2.3.4", ["http://1.2.3.4/x.jpg"], ["http://11.2.3.4/"]),
        ("2001:DB8::1", ["http://[2001:db8::1]/x.jpg"], ["http://[2001:db8::2]/"]),
        ("example.org?id=1", ["http://example.org/?id=1"], ["http://example.org/?id=2"]),
        ("example.org/é#top", ["http://example.org/%C3%A9"], ["http://example.org/a"]),
        ("0.0.0.0 a.org www.b.org", ["http://a.org/", "http://x.www.b.org/"], ["http://b.org/"]),
        ("::1 a.org\tlocalhost #x", ["http://a.org/", "http://localhost/"], ["http://b.org/"]),
        ("||ads.org^", ["http://ads.org/", "http://a.ads.org/x"], ["http://bads.org/"]),
        ("||Ads.org^$important,image", ["http://ads.org/"], ["http://ads.com/"]),
        ("address=/a.org/b.org/0.0.0.0", ["http://a.org/", "http://x.b.org/"], ["http://c.org/"]),
        ("address=/a.org/#", ["http://a.org/"], ["http://b.org/"]),
        ("server=/a.org/", ["http://a.org/"], ["http://b.org/"]),
        ("local=/a.org/", ["http://a.org/"], ["http://b.org/"]),
    ],
)  # fmt: skip
def test_judge__what_an_entry_stands_for(tmp_path, entry, listed, passing):
    lists = {"own": a_list(tmp_path, "# comment", "", "! another", "[Adblock Plus 2.0]", entry)}
    assert judged(listed, blocked=lists) == ["url_list:own"] * len(listed)
    assert judged(passing, blocked=lists) == [""] * len(passing)
    assert judged(listed, allowed=lists) == [""] * len(listed)
    assert judged(passing, allowed=lists) == ["not_allowed"] * len(passing)


def test_judge__folders_of_categories(tmp_path):
    a_list(tmp_path, "adult.example", name="ut1/adult/domains")
    a_list(tmp_path, "mixed.example/adult", name="ut1/adult/urls")
    a_list(tmp_path, "games.example", "adult.example", name="ut1/games/domains.gz")
    a_list(tmp_path, "A folder of lists", name="ut1/README")
    a_list(tmp_path, "expressions", name="ut1/adult/expressions")
    urls = [
        *("http://www.adult.example/1.jpg", "http://mixed.example/adult/2.jpg"),
        *("http://mixed.example/3.jpg", "http://games.example/4.jpg"),
    ]
    blocked = {"ut1": str(tmp_path / "ut1")}
    assert judged(urls, blocked=blocked) == [
        *("url_list:ut1/adult", "url_list:ut1/adult", "", "url_list:ut1/games"),
    ]
    assert judged(urls, blocked=blocked, categories=("games",)) == [
        *("url_list:ut1/games", "", "", "url_list:ut1/games"),
    ]
    with pytest.raises(ConfigError, match="no category 'gamez'; there are: adult, games"):
        judged(urls, blocked=blocked, categories=("gamez",))


def test_judge__schemes_pages_and_the_order_of_lists(tmp_path):
    first = a_list(tmp_path, "a.example", name="first")
    second = a_list(tmp_path, "b.example", "a.example", name="second")
    blocked = {"first": first, "second": second}
    urls = ["http://a.example/", "https://b.example/", "https://cdn.example/x.jpg"]
    pages = [None, None, "http://a.example/page"]
    assert judged(urls, pages, blocked=blocked) == [
        *("url_list:first", "url_list:second", "url_list:first"),
    ]
    assert judged(urls, pages, schemes=("https",)) == ["scheme", "", ""]
    lists = UrlLists(blocked=blocked, pages=False)
    assert lists.judge(urls, pages)[2] == ""


def test_judge__a_changed_list_is_read_again(tmp_path):
    blocked = {"own": a_list(tmp_path, "a.example")}
    lists = UrlLists(blocked=blocked)
    before = lists.fingerprint()
    assert lists.judge(["http://b.example/"], [None]) == [""]
    a_list(tmp_path, "a.example", "b.example")
    assert lists.fingerprint() != before
    assert lists.judge(["http://b.example/"], [None]) == ["url_list:own"]


def test_judge__wrong_lists_say_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="no such list of domains"):
        judged(["http://a/"], blocked={"own": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match=r"line 2 is 'a\.\*\.org' .*; write a domain"):
        judged(["http://a/"], blocked={"own": a_list(tmp_path, "a.org", "a.*.org")})


@pytest.mark.parametrize(
    "line",
    [
        *("@@||good.org^", "||ads.org", "||ads.org^$third-party", "||ads.org/x^", "||*.ads.org^"),
        *("|http://ads.org/|", "/banner[0-9]+/", "-ad-banner.", "/ads/*", "ads.org^"),
        *("a.org##.ad", "a.org#@#.ad", "a.org#?#div", "a.org#$#x", "a.*.org", "*.a.org/x", "*"),
        *("address=/a.org/10.0.0.1", "server=/a.org/8.8.8.8", "server=/a.org/#", "address=/#/::"),
        *('local-zone: "a.org" always_nxdomain', "a.org CNAME .", "10.0.0.0/8", "http://"),
        *("a..org", "a.org,b.org", "a" * 64 + ".org", "<html>", "\ufffd.org", "é .org"),
    ],
)  # fmt: skip
def test_judge__refuses_what_says_something_else(tmp_path, line):
    with pytest.raises(ConfigError, match=r"list\.txt: line 2 is .*; write a domain"):
        judged(["http://a/"], blocked={"own": a_list(tmp_path, "ok.org", line)})


def test_judge__pages_in_any_spelling(tmp_path):
    blocked = {"own": a_list(tmp_path, "münchen.de")}
    pages = ["HTTP://MÜNCHEN.de:80/", "http://xn--mnchen-3ya.de", "no page", None]
    listed = ["url_list:own", "url_list:own", "", ""]
    assert judged(["http://a.org/"] * 4, pages, blocked=blocked) == listed


def test_judge__a_list_without_entries_is_told(tmp_path, caplog):
    blocked = {"own": a_list(tmp_path, "# nothing"), "ut1": str(tmp_path / "ut1")}
    a_list(tmp_path, "", name="ut1/adult/urls")
    assert judged(["http://a.org/"], blocked=blocked) == [""]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/list.txt: has no entries"
    ]


def test_judge__packed_lists(tmp_path):
    blocked = {"own": a_list(tmp_path, "\ufeffa.org", "b.org", name="l.txt.gz")}
    assert judged(["http://a.org/", "http://b.org/"], blocked=blocked) == ["url_list:own"] * 2
    whole = (tmp_path / "l.txt.gz").read_bytes()
    (tmp_path / "cut.txt.gz").write_bytes(whole[:-4])
    with pytest.raises(DatasetError, match=r"cut\.txt\.gz: ends early"):
        judged(["http://a/"], blocked={"own": str(tmp_path / "cut.txt.gz")})


@given(st.text(max_size=20))
def test_entries_of__any_line_is_entries_or_one_error(line):
    with contextlib.suppress(ConfigError):
        for entry in entries_of(line, "a: line 1"):
            assert entries_of(entry, "again") == [entry]


@given(st.lists(st.text(max_size=30), max_size=5))
def test_judge__foreign_urls_raise_nothing(tmp_path_factory, urls):
    folder = tmp_path_factory.mktemp("lists")
    assert len(judged(urls, blocked={"own": a_list(folder, "a.org", "b.org/x")})) == len(urls)


MILLIONS = """
import resource, sys
from curation.url_lists import UrlLists
lists = UrlLists(blocked={"big": sys.argv[1]})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert lists.judge(["http://x.d1999999.example/a.jpg", "http://other.example/"], [None, None]) == [
    "url_list:big", ""]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_judge__millions_of_entries_in_little_memory(tmp_path):
    path = tmp_path / "big.txt"
    path.write_text("".join(f"d{i}.example\n" for i in range(2_000_000)))
    job = subprocess.run(
        [sys.executable, "-c", MILLIONS, str(path)], capture_output=True, text=True, check=True
    )
    assert float(job.stdout) < 160  # MiB; as Python strings the entries would take 130 MB alone
