"""Thumbnails of chosen rows: bounded in number and size, faces blurred, each shard read once."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from curation.exchange import bucket_of_ids
from curation.neighbors.dedup.verdicts import BASE
from curation.stage import DECISIONS
from embedder.errors import ImageError
from embedder.images import blur_boxes, decode, encode_jpeg, resize
from pipelines.audit.lookup import find_rows, stream_rows
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL

MAX_SIDE = 160
"""Longest side of a thumbnail, in pixels."""
MAX_PICTURES = 700
"""Thumbnails on a page; at 6 to 9 kB each they stay well below 15 MB."""
_QUALITY = 72

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
        """Read what was asked for."""
        for flow in self.work.flows:
            ids = [row_id for of, row_id in list(self.chosen)[:MAX_PICTURES] if of == flow]
            if ids:
                self._load_flow(flow, ids)
        self._load_from_union()
        self._load_from_base()

    def _load_from_union(self) -> None:
        """A row of the union that the pool does not hold is of a set taken as it is."""
        lost = [
            picture
            for picture in self.chosen.values()
            if picture.flow == POOL and not (picture.source or picture.data or picture.hidden)
        ]
        for flow in self.work.record.as_is if lost else ():
            other = Pictures(self.work)
            for picture in lost:
                other.want(flow, picture.id)
            other.load()
            for picture in lost:
                found = other.get((flow, picture.id))
                if found.source:
                    self.chosen[(POOL, picture.id)] = found

    def _load_from_base(self) -> None:
        """What this run does not hold may be of the earlier one that it was compared with."""
        base = self.work.record.base
        lost = [
            picture
            for picture in self.chosen.values()
            if picture.flow in (POOL, BASE)
            and not (picture.source or picture.data or picture.hidden)
        ]
        if not lost or base is None or not WorkFolder.is_one(base):
            return
        other = Pictures(WorkFolder(base))
        for picture in lost:
            other.want(POOL, picture.id)
        other.load()
        for picture in lost:
            self.chosen[(picture.flow, picture.id)] = other.get((POOL, picture.id))

    def _load_flow(self, flow: str, ids: list[str]) -> None:
        rows, images = self.work.making(flow, "rows"), self.work.making(flow, "images")
        faces = self.work.making(flow, "faces")
        for shard, some in self._by_shard(flow, ids).items():
            if rows is not None:
                self._add_sources(flow, find_rows(rows.output("rows"), shard, some, ["source"]))
            self._mark(flow, shard, some)
            shown = [one for one in some if not self.chosen[(flow, one)].hidden]
            if images is not None and shown:
                self._add_thumbnails(flow, images, faces, shard, shown)

    def _by_shard(self, flow: str, ids: list[str]) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        shards = bucket_of_ids(pa.array(ids, pa.string()), self.work.shards_of(flow))
        for row_id, shard in zip(ids, shards, strict=True):
            found.setdefault(int(shard), []).append(row_id)
        return dict(sorted(found.items()))

    def _add_sources(self, flow: str, rows: pa.Table) -> None:
        for row in rows.to_pylist():
            self.chosen[(flow, row["id"])].source = row["source"] or ""

    def _mark(self, flow: str, shard: int, ids: list[str]) -> None:
        """Veil or hide what stages dropped whose images are not for every eye."""
        for stage in self.work.stages(flow):
            shows = stage.entry.kind.shows_dropped
            if shows == "clear":
                continue
            verdicts = find_rows(stage.output(DECISIONS), shard, ids, ["keep"])
            for row in verdicts.to_pylist():
                picture = self.chosen[(flow, row["id"])]
                picture.veiled |= shows == "veiled" and not row["keep"]
                picture.hidden |= shows == "hidden" and not row["keep"]

    def _add_thumbnails(
        self,
        flow: str,
        images: FinishedStage,
        faces: FinishedStage | None,
        shard: int,
        ids: list[str],
    ) -> None:
        boxes = boxes_of(faces, shard, ids)
        for batch in stream_rows(images.output("images"), shard, ids, ["image"]):
            for row_id, image in zip(batch["id"].to_pylist(), batch["image"], strict=True):
                picture = self.chosen[(flow, row_id)]
                picture.data, picture.width, picture.height = thumbnail(
                    image.as_py() or b"", boxes.get(row_id, [])
                )


def boxes_of(
    faces: FinishedStage | None, shard: int, ids: Iterable[str]
) -> dict[str, list[list[int]]]:
    """Boxes of faces by id, in pixels of the stored image; none where no stage looked for them."""
    if faces is None:
        return {}
    rows = find_rows(faces.output("faces"), shard, list(ids), ["boxes"])
    return {row["id"]: row["boxes"] or [] for row in rows.to_pylist()}


def thumbnail(image: bytes, boxes: list[list[int]]) -> tuple[str, int, int]:
    """A data URI of at most MAX_SIDE pixels, and the sides of the image; empty if unreadable."""
    try:
        jpeg, width, height = small_jpeg(image, boxes, MAX_SIDE)
    except ImageError:
        return "", 0, 0
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}", width, height


def small_jpeg(image: bytes, boxes: list[list[int]], max_side: int) -> tuple[bytes, int, int]:
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
