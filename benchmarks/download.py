"""Download and canonicalize against the img2dataset command: images/s, in one run.

    python benchmarks/download.py --images 20000 --kind photo

Both fetch the same JPEGs from the same server on loopback with the same processes and threads, and
store JPEGs of at most 512 pixels. Ours runs with all protections on (robots.txt, opt-outs, caps,
deadlines, address checks) and also hashes bytes, pixels and looks. A run over a few images tells
the start-up apart. Takes about five minutes for 20,000 images on two cores; --rounds repeats it.
"""

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curation.dataset import write_dataset
from curation.pool import Pool
from curation.schema import make_id, schema_of
from curation.stage import ShardStage, StageFolder, StageInputs
from curation.stages.canonicalize import Canonicalize
from curation.stages.download import Download
from pipelines.local_engine import LocalEngine
from pipelines.stage_runner import Silent, run_stage

KINDS = {"photo": (640, 480, 90, 8), "small": (256, 192, 85, 8)}
"""Width, height, JPEG quality, strength of the grain (which sets the bytes)."""
DISTINCT = 64


def photos(kind: str) -> list[bytes]:
    """Smooth scenes with grain: about 108 KB (photo) or 12 KB (small) each."""
    width, height, quality, grain = KINDS[kind]
    rng = np.random.default_rng(0)
    out = []
    for _ in range(DISTINCT):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        scene = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        scene = scene + rng.normal(0, grain, (height, width, 1))
        buffer = io.BytesIO()
        Image.fromarray(scene.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
        out.append(buffer.getvalue())
    return out


class PhotoServer(asyncio.Protocol):
    """As little of a web server as both need: GET, keep-alive, 404 for robots.txt."""

    def __init__(self, bodies: list[bytes]) -> None:
        self._bodies = bodies
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where answers go."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer every request whose head has arrived."""
        self._head += data
        while b"\r\n\r\n" in self._head:
            head, _, self._head = self._head.partition(b"\r\n\r\n")
            self._answer(head.lower())

    def _answer(self, head: bytes) -> None:
        path = head.split(b" ", 2)[1]
        status, body = b"404 Not Found", b""
        if path.endswith(b".jpg"):
            status, body = b"200 OK", self._bodies[int(path[1:-4]) % DISTINCT]
        closes = b"connection: close" in head
        self._transport.write(
            b"HTTP/1.1 %s\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n%s\r\n"
            % (status, len(body), b"Connection: close\r\n" if closes else b"")
        )
        self._transport.write(body)
        if closes:
            self._transport.close()


def serve(kind: str, port: "multiprocessing.Queue[int]") -> None:
    bodies = photos(kind)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: PhotoServer(bodies), "127.0.0.1", 0, backlog=512)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def ours(urls: list[str], folder: Path, args: argparse.Namespace) -> None:
    schema = schema_of(["id", "source"])
    tables = [
        pa.table([[make_id(url) for url in part], part], schema=schema)
        for part in (urls[i : i + args.shard] for i in range(0, len(urls), args.shard))
    ]
    pool = Pool.of(write_dataset(str(folder / "urls"), tables, schema))
    stages: tuple[ShardStage, ...] = (
        Download(allow_private=True, threads=args.threads, per_host=args.threads),
        Canonicalize(threads=args.threads),
    )
    engine = LocalEngine(args.processes)
    for stage in stages:
        where = StageFolder(str(folder / stage.name()), stage.name())
        record, outputs = run_stage(stage, StageInputs(pool), where, engine, Silent())
        assert record.rows_out == len(urls), record.dropped
        decisions = outputs.pop("decisions")
        pool = pool.with_stage(outputs, decisions)


def theirs(urls: list[str], folder: Path, args: argparse.Namespace) -> None:
    pq.write_table(pa.table({"url": urls}), folder / "urls.parquet")
    command = [
        *(str(Path(sys.executable).parent / "img2dataset"), "--url_list"),
        *(str(folder / "urls.parquet"), "--input_format", "parquet", "--url_col", "url"),
        *("--output_folder", str(folder / "out"), "--output_format", "parquet"),
        *("--processes_count", str(args.processes), "--thread_count", str(args.threads)),
        *("--image_size", "512", "--resize_mode", "keep_ratio_largest"),
        *("--resize_only_if_bigger", "True", "--number_sample_per_shard", str(args.shard)),
        *("--encode_quality", "95", "--enable_wandb", "False", "--compute_hash", "sha256"),
    ]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    stats = [json.loads(path.read_text()) for path in (folder / "out").glob("*_stats.json")]
    assert sum(one["successes"] for one in stats) == len(urls), stats


def cost(
    run: Callable[[list[str], Path, argparse.Namespace], None],
    urls: list[str],
    args: argparse.Namespace,
) -> np.ndarray:
    """(2,) seconds of wall time and of processor time (known for one process only)."""
    folder = Path(tempfile.mkdtemp(prefix="bench-download-"))
    before = np.array([time.perf_counter(), _processor_seconds()])
    try:
        run(urls, folder, args)
    finally:
        shutil.rmtree(folder)
    return np.array([time.perf_counter(), _processor_seconds()]) - before


def _processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--kind", choices=sorted(KINDS), default="photo")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--shard", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[int] = context.Queue()
    server = context.Process(target=serve, args=(args.kind, queue), daemon=True)
    server.start()
    port = queue.get(timeout=60)
    urls = [f"http://127.0.0.1:{port}/{i}.jpg" for i in range(args.images)]
    size = sum(map(len, photos(args.kind))) / DISTINCT
    print(f"{args.images} JPEGs of {size / 1e3:.0f} KB, {args.processes} x {args.threads} threads")
    print(
        f"{'':8} {'whole s':>8} {'start s':>8} {'images/s after start':>21} {'core ms/image':>14}"
    )
    # A shard a process, so that the start of every process is told apart.
    few = urls[: args.processes * 32]
    brief = argparse.Namespace(**{**vars(args), "shard": 32})
    rivals = {"ours": ours, "theirs": theirs}
    # Rivals take turns, and the best of their rounds counts: others may use the machine, too.
    starts = {name: [cost(run, few, brief) for _ in range(2)] for name, run in rivals.items()}
    wholes: dict[str, list[np.ndarray]] = {name: [] for name in rivals}
    for _ in range(args.rounds):
        for name, run in rivals.items():
            wholes[name].append(cost(run, urls, args))
    for name in rivals:
        start, whole = np.min(starts[name], axis=0), np.min(wholes[name], axis=0)
        wall, processor = (whole - start) / (len(urls) - len(few))
        shown = f"{processor * 1e3:14.2f}" if args.processes == 1 else f"{'-':>14}"
        print(f"{name:8} {whole[0]:8.1f} {start[0]:8.1f} {1 / wall:21.0f} {shown}")
    server.terminate()


if __name__ == "__main__":
    main()
