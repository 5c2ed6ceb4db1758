"""The leak certificate: how near the finished set comes to each image of a benchmark.

Every kept vector is compared with every benchmark vector, shard by shard: no index, no threshold.

Legend: B benchmark images, N kept rows of a shard, D width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.dataset import Dataset
from curation.digest import digest_of
from curation.errors import DatasetError, SpaceError
from curation.schema import ID, KEEP
from curation.stage import Engine, Resources, Task
from pipelines.run_record import POOL
from pipelines.work_folder import FinishedStage, WorkFolder

Nearest = tuple[np.ndarray, list[str]]
"""(B,) cosines, and the id of the kept image at each."""

_BINS = 20
_LISTED = 100
"""Pairs that the page for people lists; the JSON holds the nearest pair of every image."""
_NEAREST = 5


@dataclass(frozen=True)
class _Compare(Task[tuple[str, int, int], Nearest]):
    """The nearest kept row of one shard to each benchmark image."""

    resources = Resources(memory=4 << 30)
    benchmark: Dataset
    vectors: dict[str, Dataset]
    """Embeddings of each flow that is in the set."""
    kept: Dataset
    """The last decisions of the union."""

    def open(self) -> np.ndarray:
        return read_vectors(self.benchmark)[1]  # (B, D)

    def __call__(self, item: tuple[str, int, int], opened: np.ndarray) -> Nearest:
        flow, own, joined = item
        verdicts = self.kept.read_shard(joined, [ID, KEEP])
        alive = verdicts.filter(verdicts[KEEP])[ID]
        table = self.vectors[flow].read_shard(own, [ID, "embedding"])
        table = table.filter(pc.is_in(table[ID], alive.combine_chunks()))
        return nearest(opened, unit_rows(table), table[ID].to_pylist())


def certify(path: str, engine: Engine, threshold: float | None = None) -> dict[str, Any]:
    """The certificate of every benchmark of a run.

    threshold: cosine above which an image counts as a leak; that of the run by default.

    Raises:
        DatasetError: the run looked for no leaks, or made no manifest.
    """
    work = WorkFolder(path.rstrip("/"))
    stage = work.stage(POOL, "leaks") or work.stage(POOL, "near_dedup")
    names = tuple(stage.entry.record.settings.get("against", ())) if stage else ()
    if stage is None or not names or work.manifest is None:
        raise DatasetError(f"{path}: this run has no manifest, or looked for leaks of no benchmark")
    limit = threshold if threshold is not None else _limit_of(stage)
    embeddings = str(stage.entry.record.settings["embeddings"])
    return {
        "content_digest": work.manifest.manifest.content_digest,
        "images": work.manifest.num_rows,
        "threshold": limit,
        "benchmarks": [_certify_one(work, name, embeddings, limit, engine) for name in names],
    }


def embeddings_of_leaks(work: WorkFolder) -> tuple[str, float | None, float | None]:
    """Name of the embeddings that copies are looked for in, and both thresholds of the run.

    Raises:
        DatasetError: the run looked for no copies.
    """
    dedup, leak = work.stage(POOL, "near_dedup"), work.stage(POOL, "leaks")
    stage = dedup or leak
    if stage is None:
        raise DatasetError(f"{work.path}: this run has no embeddings for copies (no 'near_dedup')")
    limit = dedup.entry.record.figures.get("threshold") if dedup else None
    return str(stage.entry.record.settings["embeddings"]), limit, _limit_of(leak or stage)


def nearest(benchmark: np.ndarray, rows: np.ndarray, ids: list[str]) -> Nearest:
    """The most similar of some rows to each benchmark image; ties go to the smallest id.

    benchmark: (B, D), rows: (N, D), both float32 unit rows. Cosines are float64 sums of the
    winners, rounded to float32.
    """
    if not ids:
        return np.full(len(benchmark), -np.inf, np.float32), [""] * len(benchmark)
    best = (benchmark @ rows.T).argmax(axis=1)  # (B,); ids are sorted, and argmax takes the first
    exact = np.einsum("bd,bd->b", benchmark.astype(np.float64), rows[best].astype(np.float64))
    return exact.astype(np.float32), [ids[place] for place in best]


def read_vectors(dataset: Dataset) -> tuple[list[str], np.ndarray]:
    """Ids and (N, D) float32 unit rows of a small set."""
    table = dataset.read([ID, "embedding"])
    return table[ID].to_pylist(), unit_rows(table)


def unit_rows(table: pa.Table) -> np.ndarray:
    """(N, D) float32 rows of length 1."""
    column = table["embedding"].combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    rows = flat.reshape(len(column), -1) if len(column) else np.empty((0, 1), np.float32)
    units: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return units


def markdown(certificate: dict[str, Any]) -> str:
    """The certificate as a page for people."""
    lines = [
        "# Leak certificate",
        "",
        f"The set with content digest `{certificate['content_digest']}` "
        f"({certificate['images']:,} images) was compared with every image of each benchmark.",
        "",
        f"| benchmark | images | above {certificate['threshold']:g} | nearest | median |",
        "|---|---:|---:|---:|---:|",
    ]
    for one in certificate["benchmarks"]:
        lines.append(
            f"| {one['benchmark']} | {one['images']:,} | {one['above']:,} | "
            f"{one['nearest']:.4f} | {one['median']:.4f} |"
        )
    for one in certificate["benchmarks"]:
        lines += ["", f"## {one['benchmark']}", "", one["statement"], ""]
        lines += [f"Digest of this statement and of all scores: `{one['digest']}`.", ""]
        lines += _pairs(one["list"], f"Above {certificate['threshold']:g}:")
        lines += _histogram(one["histogram"])
        lines += ["", *_pairs(one["scores"][:_NEAREST], "The nearest images of all:")]
    return "\n".join(lines).rstrip() + "\n"


def _pairs(rows: list[dict[str, Any]], title: str) -> list[str]:
    """Pairs as a list; those beyond some are counted."""
    if not rows:
        return []
    more = len(rows) - _LISTED
    shown = [f"- {row['similarity']:.4f} {row['image']} ~ {row['kept']}" for row in rows[:_LISTED]]
    return [
        title,
        "",
        *shown,
        *([f"- and {more:,} more: `--json` lists all"] if more > 0 else []),
        "",
    ]


def _histogram(histogram: dict[str, Any]) -> list[str]:
    """Benchmark images by their nearest cosine."""
    edges, counts = histogram["edges"], histogram["counts"]
    rows = [
        f"| {low:.1f} to {high:.1f} | {number:,} |"
        for low, high, number in zip(edges, edges[1:], counts, strict=False)
        if number
    ]
    return ["| nearest cosine | images |", "|---|---:|", *rows]


def _certify_one(
    work: WorkFolder, name: str, embeddings: str, limit: float, engine: Engine
) -> dict[str, Any]:
    assert work.manifest is not None, "checked by the caller"
    digest = work.manifest.manifest.content_digest
    benchmark = _vectors_of(work, name, embeddings)
    scores, kept = _search(work, benchmark, embeddings, engine)
    ids = read_vectors(benchmark)[0]
    order = np.lexsort((np.arange(len(ids)), -scores))
    above = int((scores > np.float32(limit)).sum())
    counts, edges = np.histogram(scores, bins=_BINS, range=(-1.0, 1.0))
    found = "none has" if not above else f"{above:,} {'has' if above == 1 else 'have'}"
    pairs = [
        {"image": ids[i], "kept": kept[i], "similarity": float(scores[i])} for i in order.tolist()
    ]
    encoder, space = benchmark.attributes.get("encoder"), benchmark.attributes.get("space")
    statement = (
        f"Of the {len(ids):,} images of '{name}', {found} an image above cosine {limit:g} in the "
        f"set {digest} (encoder {encoder}, space {space}). "
        f"The nearest comes to {scores.max(initial=-1):.4f}."
    )
    return {
        "benchmark": name,
        "images": len(ids),
        "above": above,
        "nearest": float(scores.max(initial=-1)),
        "median": float(np.median(scores)) if len(scores) else -1.0,
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "space": space,
        "encoder": encoder,
        "statement": statement,
        "scores": pairs,
        "list": pairs[:above],
        "digest": digest_of(statement, [tuple(pair.values()) for pair in pairs]),
    }


def _search(work: WorkFolder, benchmark: Dataset, embeddings: str, engine: Engine) -> Nearest:
    """The best over all shards of the set."""
    last = [stage for stage in work.stages(POOL) if stage.name in ("select", "pack")][-1]
    vectors = {flow: _vectors_of(work, flow, embeddings) for flow in last.ranges}
    for flow, dataset in vectors.items():
        if dataset.attributes.get("space") != benchmark.attributes.get("space"):
            raise SpaceError(f"{dataset.path}: '{flow}' was embedded into another space")
    task = _Compare(benchmark, vectors, last.decisions)
    items = [
        (flow, shard, first + shard)
        for flow, (first, number) in last.ranges.items()
        for shard in range(number)
    ]
    best = np.full(benchmark.num_rows, -np.inf, np.float32)
    names = [""] * benchmark.num_rows
    for _, (scores, ids) in engine.map(task, items, "certificate"):
        for place in range(len(names)):
            # ties go to the smallest id, in whatever order the shards come back
            if (-scores[place], ids[place]) < (-best[place], names[place] or "~"):
                best[place], names[place] = scores[place], ids[place]
    return best, names


def _vectors_of(work: WorkFolder, flow: str, embeddings: str) -> Dataset:
    stage = work.making(flow, embeddings)
    if stage is None:
        raise DatasetError(f"{work.path}: '{flow}' has no embeddings '{embeddings}'")
    return stage.output(embeddings)


def _limit_of(stage: FinishedStage) -> float:
    """The threshold that the run itself judged leaks by."""
    figures = stage.entry.record.figures
    return float(figures.get("against_threshold", figures.get("threshold", 0.0)))
