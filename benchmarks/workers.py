"""Two workers against one for canonicalize and embed, and what two cores gain at all.

    python benchmarks/workers.py [--images 256]

One row a stage: images/s of one and of two workers, the gain, the gain of two threads over one
on a bare matrix product in the same rounds, and their ratio (asked for: at least 0.85). Rounds are
interleaved and the best of five counts.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from curation.dataset import Dataset
from curation.pool import Pool
from curation.stage import DECISIONS, ShardStage, StageFolder, StageInputs
from curation.stages.canonicalize import Canonicalize
from curation.stages.embed import Embed
from curation.stages.ingest import Ingest
from pipelines.local_engine import LocalEngine
from pipelines.stage_runner import Silent, run_stage

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"
ROUNDS = 5


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def multiply(threads: int) -> None:
    torch.set_num_threads(threads)
    matrix = torch.ones(1024, 1024)
    for _ in range(20):
        matrix @ matrix


def run(stage: ShardStage, pool: Pool, folder: str, engine: LocalEngine) -> dict[str, Dataset]:
    shutil.rmtree(folder, ignore_errors=True)
    place = StageFolder(folder, stage.name())
    return run_stage(stage, StageInputs(pool), place, engine, Silent())[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    count = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").mkdir()
        photos = sorted(DATA.glob("*.jpg"))
        for number in range(count):
            shutil.copy(photos[number % len(photos)], f"{folder}/images/{number}.jpg")
        ingest = Ingest(images=f"{folder}/images", rows_per_shard=max(1, count // 16))
        raw = run_stage(
            ingest,
            StageInputs(Pool("pool", {})),
            StageFolder(f"{folder}/in", "ingest"),
            LocalEngine(),
            Silent(),
        )[1]
        decisions = raw.pop(DECISIONS)
        pool = Pool("pool", {}).with_stage(raw, decisions)
        images = run(Canonicalize(), pool, f"{folder}/canonical", LocalEngine())
        decided = images.pop(DECISIONS)
        canonical = pool.with_stage(images, decided)
        measure(
            count, {"canonicalize": (Canonicalize(), pool), "embed": (Embed(), canonical)}, folder
        )


def measure(count: int, stages: dict[str, tuple[ShardStage, Pool]], folder: str) -> None:
    print("| stage | 1 worker images/s | 2 workers | gain | gain of a matrix product | ratio |")
    print("|---|---|---|---|---|---|")
    os.environ["OMP_NUM_THREADS"] = "1"
    one, two = LocalEngine(1), LocalEngine(2)
    for name, (stage, pool) in stages.items():
        works = {
            "one": partial(run, stage, pool, f"{folder}/{name}-1", one),
            "two": partial(run, stage, pool, f"{folder}/{name}-2", two),
            "product one": partial(multiply, 1),
            "product two": partial(multiply, 2),
        }
        for work in works.values():
            work()
        best = dict.fromkeys(works, float("inf"))
        for _ in range(ROUNDS):
            best |= {key: min(best[key], seconds(work)) for key, work in works.items()}
        gain, most = best["one"] / best["two"], best["product one"] / best["product two"]
        rates = f"{count / best['one']:.1f} | {count / best['two']:.1f}"
        print(f"| {name} | {rates} | {gain:.2f} | {most:.2f} | {gain / most:.2f} |", flush=True)


if __name__ == "__main__":
    main()
