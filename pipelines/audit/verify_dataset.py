"""Checks that a data set is what its manifest says: bytes, columns, rows, unique ids.

Everything is read once, shard by shard. Every defect is named; none ends the check.
"""

import json
from dataclasses import dataclass, field
from itertools import combinations

import pyarrow as pa
import pyarrow.compute as pc

from curation import merkle, storage
from curation.dataset import MANIFEST, Dataset, Manifest, ShardInfo, files_digest, leaf_of
from curation.digest import Content
from curation.errors import ConfigError, CurateError, StorageError
from curation.neighbors.retrieval.hit_files import HIT_COLUMNS
from curation.schema import ID, KEEP
from embedder.errors import one_line
from pipelines.audit.dataset_stats import open_any
from pipelines.audit.tables import select

UNREADABLE = (CurateError, OSError, ValueError, pa.ArrowException, OverflowError, MemoryError)
"""What reading a damaged file may raise: Arrow does not always raise its own errors."""
NAMED = 5
"""So many examples of one defect are named."""
_ROWS_TO_TRY = 20_000
"""Swapped columns are looked for in shards of at most so many rows."""


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

    def include(self, found: "Checked", name: str = "") -> None:
        """Add what was found in one data set; name: of the output, where there are several."""
        self.files += found.files
        self.rows += found.rows
        self.num_bytes += found.num_bytes
        self.defects += [f"{name}/{defect}" if name else defect for defect in found.defects]
        self.notes += [f"{name}: {note}" if name else note for note in found.notes]


def verify_dataset(path: str, *, may_be_deleted: bool = False) -> Checked:
    """Check a data set: its manifest, then every shard's bytes, columns and rows."""
    checked = Checked(path)
    try:
        dataset = Dataset.open(path)
    except UNREADABLE as error:
        checked.blame(MANIFEST, one_line(error))
        return checked
    check_form(storage.join(path, MANIFEST), checked)
    _check_totals(dataset.manifest, checked)
    if may_be_deleted and not is_present(dataset):
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
    dataset = open_any(path)
    checked = Checked(path, notes=["foreign Parquet: it has no digests to check against"])
    for index, info in enumerate(dataset.manifest.shards):
        try:
            table = storage.read_parquet(dataset.shard_path(index))
        except UNREADABLE as error:
            checked.blame(info.name, one_line(error))
            continue
        checked.files += 1
        checked.rows += table.num_rows
        checked.num_bytes += info.num_bytes
    return checked


def check_unique(path: str, checked: Checked) -> None:
    """An id stands once where a row is an image; verdicts and hits may name one repeatedly."""
    dataset = Dataset.open(path)
    if ID not in dataset.columns or KEEP in dataset.columns or dataset.columns == [*HIT_COLUMNS]:
        return
    query = "select id, count(*) as n from rows group by id having n > 1 order by id limit ?"
    for row in select(dataset, query, [NAMED]):
        checked.blame("", f"id {row['id']} stands there {row['n']} times")


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
    except UNREADABLE as error:
        if storage.exists(dataset.shard_path(index)):
            checked.blame(info.name, f"cannot be read: {one_line(error)}")
        return
    checked.rows += table.num_rows
    # Parquet calls the inside of lists 'element', Arrow calls it 'item'
    found = {field.name: str(field.type).replace("element:", "item:") for field in table.schema}
    if list(found.items()) != list(dataset.manifest.columns.items()):
        checked.blame(info.name, _difference_of_columns(dataset.manifest.columns, found))
    if table.num_rows != info.num_rows:
        checked.blame(info.name, f"{table.num_rows:,} rows where {info.num_rows:,} were written")
    elif Content.of(table).hex() != info.content:
        checked.blame(info.name, _difference_of_rows(table, info.content))
    if info.num_kept is not None and KEEP in found:
        kept = pc.sum(table[KEEP]).as_py() or 0
        if kept != info.num_kept:
            checked.blame(info.name, f"{kept:,} verdicts are 'keep', not {info.num_kept:,}")


def _check_bytes(
    path: str, name: str, sha256: str, num_bytes: int | None, checked: Checked
) -> None:
    try:
        found = storage.digest_file(path)
    except StorageError:
        checked.blame(name, "cannot be read" if storage.exists(path) else "is missing")
        return
    checked.files += 1
    checked.num_bytes += found["size"]
    if num_bytes is not None and found["size"] != num_bytes:
        checked.blame(name, f"has {found['size']:,} bytes where {num_bytes:,} were written")
    elif found["sha256"] != sha256:
        checked.blame(name, "its bytes are not those that were written (SHA-256 differs)")


def _check_strangers(dataset: Dataset, checked: Checked) -> None:
    """Files that look like shards but are in no manifest."""
    known = {shard.name for shard in dataset.manifest.shards}
    known |= {name for shard in dataset.manifest.shards for name in shard.companion}
    for name in storage.list_files(dataset.path):
        if name.startswith("shard-") and name not in known:
            checked.blame(name, "is in the folder, but not in the manifest")


def check_form(path: str, checked: Checked) -> None:
    """Our JSON is written in one form: another one was edited by hand, or damaged."""
    value = storage.read_json(path)
    expected = (json.dumps(value, indent=1) + "\n").encode()
    if storage.read_bytes(path) != expected:
        checked.blame(path.rpartition("/")[2], "was not written by this program as it stands")


def is_present(dataset: Dataset) -> bool:
    """Whether any shard of a data set is there (raw bytes are deleted after use)."""
    return any(storage.exists(dataset.shard_path(i)) for i in range(dataset.num_shards))


def _difference_of_columns(expected: dict[str, str], found: dict[str, str]) -> str:
    wrong = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
    if not wrong:
        return "its columns stand in another order than were written"
    name = wrong[0]
    return (
        f"column '{name}' is {found.get(name, 'missing')} where "
        f"{expected.get(name, 'no such column')} was written"
    )


def _difference_of_rows(table: pa.Table, content: str) -> str:
    """Say so, or more where two columns of one type were swapped."""
    if table.num_rows <= _ROWS_TO_TRY:
        for one, other in combinations(table.column_names, 2):
            if table.schema.field(one).type == table.schema.field(other).type:
                swap = {one: other, other: one}
                renamed = table.rename_columns([swap.get(n, n) for n in table.column_names])
                if Content.of(renamed).hex() == content:
                    return f"columns '{one}' and '{other}' were swapped"
    return "its rows are not those that were written"
