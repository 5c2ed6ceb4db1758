"""Pictures of single rows: read by range from the packed shards, or from the images' side-car."""

from typing import Literal

from curation import storage
from curation.errors import DatasetError, StorageError
from embedder.errors import ImageError
from pipelines.audit.explain import place_in_tar
from pipelines.audit.lookup import stream_rows
from pipelines.audit.tables import Row
from pipelines.audit.work_folder import WorkFolder
from pipelines.run.run_record import POOL
from pipelines.web.report.pictures import boxes_of, small_jpeg

Size = Literal["small", "full"]

_SIDES = {"small": 224, "full": 1024}
_VEIL_SIDE = 8
"""A veiled picture keeps so many pixels on its long side."""


def picture(work: WorkFolder, row: Row, size: Size, reveal: bool) -> bytes | None:
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


def _stored(work: WorkFolder, flow: str, row_id: str) -> tuple[bytes, list[list[int]]] | None:
    """Bytes of the stored image, and the boxes that are still to be blurred in it."""
    if flow == POOL or flow in work.record.as_is:
        place = place_in_tar(work, flow, row_id)
        if place is not None:
            with storage.open_read(place["file"]) as file:
                file.seek(place["offset"])
                return file.read(place["num_bytes"]), []
    images = work.making(flow, "images")
    if images is None:
        return None
    shard = images.shard_of(row_id, flow)
    boxes = boxes_of(work.making(flow, "faces"), shard, [row_id])
    for batch in stream_rows(images.output("images"), shard, [row_id], ["image"]):
        return batch["image"][0].as_py() or b"", boxes.get(row_id, [])
    return None
