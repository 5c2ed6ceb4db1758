"""Checks that a data set or a run is what it says: bytes, rows, accounts, ids.

Everything is read once, shard by shard. Every defect is named; none ends the check.
"""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from curation import merkle, storage
from curation.dataset import MANIFEST, Dataset, Manifest, ShardInfo, files_digest, leaf_of
from curation.digest import Content
from curation.errors import ConfigError, CurateError, StorageError
from curation.ledger import RECEIPTS, Receipt, read_receipt, read_stage
from curation.lock import LOCK_FILE
from curation.neighbors.retrieval.hits import HIT_COLUMNS
from curation.schema import ID, KEEP
from curation.stage import DECISIONS, StageFolder
from pipelines.audit.seal import (
    PRETRAIN,
    SEAL_FILE,
    broken_seals,
    covered_files,
    sealed_files,
    sealed_folders,
)
from pipelines.audit.tables import Tables
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL
from pretrain.digests import find_damage

_UNREADABLE = (CurateError, OSError, ValueError, pa.ArrowException, OverflowError, MemoryError)
"""What reading a damaged file may raise: Arrow does not always raise its own errors."""
_CHUNK = 1 << 22
_ROWS_TO_TRY = 20_000
"""Swapped columns are looked for in shards of at most so many rows."""
_NAMED = 5
"""So many examples of one defect are named."""


@dataclass
class Checked:
    """What was looked at in one place, and what was wrong with it."""

    where: str
    files: int = 0
    rows: int = 0
    num_bytes: int = 0
    defects: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def blame(self, place: str, what: str) -> None:
        """Note a defect."""
        self.defects.append(f"{place}: {what}" if place else what)


def verify(path: str) -> list[Checked]:
    """Check a work folder, a data set of ours, or any Parquet.

    Raises:
        DatasetError: there is nothing of the kind.
    """
    path = path.rstrip("/")
    if WorkFolder.is_one(path):
        return list(verify_run(WorkFolder(path)))
    if Dataset.is_finished(path):
        checked = verify_dataset(path)
        return [checked, _guarded(f"{path}: ids", partial(_check_unique, path))]
    return [verify_foreign(path)]


def verify_run(work: WorkFolder) -> Iterator[Checked]:
    """Check a run: every output of every stage, the accounts between them, and the manifest."""
    try:
        record = work.record
    except _UNREADABLE as error:
        yield Checked("run.json", defects=[_one_line(error)])
        return
    for flow in work.flows:
        try:
            stages = work.stages(flow)
        except _UNREADABLE as error:
            yield Checked(flow, defects=[_one_line(error)])
            continue
        for stage in stages:
            yield _guarded(stage.entry.folder, partial(_verify_stage, work, stage))
        yield _guarded(f"{flow}: rows from stage to stage", partial(_chain, work, flow))
    if record.packed:
        yield _guarded(record.packed, partial(_verify_packed, work))
    if record.manifest:
        yield _guarded(record.manifest, partial(_verify_manifest, work))
    yield _guarded(PRETRAIN, partial(_verify_pretraining, work))
    yield _guarded("seal", partial(_verify_seal, work))
    yield _guarded("other files", partial(_verify_others, work))


def verify_dataset(path: str, *, may_be_deleted: bool = False) -> Checked:
    """Check a data set: its manifest, then every shard's bytes, columns and rows."""
    checked = Checked(path)
    try:
        dataset = Dataset.open(path)
    except _UNREADABLE as error:
        checked.blame(MANIFEST, _one_line(error))
        return checked
    _check_form(storage.join(path, MANIFEST), checked)
    _check_totals(dataset.manifest, checked)
    if may_be_deleted and not _present(dataset):
        checked.notes.append("deleted after use, as its recipe says")
        return checked
    for index, info in enumerate(dataset.manifest.shards):
        _check_shard(dataset, index, info, checked)
    _check_strangers(dataset, checked)
    return checked


