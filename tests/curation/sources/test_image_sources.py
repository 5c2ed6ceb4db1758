"""One reader: whatever the input, ingest, pretraining, evaluation and embedding see the same."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation import storage
from curation.errors import ConfigError, SchemaError, StorageError
from curation.ledger import StageRecord
from curation.pool import Pool
from curation.sources.images import ImageFiles
from curation.sources.references import REFERENCES, Reference, read_references
from curation.sources.shards import images_below
from curation.stage import StageFolder, StageInputs
from curation.stages.ingest import Ingest
from embedder.errors import ImageError
from pipelines.cli.inputs import images_pool
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, StageRunner, run_stage
from pretrain.sources import open_source
from tests.curation.sources.test_tars import tar_of
from tests.pretrain.small_runs import jpeg, write_shards

Found = dict[str, bytes]


def ingest(tmp_path: Path, images: Path | str, **more: object) -> tuple[StageRecord, Found]:
    """The record, and the bytes of each row by its source."""
    folder = StageFolder(str(tmp_path / f"out-{len(list(tmp_path.iterdir()))}"), "ingest")
    stage = Ingest(images=str(images), **more)  # type: ignore[arg-type]
    inputs = StageInputs(Pool("pool", {}))
    record, outputs = run_stage(stage, inputs, folder, LocalEngine(), Silent())
    rows = outputs["raw"].read()
    return record, dict(zip(rows["source"].to_pylist(), rows["raw"].to_pylist(), strict=True))


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def table(path: Path, /, **columns: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


# --- all see the same ---------------------------------------------------------------------------

JPEGS = [jpeg(i, 24) for i in range(6)]
folders = st.sampled_from(["", "a", "b/c", ".hid", "_u", "__MACOSX", "d.jpg", "run"])
bases = st.sampled_from(
    ["1.jpg", "_2.JPG", "._3.jpg", "4.jpe", "5", "6.txt", "7.heic", "8.avif?x=1", "9.jpg_large"]
)
images = st.integers(0, 5).map(lambda i: JPEGS[i])


def put_file(root: Path, folder: str, base: str, data: bytes) -> None:
    write(root / folder / base, data)


def put_tar(root: Path, folder: str, base: str, data: bytes) -> None:
    members = [(f"x/{base}", data), (f"y{base}.png", data), ("z.jpg", f"x/{base}")]
    write(root / folder / f"{base}.TAR", tar_of(*members))


def put_table(root: Path, folder: str, base: str, data: bytes) -> None:
    table(root / folder / f"{base}.parquet", key=[base, base], image=[data, data])


def put_link(root: Path, folder: str, base: str, data: bytes) -> None:
    write(root.parent / "elsewhere" / folder / base, data)
    (root / "links").mkdir(parents=True, exist_ok=True)
    link = root / "links" / f"to{len(list((root / 'links').iterdir()))}"
    link.symlink_to(root.parent / "elsewhere" / folder)


def put_output(root: Path, folder: str, base: str, data: bytes) -> None:
    write(root / folder / "out" / "raw" / base, data)
    write(root / folder / "out" / "_key.json", b"{}")


Put = Callable[[Path, str, str, bytes], None]
puts: st.SearchStrategy[Put] = st.sampled_from([put_file, put_tar, put_table, put_link, put_output])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(puts, folders, bases, images), max_size=8))
def test_sources__all_see_the_same_images(tmp_path_factory, entries):
    tmp_path = tmp_path_factory.mktemp("layout")
    root = tmp_path / "root"
    write(root / "sure" / "0.jpg", JPEGS[0])
    for put, folder, base, data in entries:
        if not (root / folder / base).is_dir():
            put(root, folder, base, data)
    _, ingested = ingest(tmp_path, root)
    source = open_source(str(root))
    places = [(shard, row) for shard, size in enumerate(source.sizes) for row in range(size)]
    assert dict(source.read(*place) for place in places) == ingested
    assert len(places) == len(ingested)
    assert [source.name(*place) for place in places] == [source.read(*p)[0] for p in places]
    evaluated = images_below(f"{root}//")
    assert {image.name: image.load() for image in evaluated} == ingested
    pool = images_pool(str(root), str(tmp_path / "embed"), StageRunner(LocalEngine(), Silent()))
    assert sum(pool.shard_rows()) == len(ingested)


# --- tars ---------------------------------------------------------------------------------------


def test_ingest__members_of_tars_are_rows(tmp_path):
    for number in range(4):
        members = [(f"{i}.jpg", JPEGS[i % 6]) for i in range(30)]
        write(tmp_path / "tars" / f"{number}.tar", tar_of(*members))
        for name, data in members:
            write(tmp_path / "files" / f"{number}.tar" / name, data)
    found = [ingest(tmp_path, tmp_path / kind, rows_per_shard=10) for kind in ("tars", "files")]
    assert found[0][0].outputs == found[1][0].outputs
    assert found[0][1] == found[1][1]
    assert [record.figures["listed_rows"] for record, _ in found] == [120, 120]
    assert len(list((tmp_path / "out-2").rglob("rows/shard-*"))) == 12
    drawn = [
        ingest(tmp_path, tmp_path / kind, max_rows=40)[0].rows_in for kind in ("tars", "files")
    ]
    assert drawn[0] == drawn[1]
    assert 20 < drawn[0] < 60


def test_pieces__large_tars_are_cut(tmp_path):
    data = tar_of(*((f"{i}.jpg", b"x") for i in range(9000)))
    write(tmp_path / "t" / "0.tar", data)
    record, found = ingest(tmp_path, tmp_path / "t", rows_per_shard=3000)
    assert (record.rows_in, record.figures["listed_rows"], len(found)) == (9000, 9000, 9000)
    mapped = tmp_path / "out-1" / "_scratch"
    assert not mapped.exists()
    assert len(list((tmp_path / "out-1").rglob("rows/shard-*"))) == 3


def test_ingest__killed_while_headers_are_read_goes_on(tmp_path):
    for number in range(3):
        write(tmp_path / "t" / f"{number}.tar", tar_of(("a.jpg", JPEGS[number])))
    whole, wanted = ingest(tmp_path, tmp_path / "t")
    members = tmp_path / "out-2" / "_scratch" / "links"
    for name in ("000000.parquet", "000000.json"):
        write(members / name, b"")
    (members / "000000.json").unlink()  # not written yet: the file of references does not count
    again, found = ingest(tmp_path, tmp_path / "t")
    assert (again.outputs, found) == (whole.outputs, wanted)


def test_ingest__compressed_tars_are_refused_by_name(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    write(tmp_path / "named" / "0.tar.gz", out.getvalue())
    write(tmp_path / "hidden" / "0.tar", out.getvalue())
    with pytest.raises(ConfigError, match=r"0\.tar\.gz: a compressed tar.*unpack it"):
        ingest(tmp_path, tmp_path / "named")
    for read in (ingest, lambda _, path: open_source(str(path))):
        with pytest.raises(ConfigError, match=r"0\.tar \(gzip\): a compressed tar"):
            read(tmp_path, tmp_path / "hidden")


def test_ingest__tars_that_cannot_be_read_cost_no_others(tmp_path, caplog):
    write(tmp_path / "t" / "0.tar", tar_of(("a.jpg", JPEGS[0])))
    write(tmp_path / "t" / "no.tar", b"no tar" * 300)
    write(tmp_path / "t" / "none.tar", b"")
    write(tmp_path / "t" / "no.parquet", b"PAR1 cut off")
    with (tmp_path / "t" / "sparse.parquet").open("wb") as file:
        file.truncate(30 << 30)
    with (tmp_path / "t" / "sparse.tar").open("wb") as file:
        file.write(tar_of(("b.jpg", JPEGS[1])))
        file.truncate(200 << 20)
    record, found = ingest(tmp_path, tmp_path / "t")
    assert found == {"0.tar/a.jpg": JPEGS[0], "sparse.tar/b.jpg": JPEGS[1]}
    assert record.figures["left_out"] == {"not_a_tar": 1, "not_a_table": 2}
    assert "no.tar: no header of a tar in it" in caplog.text
    assert "no.parquet: not a readable Parquet file" in caplog.text
    source = open_source(str(tmp_path / "t"))
    assert {source.name(shard, 0) for shard in (0, 1)} == set(found)


def test_ingest__names_that_are_no_utf8_are_rows(tmp_path):
    (tmp_path / "d").mkdir()
    with open(os.fsencode(tmp_path / "d") + b"/caf\xe9.jpg", "wb") as file:  # noqa: PTH123
        file.write(JPEGS[0])
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("th\xe9.jpg")
        info.size = len(JPEGS[1])
        tar.addfile(info, io.BytesIO(JPEGS[1]))
    with open(os.fsencode(tmp_path / "d") + b"/\xff.tar", "wb") as file:  # noqa: PTH123
        file.write(out.getvalue())
    _, found = ingest(tmp_path, tmp_path / "d")
    assert found == {"caf\\xe9.jpg": JPEGS[0], "\\xff.tar/th\\xe9.jpg": JPEGS[1]}


# --- Parquet ------------------------------------------------------------------------------------


def test_ingest__parquet_of_hugging_face_spark_and_others(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    structs = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(JPEGS[:3])]
    paths = ("b/3.jpg", "../x.jpg", "/etc/passwd", "a\0.jpg", "gone.jpg")
    beside = [*({"bytes": None, "path": path} for path in paths), None]
    table(tmp_path / "hf" / "a" / "0.parquet", image=pa.array([*structs, *beside], kind))
    write(tmp_path / "hf" / "a" / "b" / "3.jpg", JPEGS[3])
    write(tmp_path / "hf" / "x.jpg", JPEGS[4])
    record, found = ingest(tmp_path, tmp_path / "hf")
    assert record.dropped == {"empty": 4, "unreadable": 1}
    assert found == {
        **{f"a/0.parquet#{i}": JPEGS[i] for i in range(4)},
        "a/b/3.jpg": JPEGS[3],
        "x.jpg": JPEGS[4],
    }
    table(tmp_path / "spark" / "0.parquet", path=["a"], content=[JPEGS[0]])
    assert ingest(tmp_path, tmp_path / "spark")[1] == {"0.parquet#0": JPEGS[0]}
    table(tmp_path / "own" / "0.parquet", photo=[JPEGS[0]], label=[1])
    assert ingest(tmp_path, tmp_path / "own")[1] == {"0.parquet#0": JPEGS[0]}


def test_ingest__image_column_is_asked_for_where_it_is_unclear(tmp_path):
    table(tmp_path / "t" / "0.parquet", small=[JPEGS[0]], large=[JPEGS[1]], image=["0.jpg"])
    with pytest.raises(SchemaError, match=r"columns small, large hold bytes.*image_column"):
        ingest(tmp_path, tmp_path / "t")
    _, found = ingest(tmp_path, tmp_path / "t", image_column="large")
    assert found == {"0.parquet#0": JPEGS[1]}
    with pytest.raises(SchemaError, match=r"no column 'image' of image bytes.*found: small, large"):
        ingest(tmp_path, tmp_path / "t", image_column="image")
    table(tmp_path / "none" / "0.parquet", path=["0.jpg"])
    with pytest.raises(SchemaError, match="no column of image bytes"):
        ingest(tmp_path, tmp_path / "none")


def test_ingest__columns_of_foreign_parquet(tmp_path):
    bad = pa.array([b"http://h/caf\xe9.jpg", None]).cast(pa.string(), safe=False)
    kinds = {"0": bad, "1": pa.array(["http://h/1.jpg", "no url"]).dictionary_encode()}
    for name, urls in kinds.items():
        table(tmp_path / "t" / f"{name}.parquet", id=bad, url=urls, image=JPEGS[:2])
    _, found = ingest(tmp_path, tmp_path / "t")
    assert set(found) == {
        *("http://h/caf%E9.jpg", "0.parquet#1", "http://h/1.jpg", "1.parquet#1"),
    }
    rows = pa.table([JPEGS[:1], JPEGS[:1]], names=["image", "image"])
    (tmp_path / "twice").mkdir()
    pq.write_table(rows, tmp_path / "twice" / "0.parquet")
    with pytest.raises(SchemaError, match="column 'image' is there more than once"):
        ingest(tmp_path, tmp_path / "twice")


@pytest.mark.parametrize("key", ["id", "key"])
def test_ingest__keys_that_start_anew_in_each_file(tmp_path, key):
    for number, name in enumerate("ab"):
        data = JPEGS[3 * number : 3 * number + 3]
        table(tmp_path / "t" / f"{name}.parquet", **{key: [0, 1, 2], "image": data})
    record, found = ingest(tmp_path, tmp_path / "t")
    assert (record.dropped, sorted(found.values())) == ({}, sorted(JPEGS))


def test_ingest__names_of_rows_do_not_depend_on_row_groups(tmp_path):
    for name, size in (("one", 2), ("two", 5)):
        (tmp_path / name).mkdir()
        ids = ["0" * 32, "f" * 32, "x", None, "1" * 31]
        rows = pa.table({"id": ids, "image": JPEGS[:5]})
        pq.write_table(rows, tmp_path / name / "a.parquet", row_group_size=size)
    found = [ingest(tmp_path, tmp_path / name)[1] for name in ("one", "two")]
    assert found[0] == found[1]
    assert set(found[0]) == {"0" * 32, "f" * 32, *(f"a.parquet#{i}" for i in (2, 3, 4))}


# --- sets of our own, paths, reading ------------------------------------------------------------


def test_ingest__packed_shards_a_work_folder_and_a_manifest(tmp_path):
    rows = [(f"{i:032x}", JPEGS[i], None) for i in range(3)]
    write_shards(tmp_path / "work" / "packed", [rows[:2], rows[2:]])
    write(tmp_path / "work" / "site" / "dropped.jpg", JPEGS[5])
    write(tmp_path / "work" / "run.json", b'{"recipe": "r", "pool": [], "packed": "packed"}')
    wanted = {name: data for name, data, _ in rows}
    for path in (tmp_path / "work", tmp_path / "work" / "packed"):
        assert ingest(tmp_path, path)[1] == wanted
        assert {image.name: image.load() for image in images_below(str(path))} == wanted
        source = open_source(str(path))
        assert [source.read(0, 0)[0], sum(source.sizes)] == [f"{0:032x}", 3]


@pytest.mark.parametrize("tail", ["", "/", "//"])
def test_ingest__ids_do_not_depend_on_how_a_folder_is_written(tmp_path, monkeypatch, tail):
    write(tmp_path / "d" / "0.tar", tar_of(("a.jpg", JPEGS[0])))
    table(tmp_path / "d" / "1.parquet", image=[JPEGS[1]])
    monkeypatch.chdir(tmp_path)
    plain, _ = ingest(tmp_path, "d")
    for path in (f"d{tail}", f"./d{tail}", f"{tmp_path}/d{tail}", f"file://{tmp_path}/d{tail}"):
        assert ingest(tmp_path, path)[0].outputs == plain.outputs


def test_reference__reads_within_its_limits(tmp_path):
    file = tmp_path / "0.tar"
    file.write_bytes(b"0123456789")
    assert Reference(str(file), 2, 3).read() == b"234"
    for where, reason in (
        *((Reference(str(file), 8, 3), "truncated"), (Reference(str(file)), "too_large")),
        *((Reference(str(file), -1, 3), "unreadable"), (Reference(str(file), 2, 0), "empty")),
        (Reference(str(tmp_path / "gone.jpg")), "unreadable"),
        *((Reference(str(tmp_path)), "unreadable"), (Reference("/dev/zero"), "unreadable")),
        (Reference(str(file), 0, 8 << 40), "too_large"),
    ):
        with pytest.raises(ImageError) as raised:
            where.read(max_bytes=9)
        assert raised.value.reason == reason
    with pytest.raises(StorageError, match="No such file"):  # of a tar that was there: tried again
        Reference(str(tmp_path / "gone.tar"), 0, 5).read()


def test_read_references__a_tar_is_opened_once(tmp_path, monkeypatch):
    file = tmp_path / "0.tar"
    file.write_bytes(bytes(range(100)))
    rows = [
        {"path": str(i), "file": str(file).encode(), "offset": i, "size": 1} for i in (7, 3, 200, 5)
    ]
    rows += [{"path": "in", "raw": b"x"}, {"path": "none"}]
    opened = []
    real = storage.open_regular
    monkeypatch.setattr(storage, "open_regular", lambda path: opened.append(path) or real(path))
    data, reasons = read_references(pa.Table.from_pylist(rows, REFERENCES))
    assert data.to_pylist() == [b"\x07", b"\x03", None, b"\x05", b"x", None]
    assert reasons == ["", "", "truncated", "", "", "empty"]
    assert opened == [str(file)]


def test_find__stamps_change_with_any_file(tmp_path):
    write(tmp_path / "d" / "a.jpg", JPEGS[0])
    before = ImageFiles(str(tmp_path / "d")).find().stamps
    write(tmp_path / "d" / "a.jpg", JPEGS[1] + b"more")
    assert ImageFiles(str(tmp_path / "d")).find().stamps != before
