"""near_dedup of many shards on an S3 server on loopback: memory of workers and of the driver.

    python benchmarks/object_store.py [--rows 1000000] [--shards 400] [--workers 2] [--memory-gb 2]

The vectors (512 float16, a tenth of them copies of rows of the shard before at cosine 0.80 to 0.95)
lie in moto's server, a process of its own, and so does the scratch. One row a step: items, seconds
of the clock and of the cores, the memory that its tasks ask for, what the largest worker held at
its peak, libraries included (up to 0.9 GB: torch, pyarrow, Ray), and the driver's peak (asked for:
below 1 GB). Then how many of the copies were found. The server is one Python process, which others
often wait for: its core-seconds are in the last line.
"""

import argparse
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

os.environ["OMP_NUM_THREADS"] = "1"  # a worker's share of the cores, read when torch is loaded

import numpy as np
import psutil
import pyarrow as pa
from neighbors import WIDTH, around, unit

from curation import storage
from curation.dataset import Dataset, write_dataset
from curation.neighbors.index.vector_index import Comparison
from curation.pool import Pool
from curation.schema import make_id
from curation.stage import Engine, Item, Opened, Result, StageFolder, StageInputs, Task
from curation.stages.near_dedup import NearDedup
from pipelines.engines.metered_engine import MeteredEngine, Usage, forget_peak, peak_bytes
from pipelines.engines.ray_engine import RayEngine
from pipelines.run.stage_runner import Silent, run_stage

BUCKET = "s3://bucket"
COLUMNS = ("step", "items", "seconds", "core-seconds", "GB asked", "GB held", "driver GB")


@contextmanager
def served_bucket() -> Iterator[psutil.Process]:
    """Run the server, and let the environment say where it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, **quiet)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
    }
    try:
        _create_bucket()
        yield psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


def _create_bucket() -> None:
    import boto3
    from botocore.exceptions import EndpointConnectionError

    for _ in range(100):
        try:
            boto3.client("s3").create_bucket(Bucket=BUCKET.removeprefix("s3://"))
            return
        except EndpointConnectionError:
            time.sleep(0.2)
    raise SystemExit("the S3 server does not answer")


def shards(rows: int, count: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and (N, 512) float16 vectors of each shard; the last tenth copies the shard before."""
    centers = np.random.default_rng(0).normal(size=(rows // 50, WIDTH)).astype(np.float16)
    size = rows // count
    before: np.ndarray | None = None
    for shard in range(count):
        rng = np.random.default_rng([1, shard])
        own = unit(centers[rng.integers(0, len(centers), size)].astype(np.float32))
        vectors = around(own, np.sqrt(rng.uniform(0.29, 0.67, size)).astype(np.float32), rng)
        if before is not None:
            copies = size // 10
            alike = rng.uniform(0.80, 0.95, copies).astype(np.float32)
            vectors[-copies:] = around(unit(before[:copies].astype(np.float32)), alike, rng)
        before = vectors.astype(np.float16)
        kinds = ["copy" if row >= size - size // 10 and shard else "row" for row in range(size)]
        yield [make_id(f"{kind} {shard} {row}") for row, kind in enumerate(kinds)], before


def written(rows: int, count: int) -> Pool:
    """The vectors, written by another process: what that holds is not the driver's."""
    writer = multiprocessing.get_context("spawn").Process(target=write_pool, args=(rows, count))
    writer.start()
    writer.join()
    return Pool("pool", {"copy": Dataset.open(f"{BUCKET}/vectors")})


def write_pool(rows: int, count: int) -> None:
    kind = pa.list_(pa.float16(), WIDTH)
    schema = pa.schema([("id", pa.string()), ("embedding", kind)])
    tables = (
        pa.table(
            [ids, pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=kind)],
            schema=schema,
        )
        for ids, vectors in shards(rows, count)
    )
    write_dataset(f"{BUCKET}/vectors", tables, schema, {"space": "made"})


class Steps(Engine):
    """Prints what each step took."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.driver_bytes = 0

    @property
    def workers(self) -> int:
        """Those of the engine."""
        return self._engine.workers

    @property
    def workers_per_node(self) -> int:
        """Those of one machine."""
        return self._engine.workers_per_node

    def map(
        self, task: Task[Item, Opened, Result], items: Sequence[Item], label: str
    ) -> Iterator[tuple[Item, Result]]:
        """Run it there."""
        usage, began = Usage(), time.perf_counter()
        metered = MeteredEngine(self._engine, lambda _, __, one: usage.add(one))
        yield from metered.map(task, items, label)
        print(row(label, time.perf_counter() - began, usage, task), flush=True)
        self.driver_bytes = max(self.driver_bytes, peak_bytes())
        forget_peak()


def row(label: str, seconds: float, usage: Usage, task: Task[Item, Opened, Result]) -> str:
    asked = f"{task.resources.memory / 1e9:.2f}"
    took = f"{seconds:.1f} | {usage.cpu_s:.1f} | {asked} | {usage.peak_bytes / 1e9:.2f}"
    return f"| {label} | {usage.items} | {took} | {peak_bytes() / 1e9:.2f} |"


def found_copies(pool: Pool, rows: int, count: int, folder: StageFolder) -> float:
    """Share of the copies that share a component with another row."""
    decisions = Dataset.open(folder.output("decisions")).read(["id", "component_size"])
    size = rows // count
    copies = {
        make_id(f"copy {shard} {number}")
        for shard in range(1, count)
        for number in range(size - size // 10, size)
    }
    sizes = zip(decisions["id"].to_pylist(), decisions["component_size"].to_pylist(), strict=True)
    return sum(size > 1 for name, size in sizes if _text(name) in copies) / len(copies)


def _text(name: str | bytes) -> str:
    return name.hex() if isinstance(name, bytes) else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory-gb", type=float, default=2.0)
    args = parser.parse_args()
    with served_bucket() as server:
        began = time.perf_counter()
        pool = written(args.rows, args.shards)
        print(f"wrote {args.rows:,} rows in {time.perf_counter() - began:.0f} s", flush=True)
        stage = NearDedup(
            embeddings="copy",
            threshold=0.6,
            max_component_share=1,
            comparison=Comparison(memory_gb=args.memory_gb),
        )
        folder = StageFolder(storage.join(BUCKET, "out"), stage.name())
        print(f"| {' | '.join(COLUMNS)} |\n|---|" + "---|" * (len(COLUMNS) - 1))
        began, steps = time.perf_counter(), Steps(RayEngine(args.workers))
        record, _ = run_stage(stage, StageInputs(pool), folder, steps, Silent())
        seconds, driver = time.perf_counter() - began, max(steps.driver_bytes, peak_bytes())
        share = found_copies(pool, args.rows, args.shards, folder)
        used = server.cpu_times()
        print(
            f"{seconds:.0f} s; driver at most {driver / 1e9:.2f} GB; copies found {share:.4f}; "
            f"recall {record.figures['measured_recall']}; "
            f"the server's cores {used.user + used.system:.0f} s"
        )


if __name__ == "__main__":
    main()