@dataclass(frozen=True)
class ShardProof:
    """That one shard belongs to a data set, for whoever knows no more than its `files_digest`."""

    shard: str
    number: int
    """Its place among the shards, from 0."""
    shards: int
    leaf: str
    """Its files with their SHA-256: the leaf of the tree."""
    path: list[str]
    """What its hash is hashed with on the way to the root (RFC 6962)."""
    files_digest: str
    """The root."""
    defects: list[str]


def prove_shard(path: str, name: str) -> ShardProof:
    """Check one shard of a data set, and give the path of hashes from it to `files_digest`.

    Raises:
        DatasetError: no data set there.
        ConfigError: it has no such shard.
    """
    dataset, checked = Dataset.open(path), Checked(path)
    shards = dataset.manifest.shards
    names = [shard.name for shard in shards]
    if name not in names:
        ends = f"{names[0]} to {names[-1]}" if names else "none"
        raise ConfigError(f"{path}: has no shard '{name}'; there are: {ends}")
    number = names.index(name)
    _check_shard(dataset, number, shards[number], checked)
    leaves = [leaf_of(shard) for shard in shards]
    hashes = merkle.path_to_root(leaves, number)
    root = dataset.manifest.files_digest
    if merkle.root_of_path(leaves[number], number, len(leaves), hashes) != root:
        checked.blame(MANIFEST, "files digest does not follow from its shards")
    return ShardProof(name, number, len(leaves), leaves[number], hashes, root, checked.defects)


def verify_foreign(path: str) -> Checked:
    """Read any Parquet from end to end.

    Raises:
        DatasetError: there is no Parquet.
    """
    from pipelines.audit.stats import open_any

    dataset = open_any(path)
    checked = Checked(path, notes=["foreign Parquet: it has no digests to check against"])
    for index, info in enumerate(dataset.manifest.shards):
        try:
            table = storage.read_parquet(dataset.shard_path(index))
        except _UNREADABLE as error:
            checked.blame(info.name, _one_line(error))
            continue
        checked.files += 1
        checked.rows += table.num_rows
        checked.num_bytes += info.num_bytes
    return checked


def _verify_stage(work: WorkFolder, stage: FinishedStage, checked: Checked) -> None:
    """Check a stage: its record, its outputs, and its accounts shard by shard."""
    _check_record(stage, checked)
    for name, digest in stage.entry.record.outputs.items():
        path = storage.join(stage.path, name)
        deletable = name == "raw" and work.stage(stage.flow, "canonicalize") is not None
        _merge(checked, verify_dataset(path, may_be_deleted=deletable), name)
        if Dataset.is_finished(path) and _digest(path) != digest:
            checked.blame(name, "content digest is not the one in the stage's record")
    for name in _further_sets(stage):
        _merge(checked, verify_dataset(storage.join(stage.path, name)), name)
    _check_receipts(stage, checked)


def _further_sets(stage: FinishedStage) -> list[str]:
    """Data sets in a stage's folder that are no outputs of its shards, such as hits."""
    names = (name.rpartition("/") for name in storage.walk_files(stage.path))
    found = {folder for folder, _, file in names if file == MANIFEST}
    return sorted(found - set(stage.entry.record.outputs))


def _verify_packed(work: WorkFolder, checked: Checked) -> None:
    """Check the packed shards: bytes, and that every image lies where its index says."""
    path = storage.join(work.path, str(work.record.packed))
    _merge(checked, verify_dataset(path))
    packed = Dataset.open(path)
    _check_unique(path, checked)
    for index, info in enumerate(packed.manifest.shards):
        for name in info.companion:
            _check_tar(packed, index, name, checked)
    stage = work.stage(POOL, "pack")
    if stage is not None and packed.num_rows != stage.entry.record.rows_out:
        kept = stage.entry.record.rows_out
        checked.blame("", f"{packed.num_rows:,} images are packed, 'pack' kept {kept:,}")


