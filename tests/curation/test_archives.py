import gzip
import json
import sys
from datetime import UTC, datetime

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from web_archives import info, packed, page, record, wat

from curation.archives import archive_files, extract_images, images_of_wat
from curation.errors import ConfigError

PAGES = [
    page(f"http://h{i}.example/", b"<p>" * 50 + b"<img src=%d.jpg alt=%d>" % (i, i))
    for i in range(6)
]


def extracted(tmp_path, data: bytes, name: str = "a.warc.gz") -> tuple[list[dict], dict[str, int]]:
    (tmp_path / name).write_bytes(data)
    tally = extract_images(str(tmp_path / name), str(tmp_path / "links.parquet"))
    return pq.read_table(tmp_path / "links.parquet").to_pylist(), tally


def test_extract_images__page_alt_and_time_are_kept(tmp_path):
    rows, tally = extracted(tmp_path, b"".join(packed(info(), *PAGES)))
    assert rows[1] == {
        "url": "http://h1.example/1.jpg",
        "alt": "1",
        "page": "http://h1.example/",
        "crawled_at": datetime(2024, 5, 18, 1, 58, 10, tzinfo=UTC),
    }
    assert tally == {
        "pages": 6,
        "images": 6,
        "cut_records": 0,
        "long_pages": 0,
        "damaged": 0,
    }


def test_extract_images__reads_pages_only(tmp_path):
    others = [
        page("http://h/gone", b"<img src=a.jpg>", status=404),
        page("http://h/moved", b"<img src=a.jpg>", status=301),
        page("http://h/a.jpg", b"<img src=a.jpg>", kind="image/jpeg"),
        record("request", "http://h/", "application/http; msgtype=request", b"GET /", ""),
        record("metadata", "http://h/", "application/warc-fields", b"a: b", ""),
        record("conversion", "http://h/", "text/plain", b"<img src=a.jpg>", ""),
    ]
    resource = record("resource", "http://h/saved.html", "text/html", b"<img src=r.jpg>", "never")
    rows, tally = extracted(tmp_path, b"".join([*others, resource]), "plain.warc")
    assert [(row["url"], row["crawled_at"]) for row in rows] == [("http://h/r.jpg", None)]
    assert tally["pages"] == 1


def test_extract_images__undoes_encodings(tmp_path):
    body = b"<img src=a.jpg>"
    chunked = b"f\r\n" + body + b"\r\n0\r\n\r\n"
    bomb = gzip.compress(b"<i>" * (30 << 20))
    pages = [
        page("http://h/0/", gzip.compress(body), headers="Content-Encoding: gzip\r\n"),
        page("http://h/1/", body, headers="Content-Encoding: gzip\r\n"),  # as Common Crawl does
        page("http://h/2/", chunked, headers="Transfer-Encoding: chunked\r\n"),
        page("http://h/3/", bomb, headers="Content-Encoding: gzip\r\n"),
        page("http://h/4/", body),
    ]
    rows, tally = extracted(tmp_path, b"".join(packed(*pages)))
    assert [row["url"] for row in rows] == [f"http://h/{i}/a.jpg" for i in (0, 1, 2, 4)]
    assert (tally["pages"], tally["damaged"]) == (5, 0)


def test_extract_images__skips_and_counts_damages(tmp_path):
    members = packed(*PAGES)
    broken = bytearray(members[2])
    broken[60:70] = bytes(10)
    damaged = [*members[:2], bytes(broken), members[3], members[4][:50], members[5]]
    rows, tally = extracted(tmp_path, b"".join(damaged))
    assert [row["alt"] for row in rows] == ["0", "1", "3", "5"]
    assert tally["damaged"] == 2
    plain = [PAGES[0], PAGES[1][:40], b"\r\n\r\n\xff" * 9, PAGES[2], PAGES[3]]
    rows, tally = extracted(tmp_path, b"".join(plain), "plain.warc")
    assert {row["alt"] for row in rows} >= {"0", "3"}
    assert tally["damaged"] >= 1


