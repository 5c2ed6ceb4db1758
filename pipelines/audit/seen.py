"""Is my photo in your data? A file is compared with everything that a run kept."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import DatasetError, SpaceError
from curation.neighbors.rows.vectors import vectors_of
from curation.schema import ID, KEEP, column_type
from curation.sources.references import Reference
from curation.stage import Shard, ShardStage
from curation.stages.canonicalize import pixel_hash
from embedder.encoder import Encoder, Precision, embed_images, load_encoder
from embedder.errors import ImageError
from embedder.images import CanonicalImage, Limits, canonicalize, decode
from embedder.rows import unit_rows
from pipelines.audit.certificate import embeddings_of_leaks
from pipelines.audit.explain import side_car_row
from pipelines.audit.tables import Row, select
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL

_NEAREST = 5


@dataclass(frozen=True)
class _Match:
    """A row of some flow near the file."""

    similarity: float
    id: str
    flow: str

    def shown(self, work: WorkFolder) -> Row:
        """As a row of a table."""
        row = side_car_row(work, self.flow, "rows", self.id) or {"source": ""}
        told = {"flow": self.flow, "id": self.id, "similarity": round(self.similarity, 6)}
        return {**told, "source": row["source"]}


def find_image(file: Path, path: str) -> Row:
    """What a run holds of a photo: itself, copies of it, and what would have become of it.

    Raises:
        ImageError: the file is no readable image.
        DatasetError: no finished run there, or one without embeddings for copies.
        SpaceError: the run's encoder is another one today.
    """
    work = WorkFolder(path.rstrip("/"))
    data, image = _as_stored(work, file)
    hashes = (hashlib.sha256(data).hexdigest(), pixel_hash(image.pixels))
    name, dedup, leak = embeddings_of_leaks(work)
    encoder = encoder_of(work, name)
    vector = unit_rows(embed_images([encoder], [decode(image.data)])[0]).astype(np.float32)
    kept = _nearest(work, name, vector)
    benchmarks = [
        match for flow in work.benchmarks for match in _nearest_of(work, flow, name, vector, None)
    ]
    ranked = _ranked(benchmarks)
    verdicts = filter_verdicts(work, data)
    return {
        "file": str(file),
        "sha256": hashes[0],
        "pixel_hash": hashes[1],
        "verdict": _verdict(verdicts, kept, ranked, dedup, leak),
        "threshold": dedup,
        "leak_threshold": leak,
        "verdicts": verdicts,
        "equal": _equal(work, *hashes),
        "nearest": [match.shown(work) for match in kept],
        "nearest_benchmark": [match.shown(work) for match in ranked],
    }


def _as_stored(work: WorkFolder, file: Path) -> tuple[bytes, CanonicalImage]:
    """The file, and the image that this run would have stored, within its limits."""
    stage, default = work.making(POOL, "images"), Limits()
    settings = stage.entry.record.settings if stage else {}
    limits = Limits(
        settings.get("max_bytes", default.max_bytes),
        settings.get("max_pixels", default.max_pixels),
    )
    data = Reference(str(file)).read(limits.max_bytes)
    side, quality = settings.get("max_side", 512), settings.get("quality", 95)
    try:
        return data, canonicalize(data, side, quality, limits)
    except ImageError as error:
        detail = str(error).removeprefix(error.reason).removeprefix(": ")
        raise ImageError(error.reason, f"{file}: {detail}" if detail else str(file)) from error


def filter_verdicts(work: WorkFolder, data: bytes) -> list[Row]:
    """What the run's own filters say of a file, in their order, to the first that drops it.

    Stages that compare images with each other are left out, and those whose columns are not known.
    """
    columns: dict[str, Any] = {ID: "0" * 32, "source": "", "source_set": POOL, "raw": data}
    table = pa.table({name: pa.array([one], column_type(name)) for name, one in columns.items()})
    found = []
    for stage in work.stages(POOL):
        filter_ = stage.entry.built()
        known = set(filter_.required_columns()) <= set(table.column_names)
        if not isinstance(filter_, ShardStage) or not (filter_.judges_images and known):
            continue
        if filter_.set_names():
            continue
        shard = Shard(table, 0)
        filter_.process(shard, filter_.open())
        score, threshold = float(shard.scores[0]), float(shard.thresholds[0])
        found.append(
            {
                "stage": stage.name,
                "keep": bool(shard.alive[0]),
                "reason": shard.reasons[0],
                "score": None if np.isnan(score) else score,
                "threshold": None if np.isnan(threshold) else threshold,
            }
        )
        if not shard.alive[0]:
            break
        for emitted in shard.emitted.values():
            for name, values in emitted.items():
                table = table.append_column(name, pa.array(values, column_type(name)))
    return found


def _equal(work: WorkFolder, sha256: str, pixels: str) -> list[Row]:
    """Rows of any flow with the same bytes or the same pixels."""
    # Two questions: Bloom filters answer an equation, and no "or".
    query = (
        "select id, true as same_bytes from rows where sha256 = ? union all "
        "select id, false from rows where pixel_hash = ? and sha256 != ? order by id"
    )
    return [
        {"flow": flow, **row}
        for flow in work.flows
        for row in select(work.output(flow, "images"), query, [sha256, pixels, sha256])
    ]


def encoder_of(work: WorkFolder, name: str) -> Encoder:
    """The encoder of the pool's embeddings of a name.

    Raises:
        DatasetError: there are none.
        SpaceError: that encoder gives another space here.
    """
    stage = work.making(POOL, name)
    if stage is None:
        raise DatasetError(f"{work.path}: its pool has no embeddings '{name}'")
    attributes = stage.output(name).attributes
    precision: Precision = attributes.get("precision") or "auto"
    encoder = load_encoder(str(attributes["encoder"]), precision=precision)
    if encoder.space != attributes["space"]:
        raise SpaceError(
            f"{work.path}: was embedded into space {attributes['space']}, and "
            f"'{attributes['encoder']}' gives {encoder.space} here: another device or version"
        )
    return encoder


def _nearest(work: WorkFolder, name: str, vector: np.ndarray) -> list[_Match]:
    """The most similar images of the finished set."""
    last = [stage for stage in work.stages(POOL) if stage.entry.kind.on_union]
    if not last:
        raise DatasetError(f"{work.path}: its recipe has no 'select', so there is no set")
    return _ranked(
        match
        for flow in last[-1].ranges
        for match in _nearest_of(work, flow, name, vector, last[-1])
    )


def _ranked(matches: Iterable[_Match]) -> list[_Match]:
    return sorted(matches, key=lambda one: (-one.similarity, one.id))[:_NEAREST]


def _nearest_of(
    work: WorkFolder, flow: str, name: str, vector: np.ndarray, kept: FinishedStage | None
) -> list[_Match]:
    """The most similar rows of one flow, shard by shard; with `kept`, only those it kept."""
    stage = work.making(flow, name)
    if stage is None:
        return []
    dataset, best = stage.output(name), list[_Match]()
    for shard in range(dataset.num_shards):
        table = dataset.read_shard(shard, [ID, "embedding"])
        if kept is not None:
            verdicts = kept.decisions.read_shard(kept.ranges[flow][0] + shard, [ID, KEEP])
            alive = verdicts.filter(verdicts[KEEP])[ID]
            table = table.filter(pc.is_in(table[ID], alive.combine_chunks()))
        if table.num_rows:
            rows = vectors_of(table["embedding"], dataset.shard_path(shard))
            scores = unit_rows(rows) @ vector[0].astype(np.float64)
            first = np.argsort(-scores, kind="stable")[:_NEAREST]
            ids = table[ID].to_pylist()
            best = _ranked([*best, *(_Match(float(scores[i]), ids[i], flow) for i in first)])
    return best


def _verdict(
    verdicts: list[Row],
    kept: list[_Match],
    benchmarks: list[_Match],
    dedup: float | None,
    leak: float | None,
) -> str:
    """In words: whether it is there, and what a run would have done with it."""
    if kept and dedup is not None and kept[0].similarity > dedup:
        return f"in the set: {kept[0].id} is this picture or a copy of it"
    if verdicts and not verdicts[-1]["keep"]:
        last = verdicts[-1]
        return f"not in the set; it would be dropped by {last['stage']}: {last['reason']}"
    if benchmarks and leak is not None and benchmarks[0].similarity > leak:
        return f"not in the set; it would be dropped as a leak of '{benchmarks[0].flow}'"
    return "not in the set, and no near copy of it is"