def _verify_manifest(work: WorkFolder, checked: Checked) -> None:
    """Check the published manifest: bytes, unique ids, and that it is what `select` made."""
    path = storage.join(work.path, str(work.record.manifest))
    _merge(checked, verify_dataset(path))
    dataset = Dataset.open(path)
    stage = work.stage(POOL, "select")
    if stage is not None:
        if dataset.manifest.content_digest != stage.entry.record.outputs.get("manifest"):
            checked.blame("", "content digest is not that of the stage 'select'")
        if dataset.num_rows != stage.entry.record.rows_out:
            kept = stage.entry.record.rows_out
            checked.blame("", f"holds {dataset.num_rows:,} rows, 'select' kept {kept:,}")
    _check_unique(path, checked)


def _check_unique(path: str, checked: Checked) -> None:
    """An id stands once where a row is an image; verdicts and hits may name one repeatedly."""
    dataset = Dataset.open(path)
    if ID not in dataset.columns or KEEP in dataset.columns or dataset.columns == [*HIT_COLUMNS]:
        return
    for row_id, count in repeated_ids(dataset):
        checked.blame("", f"id {row_id} stands there {count} times")


def repeated_ids(dataset: Dataset) -> list[tuple[str, int]]:
    """A few ids that are there more than once, with their number."""
    with Tables() as tables:
        if not tables.add("rows", dataset):
            return []
        rows = tables.rows(
            "select id, count(*) as n from rows group by id having count(*) > 1 "
            f"order by id limit {_NAMED}"
        )
    return [(row["id"], row["n"]) for row in rows]


def _guarded(where: str, check: Callable[[Checked], None]) -> Checked:
    """Run a check; what keeps it from going on is a defect, too."""
    checked = Checked(where)
    try:
        check(checked)
    except _UNREADABLE as error:
        checked.blame("", _one_line(error))
    return checked


def _check_totals(manifest: Manifest, checked: Checked) -> None:
    """The manifest's sums must follow from its shards."""
    rows = sum(shard.num_rows for shard in manifest.shards)
    if rows != manifest.num_rows:
        checked.blame(MANIFEST, f"says {manifest.num_rows:,} rows, its shards add up to {rows:,}")
    try:
        total = Content.merge(Content.from_hex(shard.content) for shard in manifest.shards)
        content = total.digest(manifest.columns)
    except ValueError:
        content = "unreadable"
    if content != manifest.content_digest:
        checked.blame(MANIFEST, "content digest does not follow from its shards")
    if files_digest(manifest.shards) != manifest.files_digest:
        checked.blame(MANIFEST, "files digest does not follow from its shards")


def _check_shard(dataset: Dataset, index: int, info: ShardInfo, checked: Checked) -> None:
    """Bytes, columns, rows and companions of one shard."""
    _check_bytes(dataset.shard_path(index), info.name, info.sha256, info.num_bytes, checked)
    for name, sha256 in info.companion.items():
        _check_bytes(storage.join(dataset.path, name), name, sha256, None, checked)
    try:
        table = storage.read_parquet(dataset.shard_path(index))
    except _UNREADABLE as error:
        if storage.exists(dataset.shard_path(index)):
            checked.blame(info.name, f"cannot be read: {_one_line(error)}")
        return
    checked.rows += table.num_rows
    # Parquet calls the inside of lists 'element', Arrow calls it 'item'
    found = {field.name: str(field.type).replace("element:", "item:") for field in table.schema}
    if list(found.items()) != list(dataset.manifest.columns.items()):
        checked.blame(info.name, _columns_differ(dataset.manifest.columns, found))
    if table.num_rows != info.num_rows:
        checked.blame(info.name, f"{table.num_rows:,} rows where {info.num_rows:,} were written")
    elif Content.of(table).hex() != info.content:
        checked.blame(info.name, _rows_differ(table, info.content))
    if info.num_kept is not None and KEEP in found:
        kept = pc.sum(table[KEEP]).as_py() or 0
        if kept != info.num_kept:
            checked.blame(info.name, f"{kept:,} verdicts are 'keep', not {info.num_kept:,}")


