"""Drops screenshots full of text, and images that are far from every seed.

With seeds it stands after `embed`: the distance to them is read off embeddings that were stored
before.
"""

from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, PrivateAttr, model_validator

from curation.image_filter import UNREADABLE, ImageFilter
from curation.neighbors.index.vector_index import sources_of
from curation.neighbors.kernels.id_hashes import hash_ids
from curation.neighbors.kernels.k_means import assign_exactly
from curation.neighbors.rows.vectors import VectorSource, bad_rows, vectors_of
from curation.schema import ID, schema_of
from curation.stage import Figures, Limit, Resources, Shard, StageInputs, reject
from embedder.images import Pixels
from embedder.rows import unit_rows

_STROKE = 7
"""Strokes of letters are thinner than this, in pixels."""
_INK = 40
"""How much darker or lighter than its surroundings ink is, of 255."""
_GAP = 9
"""Letters this near each other are one line, in pixels."""
_LINE_HEIGHTS = (3, 48)
_FLAT = 15
"""Largest standard deviation of what text stands on: paper and screens are flat, nature is not."""


class Relevance(ImageFilter):
    """Keeps the share of text and the cosine to the nearest seed; judges by both."""

    version = 2

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
    _sources: tuple[VectorSource, ...] = PrivateAttr(())
    _seed: int = PrivateAttr(0)
    _read: tuple[int, pa.Table] | None = PrivateAttr(None)

    reasons = ("text", "far_from_seeds", "bad_vector", UNREADABLE)
    scores = ("text_share",)
    side = 512
    limits = (
        Limit("text_share", "<=", "max_text", "text"),
        Limit("seed_similarity", ">=", "min_similarity", "far_from_seeds"),
    )

    @model_validator(mode="after")
    def _seeds_have_embeddings(self) -> "Relevance":
        if bool(self.seeds) != (self.embeddings is not None):
            raise ValueError("give 'seeds' and 'embeddings' together, or neither")
        if self.max_text is None and not self.seeds:
            raise ValueError("nothing to judge by: give 'max_text', or 'seeds' and 'embeddings'")
        return self

    @property
    def looks_at_pixels(self) -> bool:
        """Where text is looked for."""
        return self.max_text is not None

    def set_names(self) -> tuple[str, ...]:
        """The seed sets."""
        return self.seeds

    def decision_columns(self) -> pa.Schema:
        """Share of text, and cosine to the nearest seed; null where not asked."""
        return schema_of(["text_share", "seed_similarity"])

    def resources(self) -> Resources:
        """What one shard's task needs."""
        return Resources(cpus=1, memory=2 << 30)

    def bound(self, inputs: StageInputs) -> Self:
        """The stage with the vectors of the pool and of the seeds."""
        if self.embeddings is None:
            return self
        bound = self.model_copy()
        bound._seed = inputs.seed
        bound._sources = sources_of(
            inputs,
            self.seeds,
            self.embeddings,
            self.embedding_column,
            assume_same_space=self.assume_same_space,
        )
        return bound

    def figures(self) -> Figures:
        """How many seeds there are, and how many were compared with."""
        num_seeds = sum(source.pool.num_rows for source in self._sources[1:])
        return {"seeds": num_seeds, "seeds_compared": min(num_seeds, self.max_seeds)}

    def measure(self, pixels: Pixels, opened: None) -> tuple[float]:
        """The share of text."""
        return (text_share(pixels),)

    def judge(self, shard: Shard, scores: dict[str, np.ndarray]) -> None:
        """Judge by the text, then by the distance."""
        super().judge(shard, scores)
        cosines = np.full(shard.num_rows, np.nan, np.float32)
        if self._sources:
            vectors = self._vectors(shard)
            bad = bad_rows(vectors)
            reject(shard, bad, "bad_vector")
            if len(self.seed_rows):
                cosines[~bad] = assign_exactly(vectors[~bad], self.seed_rows)[1]
            self.judge_by_limits(shard, {"seed_similarity": cosines})
            reject(shard, np.isnan(cosines), "far_from_seeds")  # without a seed, everything is far
        shard.note("seed_similarity", cosines)

    @cached_property
    def seed_rows(self) -> np.ndarray:
        """(S, D) float32: the seeds that are compared with, unit rows."""
        return _read_seeds(self._sources[1:], self.max_seeds, self._seed)

    def _vectors(self, shard: Shard) -> np.ndarray:
        """(N, D) vectors of the rows, which may be a part of their shard's."""
        source = self._sources[0]
        if self._read is None or self._read[0] != shard.index:
            rows = source.pool.only(source.layer).read(shard.index, [source.column])
            self._read = shard.index, rows
        table = self._read[1]
        rows = table.take(pc.index_in(shard.ids, value_set=table[ID].combine_chunks()))
        return vectors_of(rows[source.column], source.where(shard.index))


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


def text_share(pixels: Pixels) -> float:
    """Share of an image (0 to 1) that lines of text cover.

    Ink is what a closing with a kernel wider than a stroke takes away, dark on light and light on
    dark. Ink that runs together sideways is a line of text if it is low and long, mostly filled,
    changes often along its length, and stands on something flat.
    """
    import cv2

    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    covered = sum(_line_area(tones) for tones in (gray, 255 - gray))
    return min(1.0, covered / gray.size)


def _line_area(gray: np.ndarray) -> int:
    """Pixels in lines of dark text."""
    import cv2

    ground = cv2.morphologyEx(gray, cv2.MORPH_CLOSE, np.ones((_STROKE, _STROKE), np.uint8))
    ink = (cv2.subtract(ground, gray) > _INK).astype(np.uint8)
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
