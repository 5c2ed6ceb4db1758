"""The leak certificate: how near the finished set comes to each image of a benchmark.

Every kept vector is compared with every benchmark vector: no index, no threshold. The run's own
encoder may certify, or another one, which then embeds both sides anew.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from curation import storage
from curation.dataset import Dataset
from curation.digest import digest_of
from curation.errors import ConfigError, DatasetError, SpaceError
from curation.neighbors.rows.vectors import VectorSource
from curation.pool import Pool, UnionPool
from curation.schema import ID
from curation.stage import Engine, StageFolder, StageInputs
from curation.stages.embed import Embed
from pipelines.audit.nearest import Comparison
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.previous_runs import whole_flow
from pipelines.run.run_record import POOL
from pipelines.run.settling import Settling
from pipelines.run.stage_runner import Silent, run_stage

_BINS = 20
_FINE = 1 << 12
_LISTED = 100
"""Pairs that the page for people lists."""
_KEPT = 1000
"""Nearest pairs that are held and printed as JSON; all lie in a table."""
_NEAREST = 5


@dataclass(frozen=True)
class _Sides:
    """What is compared, and what judges it."""

    kept: VectorSource
    benchmarks: dict[str, VectorSource]
    limit: float
    lost: dict[str, int]
    """Images of each side that an encoder could not embed."""
    about: str
    """Whose encoder it is."""


def certify(
    path: str,
    engine: Engine,
    threshold: float | None = None,
    encoder: str | None = None,
    scratch: str | None = None,
) -> dict[str, Any]:
    """The certificate of every benchmark of a run.

    threshold: cosine above which an image counts as a leak; that of the run, or of `encoder`, by
    default. encoder: embeds both sides anew. scratch: folder for what is found.

    Raises:
        DatasetError: the run looked for no leaks, or made no manifest.
    """
    work = WorkFolder(path.rstrip("/"))
    stage = _checking(work)
    if stage is None or work.manifest is None:
        raise DatasetError(f"{path}: this run has no manifest, or looked for leaks of no benchmark")
    names = tuple(stage.entry.record.settings["against"])
    folder = scratch or storage.join(work.path, "work", "certificate")
    if encoder is None:
        sides = _own_sides(work, stage, names, threshold)
    else:
        sides = _sides_of(work, names, encoder, threshold, folder, engine)
    digest = work.manifest.manifest.content_digest
    key = digest_of(digest, sides.kept.dataset.attributes.get("space"))[:8]
    found = [
        _certify_one(work, name, sides, storage.join(folder, f"{name}-{key}"), engine)
        for name in names
    ]
    storage.remove(storage.join(folder, "embedded"))
    return {
        "content_digest": digest,
        "images": work.manifest.num_rows,
        "threshold": sides.limit,
        "benchmarks": found,
    }


def embeddings_of_leaks(work: WorkFolder) -> tuple[str, float | None, float | None]:
    """Name of the embeddings that copies are looked for in, and both thresholds of the run.

    Raises:
        DatasetError: the run looked for no copies.
    """
    dedup, leak = work.deciding(POOL, "component"), _checking(work)
    stage = dedup or leak
    if stage is None:
        raise DatasetError(f"{work.path}: this run has no embeddings for copies (no 'near_dedup')")
    limit = dedup.entry.record.figures.get("threshold") if dedup else None
    return str(stage.entry.record.settings["embeddings"]), limit, _limit_of(leak or stage)


def _checking(work: WorkFolder) -> FinishedStage | None:
    """The last stage that looked for leaks of some benchmark."""
    found = [
        stage
        for stage in work.stages(POOL)
        if stage.entry.kind.checks_benchmarks and stage.entry.record.settings["against"]
    ]
    return found[-1] if found else None


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
            f"{_shown(one['nearest'])} | {_shown(one['median'])} |"
        )
    for one in certificate["benchmarks"]:
        lines += ["", f"## {one['benchmark']}", "", one["statement"], ""]
        lines += [f"Digest of this statement and of all scores: `{one['digest']}`.", ""]
        lines += _pairs(one["list"], f"Above {certificate['threshold']:g}:", one["above"])
        lines += _histogram(one["histogram"]) if one["nearest"] is not None else []
        lines += ["", *_pairs(one["scores"][:_NEAREST], "The nearest images of all:", 0)]
    return "\n".join(lines).rstrip() + "\n"


def _shown(cosine: float | None) -> str:
    return "-" if cosine is None else f"{cosine:.4f}"


def _pairs(rows: list[dict[str, Any]], title: str, total: int) -> list[str]:
    """Pairs as a list; those of a total beyond some are counted."""
    if not rows:
        return []
    more = total - _LISTED
    shown = [f"- {row['similarity']:.4f} {row['image']} ~ {row['kept']}" for row in rows[:_LISTED]]
    return [
        title,
        "",
        *shown,
        *([f"- and {more:,} more: they lie in the table that `--json` names"] if more > 0 else []),
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
    work: WorkFolder, name: str, sides: _Sides, folder: str, engine: Engine
) -> dict[str, Any]:
    assert work.manifest is not None, "checked by the caller"
    benchmark, limit = sides.benchmarks[name], sides.limit
    if storage.exists(storage.join(folder, "nearest", "_manifest.json")):
        storage.remove(folder)  # of a certificate that was finished: this one looks itself
    nearest = Comparison(benchmark, sides.kept, folder).find(engine)
    summary = _Summary.of(nearest, limit)
    attributes = benchmark.dataset.attributes
    statement = _statement(work, name, sides, summary)
    return {
        "benchmark": name,
        "images": nearest.num_rows,
        "above": summary.above,
        "nearest": summary.pairs[0]["similarity"] if summary.pairs else None,
        "median": summary.median,
        "histogram": {
            "edges": np.linspace(-1, 1, _BINS + 1).tolist(),
            "counts": summary.counts.tolist(),
        },
        "space": attributes.get("space"),
        "encoder": attributes.get("encoder"),
        "statement": statement,
        "scores": summary.pairs,
        "list": summary.pairs[: summary.above],
        "table": nearest.path,
        "digest": digest_of(statement, nearest.manifest.content_digest),
    }


def _statement(work: WorkFolder, name: str, sides: _Sides, summary: "_Summary") -> str:
    assert work.manifest is not None, "checked by the caller"
    set_digest = work.manifest.manifest.content_digest
    rows, attributes = sides.benchmarks[name].pool.num_rows, sides.kept.dataset.attributes
    lost = "".join(
        f" {number:,} images of {side} could not be embedded and were not compared."
        for side, number in sides.lost.items()
        if number and side in (f"'{name}'", "the set")
    )
    if not summary.compared:
        empty = "the set holds no image" if not sides.kept.pool.num_rows else "it holds no image"
        return f"Nothing was compared with the {rows:,} images of '{name}': {empty}.{lost}"
    found = "none has" if not summary.above else f"{summary.above:,} have"
    found = "1 has" if summary.above == 1 else found
    return (
        f"Of the {rows:,} images of '{name}', {found} an image above cosine {sides.limit:g} in the "
        f"set {set_digest} (encoder {attributes.get('encoder')}, {sides.about}; space "
        f"{attributes.get('space')}). "
        f"The nearest comes to {summary.pairs[0]['similarity']:.4f}.{lost}"
    )


@dataclass(frozen=True)
class _Summary:
    """What is told of the nearest images of one benchmark."""

    compared: int
    above: int
    median: float | None
    counts: np.ndarray
    """(20,) int64: images by their nearest cosine."""
    pairs: list[dict[str, Any]]
    """The nearest pairs of all, nearest first."""

    @classmethod
    def of(cls, nearest: Dataset, limit: float) -> "_Summary":
        """Read what was found shard by shard; hold the nearest pairs only."""
        counts, fine, above = np.zeros(_BINS, np.int64), np.zeros(_FINE, np.int64), 0
        pairs: list[tuple[float, str, str]] = []
        for table in _compared(nearest):
            scores = np.asarray(table["similarity"])
            counts += np.histogram(scores, _BINS, (-1.0, 1.0))[0]
            fine += np.bincount(_bin_of(scores), minlength=_FINE)
            above += int((scores > np.float32(limit)).sum())
            pairs = heapq.nsmallest(_KEPT, [*pairs, *_highest(table, scores)])
        shown = [{"image": a, "kept": b, "similarity": -score} for score, a, b in pairs]
        return cls(int(fine.sum()), above, _median(nearest, fine), counts, shown)


def _compared(nearest: Dataset) -> Iterator[pa.Table]:
    """Rows that have a nearest one, shard by shard."""
    for index in range(nearest.num_shards):
        yield nearest.read_shard(index).drop_null()


def _highest(table: pa.Table, scores: np.ndarray) -> list[tuple[float, str, str]]:
    """(-cosine, image, kept) of the nearest pairs of a shard."""
    few = table.take(pa.array(np.argsort(-scores, kind="stable")[:_KEPT]))
    columns = (few[name].to_pylist() for name in ("similarity", ID, "kept"))
    return [(-score, image, kept) for score, image, kept in zip(*columns, strict=True)]


def _bin_of(scores: np.ndarray) -> np.ndarray:
    """(N,) int64: fine bin of each cosine; a higher cosine is in no lower bin."""
    bins = (np.clip(scores.astype(np.float64), -1, 1) + 1) * (_FINE / 2)
    return np.minimum(bins.astype(np.int64), _FINE - 1)


def _median(nearest: Dataset, fine: np.ndarray) -> float | None:
    """The median: only cosines in the bins of the middle are held. fine: images in each bin."""
    total = int(fine.sum())
    if not total:
        return None
    ends = np.cumsum(fine)
    low, high = np.searchsorted(ends, [(total - 1) // 2, total // 2], "right")
    held = []
    for table in _compared(nearest):
        scores = np.asarray(table["similarity"])
        bins = _bin_of(scores)
        held.append(scores[(bins >= low) & (bins <= high)])
    middle = np.sort(np.concatenate(held))
    before = int(ends[low] - fine[low])
    return float(np.mean([middle[(total - 1) // 2 - before], middle[total // 2 - before]]))


# --- what is compared -----------------------------------------------------------------------------


def _own_sides(
    work: WorkFolder, stage: FinishedStage, names: tuple[str, ...], threshold: float | None
) -> _Sides:
    """Both sides by the embeddings that the run looked for leaks in."""
    layer = str(stage.entry.record.settings["embeddings"])
    last = _last(work)
    parts = {flow: Pool(flow, {layer: _vectors_of(work, flow, layer)}) for flow in last.ranges}
    benchmarks = {
        name: VectorSource(Pool(name, {layer: _vectors_of(work, name, layer)}), layer)
        for name in names
    }
    spaces = {one.dataset.attributes.get("space") for one in benchmarks.values()}
    for flow, part in parts.items():
        if {part.layer(layer).attributes.get("space")} != spaces:
            path = part.layer(layer).path
            raise SpaceError(f"{path}: '{flow}' was embedded into another space")
    kept = VectorSource(_kept_of(tuple(parts.values()), last), layer)
    limit = threshold if threshold is not None else _limit_of(stage)
    return _Sides(kept, benchmarks, limit, {}, "which looked for the leaks")


def _sides_of(
    work: WorkFolder,
    names: tuple[str, ...],
    encoder: str,
    threshold: float | None,
    folder: str,
    engine: Engine,
) -> _Sides:
    """Both sides embedded anew by another encoder.

    Raises:
        ConfigError: it has no threshold of its own, and none is given.
    """
    settings = storage.join(folder, "embedded", "settled", "settings.json")
    stage = Settling(engine, settings).settle(Embed(encoders={"embedding": encoder}))
    assert isinstance(stage, Embed), "settling keeps a stage's class"
    thresholds = stage.facts()["embedding"].thresholds
    limit = thresholds.leak if thresholds is not None and threshold is None else threshold
    if limit is None:
        raise ConfigError(f"--encoder {encoder}: has no threshold of its own; give --threshold")
    last = _last(work)
    kept = _kept_of(tuple(whole_flow(work, flow) for flow in last.ranges), last)
    pools = {"the set": kept, **{f"'{name}'": whole_flow(work, name) for name in names}}
    key = digest_of(stage.fingerprint(), [pool.fingerprint() for pool in pools.values()])[:8]
    sources, lost = {}, {}
    for number, (side, pool) in enumerate(pools.items()):
        path = StageFolder(storage.join(folder, "embedded", f"{key}-{number}"), "embed")
        record, outputs = run_stage(stage, StageInputs(pool), path, engine, Silent())
        sources[side] = VectorSource(
            Pool(pool.name, {"embedding": outputs["embedding"]}), "embedding"
        )
        lost[side] = record.rows_in - record.rows_out
    benchmarks = {name: sources[f"'{name}'"] for name in names}
    return _Sides(sources["the set"], benchmarks, limit, lost, "which the run did not use")


def _last(work: WorkFolder) -> FinishedStage:
    """The stage whose decisions say what is in the set."""
    return [stage for stage in work.stages(POOL) if stage.entry.kind.on_union][-1]


def _kept_of(parts: tuple[Pool, ...], last: FinishedStage) -> Pool:
    """What is in the set, of the flows that it is made of."""
    if last.is_union:
        return UnionPool("union", {}, last.decisions, parts)
    return replace(parts[0], decisions=last.decisions)


def _vectors_of(work: WorkFolder, flow: str, embeddings: str) -> Dataset:
    stage = work.making(flow, embeddings)
    if stage is None:
        raise DatasetError(f"{work.path}: '{flow}' has no embeddings '{embeddings}'")
    return stage.output(embeddings)


def _limit_of(stage: FinishedStage) -> float:
    """The threshold that the run itself judged leaks by."""
    figures = stage.entry.record.figures
    return float(figures.get("against_threshold", figures.get("threshold", 0.0)))