def _check_bytes(
    path: str, name: str, sha256: str, num_bytes: int | None, checked: Checked
) -> None:
    try:
        found, size = _hash_file(path)
    except StorageError:
        missing = not storage.exists(path)
        checked.blame(name, "is missing" if missing else "cannot be read")
        return
    checked.files += 1
    checked.num_bytes += size
    if num_bytes is not None and size != num_bytes:
        checked.blame(name, f"has {size:,} bytes where {num_bytes:,} were written")
    elif found != sha256:
        checked.blame(name, "its bytes are not those that were written (SHA-256 differs)")


def _check_strangers(dataset: Dataset, checked: Checked) -> None:
    """Files that look like shards but are in no manifest."""
    known = {shard.name for shard in dataset.manifest.shards}
    known |= {name for shard in dataset.manifest.shards for name in shard.companion}
    for name in storage.list_files(dataset.path):
        if name.startswith("shard-") and name not in known:
            checked.blame(name, "is in the folder, but not in the manifest")


def _check_form(path: str, checked: Checked) -> None:
    """Our JSON is written in one form: another one was edited by hand, or damaged."""
    import json

    value = storage.read_json(path)
    expected = (json.dumps(value, indent=1) + "\n").encode()
    if storage.read_bytes(path) != expected:
        checked.blame(path.rpartition("/")[2], "was not written by this program as it stands")


def _check_record(stage: FinishedStage, checked: Checked) -> None:
    record = read_stage(StageFolder(stage.path, stage.name))
    if record is None:
        checked.blame("_stage.json", "is missing")
    elif record != stage.entry.record:
        checked.blame("_stage.json", "differs from what run.json says of the stage")
    done = stage.entry.record
    if done.rows_in != done.rows_out + sum(done.dropped.values()):
        checked.blame("_stage.json", "rows in are not rows out plus dropped")


def _check_receipts(stage: FinishedStage, checked: Checked) -> None:
    """Each shard's receipt against its files; their sums against the stage's record."""
    receipts = _read_receipts(stage, checked)
    decisions = stage.decisions
    if len(receipts) != decisions.num_shards:
        checked.blame(RECEIPTS, f"{len(receipts)} receipts for {decisions.num_shards} shards")
    dropped: Counter[str] = Counter()
    for receipt in receipts:
        dropped.update(receipt.dropped)
        if receipt.index < decisions.num_shards:
            _check_receipt(stage, receipt, checked)
    done = stage.entry.record
    totals = (sum(r.rows_in for r in receipts), sum(r.rows_out for r in receipts), dict(dropped))
    if totals != (done.rows_in, done.rows_out, done.dropped):
        checked.blame(RECEIPTS, "the receipts do not add up to the stage's record")


def _read_receipts(stage: FinishedStage, checked: Checked) -> list[Receipt]:
    root = storage.join(stage.path, RECEIPTS)
    receipts = []
    for name in storage.list_files(root, ".json"):
        try:
            receipts.append(read_receipt(storage.join(root, name)))
            _check_form(storage.join(root, name), checked)
        except _UNREADABLE as error:
            checked.blame(f"{RECEIPTS}/{name}", f"cannot be read: {_one_line(error)}")
    return receipts


