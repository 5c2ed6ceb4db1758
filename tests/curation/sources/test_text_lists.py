import contextlib
import csv
import io
import json

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import DatasetError, LedgerError, SchemaError
from curation.sources.columns import TEXTS
from curation.sources.text_lists import UNREADABLE, TextList, rewrite

SAME = {name: name for name in TEXTS.names}
URL = "http://h.example/{}.jpg"


def read(data: bytes, name: str, block: int = 1 << 20, header=(), **columns):
    """Rows and tally of a list that comes in blocks of some bytes."""
    reader = TextList(name, {**SAME, **columns}, header)
    blocks = (data[start : start + block] for start in range(0, len(data), block))
    rows = [row for table in reader.tables(blocks) for row in table.to_pylist()]
    return rows, reader.tally


def pairs(data: bytes, name: str, **settings):
    return [(row["url"], row["alt"]) for row in read(data, name, **settings)[0]]


def error(data: bytes, name: str, **settings) -> str:
    with pytest.raises((SchemaError, DatasetError)) as raised:
        read(data, name, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- the csv module as the judge ----------------------------------------------------------------

FIELDS = st.text(st.sampled_from('ab",\r\n é\0\ufeff'), max_size=6)
ROWS = st.lists(st.tuples(FIELDS, FIELDS), max_size=8)


WAYS = [("\r\n", csv.QUOTE_MINIMAL), ("\n", csv.QUOTE_ALL), ("\r", csv.QUOTE_ALL)]


def written(rows, **settings) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, **settings).writerows([("url", "alt"), *rows])
    return text.getvalue()


@settings(deadline=None)
@given(
    ROWS,
    st.sampled_from(WAYS),
    st.sampled_from([1, 2, 3, 1000]),
    st.booleans(),
)
def test_tables__of_valid_csv_are_the_rows_that_were_written(rows, way, block, mark):
    text = written(rows, lineterminator=way[0], quoting=way[1])
    data = text.encode("utf-8-sig" if mark else "utf-8")
    assert pairs(data, "a.csv", block=block) == rows


@settings(deadline=None)
@given(st.text(st.sampled_from('ab",,\r\n\n é\0'), max_size=40), st.sampled_from([1, 3, 1000]))
def test_tables__of_any_csv_are_the_rows_of_the_csv_module(text, block):
    data = f"url,alt\n{text}".encode()
    _, *records = csv.reader(io.StringIO(f"url,alt\n{text}", newline=""))
    try:
        rows, tally = read(data, "a.csv", block=block)
    except SchemaError:
        quoted = any("\n" in field or "\r" in field for record in records for field in record)
        broken = all(len(record) != 2 for record in records if record)
        assert quoted or broken or not text.endswith(("\r", "\n"))
        return
    # A record of white space alone is a blank line, and none of these.
    records = [one for one in records if one and (len(one) > 1 or one[0].strip() or '"' in text)]
    good = [tuple(record) for record in records if len(record) == 2]
    read_well = [row for row in rows if not row["url"].startswith(UNREADABLE)]
    assert [(row["url"], row["alt"]) for row in read_well] == good
    assert tally.unreadable_rows == len(rows) - len(good)


@settings(deadline=None)
@given(st.text(st.sampled_from("ab\"'\t\t\r\n\n é\0"), max_size=40), st.sampled_from([1, 3, 1000]))
def test_tables__of_tsv_have_a_row_a_line_whatever_quotes_it_holds(text, block):
    data = f"url\talt\nu\tx\n{text}".encode()
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    rows, tally = read(data, "a.tsv", block=block)
    assert len(rows) == 1 + sum(bool(line.strip()) for line in lines)
    good = [tuple(line.split("\t")) for line in lines if line.strip() and line.count("\t") == 1]
    read_well = [row for row in rows[1:] if not row["url"].startswith(UNREADABLE)]
    assert [(row["url"], row["alt"]) for row in read_well] == good
    assert tally.unreadable_rows == len(rows) - 1 - len(good)


def test_tables__of_csv_of_many_blocks(tmp_path):
    rows = [(URL.format(i), 'a, "b"\n' * (i % 40) + f"end {i}") for i in range(60_000)]
    data = written(rows).encode()
    assert len(data) > 8 << 20
    (tmp_path / "a.csv").write_bytes(data)
    tally = rewrite(str(tmp_path / "a.csv"), str(tmp_path / "a.parquet"), SAME, ())
    table = pq.read_table(tmp_path / "a.parquet")
    assert list(zip(table["url"].to_pylist(), table["alt"].to_pylist(), strict=True)) == rows
    assert (tally["rows"], tally["lines_in_fields"]) == (60_000, sum(i % 40 for i in range(60_000)))


# --- quotes that stand alone --------------------------------------------------------------------


