"""Neighbors against their rivals, all in one run, on one machine.

    .venv/bin/python benchmarks/neighbors.py --rows 1000000 --work /tmp/neighbors

Data: N x 512 unit float16: N/50 centers, 0.9 N points at in-cluster cosine 0.29 to 0.67,
0.1 N near-copies at 0.80 to 0.95, shuffled. The centers are random, so that there are no larger
groups; with --topics they lie at cosine 0.5 around N/5000 topics. Every system starts from the same
data set on disk or the same array in memory; k-means, routing, files and components count for ours,
k-means and adding for theirs. Peak is anonymous memory of the process tree: mapped file pages are
not counted. Seconds of CPU stand beside seconds of the wall: on a busy machine only they compare.
"""

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from curation.dataset import Dataset, write_dataset
from curation.neighbors.index.vector_index import (
    SEARCHED,
    Comparison,
    VectorIndex,
    arrange_queries,
    build_index,
    search_in,
    self_join,
)
from curation.neighbors.kernels.components import connected_components
from curation.neighbors.kernels.k_means import assign_exactly, spherical_kmeans
from curation.neighbors.kernels.products import Products
from curation.neighbors.kernels.threads import limit_threads
from curation.neighbors.rows.routes import Routes
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.rows.vectors import VectorSource
from curation.neighbors.search.search import Search
from curation.pool import Pool
from curation.schema import make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.cluster import Cluster
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage

WIDTH, THRESHOLD, TOPIC_COSINE = 512, 0.6, 0.5
Pairs = np.ndarray


class Peak:
    """Samples the anonymous memory of this process and its children."""

    def __enter__(self) -> "Peak":
        self.base, self.most, self._done = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.most = max(self.most, anonymous_bytes() - self.base)


def anonymous_bytes() -> int:
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
        total += sum(1024 * int(line.split()[1]) for line in lines)
    return total


