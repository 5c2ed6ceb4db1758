"""Synthetic truth: known edits of the run's own images, and how many of them would be found."""

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
from pipelines.audit.tables import Row
from pipelines.audit.work_folder import WorkFolder
from pipelines.run.run_record import POOL
from pipelines.web.calibration.curves import wilson

_STEPS = 41


def recall_by_edit(work: WorkFolder, leaks: bool, images: int, seed: int) -> Row:
    """Share of the edited copies that each threshold finds, by edit, with 95 % intervals.

    images: so many of the pool's are edited, each in every way, and compared with their originals
    and with each other's copies in the run's own embedding space.

    Raises:
        DatasetError: the run has no embeddings for copies, or no images are left.
        SpaceError: the run's encoder is another one today.
    """
    name, dedup, leak = embeddings_of_leaks(work)
    threshold = leak if leaks else dedup
    encoder = encoder_of(work, name)
    pixels = _some_images(work, images, seed)
    (rows,) = embed_images([encoder], with_copies(pixels, seed))
    found = compare(rows, tuple(EDITS))
    edits = []
    for number, edit in enumerate(found.edits):
        cosines = found.copies[:, number]
        hits = int((cosines > (threshold or 0)).sum())
        low, high = wilson(hits, len(cosines))
        recall = {"recall": hits / len(cosines), "recall_low": low, "recall_high": high}
        alike = {"lowest": float(cosines.min()), "median": float(np.median(cosines))}
        edits.append({"edit": edit, **recall, **alike})
    steps = {round(float(one), 4) for one in np.linspace(0, 1, _STEPS)}
    if threshold is not None:
        steps.add(float(threshold))
    measures = {"recall": found.recall, "precision": found.precision, "innocents": found.innocents}
    return {
        "images": len(pixels),
        "encoder": encoder.name,
        "threshold": threshold,
        "edits": edits,
        "curve": [
            {"threshold": one, **{name: measure(one) for name, measure in measures.items()}}
            for one in sorted(steps)
        ],
    }


def _some_images(work: WorkFolder, images: int, seed: int) -> list[Pixels]:
    """Images of the pool that have no near duplicate there, from shards in a seeded order.

    Ids are hashes, so the first rows of a shard are random ones.
    """
    dataset, dedup = work.output(POOL, "images"), work.deciding(POOL, "component")
    if dataset is None:
        raise DatasetError(f"{work.path}: this run stored no images to edit")
    found: list[Pixels] = []
    for shard in np.random.default_rng(seed).permutation(dataset.num_shards):
        table = dataset.read_shard(int(shard), [ID, "image"])
        if dedup is not None:
            verdicts = dedup.decisions.read_shard(int(shard), [ID, KEEP])
            alone = verdicts.filter(verdicts[KEEP])[ID].combine_chunks()
            table = table.filter(pc.is_in(table[ID], alone))
        found += [decode(one.as_py()) for one in table["image"].slice(0, images - len(found))]
        if len(found) >= images:
            break
    if len(found) < 2:
        raise DatasetError(f"{work.path}: {len(found)} images are too few to compare")
    return found
