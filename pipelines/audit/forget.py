"""Takes images out of a finished run: out of every table, every packed shard, and the report.

Accounts still add up afterward: a forgotten row is gone from what came in, too. What was done is
written down first, so that the same command finishes what a killed one began. Rows of other images
may still name a forgotten id as their twin or seed: an id is a hash, and tombstones keep it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from curation import storage
from curation.dataset import MANIFEST, Dataset, ShardInfo, files_digest, write_shard
from curation.digest import Content
from curation.errors import ConfigError
from curation.ledger import RECEIPTS, STAGE_FILE, Receipt, StageRecord, read_receipt, receipt_path
from curation.lock import locked
from curation.schema import ID, KEEP
from curation.stage import DECISIONS, StageFolder
from pipelines.audit import tombstones
from pipelines.audit.explain import ids_in, side_car_row
from pipelines.audit.seal import PRETRAIN, REPORT, SEAL_FILE, write_seal
from pipelines.audit.tables import Row, select
from pipelines.audit.work_folder import CATALOG_FILE, FinishedStage, WorkFolder
from pipelines.run.run_record import POOL, RUN_FILE, read_run

Kind = Literal["ids", "urls", "hashes"]
Targets = dict[str, set[str]]
"""Flow -> ids to forget."""

JOURNAL = "_forgetting.json"
_BLOCK = 512
_HASHES = ("sha256", "pixel_hash", "phash")
_WEIGHTS = (".safetensors", ".pt", ".pth")
"""Files below `pretrain`: all were trained on the set as it was."""


@dataclass
class Forgotten:
    """What was done."""

    rows: list[Row] = field(default_factory=list)
    """One a forgotten image: flow, id, source, and its hashes."""
    not_found: list[str] = field(default_factory=list)
    """What the list named and the run never saw."""
    checkpoints: list[str] = field(default_factory=list)
    """Files of pretraining that may have seen a forgotten image."""
    content_digest: str = ""
    """Of the manifest, afterward."""
    tombstones: list[str] = field(default_factory=list)
    """Files that keep the images out of later builds."""


def forget(path: str, kind: Kind, wanted: Sequence[str], *, near: bool = False) -> Forgotten:
    """Take images out of a finished run.

    wanted: ids, URLs (or paths below a set's folder), or SHA-256 or pixel hashes, as `kind` says.
    near: their copies, too: equal ones, and all of their components of near-duplicates.

    Raises:
        DatasetError: no finished run there.
        ConfigError: nothing to forget was named.
        LockError: a run is at work there.
    """
    read_run(path.rstrip("/"))
    with locked(path.rstrip("/")):
        work = WorkFolder(path.rstrip("/"))
        return _forget(work, *_find(work, kind, wanted, near=near))


def _forget(work: WorkFolder, found: Targets, not_found: list[str]) -> Forgotten:
    journal = storage.join(work.path, JOURNAL)
    resumed = storage.exists(journal)
    rows: list[Row] = [
        {"flow": flow, "id": row_id, **{name: image.get(name) for name in _HASHES}}
        for flow, ids in found.items()
        for row_id in sorted(ids)
        for image in [side_car_row(work, flow, "images", row_id) or {}]
    ]
    if resumed:
        before = storage.read_json(journal)["rows"]
        rows = [*before, *(row for row in rows if row not in before)]
        found = {row["flow"]: set() for row in rows}
        for row in rows:
            found[row["flow"]].add(row["id"])
    if not rows:
        return Forgotten(not_found=not_found)
    storage.write_json(journal, {"rows": rows})
    storage.remove(storage.join(work.path, CATALOG_FILE))
    _rewrite_all(work, found, everywhere=resumed)
    result = Forgotten(rows, not_found, tombstones=_write_tombstones(work.path, rows))
    weights = storage.walk_files(storage.join(work.path, PRETRAIN))
    seen = [name for name in weights if name.endswith(_WEIGHTS)]
    result.checkpoints = [storage.join(work.path, PRETRAIN, name) for name in seen]
    done = WorkFolder(work.path)
    if done.manifest is not None:
        result.content_digest = done.manifest.manifest.content_digest
    page = storage.join(work.path, REPORT)
    if storage.exists(page):  # it shows thumbnails
        from pipelines.web.report.page import write_page

        write_page(work.path, page)
    if storage.exists(storage.join(work.path, SEAL_FILE)):
        write_seal(work.path, done.record)
    storage.remove(journal)
    return result


def _find(
    work: WorkFolder, kind: Kind, wanted: Sequence[str], *, near: bool
) -> tuple[Targets, list[str]]:
    """Ids by flow, and the texts that stand for none."""
    texts = [text.strip() for text in wanted if text.strip()]
    if not texts:
        raise ConfigError("curate forget: the list names nothing")
    found: Targets = {}
    missing = []
    query = "select id from rows where sha256 = ? union select id from rows where pixel_hash = ?"
    for text in texts:
        hits: Targets = {}
        for flow in work.flows:
            if kind == "hashes":
                rows = select(work.output(flow, "images"), query, [text.lower()] * 2)
                hits[flow] = {row["id"] for row in rows}
            else:
                hits[flow] = set(ids_in(work, flow, text))
            found.setdefault(flow, set()).update(hits[flow])
        if not any(hits.values()):
            missing.append(text)
    if near:
        found = {flow: _with_copies(work, flow, ids) for flow, ids in found.items()}
    return found, missing


def _with_copies(work: WorkFolder, flow: str, ids: set[str]) -> set[str]:
    """The ids, their equals, and all members of their components."""
    found = set(ids)
    for stage in work.stages(flow):
        columns = stage.decisions.columns
        key = "component" if "component" in columns else "twin"
        if key in columns and (key == "component" or "twin_set" not in columns):
            query = (
                f"with named as (select id from rows where list_contains(?, id) union "
                f"select {key} from rows where list_contains(?, id) and {key} is not null) "
                f"select id from rows where id in (select id from named) "
                f"or {key} in (select id from named)"
            )
            rows = select(stage.decisions, query, [sorted(found)] * 2)
            found |= {row["id"] for row in rows}
    return found


def _rewrite_all(work: WorkFolder, found: Targets, *, everywhere: bool) -> None:
    """Rewrite stages, packed shards and manifest, then the record of the run."""
    flows = {}
    for flow in work.flows:
        flows[flow] = [
            {
                **stage.entry.model_dump(),
                "record": _forget_in_stage(work, stage, found, everywhere=everywhere).model_dump(),
            }
            for stage in work.stages(flow)
        ]
    if work.manifest is not None:
        _rewrite(work.manifest, range(work.manifest.num_shards), set().union(*found.values()))
    _write_run(work, flows)


def _write_run(work: WorkFolder, flows: dict[str, list[Row]]) -> None:
    sets = {name: flows[name] for name in work.record.sets}
    record = work.record.replace(pool=flows[POOL], sets=sets)
    storage.write_json(storage.join(work.path, RUN_FILE), record.model_dump(mode="json"))


def _forget_in_stage(
    work: WorkFolder, stage: FinishedStage, found: Targets, *, everywhere: bool
) -> StageRecord:
    """Rewrite the shards that hold forgotten rows, their receipts and the stage's record."""
    done = stage.entry.record
    mine = {flow: found.get(flow, set()) for flow in stage.ranges}
    ids = set().union(*mine.values())
    touched = sorted({stage.shard_of(one, flow) for flow, some in mine.items() for one in some})
    aligned = {}
    for name in done.outputs:
        dataset = stage.output(name)
        present = all(storage.exists(dataset.shard_path(i)) for i in range(dataset.num_shards))
        if dataset.num_shards == stage.decisions.num_shards and present:  # raw bytes are deleted
            aligned[name] = _rewrite(dataset, touched, ids)
    for shard in touched:
        _rewrite_receipt(stage, shard, aligned)
    if stage.has("hits"):
        hits = stage.output("hits")
        _rewrite(hits, range(hits.num_shards), found.get(POOL, set()), found)
    figures = done.figures
    if "packed" in figures and work.packed is not None and (touched or everywhere):
        packed = _forget_in_tars(work.packed, ids)
        figures = {**figures, "images": packed.num_rows}
    digests = {name: dataset.manifest.content_digest for name, dataset in aligned.items()}
    record = _add_up(stage, done, {**done.outputs, **digests}, figures)
    storage.write_json(storage.join(stage.path, STAGE_FILE), record.model_dump(mode="json"))
    return record


def _rewrite(
    dataset: Dataset, shards: Iterable[int], ids: set[str], seeds: Targets | None = None
) -> Dataset:
    """Write shards again without some ids; without hits of forgotten seeds, too."""
    infos = list(dataset.manifest.shards)
    for shard in shards:
        table = storage.read_parquet(dataset.shard_path(shard))
        gone = pc.is_in(table[ID], pa.array(sorted(ids), pa.string()))
        for flow, some in (seeds or {}).items():
            of_set = pc.equal(table["seed_set"], flow)
            seed = pc.is_in(table["seed_id"], pa.array(sorted(some), pa.string()))
            gone = pc.or_(gone, pc.and_(pc.fill_null(of_set, False), seed))
        left = table.filter(pc.invert(gone))
        rewritten = table.num_rows != infos[shard].num_rows  # by a run that was then killed
        if rewritten or left.num_rows < table.num_rows:
            companion = infos[shard].companion
            infos[shard] = write_shard(dataset.path, shard, left, companion=companion)
    return _recommit(dataset, infos)


def _recommit(dataset: Dataset, infos: Sequence[ShardInfo]) -> Dataset:
    """Write the manifest again over changed shards."""
    total = Content.merge(Content.from_hex(info.content) for info in infos)
    manifest = dataset.manifest.replace(
        shards=[info.model_dump() for info in infos],
        num_rows=sum(info.num_rows for info in infos),
        content_digest=total.digest(dataset.manifest.columns),
        files_digest=files_digest(infos),
    )
    storage.write_json(storage.join(dataset.path, MANIFEST), manifest.model_dump(mode="json"))
    return Dataset(dataset.path, manifest)


def _rewrite_receipt(stage: FinishedStage, shard: int, outputs: dict[str, Dataset]) -> None:
    path = receipt_path(StageFolder(stage.path, stage.name), shard)
    receipt = read_receipt(path)
    verdicts = outputs[DECISIONS].read_shard(shard, [KEEP, "reason"])
    fallen = verdicts.filter(pc.invert(verdicts[KEEP]))["reason"].to_pylist()
    changed = receipt.replace(
        rows_in=verdicts.num_rows,
        rows_out=verdicts.num_rows - len(fallen),
        dropped=dict(sorted(Counter(fallen).items())),
        outputs={
            name: (outputs[name].manifest.shards[shard] if name in outputs else info).model_dump()
            for name, info in receipt.outputs.items()
        },
    )
    storage.write_json(path, changed.model_dump(mode="json"))


def _add_up(
    stage: FinishedStage, done: StageRecord, outputs: dict[str, str], figures: dict[str, Any]
) -> StageRecord:
    root = storage.join(stage.path, RECEIPTS)
    receipts: list[Receipt] = [
        read_receipt(storage.join(root, name)) for name in storage.list_files(root, ".json")
    ]
    dropped: Counter[str] = Counter()
    for receipt in receipts:
        dropped.update(receipt.dropped)
    return done.replace(
        rows_in=sum(receipt.rows_in for receipt in receipts),
        rows_out=sum(receipt.rows_out for receipt in receipts),
        dropped=dict(sorted(dropped.items())),
        outputs=outputs,
        figures=figures,
    )


def _forget_in_tars(packed: Dataset, ids: set[str]) -> Dataset:
    """Write tars that hold forgotten images again, with the index of what lies where."""
    infos = list(packed.manifest.shards)
    for number, info in enumerate(infos):
        name = next(iter(info.companion), None)
        if name is None:
            continue
        path = storage.join(packed.path, name)
        index = storage.read_parquet(packed.shard_path(number))
        held = set(index[ID].to_pylist())
        if held & ids or storage.digest_file(path)["sha256"] != info.companion[name]:
            sha256, offsets = _copy_tar(path, ids)
            left = index.filter(pc.invert(pc.is_in(index[ID], pa.array(sorted(ids), pa.string()))))
            places = pa.array([offsets[one] for one in left[ID].to_pylist()], pa.int64())
            left = left.set_column(left.column_names.index("offset"), "offset", places)
            infos[number] = write_shard(packed.path, number, left, companion={name: sha256})
    return _recommit(packed, infos)


def _copy_tar(path: str, ids: set[str]) -> tuple[str, dict[str, int]]:
    """Copy the members that stay, byte for byte; give the hash, and where each image lies now."""
    import tarfile

    digest, offsets, position = hashlib.sha256(), dict[str, int](), 0
    with (
        storage.open_read(path) as source,
        tarfile.open(fileobj=source, mode="r:") as tar,
        storage.open_whole(path) as target,
    ):
        for member in tar.getmembers():
            stem, _, ending = member.name.rpartition(".")
            if stem in ids:
                continue
            header = member.offset_data - member.offset
            source.seek(member.offset)
            data = source.read(header + -(-member.size // _BLOCK) * _BLOCK)
            if ending == "jpg":
                offsets[stem] = position + header
            target.write(data)
            digest.update(data)
            position += len(data)
        end = b"\0" * 2 * _BLOCK
        target.write(end)
        digest.update(end)
    return digest.hexdigest(), offsets


def _write_tombstones(path: str, rows: list[Row]) -> list[str]:
    """Ids and hashes of all that this run ever forgot, as lists that `blocklist` reads."""
    folder = storage.join(path, tombstones.FOLDER)
    paths = []
    for name, column in tombstones.FILES.items():
        file = tombstones.list_file(folder, name)
        known = storage.read_bytes(file).decode().splitlines() if storage.exists(file) else []
        lines = sorted({*known, *(row[column] for row in rows if row.get(column))})
        storage.write_bytes(file, "".join(f"{line}\n" for line in lines).encode())
        paths.append(file)
    return paths
