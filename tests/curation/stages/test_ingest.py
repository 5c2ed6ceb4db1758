import bz2
import gzip
import importlib.util
import io
import json
import lzma
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from web_archives import packed, page, wat

from curation.config import parse_settings
from curation.errors import ConfigError, CurateError, EngineError, SchemaError, StageError
from curation.exchange import Exchange
from curation.pool import Pool
from curation.schema import make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.ingest import Ingest
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


URLS = [f"http://host{i % 7}.example/{i}.jpg" for i in range(50)]


def ingest(tmp_path, name="out", workers=1, **settings):
    folder = StageFolder(str(tmp_path / name), "ingest")
    return run_stage(
        Ingest(**settings), StageInputs(Pool("pool", {})), folder, LocalEngine(workers), Silent()
    )


def write_urls(path, urls, **columns):
    pq.write_table(pa.table({"url": urls, **columns}), path)
    return str(path)


def test_ingest__duplicates_and_bad_urls_are_accounted_for(tmp_path):
    urls = [*URLS, "HTTP://HOST1.example:80/1.jpg#top", "ftp://host/a", None, "http://"]
    record, outputs = ingest(
        tmp_path, urls=write_urls(tmp_path / "u.parquet", urls), rows_per_shard=9
    )
    assert record.dropped == {"bad_source": 3, "duplicate_source": 1}
    assert (record.rows_in, record.rows_out) == (54, 50)
    rows = outputs["rows"].read()
    assert sorted(rows["source"].to_pylist()) == sorted(URLS)
    assert rows["id"].to_pylist() == sorted(make_id(url) for url in URLS)
    assert outputs["rows"].num_shards == 6


def test_ingest__content_is_free_of_shards_order_and_workers(tmp_path):
    one = write_urls(tmp_path / "one.parquet", URLS, alt=[f"a{i % 3}" for i in range(50)])
    (tmp_path / "many").mkdir()
    table = pq.read_table(one)
    for i, part in enumerate([table.slice(30), table.slice(0, 30)]):
        pq.write_table(part, tmp_path / "many" / f"{i}.parquet", row_group_size=7)
    first, _ = ingest(tmp_path, "a", urls=one, rows_per_shard=50)
    second, _ = ingest(tmp_path, "b", 2, urls=str(tmp_path / "many"), rows_per_shard=8)
    assert first.outputs == second.outputs


PACKED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
KINDS = ["csv", "tsv", "jsonl", "txt", "txt.gz", "csv.bz2", "jsonl.xz", "tsv.zst"]


@pytest.mark.parametrize("kind", KINDS)
def test_ingest__reads_text_lists(tmp_path, kind):
    name, _, packing = kind.partition(".")
    separator = {"csv": ",", "tsv": "\t"}.get(name)
    if separator:
        lines = [f"url{separator}alt", *(f"{url}{separator}x" for url in URLS)]
    elif name == "jsonl":
        lines = [json.dumps({"url": url, "alt": "x"}) for url in URLS]
    else:
        lines = URLS
    data = "\n".join(lines).encode()
    (tmp_path / f"list.{kind}").write_bytes(PACKED[packing](data) if packing else data)
    record, outputs = ingest(tmp_path, urls=str(tmp_path / f"list.{kind}"))
    assert record.rows_out == 50
    alt = set(outputs["rows"].read()["alt"].to_pylist())
    assert alt == ({None} if kind.startswith("txt") else {"x"})


TEXTS = {
    "a.csv": b"url,alt\nhttp://h/1,x\nhttp://h/2,caf\xe9\n",
    "B.TSV.GZ": gzip.compress(b'url\talt\nhttp://h/3\t"x\nhttp://h/4\ty\n'),
    "c.jsonl": b'{"url": "http://h/5", "w": 1}\n{"url": "http://h/6", "w": "n/a"}\nnone\n',
    "d.ndjson.zst": zstd(b'{"url": "http://h/7"}\n'),
    "sub/e.txt": b"\xef\xbb\xbfhttp://h/8\r\n\r\nhttp://h/1\r\n",
}
EMPTY = {"f.csv": b"", "g.csv": b"url,alt\n", "h.jsonl": b"", "i.txt.gz": b"", "j.parquet": b""}
NO_LISTS = {
    "._a.csv": b"\0\5\26\7Mac OS X",
    "_SUCCESS": b"",
    ".f.parquet.crc": b"crc",
    "_temporary/0/k.csv": b"url\nhttp://h/9\n",
    "README.md": b"A list",
}