def _check_receipt(stage: FinishedStage, receipt: Receipt, checked: Checked) -> None:
    """One shard's receipt against the verdicts and the manifests."""
    name = f"{RECEIPTS}/{receipt.index:05d}.json"
    for output, info in receipt.outputs.items():
        shards = stage.output(output).manifest.shards
        if receipt.index >= len(shards) or shards[receipt.index] != info:
            checked.blame(name, f"says of '{output}' another thing than its manifest")
    try:
        verdicts = stage.decisions.read_shard(receipt.index, [KEEP, "reason"])
    except _UNREADABLE:
        return  # named already, where the shard's bytes were checked
    kept = pc.sum(verdicts[KEEP]).as_py() or 0
    fallen = verdicts.filter(pc.invert(verdicts[KEEP]))["reason"].to_pylist()
    reasons = dict(sorted(Counter(fallen).items(), key=str))
    if (verdicts.num_rows, kept) != (receipt.rows_in, receipt.rows_out):
        checked.blame(name, "its rows are not those of the verdicts")
    if reasons != dict(sorted(receipt.dropped.items(), key=str)):
        checked.blame(name, "its reasons are not those of the verdicts")


def _chain(work: WorkFolder, flow: str, checked: Checked) -> None:
    """Rows that a stage judges are those that the one before let live; outputs hold no others."""
    before: FinishedStage | None = None
    for stage in work.stages(flow):
        for part, (first, number) in stage.ranges.items():
            source = _before(work, part, stage, before)
            if source is not None:
                start = source.ranges[part][0]
                for shard in range(number):
                    _compare(source, start + shard, stage, first + shard, checked)
        _check_outputs(stage, checked)
        before = stage


def _before(
    work: WorkFolder, part: str, stage: FinishedStage, before: FinishedStage | None
) -> FinishedStage | None:
    """The stage whose survivors of a flow a stage judged; a set joins after its own last one."""
    joins = stage.is_union and part != POOL and (before is None or not before.is_union)
    return work.stages(part)[-1] if joins else before


def _compare(
    source: FinishedStage, from_shard: int, stage: FinishedStage, shard: int, checked: Checked
) -> None:
    """The ids that one stage kept are the ids that the next one judged, in the same order."""
    verdicts = source.decisions.read_shard(from_shard, [ID, KEEP])
    alive = verdicts.filter(verdicts[KEEP])[ID]
    judged = stage.decisions.read_shard(shard, [ID])[ID]
    checked.rows += len(judged)
    if not judged.equals(alive):
        gone = _missing(alive, judged)
        more = _missing(judged, alive)
        said = f"lost {', '.join(gone)}" if gone else f"gained {', '.join(more)}"
        if not gone and not more:
            said = "changed the order of its rows"
        checked.blame(f"{source.name} to {stage.name}, shard {shard}", said)


def _check_outputs(stage: FinishedStage, checked: Checked) -> None:
    """Side-cars hold the rows that the stage kept, or all that came in."""
    shards = stage.decisions.num_shards
    for name in stage.entry.record.outputs:
        if name == DECISIONS or not stage.has(name):
            continue
        output = stage.output(name)
        if output.num_shards != shards or not _present(output) or ID not in output.columns:
            continue
        for shard in range(shards):
            verdicts = stage.decisions.read_shard(shard, [ID, KEEP])
            held = output.read_shard(shard, [ID])[ID]
            kept = verdicts.filter(verdicts[KEEP])[ID]
            if not (held.equals(kept) or held.equals(verdicts[ID])):
                checked.blame(f"{stage.name}/{name}, shard {shard}", "holds other rows than judged")


