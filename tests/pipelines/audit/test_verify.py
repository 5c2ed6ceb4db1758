import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

from curation import merkle, storage
from curation.dataset import Dataset, ShardInfo, commit, write_shard
from curation.errors import ConfigError, DatasetError, StorageError
from curation.ledger import read_receipt
from curation.schema import schema_of
from pipelines.audit.seal import is_sealed_whole, write_seal
from pipelines.audit.verify import verify
from pipelines.audit.verify_dataset import prove_shard
from pipelines.cli import audit, pages
from pipelines.run.run_record import read_run
from pretrain.digests import write_digests
from tests.pipelines.audited_run import copied_run, finished_run


def defects_of(path):
    return [f"{one.where}: {defect}" for one in verify(str(path)) for defect in one.defects]


def folder_of(work, stage):
    record = read_run(str(work))
    return work / next(entry.folder for entry in record.pool if entry.stage == stage)


def filled_shard(folder):
    return max(folder.glob("shard-*.parquet"), key=lambda path: path.stat().st_size)


def rewrite(path, change):
    table = change(pq.read_table(path))
    pq.write_table(table, path, compression="zstd")


def test_verify__sound_run_has_no_defect(capsys):
    assert defects_of(finished_run()) == []
    audit.verify(str(finished_run()))
    shown = capsys.readouterr().out
    assert "everything is as it was written" in shown
    assert "deleted after use" in shown


def test_verify__flipped_byte(tmp_path):
    work = copied_run(tmp_path)
    shard = filled_shard(folder_of(work, "canonicalize") / "images")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    found = defects_of(work)
    assert any(f"images/{shard.name}: its bytes are not those" in one for one in found)


def test_verify__missing_shard(tmp_path):
    work = copied_run(tmp_path)
    shard = filled_shard(folder_of(work, "near_dedup") / "decisions")
    shard.unlink()
    found = defects_of(work)
    assert any(f"decisions/{shard.name}: is missing" in one for one in found)


def test_verify__swapped_column(tmp_path):
    work = copied_run(tmp_path)
    shard = filled_shard(work / "manifest")

    def swap(table):
        one, other = table["pixel_hash"], table["phash"]
        table = table.set_column(table.column_names.index("pixel_hash"), "pixel_hash", other)
        return table.set_column(table.column_names.index("phash"), "phash", one)

    rewrite(shard, swap)
    found = [one for one in defects_of(work) if shard.name in one]
    assert any("columns 'pixel_hash' and 'phash' were swapped" in one for one in found)


def test_verify__columns_in_another_order(tmp_path):
    work = copied_run(tmp_path)
    shard = filled_shard(work / "manifest")
    rewrite(shard, lambda table: table.select(table.column_names[::-1]))
    assert any("its columns stand in another order" in one for one in defects_of(work))


def test_verify__swapped_column_of_another_type(tmp_path):
    work = copied_run(tmp_path)
    shard = filled_shard(work / "manifest")

    def swap(table):
        names = [
            "sha256" if n == "width" else "width" if n == "sha256" else n
            for n in table.column_names
        ]
        return table.rename_columns(names)

    rewrite(shard, swap)
    assert any(
        "column 'width' is string where int32 was written" in one for one in defects_of(work)
    )


def test_verify__edited_verdict(tmp_path):
    work = copied_run(tmp_path)
    shard = filled_shard(folder_of(work, "leaks") / "decisions")
    rewrite(shard, keep_all)
    found = "\n".join(defects_of(work))
    assert f"decisions/{shard.name}: its rows are not those that were written" in found
    assert "verdicts are 'keep'" in found
    assert "its footer is not what was written" in found


def test_verify__edited_verdict_with_manifest_and_receipt_made_to_fit(tmp_path):
    work = copied_run(tmp_path)
    folder = folder_of(work, "leaks")
    dataset = Dataset.open(str(folder / "decisions"))
    infos, changed = [], None
    for index in range(dataset.num_shards):
        table = dataset.read_shard(index)
        if pa.compute.any(pa.compute.invert(table["keep"])).as_py():
            changed = index
            table = keep_all(table)
        infos.append(write_shard(str(folder / "decisions"), index, table))
    schema = pa.schema(pq.read_schema(folder / "decisions" / infos[0].name))
    commit(str(folder / "decisions"), schema, infos, dataset.attributes)
    forge_receipt(folder, changed, infos[changed])
    found = "\n".join(defects_of(work))
    assert "content digest is not the one in the stage's record" in found
    assert f"leaks to retrieve, shard {changed}: lost" in found


