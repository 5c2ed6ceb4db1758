"""A map of the embeddings: a sample of the pool in the plane of its two main directions."""

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from pipelines.audit.tables import Tables
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL
from pipelines.web.report.groups import Groups, groups_of
from pipelines.web.report.pictures import Key, Picture, Pictures

_SAMPLE = 600
_PICTURED = 200
"""Points that show their picture."""
_SIDE = 520
_MARKS = ("circle", "square", "triangle", "diamond", "cross")
_OTHER = "dropped later"


@dataclass
class EmbeddingMap:
    """Points of the plane and what they stand for."""

    name: str
    """Name of the embeddings."""
    keys: list[Key]
    places: np.ndarray  # (N, 2) in 0..1
    groups: list[str]
    """What became of each: its seed set, or that it was dropped."""
    explained: float
    """Share of the variance that the plane shows."""
    clusters: Groups | None = None
    """Groups of like images among them."""

    def legend(self) -> list[str]:
        """Groups, the fullest first, what was dropped last."""
        names = sorted(set(self.groups), key=lambda one: (one == _OTHER, -self.groups.count(one)))
        return names

    def chart(self, pictures: Pictures) -> dict[str, object]:
        """The drawing, and what its marks mean."""
        legend = self.legend()
        number = {name: min(i, len(_MARKS) - 1) for i, name in enumerate(legend)}
        marks = []
        order = sorted(range(len(self.keys)), key=lambda i: -number[self.groups[i]])
        for i in order:
            x, y = 8 + self.places[i] * (_SIDE - 16)
            kind = "off" if self.groups[i] == _OTHER else str(number[self.groups[i]])
            marks.append(_mark(x, y, number[self.groups[i]], kind, self.groups[i], self._data(i)))
        marks += _numbers(self.places, self.clusters)
        summary = f"Map of {len(self.keys)} embeddings by what became of them"
        drawing = Markup(
            f'<svg class="map" role="img" aria-label="{summary}" viewBox="0 0 {_SIDE} {_SIDE}" '
            f'width="{_SIDE}" height="{_SIDE}">{"".join(marks)}</svg>'
        )
        swatches = [
            (name, Markup(_swatch(number[name], "off" if name == _OTHER else str(number[name]))))
            for name in legend
        ]
        shown = {self._data(i): pictures.get(self.keys[i]) for i in range(len(self.keys))}
        return {
            "drawing": drawing,
            "legend": swatches,
            "name": self.name,
            "explained": self.explained,
            "pictures": {key: one for key, one in shown.items() if _may_hover(one)},
        }

    def _data(self, index: int) -> str:
        return self.keys[index][1]


def _may_hover(picture: Picture) -> bool:
    return bool(picture.data) and not (picture.veiled or picture.hidden)


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
    groups = _groups(work, ids)
    keys = [(POOL, one) for one in ids]
    for key in keys[:_PICTURED]:
        pictures.want(*key)
    kept = np.array([group != _OTHER for group in groups])
    return EmbeddingMap(name, keys, places, groups, explained, groups_of(vectors, kept))


def plane(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """Coordinates (N, 2) in 0..1 along the two main directions, and their share of variance."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0)
    left, scales, _ = np.linalg.svd(centred, full_matrices=False)
    # a direction has no sign of its own: make its largest coordinate positive
    points = left[:, :2] * scales[:2]
    points *= np.sign(points[np.abs(points).argmax(axis=0), np.arange(points.shape[1])])
    low, high = np.quantile(points, [0.01, 0.99], axis=0)
    places = np.clip((points - low) / np.maximum(high - low, 1e-12), 0, 1)
    return places, float((scales[:2] ** 2).sum() / max((scales**2).sum(), 1e-12))


def _sample(stage: FinishedStage, name: str) -> tuple[list[str], np.ndarray]:
    """The rows with the smallest ids, shard after shard until there are enough."""
    dataset = stage.output(name)
    ids: list[str] = []
    blocks = []
    for index in range(dataset.num_shards):
        rows = dataset.read_shard(index, ["id", "embedding"]).slice(0, _SAMPLE - len(ids))
        if rows.num_rows:
            ids += rows["id"].to_pylist()
            flat = rows["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            blocks.append(flat.astype(np.float32).reshape(rows.num_rows, -1))
        if len(ids) >= _SAMPLE:
            break
    return ids, np.concatenate(blocks) if blocks else np.empty((0, 1), np.float32)


def _groups(work: WorkFolder, ids: list[str]) -> list[str]:
    """The seed set that retrieved each id, `pool` where it is kept without one."""
    if work.manifest is None:
        return ["pool"] * len(ids)
    with Tables() as tables:
        if not tables.add("manifest", work.manifest):
            return [_OTHER] * len(ids)
        rows = tables.rows(
            "select id, coalesce(seed_set, source_set) as part from manifest "
            "where id in (select unnest(?))",
            [ids],
        )
    found = {row["id"]: row["part"] for row in rows}
    return [found.get(one, _OTHER) for one in ids]


def _numbers(places: np.ndarray, clusters: Groups | None) -> list[str]:
    """The number of each group of like images, in the middle of its points."""
    if clusters is None:
        return []
    found = []
    for number in range(len(clusters.before)):
        x, y = 8 + np.median(places[clusters.labels == number], axis=0) * (_SIDE - 16)
        found.append(
            f'<text class="group-number" x="{x:.1f}" y="{y + 5:.1f}" text-anchor="middle">'
            f"{number + 1}</text>"
        )
    return found


def _mark(x: float, y: float, shape: int, kind: str, group: str, row_id: str) -> str:
    body = _shape(x, y, shape)
    title = f"<title>{escape(group)} {row_id[:12]}</title>"
    return f'<g class="dot dot-{kind}" data-id="{row_id}">{title}{body}</g>'


def _swatch(shape: int, kind: str) -> str:
    return f'<svg width="14" height="14" class="dot dot-{kind}">{_shape(7, 7, shape)}</svg>'


def _shape(x: float, y: float, shape: int) -> str:
    name = _MARKS[shape]
    if name == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "triangle": ((0, -5), (5, 4), (-5, 4)),
        "diamond": ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
        "cross": (
            (-4, -1),
            (-1, -1),
            (-1, -4),
            (1, -4),
            (1, -1),
            (4, -1),
            (4, 1),
            (1, 1),
            (1, 4),
            (-1, 4),
            (-1, 1),
            (-4, 1),
        ),
    }[name]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}"/>'
