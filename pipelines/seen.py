"""Is my photo in your data? A file is compared with everything that a run kept."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from curation.dataset import Dataset
from curation.errors import DatasetError, SpaceError
from curation.schema import ID, KEEP
from embedder.encoder import Encoder, embed_images, load_encoder
from embedder.images import CanonicalImage, Limits, canonicalize
from pipelines.certificate import embeddings_of_leaks, unit_rows
from pipelines.run_record import POOL
from pipelines.tables import Row, Tables
from pipelines.work_folder import FinishedStage, WorkFolder

_NEAREST = 5


@dataclass(frozen=True)
class _Match:
    """A row of some flow near the file."""

    similarity: float
    id: str
    flow: str

    def shown(self, sources: dict[str, str]) -> Row:
        """As a row of a table."""
        return {
            "flow": self.flow,
            "id": self.id,
            "similarity": round(self.similarity, 6),
            "source": sources.get(self.id, ""),
        }


def look_for(file: Path, path: str) -> dict[str, Any]:
    """What a run holds of a photo: itself, copies of it, and what would have become of it.

    Raises:
        ImageError: the file is no readable image.
        DatasetError: no finished run there, or one without embeddings for copies.
        SpaceError: the run's encoder is another one today.
    """
    work = WorkFolder(path.rstrip("/"))
    data = file.read_bytes()
    image = _canonical(work, data)
    from curation.stages.canonicalize import pixel_hash

    hashes = (hashlib.sha256(data).hexdigest(), pixel_hash(image.pixels))
    equal = _equal(work, *hashes)
    name, dedup, leak = embeddings_of_leaks(work)
    vector = _embed(work, name, image)
    kept = _nearest(work, name, vector)
    benchmarks = [
        match
        for flow, roles in work.record.roles.items()
        if set(roles) & {"leaks", "near_dedup"}
        for match in _nearest_of(work, flow, name, vector, None)
    ]
    sources = _sources(work, [*kept, *benchmarks])
    ranked = sorted(benchmarks, key=lambda one: (-one.similarity, one.id))[:_NEAREST]
    return {
        "file": str(file),
        "sha256": hashes[0],
        "pixel_hash": hashes[1],
        "verdict": _verdict(kept, ranked, dedup, leak),
        "threshold": dedup,
        "leak_threshold": leak,
        "equal": equal,
        "nearest": [match.shown(sources) for match in kept],
        "nearest_benchmark": [match.shown(sources) for match in ranked],
    }


def _canonical(work: WorkFolder, data: bytes) -> CanonicalImage:
    """The file as this run would have stored it."""
    stage = work.stage(POOL, "canonicalize")
    settings = stage.entry.record.settings if stage else {}
    limits = Limits(settings.get("max_bytes", 64 << 20), settings.get("max_pixels", 50_000_000))
    return canonicalize(data, settings.get("max_side", 512), settings.get("quality", 95), limits)


def _equal(work: WorkFolder, sha256: str, pixels: str) -> list[Row]:
    """Rows of any flow with the same bytes or the same pixels."""
    found: list[Row] = []
    for flow in work.flows:
        stage = work.making(flow, "images")
        with Tables() as tables:
            if stage is not None and tables.add("images", stage.output("images")):
                rows = tables.rows(
                    "select id, sha256 = ? as same_bytes from images "
                    "where sha256 = ? or pixel_hash = ? order by id",
                    [sha256, sha256, pixels],
                )
                found += [{"flow": flow, **row} for row in rows]
    return found


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
    encoder = load_encoder(str(attributes["encoder"]))
    if encoder.space != attributes["space"]:
        raise SpaceError(
            f"{work.path}: was embedded into space {attributes['space']}, and "
            f"'{attributes['encoder']}' gives {encoder.space} here: another device or version"
        )
    return encoder


def _embed(work: WorkFolder, name: str, image: CanonicalImage) -> np.ndarray:
    """(1, D) float32 unit row of the file, in the run's space."""
    from embedder.images import decode

    encoder = encoder_of(work, name)
    vector = embed_images([encoder], [decode(image.data)])[0].astype(np.float32)
    unit: np.ndarray = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return unit


def _nearest(work: WorkFolder, name: str, vector: np.ndarray) -> list[_Match]:
    """The most similar images of the finished set."""
    last = [stage for stage in work.stages(POOL) if stage.is_union or stage.name == "select"]
    if not last:
        raise DatasetError(f"{work.path}: its recipe has no 'select', so there is no set")
    found = [
        match
        for flow in last[-1].ranges
        for match in _nearest_of(work, flow, name, vector, last[-1])
    ]
    return sorted(found, key=lambda one: (-one.similarity, one.id))[:_NEAREST]


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
            alive = _alive(kept.decisions, kept.ranges[flow][0] + shard)
            table = table.filter(pc.is_in(table[ID], alive.combine_chunks()))
        if table.num_rows:
            scores = unit_rows(table).astype(np.float64) @ vector[0].astype(np.float64)
            first = np.argsort(-scores, kind="stable")[:_NEAREST]
            ids = table[ID].to_pylist()
            best += [_Match(float(scores[i]), ids[i], flow) for i in first]
            best = sorted(best, key=lambda one: (-one.similarity, one.id))[:_NEAREST]
    return best


def _alive(decisions: Dataset, shard: int) -> Any:
    verdicts = decisions.read_shard(shard, [ID, KEEP])
    return verdicts.filter(verdicts[KEEP])[ID]


def _sources(work: WorkFolder, matches: list[_Match]) -> dict[str, str]:
    """Where the images came from."""
    from pipelines.lookup import find_rows

    found = {}
    for match in matches:
        stage = work.making(match.flow, "rows")
        if stage is not None:
            shard = stage.shard_of(match.id, match.flow)
            for row in find_rows(stage.output("rows"), shard, [match.id], ["source"]).to_pylist():
                found[match.id] = row["source"]
    return found


def _verdict(
    kept: list[_Match], benchmarks: list[_Match], dedup: float | None, leak: float | None
) -> str:
    """In words: whether it is there, and what a run would have done with it."""
    if kept and dedup is not None and kept[0].similarity > dedup:
        return f"in the set: {kept[0].id} is this picture or a copy of it"
    if benchmarks and leak is not None and benchmarks[0].similarity > leak:
        return f"not in the set; it would be dropped as a leak of '{benchmarks[0].flow}'"
    return "not in the set, and no near copy of it is"