def stray(places, rows=200, sep=",", mark='"', end=""):
    lines = [
        f"{URL.format(i)}{sep}{mark if i in places else ''}photo {i}{end if i in places else ''}"
        for i in range(rows)
    ]
    return "\n".join([f"url{sep}alt", *lines, ""]).encode()


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (stray({7}), 9),
        (stray({199}), 201),
        (stray(set(range(7, 200, 20))), 9),  # the next one closes it, and text follows
        (stray({7}) + b'http://h.example/,5"\n', 9),  # the last line closes it as it should
        (b'url,alt\nu,"two\nlines"\nu,"open\n', 4),
        (b'alt,page,url\n"one\ntwo","open\n\nthree,u\n', 3),  # the second field of a record
        (b'url,"alt\nu,x\n', 1),
        (b'url,alt\nu,"a"b,"open\nu,x\n', 2),
        (b'url,alt\nu,"two\nlines",three\n', 2),
        (b'url,alt\nu,"cut off', 2),
    ],
)
def test_tables__of_csv_with_an_open_quote_names_its_line(data, line):
    assert f"a.csv: line {line}: a quoted field begins here" in error(data, "a.csv")


def test_tables__of_csv_with_an_open_quote_does_not_read_on_for_ever(monkeypatch):
    monkeypatch.setattr("curation.sources.text_lists._MAX_LINE_BYTES", 1000)
    limit = csv.field_size_limit()
    assert "line 2: a quoted field begins here" in error(stray({0}, 10_000), "a.csv")
    assert csv.field_size_limit() == limit
    assert "line 3 is longer than" in error(b"url\nu\n" + b"x" * 2000, "a.csv", block=100)


def test_tables__of_csv_take_quotes_inside_fields_as_they_are():
    data = b'url,alt\nu,5" wide\nu,"a"b\nu,""\nu,"say ""hi"""\n'
    assert pairs(data, "a.csv") == [("u", '5" wide'), ("u", "ab"), ("u", ""), ("u", 'say "hi"')]


def test_tables__of_csv_keep_captions_that_speak_of_urls():
    caption = "see\nhttp://h.example/a, and\nhttp://h.example/b\nmore, or less"
    assert pairs(written([("u", caption)]).encode(), "a.csv") == [("u", caption)]


# --- accounts -----------------------------------------------------------------------------------


class Forgetful(TextList):
    def _tsv_records(self, text):
        yield from (record for record in super()._tsv_records(text) if record[0] != ["lost"])


def test_tables__that_lose_a_line_end_in_an_error_with_the_file():
    with pytest.raises(LedgerError, match=r"a\.tsv: has 4 lines, 3 were read"):
        list(Forgetful("a.tsv", SAME).tables([b"url\nu1\nlost\nu2\n"]))


# --- rows that cannot be read -------------------------------------------------------------------


def test_tables__of_ragged_rows_shift_nothing():
    for sep, name in ((",", "a.csv"), ("\t", "a.tsv")):
        lines = ["alt,url", "x,u1", "u2", "x,u3,more", "", " ", "y,u4"]
        rows, tally = read("\n".join(lines).replace(",", sep).encode(), name)
        assert [row["url"] for row in rows] == [
            *("u1", f"{UNREADABLE}u2", f"{UNREADABLE}x{sep}u3{sep}more", "u4")
        ]
        assert (tally.unreadable_rows, tally.blank_lines) == (2, 2)
        assert tally.first_unreadable == "line 3 has 1 fields, not 2"


def test_tables__of_lists_without_a_row_that_can_be_read():
    assert error(b"url,alt\n\n1\n2\n", "a.csv") == (
        "a.csv: no row can be read: line 3 has 1 fields, not 2"
    )
    assert "no row can be read: line 1 is no JSON object" in error(b'[\n{"url": 5},\n', "a.jsonl")


@pytest.mark.parametrize("line", ["{", "[1]", "null", '"u"', "[" * 100_000, '{"url": "u"} x'])
def test_tables__of_json_lines_of_which_one_is_none(line):
    rows, tally = read(f'{{"url": "a"}}\n{line}\n\n{{"url": "b"}}'.encode(), "a.jsonl")
    assert [row["url"] for row in rows] == ["a", f"{UNREADABLE}{line[:1000]}", "b"]
    assert (tally.unreadable_rows, tally.blank_lines) == (1, 1)
    assert tally.first_unreadable == "line 2 is no JSON object"


# --- values -------------------------------------------------------------------------------------


def test_tables__of_json_lines_leave_other_columns_alone():
    rows = [
        *({"url": "u0", "width": 5}, {"url": "u1", "width": "n/a"}, {"url": "u2", "width": [{}]}),
        *({"url": "u3", "html": "x" * 3_000_000, "alt": "y"}, {"url": "u4", "\ud83d": "\ud83d"}),
    ]
    lines = [*map(json.dumps, rows), '{"url": "no", "url": "u5", "n": NaN, "n": 1e999}']
    data = "\n".join(lines).encode()
    assert pairs(data, "a.jsonl") == [
        *(("u0", None), ("u1", None), ("u2", None), ("u3", "y"), ("u4", None), ("u5", None))
    ]


