"""Decodes fetched files, of any format, into upright sRGB JPEGs of at most `max_side` pixels."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from blake3 import blake3
from pydantic import Field

from curation.blocklists import BlockIndex, Blocklists, RowHashes, md5_of, reject_listed
from curation.pdq import pdq
from curation.schema import IMAGE_COLUMNS, SOURCE_COLUMNS, binary_column, column_type, schema_of
from curation.stage import Resources, Shard, ShardStage, reject
from embedder.errors import ImageError
from embedder.images import REASONS, Limits, Pixels, canonicalize


class Canonicalize(ShardStage):
    """Decodes, turns upright, converts to sRGB, shrinks and stores as JPEG without metadata.

    A JPEG that needs none of this keeps its coded pixels bit for bit.
    """

    version = 4

    max_side: int = Field(512, ge=16)
    """Longest side of the stored image, in pixels; larger ones are shrunk."""
    quality: int = Field(95, ge=1, le=100)
    """JPEG quality of images that are encoded again."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Images whose header announces more are refused before they are decoded."""
    max_bytes: int = Field(64 << 20, ge=1)
    """Files of more bytes are refused."""
    threads: int = Field(2, ge=1)
    """Rows decoded at once; each needs up to 8 bytes a pixel of its image."""

    blocklists: Blocklists | None = None
    """Lists of known-bad hashes: what is on one is dropped before it is stored."""

    reasons = (*REASONS, "blocklist:NAME")
    on_sets = True
    judges_images = True

    def required_columns(self) -> tuple[str, ...]:
        """Columns that the stage reads."""
        return ("raw",)

    def optional_columns(self) -> tuple[str, ...]:
        """Where each row is from; null in the output where the input does not say."""
        return SOURCE_COLUMNS

    def outputs(self) -> dict[str, pa.Schema]:
        """The images; where lists are given, when a row was found on one (null for all others)."""
        images = {"images": schema_of(IMAGE_COLUMNS)}
        if self.blocklists is None:
            return images
        return {**images, "blocked": schema_of(["id", "blocklist", "blocked_at"])}

    def varying_outputs(self) -> tuple[str, ...]:
        """Times differ from run to run."""
        return ("blocked",) if self.blocklists is not None else ()

    def decision_columns(self) -> pa.Schema:
        """Name of the blocklist that holds the row."""
        return schema_of(["blocklist"] if self.blocklists is not None else [])

    def fingerprint(self) -> str:
        """Digest of the blocklists' content."""
        return "" if self.blocklists is None else self.blocklists.fingerprint()

    def open(self) -> BlockIndex | None:
        """Read the blocklists; rows already run in parallel, so OpenCV's threads are disabled."""
        import cv2

        cv2.setNumThreads(1)
        return None if self.blocklists is None else self.blocklists.load()

    def resources(self) -> Resources:
        """What one shard's task needs."""
        return Resources(cpus=1, memory=4 << 30)

    def process(self, shard: Shard, opened: BlockIndex | None) -> None:
        """Canonicalize each row; rows that are no images are dropped with the decoder's reason."""
        limits = Limits(self.max_bytes, self.max_pixels)
        rows = self._rows(shard.table["raw"], limits)
        failures = np.array([row if isinstance(row, str) else "" for row in rows], dtype=object)
        for reason in sorted(set(failures) - {""}):
            reject(shard, failures == reason, reason)
        images = [{} if isinstance(row, str) else row for row in rows]
        if opened is not None:
            _drop_listed(shard, images, opened)
        for name in IMAGE_COLUMNS:
            if name not in ("id", *SOURCE_COLUMNS):
                # Taken out of the rows as it goes: a shard's images are in memory once, not twice.
                values = [image.pop(name, None) for image in images]
                kind = column_type(name)
                is_bytes = kind == pa.large_binary()
                column = binary_column(values) if is_bytes else pa.array(values, kind)
                shard.emit("images", {name: column})

    def _rows(self, raw: pa.ChunkedArray, limits: Limits) -> list[dict[str, Any] | str]:
        if self.threads == 1:
            return [self._row(scalar, limits) for scalar in raw]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(lambda scalar: self._row(scalar, limits), raw))

    def _row(self, scalar: Any, limits: Limits) -> dict[str, Any] | str:
        """Columns of one image, or the reason why it is none."""
        data = scalar.as_py() or b""
        try:
            return _image_columns(data, self.max_side, self.quality, limits)
        except ImageError as error:
            return error.reason


def _drop_listed(shard: Shard, images: list[dict[str, Any]], index: BlockIndex) -> None:
    live = np.flatnonzero(shard.alive)
    data = shard.table["raw"]
    hashes = RowHashes(
        sha256=[images[row]["sha256"] for row in live],
        phash=[images[row]["phash"] for row in live],
        phash_quality=[images[row]["phash_quality"] for row in live],
        md5=[md5_of(data[int(row)].as_py()) for row in live] if index.md5 else [],
    )
    reject_listed(shard, index, live, hashes)


def _image_columns(data: bytes, max_side: int, quality: int, limits: Limits) -> dict[str, Any]:
    image = canonicalize(data, max_side, quality, limits)
    phash, phash_quality = pdq(image.pixels)
    return {
        "image": image.data,
        "width": image.width,
        "height": image.height,
        "original_width": image.original_width,
        "original_height": image.original_height,
        "format": image.format,
        "num_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "pixel_hash": pixel_hash(image.pixels),
        "phash": phash,
        "phash_quality": phash_quality,
    }


def pixel_hash(pixels: Pixels) -> str:
    """32 hex characters of BLAKE3 over the size and the pixels: equal for equal pictures."""
    digest = blake3(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest(length=16)