def test_extract_images__reads_what_a_cut_file_holds(tmp_path):
    end = page("http://h/", b"<img src=first.jpg>" + bytes(range(256)) * 400)
    (whole,) = packed(end)
    rows, tally = extracted(tmp_path, packed(PAGES[0])[0] + whole[:-20])
    assert [row["url"] for row in rows] == ["http://h0.example/0.jpg", "http://h/first.jpg"]
    assert tally["cut_records"] == 1


def test_extract_images__endless_damage_ends(tmp_path):
    _, tally = extracted(tmp_path, packed(PAGES[0])[0] + b"\x1f\x8b\x08 " * 100_000)
    assert tally["pages"] == 1
    assert tally["damaged"] >= 1


def test_extract_images__reads_wat(tmp_path):
    links = [
        {"path": "IMG@/src", "url": "a.jpg", "alt": "A"},
        {"path": "IMG@/srcset", "url": "b.jpg 1x, c.jpg 2x"},
        {"path": "IMG@/longdesc", "url": "d.html"},
        {"path": "A@/href", "url": "e.jpg"},
        {"path": "IMG@/src", "url": 5, "alt": []},
        {"path": None},
        "nonsense",
    ]
    pages = [wat("http://h/dir/page", links), wat("http://h/dir/page", links[:1], "/base/")]
    rows, _ = extracted(tmp_path, b"".join(packed(info(), *pages)), "a.warc.wat.gz")
    assert [(row["url"], row["alt"]) for row in rows] == [
        ("http://h/dir/a.jpg", "A"),
        ("http://h/dir/b.jpg", None),
        ("http://h/dir/c.jpg", None),
        ("http://h/base/a.jpg", "A"),
    ]
    assert rows[0]["page"] == "http://h/dir/page"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["Links", "Head", "Base", "path", "url", "alt"]) | st.text(max_size=4),
            inner | st.sampled_from(["IMG@/src", "IMG@/srcset", "http://[", "\ud800.jpg"]),
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(JSON)
@settings(max_examples=200, deadline=None)
def test_images_of_wat__of_nonsense_raises_nothing(html):
    envelope = {"Payload-Metadata": {"HTTP-Response-Metadata": {"HTML-Metadata": html}}}
    for image in images_of_wat(json.dumps({"Envelope": envelope}).encode(), "http://h/"):
        (image.url + (image.alt or "")).encode()
    images_of_wat(json.dumps(html).encode(), "http://h/")


def test_images_of_wat__deep_nesting_is_nonsense():
    assert images_of_wat(b"[" * 1_000_000, "http://h/") == []


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_extract_images__mutated_archives_end_with_a_table(tmp_path_factory, data):
    plain = data.draw(st.booleans())
    records = [*PAGES[:3], wat("http://h/", [{"path": "IMG@/src", "url": "w.jpg"}])]
    raw = bytearray(b"".join(records if plain else packed(*records)))
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(raw) - 1))
        cut = data.draw(st.integers(0, 40))
        raw[start : start + cut] = data.draw(st.binary(max_size=20))
        raw = raw or bytearray(b"W")
    name = "m.warc" if plain else "m.warc.gz"
    rows, tally = extracted(tmp_path_factory.mktemp("mutated"), bytes(raw), name)
    assert tally["images"] == len(rows)


def test_archive_files__finds_them_in_folders(tmp_path):
    for name in ("b.warc.gz", "a.warc", "x/c.warc.wat.gz", "list.txt", "d.wat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [file.removeprefix(f"{tmp_path}/") for file in archive_files(str(tmp_path))]
    assert found == ["a.warc", "b.warc.gz", "d.wat", "x/c.warc.wat.gz"]
    with pytest.raises(ConfigError, match=r"no web archives there; they end in \.warc or \.wat"):
        archive_files(str(tmp_path / "list.txt"))


def test_extract_images__without_the_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastwarc.warc", None)
    with pytest.raises(ConfigError, match=r"pip install 'lvd-curate\[warc\]'"):
        extracted(tmp_path, PAGES[0], "a.warc")