def folder_of(path, *kinds: dict[str, bytes]) -> str:
    for name, data in (pair for kind in kinds for pair in kind.items()):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return str(path)


def test_ingest__reads_a_folder_of_lists_of_all_kinds(tmp_path, caplog):
    folder = folder_of(tmp_path / "lists", TEXTS, EMPTY, NO_LISTS)
    write_urls(tmp_path / "lists" / "L.PARQUET", ["http://h/10"])
    pq.ParquetWriter(tmp_path / "lists" / "m.parquet", pa.schema([("url", pa.string())])).close()
    record, outputs = ingest(tmp_path, urls=folder, rows_per_shard=3)
    sources = outputs["rows"].read()["source"].to_pylist()
    assert sorted(sources) == sorted(f"http://h/{i}" for i in (*range(1, 9), 10))
    assert (record.rows_in, record.figures["listed_rows"]) == (11, 11)
    assert record.dropped == {"bad_source": 1, "duplicate_source": 1}
    odd = {"left_out_files": 5, "empty_lists": 4, "unreadable_rows": 1, "blank_lines": 1}
    assert record.figures.items() >= {"input_files": 12, "repaired_values": 1, **odd}.items()
    assert f"1 in {folder}/c.jsonl, the first in line 3 is no JSON object" in caplog.text
    again, _ = ingest(tmp_path, "again", 2, urls=folder, rows_per_shard=100)
    assert again.outputs == record.outputs


def test_ingest__content_is_free_of_how_a_text_is_cut(tmp_path):
    lines = [f"{url}\t{i % 3}" for i, url in enumerate([*URLS, *URLS[:9], "no url"])] + ["ragged"]
    whole = {"a.tsv": "\n".join(["url\talt", *lines]).encode()}
    parts = {f"{i}.tsv": "\n".join(["url\talt", *lines[i::3]]).encode() for i in range(3)}
    first, _ = ingest(tmp_path, "a", urls=folder_of(tmp_path / "whole", whole))
    second, _ = ingest(tmp_path, "b", urls=folder_of(tmp_path / "parts", parts))
    assert first.outputs == second.outputs
    assert first.dropped == {"bad_source": 2, "duplicate_source": 9}


@pytest.mark.parametrize("files", [EMPTY, {"a.csv": b"url\n\n"}])
def test_ingest__says_that_all_lists_are_empty(tmp_path, files):
    folder = folder_of(tmp_path / "lists", files)
    for max_rows in (None, 10):
        with pytest.raises(StageError, match="lists: no rows there, only empty files"):
            ingest(tmp_path, f"out-{max_rows}", urls=folder, max_rows=max_rows)


@pytest.mark.parametrize(
    ("name", "data", "settings", "said"),
    [
        ("a.csv", b'url,alt\nhttp://h/1,"x\nhttp://h/2,y\n', {}, "a.csv: line 2: a quoted field"),
        ("a.csv.gz", gzip.compress(b"url\n" * 99, mtime=0)[:-9], {}, "a.csv.gz: ends early"),
        ("a.parquet.gz", b"", {}, "a.parquet.gz: Parquet is compressed inside; unpack the file"),
        ("a.tsv", b"x\thttp://h/1\n", {}, r"has no header.*--columns alt,url"),
        ("a.txt", b"http://h/1\n", {"columns": ("url",)}, "'columns' is for CSV and TSV lists"),
        ("a.csv", b"url\nhttp://h/1\n", {"alt_column": "text"}, "no column 'text'; found: url"),
    ],
)
def test_ingest__lists_that_cannot_be_read_end_in_one_line(tmp_path, name, data, settings, said):
    folder_of(tmp_path, {name: data})
    with pytest.raises(CurateError, match=said) as raised:
        ingest(tmp_path, urls=str(tmp_path / name), **settings)
    assert not isinstance(raised.value, EngineError)  # not tried again


