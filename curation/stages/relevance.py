"""Drops screenshots full of text, and images that are far from every seed.

It stands after `embed`: the distance to the seeds is read off embeddings that were stored before.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from curation.decoding import UNREADABLE, measure_images
from curation.ledger import commit_shard, finished_shards
from curation.neighbors.index.vector_index import sources_of
from curation.neighbors.kernels.id_hashes import hash_ids
from curation.neighbors.kernels.k_means import assign_exactly
from curation.neighbors.rows.vectors import VectorSource, bad_rows, vectors_of
from curation.schema import schema_of
from curation.stage import (
    DatasetStage,
    Engine,
    Resources,
    Shard,
    StageFolder,
    StageInputs,
    Task,
    reject,
)
from embedder.images import Pixels, decode_within
from embedder.rows import unit_rows

_SIDE = 512
"""Text is looked for at this size."""
_STROKE = 7
"""Strokes of letters are thinner than this, in pixels."""
_INK = 40
"""How much darker or lighter than its surroundings ink is, of 255."""
_GAP = 9
"""Letters this near each other are one line, in pixels."""
_LINE_HEIGHTS = (3, 48)
_FLAT = 15
"""Largest standard deviation of what text stands on: paper and screens are flat, nature is not."""


class Relevance(DatasetStage):
    """Keeps the share of text and the cosine to the nearest seed; judges by both."""

    max_text: float | None = Field(0.12, ge=0, le=1)
    """Share of the image in lines of text; images with more are dropped. null: do not look."""
    seeds: tuple[str, ...] = ()
    """Seed sets that images must resemble; none: not asked."""
    embeddings: str | None = None
    """Side-car with the vectors that are compared, in the pool and in every seed set."""
    embedding_column: str = "embedding"
    """Its column of vectors."""
    min_similarity: float = Field(0.2, ge=-1, le=1)
    """Cosine to the nearest seed; images below it are dropped. It depends on the encoder."""
    max_seeds: int = Field(20_000, ge=1)
    """Seeds compared with, at most: those with the smallest hash of the seed and their id."""
    assume_same_space: bool = False
    """Compare embeddings whose spaces are unknown or differ."""
    threads: int = Field(2, ge=1)
    """Images looked at at once."""

    reasons = ("text", "far_from_seeds", "bad_vector", UNREADABLE)

    @model_validator(mode="after")
    def _seeds_have_embeddings(self) -> "Relevance":
        if bool(self.seeds) != (self.embeddings is not None):
            raise ValueError("give 'seeds' and 'embeddings' together, or neither")
        if self.max_text is None and not self.seeds:
            raise ValueError("nothing to judge by: give 'max_text', or 'seeds' and 'embeddings'")
        return self

    def required_columns(self) -> tuple[str, ...]:
        """The image where text is looked for, vectors where seeds are."""
        images = () if self.max_text is None else ("image",)
        return (*images, *((self.embedding_column,) if self.seeds else ()))

    def optional_columns(self) -> tuple[str, ...]:
        """Faces, which are blurred for every stage after the one that found them."""
        return () if self.max_text is None else ("boxes",)

    def set_names(self) -> tuple[str, ...]:
        """The seed sets."""
        return self.seeds

    def decision_columns(self) -> pa.Schema:
        """Share of text, and cosine to the nearest seed; null where not asked."""
        return schema_of(["text_share", "seed_similarity"])

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> dict[str, Any]:
        """Judge the shards that have no receipt yet."""
        sources: tuple[VectorSource, ...] = ()
        if self.embeddings is not None:
            sources = sources_of(
                inputs,
                self.seeds,
                self.embeddings,
                self.embedding_column,
                assume_same_space=self.assume_same_space,
            )
        done = finished_shards(folder)
        waiting = [index for index in range(inputs.pool.num_shards) if index not in done]
        for _ in engine.map(_JudgeShard(self, inputs, sources, folder), waiting, folder.stage):
            pass
        num_seeds = sum(source.pool.num_rows for source in sources[1:])
        return {"seeds": num_seeds, "seeds_compared": min(num_seeds, self.max_seeds)}


@dataclass(frozen=True)
class _JudgeShard(Task[int, np.ndarray, int]):
    stage: Relevance
    inputs: StageInputs
    sources: tuple[VectorSource, ...]
    folder: StageFolder

    @property
    def resources(self) -> Resources:
        return Resources(memory=2 << 30)

    def open(self) -> np.ndarray:
        """(S, D) float32: the seeds, unit rows."""
        return _read_seeds(self.sources[1:], self.stage.max_seeds, self.inputs.seed)

    def __call__(self, item: int, opened: np.ndarray) -> int:
        stage, pool = self.stage, self.inputs.pool
        used = [name for name in stage.optional_columns() if name in pool.columns]
        columns = [name for name in stage.required_columns() if name != stage.embedding_column]
        shard = Shard(pool.read(item, [*columns, *used]), item)
        self._judge_text(shard)
        self._judge_distance(shard, opened)
        commit_shard(stage, self.folder, shard)
        return shard.num_rows

    def _judge_text(self, shard: Shard) -> None:
        shares = np.full(shard.num_rows, np.nan)
        if self.stage.max_text is not None:
            found = measure_images(
                shard, text_share, threads=self.stage.threads, decode=_decode_small
            )
            shares = np.array([np.nan if share is None else share for share in found], np.float64)
            shard.record_score(shares, self.stage.max_text)
            reject(shard, shares > self.stage.max_text, "text")
        shard.note("text_share", shares.astype(np.float32))

    def _judge_distance(self, shard: Shard, seeds: np.ndarray) -> None:
        cosines = np.full(shard.num_rows, np.nan, np.float32)
        if self.sources:
            source = self.sources[0]
            rows = source.pool.only(source.layer).read(shard.index, [source.column])
            vectors = vectors_of(rows[source.column], source.where(shard.index))
            bad = bad_rows(vectors)
            reject(shard, bad, "bad_vector")
            if len(seeds):
                cosines[~bad] = assign_exactly(vectors[~bad], seeds)[1]
            shard.record_score(cosines, self.stage.min_similarity)
            far = ~(cosines >= self.stage.min_similarity)  # with no seed at all, everything is far
            reject(shard, far, "far_from_seeds")
        shard.note("seed_similarity", cosines)


def _read_seeds(sources: tuple[VectorSource, ...], count: int, seed: int) -> np.ndarray:
    """(S, D) float32 unit rows: the seeds with the smallest hash, in its order."""
    hashes, kept = np.empty(0, np.uint64), None
    for source in sources:
        for index in range(source.pool.num_shards):
            ids, vectors = source.read(index)
            good = ~bad_rows(vectors)
            found = unit_rows(vectors[good]).astype(np.float32)
            kept = found if kept is None else np.concatenate([kept, found])
            hashes = np.concatenate([hashes, hash_ids(ids[good], seed, "relevance")])
            order = np.argsort(hashes, kind="stable")[:count]
            hashes, kept = hashes[order], kept[order]
    return np.empty((0, 0), np.float32) if kept is None else kept


def _decode_small(data: bytes) -> Pixels:
    return decode_within(data, _SIDE)


def text_share(pixels: Pixels) -> float:
    """Share of an image (0 to 1) that lines of text cover.

    Ink is what a closing with a kernel wider than a stroke takes away, dark on light and light on
    dark. Ink that runs together sideways is a line of text if it is low and long, mostly filled,
    changes often along its length, and stands on something flat.
    """
    import cv2

    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    covered = sum(_line_area(tones) for tones in (grey, 255 - grey))
    return min(1.0, covered / grey.size)


def _line_area(grey: np.ndarray) -> int:
    """Pixels in lines of dark text."""
    import cv2

    ground = cv2.morphologyEx(grey, cv2.MORPH_CLOSE, np.ones((_STROKE, _STROKE), np.uint8))
    ink = (cv2.subtract(ground, grey) > _INK).astype(np.uint8)
    joined = cv2.morphologyEx(ink, cv2.MORPH_CLOSE, np.ones((1, _GAP), np.uint8))
    _, _, boxes, _ = cv2.connectedComponentsWithStats(joined, connectivity=4)
    boxes = boxes[1:]  # the first is the background
    _, _, width, height, filled = boxes.T
    low, high = _LINE_HEIGHTS
    shaped = (height >= low) & (height <= high) & (width >= 2 * height)
    area = 0
    for x, y, w, h in boxes[shaped & (filled >= 0.5 * width * height), :4]:
        marks = ink[y : y + h, x : x + w]
        changes = np.count_nonzero(marks[:, 1:] != marks[:, :-1]) / w
        if changes > 0.8 and ground[y : y + h, x : x + w].std() <= _FLAT:
            area += w * (h + 2)
    return int(area)