def forge_receipt(folder, index, info: ShardInfo):
    path = str(folder / "_receipts" / f"{index:05d}.json")
    receipt = read_receipt(path)
    forged = receipt.replace(outputs={"decisions": info}, rows_out=receipt.rows_in, dropped={})
    storage.write_json(path, forged.model_dump(mode="json"))


def keep_all(table):
    keep = pa.array(np.ones(len(table), bool))
    reason = pa.nulls(len(table), pa.string())
    table = table.set_column(table.column_names.index("keep"), "keep", keep)
    return table.set_column(table.column_names.index("reason"), "reason", reason)


def test_verify__damaged_tar_and_lost_file(tmp_path):
    work = copied_run(tmp_path)
    tar = next((folder_of(work, "pack") / "packed").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[700] ^= 255
    tar.write_bytes(data)
    assert any(f"{tar.name}: its bytes are not" in one for one in defects_of(work))
    tar.unlink()
    assert any(f"{tar.name}: is missing" in one for one in defects_of(work))


def test_verify__repeated_id_and_strange_shard(tmp_path):
    row = pa.table({"id": ["a" * 32], "width": pa.array([3], pa.int32())})
    infos = [write_shard(str(tmp_path), index, row) for index in range(2)]
    commit(str(tmp_path), schema_of(["id", "width"]), infos[:1])
    assert defects_of(tmp_path) == [
        f"{tmp_path}: shard-00001.parquet: is in the folder, but not in the manifest"
    ]


def test_verify__edited_records(tmp_path):
    work = copied_run(tmp_path)
    path = folder_of(work, "quality") / "_stage.json"
    path.write_text(path.read_text().replace('"blank": 1', '"blank": 0'))
    found = "\n".join(defects_of(work))
    assert "_stage.json: differs from what run.json says" in found


def test_verify__seal_names_the_folder(tmp_path):
    work = copied_run(tmp_path)
    write_seal(str(work), read_run(str(work)))
    assert defects_of(work) == []
    path = folder_of(work, "embed") / "copy" / "_manifest.json"
    path.write_text(path.read_text().replace('"tiny"', '"tidy"'))
    found = defects_of(work)
    assert len(found) == 1
    assert found[0].startswith("seal: work/pool/05-embed")


def test_verify__foreign_parquet(tmp_path):
    pq.write_table(pa.table({"x": list(range(1000))}), tmp_path / "a.parquet")
    assert defects_of(tmp_path) == []
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[-6] ^= 64
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(StorageError, match="not a readable Parquet file"):
        verify(str(tmp_path))


def test_prove_shard__leads_to_the_files_digest_without_the_other_shards(tmp_path, capsys):
    work = copied_run(tmp_path)
    packed = folder_of(work, "pack") / "packed"
    digest = Dataset.open(str(packed)).manifest.files_digest
    first, last = sorted(packed.glob("*.parquet"))
    last.unlink()
    proof = prove_shard(str(packed), first.name)
    assert proof.defects == []
    assert first.with_suffix(".tar").name in proof.leaf
    found = merkle.root_of_path(proof.leaf, proof.number, proof.shards, proof.path)
    assert found == proof.files_digest == digest
    audit.verify(str(packed), first.name, json=True)
    assert json.loads(capsys.readouterr().out)["path"] == proof.path
    with pytest.raises(typer.Exit):
        audit.verify(str(packed), last.name)
    assert "is missing" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="has no shard 'x'; there are: shard-00000"):
        prove_shard(str(packed), "x")


def test_prove_shard__damaged_tar_and_edited_manifest(tmp_path):
    work = copied_run(tmp_path)
    packed = folder_of(work, "pack") / "packed"
    tar = min(packed.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    (defect,) = prove_shard(str(packed), "shard-00000.parquet").defects
    assert f"{tar.name}: its bytes are not those" in defect
    manifest = packed / "_manifest.json"
    record = json.loads(manifest.read_text())
    record["shards"][1]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(record, indent=1) + "\n")
    defects = prove_shard(str(packed), "shard-00000.parquet").defects
    assert "_manifest.json: files digest does not follow from its shards" in defects


