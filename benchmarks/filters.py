"""Filters that follow each other, each alone and all together: what one shared decode saves.

    python benchmarks/filters.py [--images FOLDER] [--count 96] [--rounds 5]

CPU milliseconds an image of quality, nsfw, faces and relevance, alone and in a row, and how often
images are decoded. Rounds are interleaved in one process with one thread, and the best of each
counts, since other work on the machine slows whatever runs beside it. The scores must be the same
bit for bit. Without a folder, drawn pictures of 512 x 384 pixels stand in for photos.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from curation.image_filter import DECODED, ImageFilter, filter_in_turn
from curation.schema import make_id
from curation.stage import Shard
from curation.stages.faces import Faces
from curation.stages.nsfw import Nsfw
from curation.stages.quality import Quality
from curation.stages.relevance import Relevance
from embedder.images import canonicalize, encode_jpeg, resize

Chain = list[tuple[ImageFilter, Any]]


def pictures(folder: str | None, count: int) -> list[bytes]:
    """Stored images, as canonicalize leaves them."""
    if folder is not None:
        files = sorted(path for path in Path(folder).rglob("*.jpg") if path.is_file())
        stored = [canonicalize(path.read_bytes()).data for path in files[:count]]
    else:
        rng = np.random.default_rng(0)
        small = rng.integers(0, 255, (16, 48, 64, 3)).astype(np.uint8)
        stored = [encode_jpeg(resize(pixels, 512, 384)) for pixels in small]
    return [stored[number % len(stored)] for number in range(count)]


def shard_of(images: list[bytes]) -> Shard:
    """The images as a shard."""
    columns = {
        "id": [make_id(str(number)) for number in range(len(images))],
        "image": pa.array(images, pa.large_binary()),
        "original_width": np.full(len(images), 1024),
        "original_height": np.full(len(images), 768),
    }
    return Shard(pa.table(columns), 0)


def apart(images: list[bytes], chain: Chain) -> Shard:
    """Each filter passes over the shard by itself."""
    shard = shard_of(images)
    for stage, opened in chain:
        stage.process(shard, opened)
    return shard


def together(images: list[bytes], chain: Chain) -> Shard:
    """All filters pass over the shard in a row."""
    shard = shard_of(images)
    filter_in_turn(shard, chain)
    return shard


def main() -> None:
    """Measure, check that the scores agree, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    images = pictures(args.images, args.count)
    filters = (Quality(threads=1), Nsfw(threads=1), Faces(threads=1, action="keep"))
    chain: Chain = [(one, one.open()) for one in (*filters, Relevance(threads=1))]
    ways = {stage.name(): (apart, [(stage, opened)]) for stage, opened in chain}
    light = [chain[0], chain[-1]]
    ways |= {"all, each alone": (apart, chain), "all together": (together, chain)}
    ways |= {"first and last, alone": (apart, light), "together": (together, light)}
    seconds, shards = defaultdict[str, list[float]](list), dict[str, Shard]()
    for _ in range(args.rounds):
        for name, (way, some) in ways.items():
            start = time.process_time()
            shards[name] = way(images, some)
            seconds[name].append(time.process_time() - start)
    print(f"{'filters':22} {'CPU ms an image':>16} {'decodes an image':>17}")
    for name, took in seconds.items():
        decodes = shards[name].counters[DECODED] / len(images)
        print(f"{name:22} {1000 * min(took) / len(images):16.2f} {decodes:17.2f}")
    for one, other in ("all, each alone", "all together"), ("first and last, alone", "together"):
        print(f"{other}: {min(seconds[other]) / min(seconds[one]):.3f} of the CPU time")
    first, second = (shards[name].notes for name in ("all, each alone", "all together"))
    same = first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name], equal_nan=True) for name in first
    )
    print(f"the same scores: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
