"""Two workers against one for canonicalize, embed and near_dedup, and what two cores gain at all.

    python benchmarks/workers.py [--engine ray] [--stage NAME …] [--images 768] [--rows 240000]

One row a stage: rows/s of one and of two workers, each with one thread, the gain, the gain of two
threads over one on a bare matrix product in the same rounds, and their ratio (asked for: at least
0.85). Rounds are interleaved and the best of five counts. near_dedup joins made vectors, see
benchmarks/neighbors.py; workers are started before the clock is.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"  # a worker's share of the cores, read when torch is loaded

import torch
from neighbors import generate, write_pool

from curation.pool import Pool
from curation.stage import DECISIONS, Engine, Stage, StageFolder, StageInputs
from curation.stages.canonicalize import Canonicalize
from curation.stages.embed import Embed
from curation.stages.ingest import Ingest
from curation.stages.near_dedup import NearDedup
from pipelines.engines.local_engine import LocalEngine
from pipelines.engines.ray_engine import RayEngine
from pipelines.run.stage_runner import Silent, run_stage

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"
STAGES = ("canonicalize", "embed", "near_dedup")
ROUNDS = 5
SHARDS = 24


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def multiply(threads: int) -> None:
    torch.set_num_threads(threads)
    matrix = torch.ones(1024, 1024)
    for _ in range(40):
        matrix @ matrix
    torch.set_num_threads(1)


def run(stage: Stage, pool: Pool, folder: str, engine: Engine) -> Pool:
    """Run a stage anew; give the pool as it is after it."""
    shutil.rmtree(folder, ignore_errors=True)
    place = StageFolder(folder, stage.name())
    outputs = run_stage(stage, StageInputs(pool), place, engine, Silent())[1]
    return pool.with_stage(outputs, outputs.pop(DECISIONS))


def images(count: int, folder: str) -> Pool:
    """Photos as they are ingested, in shards."""
    photos = sorted(DATA.glob("*.jpg"))
    Path(folder, "images").mkdir()
    for number in range(count):
        shutil.copy(photos[number % len(photos)], f"{folder}/images/{number}.jpg")
    ingest = Ingest(images=f"{folder}/images", rows_per_shard=-(-count // SHARDS))
    return run(ingest, Pool("pool", {}), f"{folder}/in", LocalEngine())


def work_of(name: str, options: argparse.Namespace, folder: str) -> tuple[Stage, Pool]:
    """A stage and its input."""
    if name == "near_dedup":
        rows = generate(options.rows)[0]
        pool = write_pool(rows, f"{folder}/vectors", "pool", options.rows // SHARDS).pool
        return NearDedup(embeddings="copy", threshold=0.6, max_component_share=1), pool
    pool = images(options.images, folder)
    if name == "canonicalize":
        return Canonicalize(threads=1), pool
    return Embed(), run(Canonicalize(), pool, f"{folder}/canonical", LocalEngine())


def engines(kind: str) -> tuple[Engine, Engine]:
    """With one and with two workers."""
    if kind == "local":
        return LocalEngine(1), LocalEngine(2)
    import ray

    # One Ray with room for both, whatever the machine's memory: it is only counted.
    ray.init(num_cpus=3, _memory=64 << 30, include_dashboard=False, log_to_driver=False)
    return RayEngine(1), RayEngine(2)


def measure(name: str, options: argparse.Namespace, folder: str, pair: Iterable[Engine]) -> None:
    stage, pool = work_of(name, options, folder)
    one, two = pair
    works: dict[str, Callable[[], object]] = {
        "one": partial(run, stage, pool, f"{folder}/out-1", one),
        "two": partial(run, stage, pool, f"{folder}/out-2", two),
        "product one": partial(multiply, 1),
        "product two": partial(multiply, 2),
    }
    for work in works.values():
        work()
    best = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        best |= {key: min(best[key], seconds(work)) for key, work in works.items()}
    gain, most = best["one"] / best["two"], best["product one"] / best["product two"]
    rates = f"{pool.num_rows / best['one']:,.1f} | {pool.num_rows / best['two']:,.1f}"
    print(f"| {name} | {rates} | {gain:.2f} | {most:.2f} | {gain / most:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("local", "ray"), default="ray")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--rows", type=int, default=240_000)
    options = parser.parse_args()
    pair = engines(options.engine)
    print("| stage | 1 worker rows/s | 2 workers | gain | gain of a matrix product | ratio |")
    print("|---|---|---|---|---|---|")
    for name in options.stage:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, options, folder, pair)


if __name__ == "__main__":
    main()