def test_verify__nothing_there(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        verify(str(tmp_path / "absent"))


def test_print_verification__json_says_not_ok(tmp_path, capsys):
    work = copied_run(tmp_path)
    filled_shard(work / "manifest").unlink()
    with pytest.raises(typer.Exit):
        audit.verify(str(work), json=True)
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert any("is missing" in one for one in found["defects"])


def sealed_copy(tmp_path):
    """A run with all that steps after the last stage leave."""
    work = copied_run(tmp_path)
    for name in ("report.html", "evaluate/_step.json", "work/report/_step.json", "events/1.jsonl"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text('{"key": "one", "result": null}\n')
    checkpoint = work / "pretrain" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    for folder in (checkpoint, work / "pretrain"):
        for name in (".metadata", "weights", "log.jsonl"):
            (folder / name).write_bytes(b"{}\n" if "log" in name else bytes(range(200)))
        write_digests(folder)
    (work / "pretrain" / "_step.json").write_text("{}\n")
    write_seal(str(work), read_run(str(work)))
    return work


def files_that_count(work):
    """Everything that the run is made of: not its inputs, nor what `serve` keeps to be quick."""
    inputs = ("images", "sets", "recipe.yaml", "_catalog.duckdb")
    files = (path for path in work.rglob("*") if path.relative_to(work).parts[0] not in inputs)
    return sorted(path for path in files if path.is_file())


KINDS = (
    *("pretrain/checkpoints", "pretrain/weights", "pretrain/digests.json", "pretrain/_step.json"),
    *("evaluate", "events", "report.html", "run.json", "_seal.json", "work/report", "manifest"),
    *("hits/shard", "hits/_manifest.json", "packed/shard", "_receipts", "_key.json", "_stage.json"),
)


@pytest.mark.parametrize("how", ["flipped", "shorter", "longer", "gone", "empty"])
def test_verify__damage_of_every_kind_of_file(tmp_path, how):
    work = sealed_copy(tmp_path)
    assert defects_of(work) == []
    rng = np.random.default_rng(3)
    for kind in KINDS:
        files = [one for one in files_that_count(work) if kind in one.as_posix()]
        file = files[rng.integers(len(files))]
        if file.name == "log.jsonl" and how == "longer":
            continue  # training may have gone on
        if file.name == "_seal.json" and how == "gone":
            continue  # a run of a program that sealed none: that is told
        before = file.read_bytes()
        damage(file, before, how, rng)
        assert is_noticed(work), f"{file} {how}"
        file.write_bytes(before)
    assert defects_of(work) == []


def is_noticed(work):
    """Whether verify names a defect, or finds no run any more."""
    try:
        return bool(defects_of(work))
    except DatasetError:
        return not (work / "run.json").exists()


def damage(file, data, how, rng):
    """Do one thing to a file."""
    place = int(rng.integers(len(data)))
    changed = {
        "flipped": data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :],
        "shorter": data[:-1],
        "longer": data + b"\n",
        "empty": b"",
    }
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(changed[how])


def test_verify__added_files(tmp_path):
    work = sealed_copy(tmp_path)
    (work / "manifest" / "notes.txt").write_text("x")
    (work / "mine").mkdir()
    (work / "mine" / "notes.txt").write_text("x")
    assert defects_of(work) == [
        "other files: manifest/notes.txt: is no part of the run: neither a manifest nor the seal "
        "names it"
    ]
    (others,) = [one for one in verify(str(work)) if one.where == "other files"]
    assert "mine (1)" in others.notes[0]


def test_write_seal__steps_are_sealed_when_all_is_done(tmp_path):
    work = sealed_copy(tmp_path)
    write_seal(str(work), read_run(str(work)), whole=False)
    assert not is_sealed_whole(str(work))
    (work / "report.html").write_text("another")
    assert defects_of(work) == []
    write_seal(str(work), read_run(str(work)))
    assert is_sealed_whole(str(work))
    pages.report(str(work))
    assert defects_of(work) == []


def flip_somewhere(files, rng):
    """Change one byte, chosen evenly over all bytes; give how to undo it."""
    sizes = np.array([file.stat().st_size for file in files])
    file = files[rng.choice(len(files), p=sizes / sizes.sum())]
    before = file.read_bytes()
    data = bytearray(before)
    place = int(rng.integers(len(data)))
    data[place] ^= int(rng.integers(1, 256))
    file.write_bytes(data)
    return file, place, before


@pytest.mark.parametrize("number", range(3))
def test_verify__finds_a_random_flip(tmp_path, number):
    work = sealed_copy(tmp_path)
    file, place, _ = flip_somewhere(files_that_count(work), np.random.default_rng(number))
    assert defects_of(work), f"{file} at {place}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_verify__finds_each_of_200_random_flips(tmp_path):
    work = sealed_copy(tmp_path)
    rng = np.random.default_rng(int(os.environ.get("SEED", "7")))
    files = files_that_count(work)
    small = [file for file in files if file.suffix == ".json"]
    for number in range(200):
        file, place, before = flip_somewhere(small if number % 2 else files, rng)
        assert defects_of(work), f"{file} at {place}"
        file.write_bytes(before)
    assert defects_of(work) == []
