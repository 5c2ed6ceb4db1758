"""Filters that look at pixels: one method from pixels to scores, one from scores to verdicts.

Filters that follow each other share what they decode: a few rows at a time pass through all of
them, and each image is decoded once for all that look at it at the same scale.
"""

from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.schema import score_type
from curation.stage import Shard, ShardStage, reject
from embedder.errors import ImageError
from embedder.images import DecodedImage, Pixels, blur_boxes

Score: TypeAlias = float | list[list[int]]
"""A number, or boxes."""
UNREADABLE = "unreadable"
"""Reason of rows whose image does not decode."""
DECODED = "images_decoded"
"""Counter of the run summary: images that this stage decoded, for itself and for those after it."""
_ROWS_AT_ONCE = 32
"""Rows that pass through several filters together: their decoded images are in memory meanwhile."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


class ImageFilter(ShardStage):
    """Scores each image by its pixels, and rejects by its scores.

    A filter names its `scores`, measures them, and declares what they are judged by in `limits`;
    where that does not say it all, `judge` does.
    """

    judges_images = True
    scores: ClassVar[tuple[str, ...]]
    """What `measure` gives, in its order: columns of the decisions."""
    side: ClassVar[int | None] = None
    """Images are shrunk to this side before they are measured; None: as they are stored."""

    threads: int = Field(2, ge=1)
    """Images looked at at once."""

    @abstractmethod
    def measure(self, pixels: Pixels, opened: Any) -> tuple[Score, ...]:
        """The scores of one image, uint8 (H, W, 3), which is not to be written to."""

    def judge(self, shard: Shard, scores: dict[str, np.ndarray]) -> None:
        """Note the scores, and drop what is beyond the limits.

        scores: (N,) float64 by name, NaN where nothing was measured.
        """
        for name, values in scores.items():
            shard.note(name, values.astype(np.float32))
        self.judge_by_limits(shard, scores)

    def judge_columns(self, shard: Shard) -> None:
        """Drop by other columns what need not be decoded."""

    def judge_by_limits(self, shard: Shard, scores: dict[str, np.ndarray]) -> None:
        """Record the scores, and drop what is beyond the limits, in their order."""
        for limit in self.limits:
            if limit.score in scores:
                limit.judge(shard, scores[limit.score], getattr(self, limit.setting))

    @property
    def looks_at_pixels(self) -> bool:
        """Whether the settings ask for anything that pixels tell."""
        return True

    def required_columns(self) -> tuple[str, ...]:
        """The canonical image."""
        return ("image",) if self.looks_at_pixels else ()

    def optional_columns(self) -> tuple[str, ...]:
        """Faces, which are blurred for every stage after the one that found them."""
        return ("boxes",) if self.looks_at_pixels else ()

    def decision_columns(self) -> pa.Schema:
        """A column a score."""
        return pa.schema([(name, score_type(name)) for name in self.scores])

    def process(self, shard: Shard, opened: Any) -> None:
        """Measure every live row, then judge."""
        filter_in_turn(shard, [(self, opened)])


@dataclass
class Scores:
    """What a filter measured of the rows of a shard."""

    columns: dict[str, np.ndarray]
    """(N,) float64 by name, or objects such as boxes; NaN or None where nothing was measured."""
    reached: np.ndarray
    """(N,) bool: rows that no filter before this one drops."""
    unreadable: np.ndarray
    """(N,) bool: rows that do not decode."""

    @classmethod
    def of(cls, stage: ImageFilter, num_rows: int) -> "Scores":
        """Nothing measured so far."""
        columns = {
            name: np.full(num_rows, np.nan)
            if pa.types.is_floating(score_type(name))
            else np.full(num_rows, None, object)
            for name in stage.scores
        }
        return cls(columns, np.zeros(num_rows, bool), np.zeros(num_rows, bool))

    def part(self, rows: slice) -> "Scores":
        """Some of the rows; what is written there is written here."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Scores(columns, self.reached[rows], self.unreadable[rows])

    def judge(self, stage: ImageFilter, shard: Shard) -> None:
        """Drop what the filter drops by columns, then what does not decode, then by the scores."""
        stage.judge_columns(shard)
        reject(shard, self.unreadable, UNREADABLE)
        stage.judge(shard, self.columns)