def test_tables__of_json_values_that_are_no_text():
    values = ["x", None, 5, 0.5, True, ["a", None], {"en": "é"}, "cut \ud83d", "\ud83d\ude00"]
    data = "\n".join(json.dumps({"url": "u", "alt": value}) for value in values).encode()
    texts = ["x", None, "5", "0.5", "true", '["a", null]', '{"en": "é"}', "cut �", "😀"]
    assert [alt for _, alt in pairs(data, "a.jsonl")] == texts


def test_tables__of_bytes_that_are_no_utf8():
    data = b"url,alt,page\nhttp://h/caf\xe9,caf\xe9 \x93x\x94,p\nu,ok \xc3\xa9,http://h/\xff\n"
    rows, tally = read(data, "a.csv")
    assert [(row["url"], row["alt"], row["page"]) for row in rows] == [
        ("http://h/caf%E9", "café “x”", "p"),
        ("u", "ok é", "http://h/%FF"),
    ]
    assert tally.repaired_values == 3


@settings(deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["a.csv", "a.tsv", "a.txt", "a.jsonl"]))
def test_tables__of_any_bytes_are_rows_or_one_error(data, name):
    head = {"a.csv": b"url,alt\n", "a.tsv": b"url\talt\n"}.get(name, b"")
    with contextlib.suppress(SchemaError, DatasetError):
        rows, tally = read(head + data, name, block=7)
        assert len(rows) == tally.rows


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt"])
def test_tables__of_a_byte_order_mark(name):
    text = {"a.csv": "url\nu\n", "a.tsv": "url\nu\n", "a.jsonl": '{"url": "u"}\n', "a.txt": "u\n"}
    for block in (1, 2, 100):
        assert pairs(text[name].encode("utf-8-sig"), name, block=block) == [("u", None)]
    assert "is UTF-16 or UTF-32; lists are UTF-8" in error(text[name].encode("utf-16"), name)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b"url,alt\n", b"url,alt"])
def test_tables__of_empty_parts(data):
    assert read(data, "a.csv")[0] == []


def test_tables__of_text_end_lines_with_lf_crlf_or_cr():
    for end in ("\n", "\r\n", "\r"):
        data = f"a{end} b {end}{end}\t{end}c".encode()
        for block in (1, 2, 100):
            assert [url for url, _ in pairs(data, "a.txt", block=block)] == ["a", "b", "c"]
    assert pairs("a\u2028b\x0bc\n".encode(), "a.txt") == [("a\u2028b\x0bc", None)]


# --- columns ------------------------------------------------------------------------------------


def test_tables__of_lists_without_a_header():
    cc3m = b'a "photo"\thttp://h/1\nanother\thttp://h/2\n'
    assert pairs(cc3m, "a.tsv", header=("alt", "url")) == [
        *(("http://h/1", 'a "photo"'), ("http://h/2", "another"))
    ]
    assert error(cc3m, "a.tsv") == (
        'a.tsv: has no header, its first line is a row: a "photo", http://h/1; name its columns in '
        "order with columns: [alt,url], or --columns alt,url"
    )
    assert "--columns url,alt,column3" in error(b"http://h/1,x,5\n", "a.csv")
    assert pairs(b'u,"a\nb"\n', "a.csv", header=("url", "alt")) == [("u", "a\nb")]


def test_tables__of_lists_whose_columns_have_other_names():
    data = b"URL,TEXT,image_url\nu,x,i\n"
    assert pairs(data, "a.csv", url="URL", alt="TEXT") == [("u", "x")]
    assert error(data, "a.csv") == (
        "a.csv: no column 'url'; found: URL, TEXT, image_url; name it with url_column, such as "
        "URL, image_url"
    )
    assert "no column 'CAPTION'" in error(data, "a.csv", url="URL", alt="CAPTION")
    assert "column 'url' is there 2 times" in error(b"url,url\na,b\n", "a.csv")
    assert pairs(b"url,x,x\nu,1,2\n", "a.csv") == [("u", None)]
    latin = b"url,libell\xe9\nu,x\n"
    assert pairs(latin, "a.csv", alt="libellé") == [("u", "x")]
    lines = b'{"link": "u", "b": 1}\n{"b": 2}\n'
    assert "a.jsonl: no column 'url'; found: b, link; name it with url_column, such as link" in (
        error(lines, "a.jsonl")
    )
    assert pairs(lines, "a.jsonl", url="link") == [("u", None), (None, None)]
