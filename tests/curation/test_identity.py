import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.errors import ConfigError
from curation.identity import file_source, normalize_url, set_name_of

SAME = [
    ("http://example.com", "http://example.com/"),
    ("HTTP://User@EXAMPLE.com:80/a", "http://User@example.com/a"),
    ("https://example.com:443/%7ea/%2f?q=%e4#f", "https://example.com/~a/%2F?q=%E4"),
    ("https://example.com:8443/", "https://example.com:8443/"),
    ("http://example.com/a/./b/../c", "http://example.com/a/c"),
    ("http://example.com/a b", "http://example.com/a%20b"),
    ("http://bücher.example/ü", "http://xn--bcher-kva.example/%C3%BC"),
    ("http://[::1]:81/x", "http://[::1]:81/x"),
    ("  http://example.com./x ", "http://example.com/x"),
]


@pytest.mark.parametrize(("url", "normal"), SAME)
def test_normalize_url__known_cases(url, normal):
    assert normalize_url(url) == normal


@pytest.mark.parametrize(
    "url", ["", "file:///etc/passwd", "http://", "//a/b", "http://a:x/", "http://[/"]
)
def test_normalize_url__refuses(url):
    with pytest.raises(ValueError, match=r"."):
        normalize_url(url)


@given(st.text(max_size=40))
def test_normalize_url__is_idempotent_and_raises_only_value_errors(tail):
    try:
        once = normalize_url("http://example.com/" + tail)
    except ValueError:
        return
    assert normalize_url(once) == once
    assert once.isascii()


def test_file_source__names_set_and_path():
    assert file_source("flowers", "a\\b.jpg") == "flowers/a/b.jpg"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("val/tench", "tench"),
        ("val/tench///", "tench"),
        ("val/church/../tench/.", "tench"),
        ("file:///data/val/tench/", "tench"),
        ("s3://bucket/val/tench/", "tench"),
        ("s3://bucket", "bucket"),
        ("/data/tench.tar", "tench.tar"),
        ("/data/my photos ü", "my photos ü"),
    ],
)
def test_set_name_of__is_the_folders_own(path, name):
    assert set_name_of(path) == name


@pytest.mark.parametrize("path", ["/", "//", "/data/\udcff"])
def test_set_name_of__a_folder_without_a_name_wants_one(path):
    with pytest.raises(ConfigError, match="--set-name"):
        set_name_of(path)