def test_ingest__headerless_lists(tmp_path):
    cc3m = {"a.tsv": b'a "photo"\thttp://h/1\nanother\thttp://h/2\n'}
    folder = folder_of(tmp_path / "lists", cc3m)
    _, outputs = ingest(tmp_path, urls=folder, columns=("alt", "url"))
    rows = {row["source"]: row["alt"] for row in outputs["rows"].read().to_pylist()}
    assert rows == {"http://h/1": 'a "photo"', "http://h/2": "another"}
    with pytest.raises(ConfigError, match="'columns' names a column twice"):
        parse_settings(Ingest, {"urls": "a.tsv", "columns": ["url", "url"]}, "r.yaml")


def test_ingest__parquet_values_of_other_types(tmp_path):
    raw = pa.array([b"ok", b"caf\xe9", None])
    columns = {
        "alt": pa.array([{"en": "x"}, {"en": None}, None]),
        "page": raw.dictionary_encode(),
        "license": pa.array([1, None, 3]),
    }
    urls = write_urls(tmp_path / "u.parquet", [f"http://h/{i}" for i in range(3)], **columns)
    _, outputs = ingest(tmp_path, urls=urls)
    rows = sorted(outputs["rows"].read().to_pylist(), key=lambda row: row["source"])
    assert [row["alt"] for row in rows] == ['{"en": "x"}', '{"en": null}', None]
    assert [row["page"] for row in rows] == ["ok", "caf%E9", None]
    assert [row["license"] for row in rows] == ["1", None, "3"]
    twice = pa.table([pa.array(["http://h/1"])] * 3, names=["url", "alt", "alt"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(SchemaError, match=r"twice\.parquet: column 'alt' is there 2 times"):
        ingest(tmp_path, "twice", urls=str(tmp_path / "twice.parquet"))
    with pytest.raises(SchemaError, match=r"n\.parquet: column 'url' is int64; text is expected"):
        ingest(tmp_path, "number", urls=write_urls(tmp_path / "n.parquet", [1]))


def test_ingest__lists_whose_names_are_no_utf8(tmp_path):
    folder = os.fsencode(
        folder_of(tmp_path / "lists", {"a.csv": b"url\nhttp://h/1\nhttp://h/2,3\n"})
    )
    write_urls(tmp_path / "lists" / "b.parquet", ["http://h/3"])
    for name in (b"a.csv", b"b.parquet"):
        os.rename(folder + b"/" + name, folder + b"/caf\xe9" + name)  # noqa: PTH104
    assert ingest(tmp_path, urls=str(tmp_path / "lists"))[0].rows_out == 2


def test_ingest__goes_on_where_a_killed_one_read_lists(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "lists", TEXTS)
    whole, _ = ingest(tmp_path, "whole", urls=folder)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Exchange, "run", interrupt)
        ingest(tmp_path, urls=folder)
    written = sorted((tmp_path / "out").rglob("links/*"))
    assert len(written) == 2 * len(TEXTS)
    monkeypatch.setattr("curation.stages.ingest.rewrite", interrupt)  # nothing is read again
    record, _ = ingest(tmp_path, urls=folder)
    assert (record.outputs, record.figures) == (whole.outputs, whole.figures)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_ingest__a_folder_named_as_a_list(tmp_path):
    folder = folder_of(tmp_path / "urls.parquet", {"_SUCCESS": b""})
    write_urls(tmp_path / "urls.parquet" / "part-0.parquet", URLS)
    assert ingest(tmp_path, urls=folder)[0].rows_out == 50


def img2dataset_output(folder, kind: str, host: str = "h") -> list[bytes]:
    """What img2dataset's own writers make of four images, one of which failed."""
    (package,) = importlib.util.find_spec("img2dataset").submodule_search_locations
    spec = importlib.util.spec_from_file_location("img2dataset_writer", f"{package}/writer.py")
    writer = importlib.util.module_from_spec(spec)  # alone: the package brings torch along
    spec.loader.exec_module(writer)
    classes = {
        "files": writer.FilesSampleWriter,
        "webdataset": writer.WebDatasetSampleWriter,
        "parquet": writer.ParquetSampleWriter,
    }
    known = pa.schema([("url", pa.string()), ("key", pa.string()), ("status", pa.string())])
    folder.mkdir(parents=True)
    images = [jpeg(10), jpeg(90), None, jpeg(200)]
    out = classes[kind](0, str(folder), False, 5, known, "jpg")
    for i, image in enumerate(images):
        status = "success" if image else "failed_to_download"
        key = f"0000000{i}"
        meta = {"url": f"http://{host}/{i}.jpg", "key": key, "status": status}
        out.write(image, key, None, meta)
    out.close()
    (folder / "00000_stats.json").write_text("{}")
    return [image for image in images if image]


@pytest.mark.parametrize("kind", ["files", "webdataset", "parquet"])
def test_ingest__reads_what_img2dataset_wrote(tmp_path, kind):
    images = img2dataset_output(tmp_path / "old", kind)
    record, outputs = ingest(tmp_path, images=str(tmp_path / "old"))
    found = [raw for raw in outputs["raw"].read()["raw"].to_pylist() if raw]
    assert sorted(found) == sorted(images)
    assert record.rows_out == 3
    assert record.dropped == ({"empty": 1} if kind == "parquet" else {})
    rows = outputs["rows"].read()
    assert {f"http://h/{i}.jpg" for i in (0, 1, 3)} <= set(rows["source"].to_pylist())
    assert make_id("http://h/3.jpg") in rows["id"].to_pylist()


def test_ingest__two_outputs_of_img2dataset_keep_their_rows(tmp_path):
    for name in ("a", "b"):
        img2dataset_output(tmp_path / "old" / name, "parquet", host=name)
    record, _ = ingest(tmp_path, images=str(tmp_path / "old"))
    assert (record.rows_out, record.dropped) == (6, {"empty": 2})


def test_ingest__reads_a_tar_that_ends_early(tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for i in range(3):
            image = jpeg(i)
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
    whole = (tmp_path / "tars" / "0.tar").read_bytes()
    (tmp_path / "tars" / "0.tar").write_bytes(whole[: 2 * (512 + 1024) + 300])
    record, outputs = ingest(tmp_path, images=str(tmp_path / "tars"))
    assert record.rows_out == 2
    assert sorted(outputs["raw"].read()["raw"].to_pylist()) == sorted([jpeg(0), jpeg(1)])


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_ingest__images_from_folder_tar_and_parquet(tmp_path):
    images = {f"d/{i}.jpg": jpeg(i * 20) for i in range(9)}
    for name, data in images.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        tar.add(tmp_path / "folder" / "d", "d")
    (tmp_path / "tables").mkdir()
    pq.write_table(
        pa.table({"key": list(images), "jpg": list(images.values())}),
        tmp_path / "tables" / "0.parquet",
    )
    for kind in ("folder", "tars", "tables"):
        record, outputs = ingest(
            tmp_path, f"out-{kind}", images=str(tmp_path / kind), source_set="s"
        )
        assert record.rows_out == 9
        assert sorted(outputs["raw"].read()["raw"].to_pylist()) == sorted(images.values())
    ids = set(
        ingest(tmp_path, images=str(tmp_path / "folder"), source_set="s")[1]["rows"]
        .read()["id"]
        .to_pylist()
    )
    assert ids == {make_id(f"s/{name}") for name in images}


def test_ingest__wrong_input_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="either 'urls', 'archives' or 'images'"):
        parse_settings(Ingest, {}, "r.yaml")
    with pytest.raises(ConfigError, match=r"no such list|no lists"):
        ingest(tmp_path, urls=str(tmp_path / "no.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no images"):
        ingest(tmp_path, images=str(tmp_path / "empty"))
    with pytest.raises(SchemaError, match="no column 'link'; found: url"):
        ingest(tmp_path, urls=write_urls(tmp_path / "u.parquet", URLS), url_column="link")


def test_ingest__sample_is_uniform_and_the_same_every_time(tmp_path):
    urls = write_urls(tmp_path / "u.parquet", [f"http://h/{i}" for i in range(4000)])
    whole, _ = ingest(tmp_path, "whole", urls=urls)
    record, outputs = ingest(tmp_path, "one", urls=urls, max_rows=1000)
    again, _ = ingest(tmp_path, "two", urls=urls, max_rows=1000, rows_per_shard=100)
    assert record.outputs == again.outputs
    assert 900 < record.rows_in < 1100
    assert record.figures["listed_rows"] == whole.rows_in == 4000
    first_bytes = np.array([int(one[:2], 16) for one in outputs["rows"].read()["id"].to_pylist()])
    assert 100 < np.median(first_bytes) < 156


def test_ingest__web_archives(tmp_path):
    (tmp_path / "crawl").mkdir()
    pages = [
        page(f"http://h{i}.example/", b'<img src=%d.jpg alt=A><img src="/logo.png">' % i)
        for i in range(8)
    ]
    whole, cut = packed(*pages[:4]), packed(*pages[4:])
    (tmp_path / "crawl" / "a.warc.gz").write_bytes(b"".join(whole))
    (tmp_path / "crawl" / "b.warc.gz").write_bytes(b"".join([cut[0], cut[1][:40], *cut[2:]]))
    links = [{"path": "IMG@/src", "url": "http://h0.example/0.jpg"}]
    (tmp_path / "crawl" / "c.wat.gz").write_bytes(packed(wat("http://x.example/", links))[0])
    record, outputs = ingest(tmp_path, archives=str(tmp_path / "crawl"), rows_per_shard=4)
    assert (record.rows_in, record.rows_out) == (15, 14)
    assert record.dropped == {"duplicate_source": 1}
    figures = record.figures
    assert (figures["pages"], figures["images"], figures["damaged"]) == (8, 15, 1)
    rows = {row["source"]: row for row in outputs["rows"].read().to_pylist()}
    found = rows["http://h1.example/1.jpg"]
    assert (found["alt"], found["page"]) == ("A", "http://h1.example/")
    assert found["crawled_at"].isoformat() == "2024-05-18T01:58:10+00:00"
    again, _ = ingest(tmp_path, "again", 2, archives=str(tmp_path / "crawl"), rows_per_shard=100)
    assert again.outputs == record.outputs


def test_ingest__files_that_are_no_archives(tmp_path):
    (tmp_path / "a.warc").write_bytes(b"<html>" * 100)
    with pytest.raises(StageError, match="are these WARC files"):
        ingest(tmp_path, archives=str(tmp_path / "a.warc"))


def test_ingest__lists_drop_rows_with_a_reason(tmp_path):
    (tmp_path / "adult").mkdir()
    (tmp_path / "adult" / "domains").write_text("host3.example\n")
    (tmp_path / "own.txt").write_text("host4.example/4.jpg\n*.pages.example\n")
    pages = [None] * 49 + ["http://a.pages.example/"]
    urls = write_urls(tmp_path / "u.parquet", [*URLS, *URLS[48:]], page=[*pages, None, None])
    lists = {"blocked": {"ut1": str(tmp_path), "own": str(tmp_path / "own.txt")}}
    record, outputs = ingest(tmp_path, urls=urls, lists=lists)
    listed = {"url_list:own": 2, "url_list:ut1/adult": 7}
    assert record.dropped == {"duplicate_source": 1, **listed}
    left = outputs["rows"].read()["source"].to_pylist()
    assert not [url for url in left if "host3" in url or url.endswith("/4.jpg")]
    assert URLS[49] in left  # listed for one page, it is also shown by another
    decisions = outputs["decisions"].read().to_pylist()
    reasons = {row["id"]: row["reason"] for row in decisions if row["reason"]}
    assert reasons[make_id(URLS[3])] == "url_list:ut1/adult"