def filter_in_turn(shard: Shard, filters: Sequence[tuple[ImageFilter, Any]]) -> None:
    """Pass a shard through filters that follow each other, each with what its `open` gave."""
    found = measure_in_turn(shard, filters)
    for (stage, _), scores in zip(filters, found, strict=True):
        scores.judge(stage, shard)


def measure_in_turn(shard: Shard, filters: Sequence[tuple[ImageFilter, Any]]) -> list[Scores]:
    """What each filter measures of the rows that those before it keep; drops none itself.

    Memory: the decoded images of 32 rows, or of a row a thread where there is but one filter.
    """
    found = [Scores.of(stage, shard.num_rows) for stage, _ in filters]
    step = _ROWS_AT_ONCE if len(filters) > 1 else max(1, shard.num_rows)
    with ThreadPoolExecutor(max(stage.threads for stage, _ in filters)) as pool:
        for start in range(0, shard.num_rows, step):
            part = shard.part(slice(start, start + step))
            images = _Images(part, keeps=len(filters) > 1)
            for number, (stage, opened) in enumerate(filters):
                scores = found[number].part(slice(start, start + step))
                _measure(stage, opened, part, images, scores, pool)
                if number < len(filters) - 1:
                    scores.judge(stage, part)
            shard.count(DECODED, int(images.num_decoded.sum()))
    return found


def _measure(
    stage: ImageFilter,
    opened: Any,
    part: Shard,
    images: "_Images",
    scores: Scores,
    pool: ThreadPoolExecutor,
) -> None:
    """Measure the rows that are alive and that other columns do not drop."""
    scores.reached[:] = part.alive
    stage.judge_columns(part)
    live = np.flatnonzero(part.alive) if stage.looks_at_pixels else np.empty(0, np.int64)

    def look(row: int) -> tuple[Score, ...] | ImageError:
        try:
            return stage.measure(images.pixels(row, stage), opened)
        except ImageError as error:
            return error

    for row, result in zip(live, pool.map(look, live.tolist()), strict=True):
        if isinstance(result, ImageError):
            scores.unreadable[row] = True
        else:
            for column, value in zip(scores.columns.values(), result, strict=True):
                column[row] = value


class _Images:
    """The images of some rows, with the faces blurred that stages before found."""

    def __init__(self, rows: Shard, *, keeps: bool) -> None:
        self._rows = rows
        self._keeps = keeps
        self._decoded: dict[int, DecodedImage] = {}
        self.num_decoded = np.zeros(rows.num_rows, np.int64)
        """(N,) how often each was decoded."""

    def pixels(self, row: int, stage: ImageFilter) -> Pixels:
        """The image of a row as a filter looks at it. Raises: ImageError."""
        image = self._decoded.get(row)
        if image is None:
            image = DecodedImage(self._rows.table["image"][row].as_py() or b"")
            if self._keeps:
                self._decoded[row] = image
        pixels = image.within(stage.side)
        self.num_decoded[row] = image.num_decoded
        boxes = self._boxes(row) if "boxes" in stage.optional_columns() else None
        if not boxes:
            return pixels
        scale = pixels.shape[1] / image.width
        return blur_boxes(pixels, np.asarray(boxes) * scale if scale < 1 else boxes)

    def _boxes(self, row: int) -> list[list[int]] | None:
        """Faces of a row: those that a filter of this pass found, or else an earlier stage."""
        for columns in self._rows.emitted.values():
            if "boxes" in columns:
                return cast("list[list[int]]", columns["boxes"][row])
        known = "boxes" in self._rows.table.column_names
        return self._rows.table["boxes"][row].as_py() if known else None


def luma_of(pixels: Pixels) -> np.ndarray:
    """(H, W) float32 whole numbers from 0 to 255: how bright each pixel is."""
    luma: np.ndarray = np.rint(pixels @ _LUMA)
    return luma
