"""Whose images a path means: a work folder stands for its set, a manifest for its packed images."""

import re
from typing import Any

from curation import storage
from curation.dataset import Dataset
from curation.errors import DatasetError, StorageError

_STAGE_FOLDER = re.compile(r"\d\d-[a-z_]+-[0-9a-f]+$")
RUN_FILE = "run.json"
"""What a finished run did, in its work folder."""
RAW = "_raw"
"""Where `curate ingest --images` lays the bytes, beside the rows."""
IMAGE_BYTES = ("image", "raw")
"""Columns of our own data sets that hold images."""


def image_place(path: str) -> str:
    """The folder that is read for a path: itself, or where the images of its set are packed.

    Raises:
        DatasetError: there is nothing, or what is there is no finished set of images.
    """
    path = path.rstrip("/") or "/"
    if not storage.exists(path):
        raise DatasetError(f"{path}: no such folder or file; name images, or a folder of them")
    if storage.exists(storage.join(path, RUN_FILE)):
        record = _run_record(path)
        if record is not None:
            return _packed_by(record, path)
    elif any(map(_STAGE_FOLDER.match, storage.list_folders(storage.join(path, "work", "pool")))):
        raise DatasetError(
            f"{path}: a run that has not finished (no {RUN_FILE}); end it with the same "
            "`curate run`, or name a folder of images inside"
        )
    return _of_dataset(Dataset.open(path)) if Dataset.is_finished(path) else path


def _run_record(path: str) -> dict[str, Any] | None:
    """What a run says of itself; None where the file is someone else's."""
    try:
        found = storage.read_json(storage.join(path, RUN_FILE))
    except StorageError:
        return None
    is_ours = isinstance(found, dict) and {"recipe", "pool"} <= set(found)
    return found if is_ours else None


def _packed_by(record: dict[str, Any], path: str) -> str:
    if record.get("packed") is None:
        raise DatasetError(
            f"{path}: a work folder whose recipe '{record['recipe']}' packs no images; add 'pack' "
            "to it and run it again, or name a folder of images inside"
        )
    return storage.join(path, str(record["packed"]))


def is_packed(dataset: Dataset) -> bool:
    """Whether a data set is packed shards, or a manifest with such beside it."""
    return "offset" in dataset.columns or bool(dataset.attributes.get("packed"))


def _of_dataset(dataset: Dataset) -> str:
    path = dataset.path.rstrip("/")
    if "offset" in dataset.columns or set(IMAGE_BYTES) & set(dataset.columns):
        return path
    if is_packed(dataset):
        return storage.join(path.rpartition("/")[0] or ".", str(dataset.attributes["packed"]))
    if Dataset.is_finished(storage.join(path, RAW)):
        return storage.join(path, RAW)
    raise DatasetError(f"{path}: its images are not packed; run `curate pack` and name its output")
