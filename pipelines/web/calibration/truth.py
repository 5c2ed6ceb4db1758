"""Synthetic truth: known edits of the run's own images, and how many of them would be found."""

from typing import Any

import numpy as np
import pyarrow.compute as pc

from curation.errors import DatasetError
from curation.schema import ID, KEEP
from embedder.calibration import compare, with_copies
from embedder.edits import EDITS
from embedder.encoder import embed_images
from embedder.images import Pixels, decode
from pipelines.audit.certificate import embeddings_of_leaks
from pipelines.audit.seen import encoder_of
from pipelines.audit.work_folder import WorkFolder
from pipelines.run.run_record import POOL
from pipelines.web.calibration.curves import wilson

_STEPS = 41


def recall_by_edit(work: WorkFolder, leaks: bool, images: int, seed: int) -> dict[str, Any]:
    """Share of the edited copies that each threshold finds, by edit, with 95 % intervals.

    images: so many of the pool's are edited, each in every way, and compared with their originals
    and with each other's copies in the run's own embedding space.

    Raises:
        DatasetError: the run has no embeddings for copies, or no images are left.
        SpaceError: the run's encoder is another one today.
    """
    name, dedup, leak = embeddings_of_leaks(work)
    encoder = encoder_of(work, name)
    pixels = _some_images(work, images, seed)
    (rows,) = embed_images([encoder], with_copies(pixels, seed))
    found = compare(rows, tuple(EDITS))
    threshold = leak if leaks else dedup
    thresholds = sorted({*np.linspace(0, 1, _STEPS).round(4).tolist(), *_known(threshold)})
    return {
        "images": len(pixels),
        "encoder": encoder.name,
        "threshold": threshold,
        "edits": [
            _edit(found.copies[:, number], edit, threshold)
            for number, edit in enumerate(found.edits)
        ],
        "curve": [
            {
                "threshold": one,
                "recall": found.recall(one),
                "precision": found.precision(one),
                "innocents": found.innocents(one),
            }
            for one in thresholds
        ],
    }


def _known(threshold: float | None) -> list[float]:
    return [] if threshold is None else [float(threshold)]


def _edit(cosines: np.ndarray, edit: str, threshold: float | None) -> dict[str, Any]:
    """Recall of one edit at the run's threshold, and how far the least alike copy lies."""
    hits = int((cosines > (threshold or 0)).sum())
    low, high = wilson(hits, len(cosines))
    return {
        "edit": edit,
        "recall": hits / len(cosines),
        "recall_low": low,
        "recall_high": high,
        "lowest": float(cosines.min()),
        "median": float(np.median(cosines)),
    }


def _some_images(work: WorkFolder, images: int, seed: int) -> list[Pixels]:
    """Images of the pool that have no near duplicate there, from shards in a seeded order.

    Ids are hashes, so the first rows of a shard are random ones.
    """
    stage, judge = work.making(POOL, "images"), work.deciding(POOL, "component")
    if stage is None:
        raise DatasetError(f"{work.path}: this run stored no images to edit")
    dataset = stage.output("images")
    found: list[Pixels] = []
    for shard in np.random.default_rng(seed).permutation(dataset.num_shards):
        table = dataset.read_shard(int(shard), [ID, "image"])
        if judge is not None:
            verdicts = judge.decisions.read_shard(int(shard), [ID, KEEP])
            alone = verdicts.filter(verdicts[KEEP])[ID].combine_chunks()
            table = table.filter(pc.is_in(table[ID], alone))
        some = table["image"].slice(0, images - len(found))
        found += [decode(image.as_py()) for image in some]
        if len(found) >= images:
            break
    if len(found) < 2:
        raise DatasetError(f"{work.path}: {len(found)} images are too few to compare")
    return found
