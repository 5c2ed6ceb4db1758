"""Pictures of rows: thumbnails for the report, single ones for the server, faces blurred in all."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from curation import storage
from curation.errors import DatasetError, StorageError
from curation.exchange import bucket_of_ids
from curation.neighbors.dedup.verdicts import BASE
from embedder.errors import ImageError
from embedder.images import blur_boxes, decode, encode_jpeg, resize
from pipelines.audit.explain import place_in_tar
from pipelines.audit.lookup import find_rows, stream_rows
from pipelines.audit.tables import Row
from pipelines.audit.work_folder import WorkFolder
from pipelines.run.run_record import POOL

MAX_SIDE = 160
"""Longest side of a thumbnail, in pixels."""
MAX_PICTURES = 700
"""Thumbnails on a page; at 6 to 9 kB each they stay well below 15 MB."""
_QUALITY = 72
_VEIL_SIDE = 8
"""A veiled picture keeps so many pixels on its long side."""

Size = Literal["small", "full"]
_SIDES = {"small": 224, "full": 1024}
Boxes = list[list[int]]
Key = tuple[str, str]
"""(flow, id): a set may hold the same URL as the pool."""


@dataclass
class Picture:
    """One image as the page shows it."""

    flow: str
    id: str
    source: str = ""
    width: int = 0
    height: int = 0
    data: str = ""
    """The thumbnail as an address; empty where there is none to show."""
    full: str = ""
    """Address of the larger picture, and of the clear one where the thumbnail is blurred."""
    page: str = ""
    """Address of the page about it."""
    veiled: bool = False
    """Blurred until clicked."""
    hidden: bool = False
    """Never shown: a blocklist names it."""

    @property
    def is_known(self) -> bool:
        """Whether anything was found of it."""
        return bool(self.source or self.data or self.hidden)


@dataclass
class Pictures:
    """Collects the ids that galleries ask for, then loads them shard by shard."""

    work: WorkFolder
    chosen: dict[Key, Picture] = field(default_factory=dict)

    def want(self, flow: str, row_id: str) -> Key:
        """Ask for an image; beyond the bound of the page it will have no thumbnail."""
        key = (flow, row_id)
        self.chosen.setdefault(key, Picture(flow, row_id))
        return key

    def get(self, key: Key) -> Picture:
        """An image that was asked for; one without a thumbnail otherwise."""
        return self.chosen.get(key) or Picture(*key)

    def load(self) -> None:
        """Read what was asked for, each shard once."""
        for flow in self.work.flows:
            ids = [row_id for of, row_id in list(self.chosen)[:MAX_PICTURES] if of == flow]
            shards = bucket_of_ids(pa.array(ids, pa.string()), self.work.shards_of(flow))
            for shard in sorted(set(shards.tolist())):
                self._load_shard(flow, shard, [ids[i] for i in np.flatnonzero(shards == shard)])
        # a row of the union that the pool does not hold is of a set taken as it is,
        # and what this run does not hold may be of the previous one that it was compared with
        for flow in self.work.record.as_is:
            self._load_elsewhere(self.work, flow, (POOL,))
        base = self.work.record.base
        if base is not None and WorkFolder.is_one(base):
            self._load_elsewhere(WorkFolder(base), POOL, (POOL, BASE))

    def _load_elsewhere(self, work: WorkFolder, flow: str, flows: tuple[str, ...]) -> None:
        """Look in another flow, or run, for what is still missing of some flows."""
        missing = [one for one in self.chosen.values() if one.flow in flows and not one.is_known]
        other = Pictures(work)
        for picture in missing:
            other.want(flow, picture.id)
        if missing:
            other.load()
        for picture in missing:
            found = other.get((flow, picture.id))
            if found.is_known:
                self.chosen[(picture.flow, picture.id)] = found

    def _load_shard(self, flow: str, shard: int, ids: list[str]) -> None:
        rows, images = self.work.output(flow, "rows"), self.work.output(flow, "images")
        for row in find_rows(rows, shard, ids, ["source"]).to_pylist() if rows else ():
            self.chosen[(flow, row["id"])].source = row["source"] or ""
        for stage in self.work.stages(flow):
            shows = stage.entry.kind.shows_dropped
            if shows != "clear":  # what it dropped is not for every eye
                for row in find_rows(stage.decisions, shard, ids, ["keep"]).to_pylist():
                    picture = self.chosen[(flow, row["id"])]
                    picture.veiled |= shows == "veiled" and not row["keep"]
                    picture.hidden |= shows == "hidden" and not row["keep"]
        shown = [one for one in ids if not self.chosen[(flow, one)].hidden]
        if images is None or not shown:
            return
        boxes = boxes_of(self.work, flow, shard, shown)
        for batch in stream_rows(images, shard, shown, ["image"]):
            for row_id, image in zip(batch["id"].to_pylist(), batch["image"], strict=True):
                picture, data = self.chosen[(flow, row_id)], image.as_py() or b""
                picture.data, picture.width, picture.height = thumbnail(data, boxes.get(row_id, []))


def boxes_of(work: WorkFolder, flow: str, shard: int, ids: Iterable[str]) -> dict[str, Boxes]:
    """Boxes of faces by id, in pixels of the stored image; none where no stage looked for them."""
    faces = work.output(flow, "faces")
    rows = find_rows(faces, shard, list(ids), ["boxes"]).to_pylist() if faces else ()
    return {row["id"]: row["boxes"] or [] for row in rows}


def thumbnail(image: bytes, boxes: Boxes) -> tuple[str, int, int]:
    """A data URI of at most MAX_SIDE pixels, and the sides of the image; empty if unreadable."""
    try:
        jpeg, width, height = small_jpeg(image, boxes, MAX_SIDE)
    except ImageError:
        return "", 0, 0
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}", width, height


def small_jpeg(image: bytes, boxes: Boxes, max_side: int) -> tuple[bytes, int, int]:
    """A JPEG of at most `max_side` pixels with its faces blurred, and the sides of the image.

    Raises:
        ImageError: it cannot be read.
    """
    pixels = decode(image)
    if boxes:
        pixels = blur_boxes(pixels, boxes)
    height, width = pixels.shape[:2]
    scale = min(1.0, max_side / max(width, height))
    small = resize(pixels, max(1, round(width * scale)), max(1, round(height * scale)))
    return encode_jpeg(np.ascontiguousarray(small), _QUALITY), width, height


def picture_of(work: WorkFolder, row: Row, size: Size, reveal: bool) -> bytes | None:
    """The picture of a row of the catalog as JPEG, faces blurred; None where there is none.

    reveal: also where the NSFW filter dropped it; otherwise such a picture is a few blots.
    """
    if row["hidden"]:
        return None
    side = _VEIL_SIDE if row["veiled"] and not reveal else _SIDES[size]
    try:
        found = _stored(work, row["flow"], row["id"])
        return small_jpeg(*found, side)[0] if found else None
    except (ImageError, StorageError, DatasetError):
        return None  # taken away or damaged: `curate verify` says which


def _stored(work: WorkFolder, flow: str, row_id: str) -> tuple[bytes, Boxes] | None:
    """Bytes of the stored image, by range from its tar or side-car, and what to blur in it."""
    place = place_in_tar(work, flow, row_id) if flow in (POOL, *work.record.as_is) else None
    if place is not None:
        with storage.open_read(place["file"]) as file:
            file.seek(place["offset"])
            return file.read(place["num_bytes"]), []
    stage = work.making(flow, "images")
    if stage is None:
        return None
    shard = stage.shard_of(row_id, flow)
    boxes = boxes_of(work, flow, shard, [row_id]).get(row_id, [])
    for batch in stream_rows(stage.output("images"), shard, [row_id], ["image"]):
        return batch["image"][0].as_py() or b"", boxes
    return None
