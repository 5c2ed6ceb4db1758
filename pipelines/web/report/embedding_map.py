"""A map of the embeddings: a sample of the pool in the plane of its two main directions.

Like images are grouped, to show how full each group is before curation and after.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.audit.dataset_stats import balance
from pipelines.audit.tables import Row, select
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL
from pipelines.web.charts import draw, paired_bars
from pipelines.web.pictures import Key, Pictures

Floats = NDArray[np.floating]

_SAMPLE = 600
_PICTURED = 200
"""Points that show their picture."""
_SIDE = 520
_ROWS_A_GROUP = 8
_MOST_GROUPS = 12
_OTHER = "dropped later"
_MARKS = 5
"""Marks of different shapes."""


@dataclass(frozen=True)
class Groups:
    """A clustering of the sample, the fullest group first."""

    labels: NDArray[np.int64]  # (N,) number of each row's group
    before: list[int]
    """Rows of the sample in each group."""
    after: list[int]
    """Those of them that are in the set."""


@dataclass(frozen=True)
class EmbeddingMap:
    """Points of the plane and what they stand for."""

    name: str
    """Name of the embeddings."""
    keys: list[Key]
    places: Floats  # (N, 2) in 0..1
    fates: list[str]
    """What became of each: its seed set, or that it was dropped."""
    explained: float
    """Share of the variance that the plane shows."""
    groups: Groups | None
    """Groups of like images among them."""

    def legend(self) -> list[str]:
        """Fates, the commonest first, what was dropped last."""
        return sorted(set(self.fates), key=lambda one: (one == _OTHER, -self.fates.count(one)))

    def chart(self, pictures: Pictures) -> Row:
        """The drawing, and what its marks mean."""
        legend = self.legend()
        number = {name: min(i, _MARKS - 1) for i, name in enumerate(legend)}
        kind = {name: "off" if name == _OTHER else number[name] for name in legend}
        order = sorted(range(len(self.keys)), key=lambda i: -number[self.fates[i]])
        spots = 8 + self.places * (_SIDE - 16)
        dots = [
            (kind[fate], number[fate], fate, self.keys[i][1], *spots[i])
            for i in order
            for fate in [self.fates[i]]
        ]
        labels = self.groups.labels if self.groups else np.empty(0, np.int64)
        numbers = range(labels.max(initial=-1) + 1)
        centers = [np.median(spots[labels == one], axis=0) for one in numbers]
        found = {key[1]: pictures.get(key) for key in self.keys}
        return {
            "drawing": draw("map", side=_SIDE, dots=dots, numbers=centers),
            "legend": [(one, draw("swatch", kind=kind[one], number=number[one])) for one in legend],
            "name": self.name,
            "explained": self.explained,
            "pictures": {
                row_id: picture
                for row_id, picture in found.items()
                if picture.data and not (picture.veiled or picture.hidden)
            },
        }

    def spread(self) -> Row | None:
        """How evenly groups of like images are filled, in the pool and in the set."""
        if self.groups is None:
            return None
        before, after = self.groups.before, self.groups.after
        chart = paired_bars(before, after)
        return {"before": balance(before), "after": balance(after), "chart": chart}


def embedding_map(work: WorkFolder, pictures: Pictures) -> EmbeddingMap | None:
    """The map of the last embedding that the pool has; None without any."""
    found = [(stage, name) for stage in work.stages(POOL) for name in stage.embeddings]
    if not found:
        return None
    stage, name = found[-1]
    ids, vectors = _sample(stage, name)
    if len(ids) < 3:
        return None
    places, explained = plane(vectors)
    fates = _fates(work, ids)
    keys = [(POOL, one) for one in ids]
    for key in keys[:_PICTURED]:
        pictures.want(*key)
    kept = np.array([fate != _OTHER for fate in fates])
    return EmbeddingMap(name, keys, places, fates, explained, groups_of(vectors, kept))


def plane(vectors: Floats) -> tuple[Floats, float]:
    """Coordinates (N, 2) in 0..1 along the two main directions, and their share of variance."""
    centered = vectors.astype(np.float64) - vectors.mean(axis=0)
    left, scales, _ = np.linalg.svd(centered, full_matrices=False)
    # a direction has no sign of its own: make its largest coordinate positive
    points = left[:, :2] * scales[:2]
    points *= np.sign(points[np.abs(points).argmax(axis=0), np.arange(points.shape[1])])
    low, high = np.quantile(points, [0.01, 0.99], axis=0)
    places = np.clip((points - low) / np.maximum(high - low, 1e-12), 0, 1)
    return places, float((scales[:2] ** 2).sum() / max((scales**2).sum(), 1e-12))


def groups_of(vectors: Floats, kept: NDArray[np.bool_]) -> Groups | None:
    """Group unit rows by Ward's method, the same every time; None where there are too few.

    vectors: (N, D) float32. kept: (N,) whether each is in the set.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    number = min(_MOST_GROUPS, len(vectors) // _ROWS_A_GROUP)
    if number < 2:
        return None
    found = fcluster(linkage(vectors.astype(np.float64), "ward"), number, "maxclust") - 1
    sizes = np.bincount(found, minlength=number)
    labels = np.argsort(np.argsort(-sizes, kind="stable"))[found]  # the fullest is 0
    before = np.bincount(labels, minlength=number)
    after = np.bincount(labels[kept], minlength=number)
    return Groups(labels, before.tolist(), after.tolist())


def _sample(stage: FinishedStage, name: str) -> tuple[list[str], Floats]:
    """The rows with the smallest ids, shard after shard until there are enough."""
    dataset, ids = stage.output(name), list[str]()
    blocks = [np.empty((0, 1), np.float32)]
    for index in range(dataset.num_shards):
        rows = dataset.read_shard(index, ["id", "embedding"]).slice(0, _SAMPLE - len(ids))
        if rows.num_rows:
            ids += rows["id"].to_pylist()
            flat = rows["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            blocks.append(flat.astype(np.float32).reshape(rows.num_rows, -1))
        if len(ids) >= _SAMPLE:
            break
    return ids, np.concatenate(blocks[1:] or blocks)


def _fates(work: WorkFolder, ids: list[str]) -> list[str]:
    """The seed set that retrieved each id, or the set that it is kept of."""
    if work.manifest is None:
        return ["pool"] * len(ids)
    query = (
        "select id, coalesce(seed_set, source_set) as part from rows where id in (select unnest(?))"
    )
    found = {row["id"]: row["part"] for row in select(work.manifest, query, [ids])}
    return [found.get(one, _OTHER) for one in ids]
