"""What `--keep` names: verdicts on the images of a verb, all of which must keep a row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from curation import storage
from curation.dataset import Dataset, ShardInfo, commit, write_shard
from curation.digest import Content
from curation.errors import SchemaError
from curation.pool import Pool
from curation.schema import ID, KEEP, REASON, schema_of
from curation.stage import ABOUT, Engine, Task
from pipelines.cli.inputs import images_of
from pipelines.operate import console

NO_VERDICT = "no_verdict"
"""Reason of an image on which the decisions that must keep it say nothing."""
_CONTENT = "sha256"


def about(images: Dataset, engine: Engine) -> str:
    """Digest of the ids and bytes of a set of images, in whatever order and shards they lie."""
    task = _DigestRows(images)
    shards = range(images.num_shards)
    parts = (content for _, content in engine.map(task, shards, "know the images again"))
    return Content.merge(map(Content.from_hex, parts)).digest({ID: "", _CONTENT: ""})


@dataclass(frozen=True)
class _DigestRows(Task[int, None, str]):
    images: Dataset

    def __call__(self, item: int, opened: None) -> str:
        known = [name for name in (ID, _CONTENT) if name in self.images.columns]
        return Content.of(self.images.read_shard(item, known)).hex()


def kept_by(pool: Pool, decisions: Sequence[str], out: str, engine: Engine) -> Pool:
    """The images that every one of some decisions keeps, by a table in OUT/_keep-NAME.

    Raises:
        SchemaError: decisions that are no decisions, or not about these images.
    """
    if not decisions:
        return pool
    images = images_of(pool)
    verdicts = tuple(Dataset.open(path) for path in decisions)
    for one in verdicts:
        check_about(one, pool, images, engine)
    task = _KeepAll(pool, verdicts, storage.join(out, f"_keep-{pool.name}"))
    judged = dict(engine.map(task, range(pool.num_shards), "keep"))
    for path, row_id in (pair for result in judged.values() for pair in result.strangers):
        raise SchemaError(f"{path}: keeps {row_id}, which is none of {images.path}; {_ADVICE}")
    kept = commit(task.folder, _SCHEMA, [judged[index].info for index in sorted(judged)])
    dropped = sum((result.dropped for result in judged.values()), Counter[str]())
    console.print_pairs(
        {"images": pool.num_rows, **{f"dropped: {why}": dropped[why] for why in sorted(dropped)}},
        title=f"--keep {', '.join(decisions)}",
    )
    # What decisions bring along: the faces that their filter found, the best hit of an image.
    beside = (storage.join(one.path, "_faces") for one in verdicts)
    side_cars = {path: Dataset.open(path) for path in beside if Dataset.is_finished(path)}
    side_cars |= {one.path: one for one in verdicts if "seed_set" in one.columns}
    return pool.with_stage(side_cars, kept)


_ADVICE = "give decisions on these very rows"
_SCHEMA = schema_of([ID, KEEP, REASON])


def check_about(verdicts: Dataset, pool: Pool, images: Dataset, engine: Engine) -> None:
    """Refuse decisions that are no decisions, or not about some images of a pool.

    Raises:
        SchemaError: names both.
    """
    if KEEP not in verdicts.columns:
        raise SchemaError(
            f"{verdicts.path}: no column '{KEEP}'; found: {', '.join(verdicts.columns)}; give "
            "decisions: the output of filter or dedup, or the folder _decisions of another verb"
        )
    if verdicts.num_shards != pool.num_shards:
        raise SchemaError(
            f"{verdicts.path}: has {verdicts.num_shards} shards, {images.path} has "
            f"{pool.num_shards}; {_ADVICE}"
        )
    subject = verdicts.attributes.get(ABOUT)
    if subject is not None and subject != about(images, engine):
        raise SchemaError(f"{verdicts.path}: is about other rows than {images.path}; {_ADVICE}")


@dataclass(frozen=True)
class _Kept:
    """What became of one shard."""

    info: ShardInfo
    dropped: Counter[str]
    strangers: tuple[tuple[str, str], ...]
    """Decisions and the id of a row that they keep, which is not there."""


@dataclass(frozen=True)
class _KeepAll(Task[int, None, _Kept]):
    """Joins the verdicts on one shard: a row falls for the reason of the first that drops it."""

    pool: Pool
    verdicts: tuple[Dataset, ...]
    folder: str

    def __call__(self, item: int, opened: None) -> _Kept:
        ids = self.pool.live_ids(item).to_pylist()
        reasons: list[str | None] = [None] * len(ids)
        strangers = []
        for one in self.verdicts:
            known = [name for name in (ID, KEEP, REASON) if name in one.columns]
            said = _reasons(one.read_shard(item, known))
            reasons = [why or said.get(i, NO_VERDICT) for i, why in zip(ids, reasons, strict=True)]
            kept = {row_id for row_id, why in said.items() if why is None}
            strangers += [(one.path, row_id) for row_id in sorted(kept.difference(ids))[:1]]
        columns = {ID: ids, KEEP: [why is None for why in reasons], REASON: reasons}
        info = write_shard(self.folder, item, pa.table(columns, _SCHEMA))
        return _Kept(info, Counter(filter(None, reasons)), tuple(strangers))


def _reasons(verdicts: pa.Table) -> dict[str, str | None]:
    """Why each row falls; None where it stays, also beside a repeat of it that falls."""
    columns = verdicts.to_pydict()
    said = columns.get(REASON, [None] * verdicts.num_rows)
    rows = zip(columns[ID], columns[KEEP], said, strict=True)
    ordered = sorted(rows, key=lambda row: bool(row[1]))
    return {row_id: None if keep else why or "dropped" for row_id, keep, why in ordered}