def measured(name: str, work: Callable[[], Any], table: list[dict[str, Any]], **facts: Any) -> Any:
    """Run, and note wall and CPU seconds and peak memory."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    with Peak() as peak:
        result = work()
    row = {
        "what": name,
        "wall_s": round(time.perf_counter() - wall, 2),
        "cpu_s": round(cpu_seconds() - cpu, 2),
        "peak_gb": round(peak.most / 1e9, 2),
        **facts,
    }
    table.append(row)
    print(row, flush=True)
    return result


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def generate(num_rows: int, seed: int = 0, *, topics: bool = False) -> tuple[np.ndarray, Pairs]:
    """(N, 512) float16, and (0.1 N, 2) rows of each planted copy and its original."""
    rng = np.random.default_rng(seed)
    centers = unit(rng.normal(size=(num_rows // 50, WIDTH)).astype(np.float32))
    if topics:
        topic = unit(rng.normal(size=(num_rows // 5000, WIDTH)).astype(np.float32))
        of_center = topic[rng.integers(0, len(topic), len(centers))]
        centers = around(of_center, np.full(len(centers), TOPIC_COSINE, np.float32), rng)
    points = int(0.9 * num_rows)
    owner = rng.integers(0, len(centers), points)
    rows = large_array(num_rows)
    # two points at cosine a to their center have cosine a^2 to each other, on average
    to_center = np.sqrt(rng.uniform(0.29, 0.67, points)).astype(np.float32)
    for some in blocks(0, points):
        rows[some] = around(centers[owner[some]], to_center[some], rng)
    source = rng.integers(0, points, num_rows - points)
    alike = rng.uniform(0.80, 0.95, num_rows - points).astype(np.float32)
    for some in blocks(0, num_rows - points):
        base = unit(rows[source[some]].astype(np.float32))
        rows[points + some.start : points + some.stop] = around(base, alike[some], rng)
    order = rng.permutation(num_rows)
    place, shuffled = np.argsort(order), large_array(num_rows)
    for some in blocks(0, num_rows):
        shuffled[some] = rows[order[some]]
    return shuffled, np.stack([place[source], place[points:]], axis=1)


def large_array(num_rows: int) -> np.ndarray:
    """(N, 512) float16, in a file that has no name where it would not fit into memory."""
    if num_rows <= 2_000_000:
        return np.empty((num_rows, WIDTH), np.float16)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float16, "w+", shape=(num_rows, WIDTH))


def around(base: np.ndarray, cosines: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(size=base.shape).astype(np.float32)
    noise -= (noise * base).sum(axis=1, keepdims=True) * base
    return cosines[:, None] * base + np.sqrt(1 - cosines[:, None] ** 2) * unit(noise)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def blocks(start: int, stop: int, size: int = 1 << 15) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(stop, first + size))


def write_pool(
    rows: np.ndarray, folder: str, name: str, rows_per_shard: int = 50_000
) -> VectorSource:
    kind = pa.list_(pa.float16(), WIDTH)
    schema = pa.schema([("id", pa.string()), ("embedding", kind)])

    def tables() -> Iterator[pa.Table]:
        for some in blocks(0, len(rows), rows_per_shard):
            flat = pa.array(rows[some].reshape(-1))
            ids = [make_id(f"{name} {row}") for row in range(some.start, some.stop)]
            yield pa.table([ids, pa.FixedSizeListArray.from_arrays(flat, type=kind)], schema=schema)

    if not Dataset.is_finished(folder):
        write_dataset(folder, tables(), schema, {"space": "made"})
    return VectorSource(Pool(name, {"copy": Dataset.open(folder)}), "copy")


def true_pairs(rows: np.ndarray, sample: np.ndarray) -> Pairs:
    """All pairs above the threshold of sampled rows with any other row."""
    products = Products.best_for(len(rows))
    left = products.prepare(rows[sample])
    found = []
    for some in blocks(0, len(rows)):
        a, b, _ = products.above(left, products.prepare(rows[some]), THRESHOLD - 0.02)
        found.append(np.stack([sample[a], b + some.start], axis=1))
    pairs = np.concatenate(found)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return pairs[cosines_of(rows, pairs) > THRESHOLD]


def cosines_of(rows: np.ndarray, pairs: Pairs) -> np.ndarray:
    left, right = (unit(rows[side].astype(np.float64)) for side in pairs.T)
    return np.einsum("nd,nd->n", left, right)


def bench_join(source: VectorSource, rows: np.ndarray, planted: Pairs, args: Any) -> list[Any]:
    table: list[dict[str, Any]] = []
    rng = np.random.default_rng(1)
    truth = true_pairs(rows, rng.choice(len(rows), 2000, replace=False))
    planted = planted[cosines_of(rows, planted) > THRESHOLD]
    for recall in args.recall:
        folder = f"{args.work}/join-{recall}"
        shutil.rmtree(folder, ignore_errors=True)
        result = measured("ours", lambda: our_join(source, recall, folder, args), table)  # noqa: B023
        index, figures = result
        met = [round(met_share(index.files, figures, rows, p), 4) for p in (truth, planted)]
        table[-1] |= {"recall": met[0], "planted": met[1], "lists_met": figures.get("lists_met")}
        print("   ", table[-1], flush=True)
    for lists in args.ivf_lists:
        table += faiss_join(rows, lists, truth, planted, args)
    if args.ivf_lists:
        table += exhaustive_rate(rows)
    return table


def our_join(
    source: VectorSource, recall: float, folder: str, args: Any
) -> tuple[VectorIndex, dict[str, Any]]:
    engine = LocalEngine(args.workers)
    how = Comparison(method="lists", recall=recall, memory_gb=args.memory_gb)
    rows = f"{folder}/rows"
    index = build_index((source,), rows, engine, comparison=how, seed=0, alike=THRESHOLD)
    joined, figures = self_join(index, THRESHOLD, f"{folder}/join", engine)
    connected_components(index.files.num_rows, joined.edges())
    return index, figures


def met_share(files: RowFiles, figures: dict[str, Any], rows: np.ndarray, pairs: Pairs) -> float:
    """Share of pairs of which one row visits the list of the other: what the join compares."""
    partitions = range(files.num_partitions)
    parts = [Routes.read(files.path("routes", p), files.size(p)) for p in partitions]
    routes, places = Routes.joined(parts), np.empty(len(rows), np.int64)
    places[row_numbers(files)] = np.arange(len(rows))
    a, b = places[pairs[:, 0]], places[pairs[:, 1]]
    margins = np.minimum(routes.margins_to(a, routes.home[b]), routes.margins_to(b, routes.home[a]))
    return float((margins <= np.float16(figures["probe_margin"])).mean())


def faiss_join(
    rows: np.ndarray, lists: int, truth: Pairs, planted: Pairs, args: Any
) -> list[dict[str, Any]]:
    """IVFFlat, k = 64: a pair counts as found where either row has the other among its 64."""
    table: list[dict[str, Any]] = []
    build = partial(ivf_flat, rows, lists)
    index = measured(f"IVF{lists},Flat: k-means and adding", build, table)
    built, planted = table[-1]["wall_s"], planted[: args.ivf_queries // 10]
    asked = np.unique(np.concatenate([truth.reshape(-1), planted.reshape(-1)]))
    others = np.setdiff1d(np.arange(len(rows)), asked)[: max(0, args.ivf_queries - len(asked))]
    asked = np.sort(np.concatenate([asked, others]))
    data = unit(rows[asked].astype(np.float32))
    for probes in args.probes:
        index.nprobe = probes
        name = f"IVF{lists},Flat: {probes} probes, k=64, {len(asked)} queries"
        near = measured(name, lambda: index.search(data, 64)[1], table)
        table[-1]["all_rows_s"] = round(built + table[-1]["wall_s"] * len(rows) / len(asked))
        shares = []
        for p in (truth, planted):
            a, b = (near[np.searchsorted(asked, side)] for side in p.T)
            shares.append((a == p[:, 1:]).any(axis=1) | (b == p[:, :1]).any(axis=1))
        table[-1] |= {
            "recall": round(float(shares[0].mean()), 4),
            "planted": round(float(shares[1].mean()), 4),
        }
        print("   ", table[-1], flush=True)
    return table


def exhaustive_rate(rows: np.ndarray) -> list[dict[str, Any]]:
    import faiss

    table: list[dict[str, Any]] = []
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    index = faiss.IndexFlatIP(WIDTH)
    data = unit(rows.astype(np.float32))
    index.add(data)
    queries = min(1000, len(rows))
    measured("IndexFlatIP, k=64", lambda: index.search(data[:queries], 64), table)
    table[-1]["queries_per_s"] = round(queries / table[-1]["wall_s"])
    return table


def bench_search(source: VectorSource, rows: np.ndarray, args: Any) -> list[Any]:
    """32 neighbors of 10,000 seeds; building left out."""
    table: list[dict[str, Any]] = []
    rng = np.random.default_rng(2)
    chosen = rng.choice(len(rows), min(10_000, len(rows)), replace=False)
    seeds = around(unit(rows[chosen].astype(np.float32)), np.full(len(chosen), 0.7), rng)
    seeds = seeds.astype(np.float16)
    truth = nearest_exactly(rows, seeds[:1000])
    engine, folder = LocalEngine(args.workers), f"{args.work}/search"
    shutil.rmtree(folder, ignore_errors=True)
    queries = write_pool(seeds, f"{args.work}/seeds-{len(rows)}", "seeds")
    how = Comparison(method="lists", recall=0.99)
    index = build_index(
        (source,), f"{folder}/rows", engine, comparison=how, seed=0, rows_per_list=SEARCHED
    )
    arranged = arrange_queries(queries, index.files, f"{folder}/seeds", engine)
    measured("exact bfloat16 products, 32 of 1,000 seeds", exact_search(rows, seeds), table)
    table[-1]["queries_per_s"] = round(1000 / table[-1]["wall_s"])
    for attempt in range(args.tries):
        found = f"{folder}/found-{attempt}"
        ours = partial(search_in, index, arranged, 32, found, engine)
        search, figures = measured("ours, 32 of each seed", ours, table)
        table[-1]["queries_per_s"] = round(len(seeds) / table[-1]["wall_s"])
        table[-1] |= {"recall": recall_at_32(search, truth), "lists_met": figures["lists_met"]}
        print("   ", table[-1], flush=True)
    return table + faiss_search(rows, seeds, truth, args)


def exact_search(rows: np.ndarray, seeds: np.ndarray) -> Callable[[], None]:
    """Products of 1,000 seeds with all rows in the best precision, prepared beforehand."""
    limit_threads(os.cpu_count() or 1)
    products = Products.best_for(len(rows))
    left, right = products.prepare(seeds[:1000]), products.prepare(rows)

    def search() -> None:
        for some in blocks(0, len(rows)):
            (left @ right[some].T).topk(32, dim=1)

    return search


def nearest_exactly(rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """(Q, 32) rows nearest to each seed: float32 products."""
    import faiss

    near = faiss.knn(
        unit(seeds.astype(np.float32)),
        unit(rows.astype(np.float32)),
        32,
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    return np.asarray(near[1])


def recall_at_32(search: Search, truth: np.ndarray) -> float:
    rows, seeds = row_numbers(search.rows), row_numbers(search.queries)
    partitions = range(search.queries.num_partitions)
    positions = np.concatenate([search.nearest(partition)[0] for partition in partitions])
    found = np.empty_like(positions)
    found[seeds] = rows[positions]
    return same_share(found[: len(truth)], truth)


def row_numbers(files: RowFiles) -> np.ndarray:
    """(N,) the number in the made data of the row at each position."""
    tables = [files.rows(partition) for partition in range(files.num_partitions)]
    shards, inside = (
        np.concatenate([np.asarray(table[name]) for table in tables]) for name in ("shard", "row")
    )
    return shards.astype(np.int64) * 50_000 + inside


def same_share(found: np.ndarray, truth: np.ndarray) -> float:
    met = [len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]
    return round(float(np.sum(met)) / truth.size, 4)


def faiss_search(
    rows: np.ndarray, seeds: np.ndarray, truth: np.ndarray, args: Any
) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = []
    queries = unit(seeds.astype(np.float32))
    for lists in args.ivf_lists[:1]:
        index = measured(f"IVF{lists},Flat: building", partial(ivf_flat, rows, lists), table)
        for probes in args.search_probes:
            index.nprobe = probes
            name = f"IVF{lists},Flat: {probes} probes, 32 of each seed"
            near = measured(name, lambda: index.search(queries, 32)[1], table)  # noqa: B023
            table[-1]["queries_per_s"] = round(len(seeds) / table[-1]["wall_s"])
            table[-1]["recall"] = same_share(near[: len(truth)], truth)
            print("   ", table[-1], flush=True)
    return table


def ivf_flat(rows: np.ndarray, lists: int) -> Any:
    import faiss

    faiss.omp_set_num_threads(os.cpu_count() or 1)  # ours has set it to one, for its own threads
    data = unit(rows.astype(np.float32))
    index = faiss.index_factory(WIDTH, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(data)
    index.add(data)
    return index


def bench_kmeans(args: Any) -> list[Any]:
    """200,000 x 256, 1,000 centroids, 10 iterations, in turn."""
    import faiss
    import torch

    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    table: list[dict[str, Any]] = []
    rng = np.random.default_rng(3)
    centers = rng.normal(size=(2000, 256)).astype(np.float32)
    rows = centers[rng.integers(0, 2000, 200_000)]
    rows = unit(rows + 1.5 * rng.normal(size=rows.shape).astype(np.float32))

    def theirs() -> np.ndarray:
        trained = faiss.Kmeans(
            256, 1000, niter=10, spherical=True, seed=0, max_points_per_centroid=1 << 20
        )
        trained.train(rows)
        return np.asarray(trained.centroids)

    systems = (("ours", lambda: spherical_kmeans(rows, 1000, 10, 0)), ("faiss", theirs))
    for name, work in systems * args.repeats:
        what = f"k-means, 200,000 x 256, 1,000 centroids: {name}"
        centroids = measured(what, work, table)
        objective = float((2 - 2 * assign_exactly(rows, centroids)[1]).mean())
        table[-1]["mean_squared_distance"] = round(objective, 5)
        print("   ", table[-1], flush=True)
    return table


def bench_kmeans_large(args: Any) -> list[Any]:
    """The stage `cluster` on disk: a centroid for 50 rows (1 M x 512, 20,000 centroids)."""
    table: list[dict[str, Any]] = []
    count, width = args.large_rows, WIDTH
    rows, _ = generate(count)
    source = write_pool(rows, f"{args.work}/pool-{count}", "pool")
    del rows
    folder = StageFolder(f"{args.work}/clusters", "cluster")
    shutil.rmtree(folder.path, ignore_errors=True)
    stage = Cluster(embeddings="copy", levels=(count // 50,))

    def ours() -> Any:
        return run_stage(stage, StageInputs(source.pool), folder, LocalEngine(), Silent())[0]

    what = f"curate cluster, {count:,} x {width}, {count // 50:,} centroids, files included"
    figures = measured(what, ours, table).figures
    cosine = figures["mean_cosine_by_pass"][-1]
    table[-1] |= {"mean_squared_distance": round(2 - 2 * cosine, 5)}
    table[-1] |= {"agreement": figures["assignment"][0]["agreement"]}
    print("   ", table[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", default="/tmp/neighbors")
    parser.add_argument("--topics", action="store_true", help="Centers lie around N/5000 topics.")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--memory-gb", type=float, default=4.0)
    parser.add_argument("--recall", type=float, nargs="+", default=[0.99, 0.995])
    parser.add_argument("--ivf-lists", type=int, nargs="*", default=[4000, 16000])
    parser.add_argument("--probes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--search-probes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--ivf-queries", type=int, default=100_000, help="Rows asked of IVFFlat.")
    parser.add_argument("--tries", type=int, default=2, help="searches of ours, to see the noise")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large-rows", type=int, default=1_000_000)
    parser.add_argument("--parts", nargs="+", default=["kmeans", "join", "search"])
    args = parser.parse_args()
    table: list[dict[str, Any]] = []
    if "kmeans" in args.parts:
        table += bench_kmeans(args)
        table += bench_kmeans_large(args) if args.large_rows else []
    if {"join", "search"} & set(args.parts):
        rows, planted = generate(args.rows, topics=args.topics)
        name = f"pool-{args.rows}{'-topics' if args.topics else ''}"
        source = write_pool(rows, f"{args.work}/{name}", "pool")
        if "join" in args.parts:
            table += bench_join(source, rows, planted, args)
        if "search" in args.parts:
            table += bench_search(source, rows, args)
    columns = list(dict.fromkeys(name for row in table for name in row))
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in table:
        print("| " + " | ".join(str(row.get(name, "")) for name in columns) + " |")


if __name__ == "__main__":
    main()
