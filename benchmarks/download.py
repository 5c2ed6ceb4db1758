"""Download and canonicalize against the img2dataset command: images/s, in one run.

    python benchmarks/download.py --images 20000 --kind photo

Both fetch the same JPEGs from the same server on loopback with the same processes and threads, and
store JPEGs of at most 512 pixels. Ours runs with all protections on (robots.txt, opt-outs, caps,
deadlines, address checks) and also hashes bytes, pixels and looks. A run over a few images tells
the start-up apart. Needs nginx. Takes about three minutes for 20,000 images on two cores; --rounds
repeats it.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage

KINDS = {"photo": (640, 480, 90, 8), "small": (256, 192, 85, 8)}
"""Width, height, JPEG quality, strength of the grain (which sets the bytes)."""
DISTINCT = 64
NGINX = """
daemon off; worker_processes 1; pid {root}/pid; {user}
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000;
  types {{ image/jpeg jpg; }}
  client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
  uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
  server {{ listen 127.0.0.1:{port} backlog=512; root {root}/www; }}
}}
"""


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


@contextlib.contextmanager
def serving(kind: str, count: int) -> Iterator[str]:
    """Serve `count` photos by one worker of nginx on loopback; gives the address before N.jpg."""
    if shutil.which("nginx") is None:
        sys.exit("nginx is missing; install it, such as by: apt-get install nginx-light")
    with tempfile.TemporaryDirectory(prefix="bench-nginx-") as folder:
        root = Path(folder)
        (root / "www").mkdir()
        for number, body in enumerate(photos(kind)):
            (root / f"{number}.jpg").write_bytes(body)
        for number in range(count):
            (root / "www" / f"{number}.jpg").hardlink_to(root / f"{number % DISTINCT}.jpg")
        port = free_port()
        user = "user root;" if os.getuid() == 0 else ""  # else its worker cannot enter the folder
        (root / "nginx.conf").write_text(NGINX.format(root=root, port=port, user=user))
        command = ["nginx", "-p", folder, "-e", str(root / "error.log"), "-c", "nginx.conf"]
        server = subprocess.Popen(command)
        try:
            wait_for(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_for(port: int) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    sys.exit(f"nginx does not answer on port {port}")


def ours(urls: list[str], folder: Path, args: argparse.Namespace) -> None:
    schema = schema_of(["id", "source"])
    tables = [
        pa.table([[make_id(url) for url in part], part], schema=schema)
        for part in (urls[i : i + args.shard] for i in range(0, len(urls), args.shard))
    ]
    pool = Pool.of(write_dataset(str(folder / "urls"), tables, schema))
    stages: tuple[ShardStage, ...] = (
        Download(allow_private=True, threads=args.threads, per_host=args.processes * args.threads),
        Canonicalize(),
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
    with serving(args.kind, args.images) as site:
        compare([f"{site}/{i}.jpg" for i in range(args.images)], args)


def compare(urls: list[str], args: argparse.Namespace) -> None:
    """Let both take turns, and print a row for each."""
    size = sum(map(len, photos(args.kind))) / DISTINCT
    print(f"{len(urls)} JPEGs of {size / 1e3:.0f} KB, {args.processes} x {args.threads} threads")
    # A shard a process, so that the start of every process is told apart.
    few = urls[: args.processes * 32]
    brief = argparse.Namespace(**{**vars(args), "shard": 32})
    rivals = {"ours": ours, "theirs": theirs}
    starts = {name: [cost(run, few, brief) for _ in range(2)] for name, run in rivals.items()}
    wholes: dict[str, list[np.ndarray]] = {name: [] for name in rivals}
    for number in range(args.rounds):
        for name, run in rivals.items():
            wholes[name].append(cost(run, urls, args))
            print(f"round {number + 1}: {name} {wholes[name][-1][0]:.1f} s", flush=True)
    print(
        f"{'':8} {'whole s':>8} {'start s':>8} {'images/s':>9} {'after start':>12} {'core ms':>8}"
    )
    # The best of the rounds counts: others may use the machine, too.
    for name in rivals:
        start, whole = np.min(starts[name], axis=0), np.min(wholes[name], axis=0)
        wall, processor = (whole - start) / (len(urls) - len(few))
        core = f"{processor * 1e3:8.2f}" if args.processes == 1 else f"{'-':>8}"
        rates = f"{len(urls) / whole[0]:9.0f} {1 / wall:12.0f}"
        print(f"{name:8} {whole[0]:8.1f} {start[0]:8.1f} {rates} {core}")


if __name__ == "__main__":
    main()
