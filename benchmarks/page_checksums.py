"""What checking every page and footer costs the stages that read and write images and vectors.

    python benchmarks/page_checksums.py [--images 640] [--rounds 7]

One row a stage: CPU seconds with the checksums and without, and their ratio. Rounds are interleaved
in one process with one thread, and the best of each counts. `without` writes no page checksums, and
reads without looking at them or at footers.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"

from curation import storage
from curation.pool import Pool
from curation.stage import DECISIONS, Stage, StageFolder, StageInputs
from curation.stages.canonicalize import Canonicalize
from curation.stages.embed import Embed
from curation.stages.exact_dedup import ExactDedup
from curation.stages.ingest import Ingest
from curation.stages.near_dedup import NearDedup
from curation.stages.pack import Pack
from curation.stages.quality import Quality
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"
SHARDS = 8


@contextmanager
def unchecked() -> Iterator[None]:
    """Write and read as if pages and footers had no checksums."""
    write, opened = storage.pq.write_table, storage.pq.ParquetFile

    def plain_write(*args: Any, **options: Any) -> None:
        write(*args, **{**options, "write_page_checksum": False})

    def plain_open(*args: Any, **options: Any) -> Any:
        return opened(*args, **{**options, "page_checksum_verification": False, "metadata": None})

    with (
        mock.patch.object(storage.pq, "write_table", plain_write),
        mock.patch.object(storage.pq, "ParquetFile", plain_open),
        mock.patch.object(storage, "_checked_footer", return_value=None),
    ):
        yield


def stages(images: str, count: int) -> list[Stage]:
    return [
        Ingest(images=images, rows_per_shard=-(-count // SHARDS)),
        Canonicalize(),
        Quality(),
        ExactDedup(),
        Embed(),
        NearDedup(embeddings="copy", max_component_share=1),
        Pack(),
    ]


def run_all(images: str, count: int, folder: str, best: dict[str, float]) -> None:
    """Run the stages one after the other; keep the least CPU seconds of each."""
    shutil.rmtree(folder, ignore_errors=True)
    pool = Pool("pool", {})
    for stage in stages(images, count):
        start = time.process_time()
        place = StageFolder(f"{folder}/{stage.name()}", stage.name())
        outputs = run_stage(stage, StageInputs(pool), place, LocalEngine(), Silent())[1]
        best[stage.name()] = min(best[stage.name()], time.process_time() - start)
        pool = pool.with_stage(outputs, outputs.pop(DECISIONS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    photos = sorted(DATA.glob("*.jpg"))
    found: list[dict[str, float]] = [defaultdict(partial(float, "inf")) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "images").mkdir()
        for number in range(args.images):
            data = photos[number % len(photos)].read_bytes()
            Path(folder, "images", f"{number}.jpg").write_bytes(data)
        for _ in range(args.rounds):
            run_all(f"{folder}/images", args.images, f"{folder}/with", found[0])
            with unchecked():
                run_all(f"{folder}/images", args.images, f"{folder}/without", found[1])
    for one in found:
        one["all"] = sum(one.values())
    print(f"{'stage':14}{'with':>9}{'without':>9}{'ratio':>8}")
    for name, seconds in found[0].items():
        print(f"{name:14}{seconds:9.3f}{found[1][name]:9.3f}{seconds / found[1][name]:8.3f}")


if __name__ == "__main__":
    main()