def _check_tar(packed: Dataset, index: int, name: str, checked: Checked) -> None:
    """Images of the index lie in the tar under their ids, at their offsets, in their sizes."""
    rows = packed.read_shard(index, [ID, "offset", "num_bytes"]).to_pylist()
    told = {f"{row[ID]}.jpg": (row["offset"], row["num_bytes"]) for row in rows}
    try:
        with (
            storage.open_read(storage.join(packed.path, name)) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            held = {one.name: (one.offset_data, one.size) for one in tar if _is_image(one.name)}
    except (tarfile.TarError, *_UNREADABLE) as error:
        checked.blame(name, f"is no readable tar: {_one_line(error)}")
        return
    for image in sorted(told.keys() ^ held.keys())[:_NAMED]:
        side = "is not in the tar" if image in told else "is not in the index"
        checked.blame(name, f"{image} {side}")
    for image in [one for one in told if one in held and told[one] != held[one]][:_NAMED]:
        checked.blame(name, f"{image} lies elsewhere than its index says")


def _verify_seal(work: WorkFolder, checked: Checked) -> None:
    broken = broken_seals(work.path, work.record)
    if broken is None:
        checked.notes.append("this run was never sealed")
        return
    for what in broken:
        checked.blame("", what)
    _check_form(storage.join(work.path, SEAL_FILE), checked)


def _verify_pretraining(work: WorkFolder, checked: Checked) -> None:
    """Weights, checkpoints and logs against the digests that training left beside them."""
    folder = Path(work.path.removeprefix("file://")) / PRETRAIN
    if not storage.is_local(work.path) or not folder.is_dir():
        checked.notes.append("there is none")
        return
    checked.files = sum(path.is_file() for path in folder.rglob("*"))
    for line in find_damage(folder):
        checked.blame("", line)


def _verify_others(work: WorkFolder, checked: Checked) -> None:
    """Files that no digest covers: in a folder of a stage or set a defect, elsewhere a note."""
    known = covered_files(work.path, work.record)
    if storage.exists(storage.join(work.path, SEAL_FILE)):
        known |= set(sealed_files(storage.read_json(storage.join(work.path, SEAL_FILE))))
    ours = tuple(f"{folder}/" for folder in sealed_folders(work.record))
    unknown: Counter[str] = Counter()
    for name in storage.walk_files(work.path):
        if name in known or name.rpartition("/")[2] == LOCK_FILE:
            continue
        if name.startswith(ours):
            checked.blame(name, "is no part of the run: neither a manifest nor the seal names it")
        else:
            unknown[name.partition("/")[0]] += 1
    if unknown:
        shown = ", ".join(f"{name} ({count:,})" for name, count in sorted(unknown.items()))
        checked.notes.append(f"not covered by any digest: {shown}")


def _merge(checked: Checked, found: Checked, name: str = "") -> None:
    """Add what was found in one data set; name: of the output, where there are several."""
    checked.files += found.files
    checked.rows += found.rows
    checked.num_bytes += found.num_bytes
    checked.defects += [f"{name}/{defect}" if name else defect for defect in found.defects]
    checked.notes += [f"{name}: {note}" if name else note for note in found.notes]


def _present(dataset: Dataset) -> bool:
    """Whether any shard of a data set is there (raw bytes are deleted after use)."""
    return any(storage.exists(dataset.shard_path(i)) for i in range(dataset.num_shards))


def _digest(path: str) -> str:
    try:
        return Dataset.open(path).manifest.content_digest
    except _UNREADABLE:
        return ""


def _hash_file(path: str) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with storage.open_read(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _columns_differ(expected: dict[str, str], found: dict[str, str]) -> str:
    wrong = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
    if not wrong:
        return "its columns stand in another order than were written"
    name = wrong[0]
    return (
        f"column '{name}' is {found.get(name, 'missing')} where "
        f"{expected.get(name, 'no such column')} was written"
    )


def _rows_differ(table: pa.Table, content: str) -> str:
    """Say so, or more where two columns of one type were swapped."""
    if table.num_rows <= _ROWS_TO_TRY:
        for one, other in combinations(table.column_names, 2):
            if table.schema.field(one).type == table.schema.field(other).type:
                swap = {one: other, other: one}
                renamed = table.rename_columns([swap.get(n, n) for n in table.column_names])
                if Content.of(renamed).hex() == content:
                    return f"columns '{one}' and '{other}' were swapped"
    return "its rows are not those that were written"


def _missing(wanted: pa.ChunkedArray, held: pa.ChunkedArray) -> list[str]:
    """A few ids of the first that the second lacks."""
    found: list[str] = wanted.filter(pc.invert(pc.is_in(wanted, held.combine_chunks()))).to_pylist()
    return found[:_NAMED]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _is_image(name: str) -> bool:
    return name.endswith(".jpg")
