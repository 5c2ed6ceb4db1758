"""How well `lite` finds copies and classes.

    python benchmarks/embed_quality.py [--data FOLDER]

Prints the table of docs/encoders.md. No photo that is measured entered a whitening: those are
fitted on imagenette/train, measured are photos (one of each of 334 classes: unlike each other) and
imagenette/val (500 of ten classes: like each other, so harder). About six minutes on two cores.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from embedder.calibration import CopyScores, compare, nearest_neighbour_accuracy, with_copies
from embedder.edits import EDITS
from embedder.encoder import LoadOptions, Thresholds, embed_images, load_encoder
from embedder.encoders.lite import load_trunk
from embedder.encoders.lite_network import NUM_FEATURES
from embedder.encoders.torch_trunk import TrunkEncoder
from embedder.images import Pixels, decode
from embedder.rows import unit_rows
from embedder.whitening import fit_pca_whitening, load_whitening

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
POWERS = (1.0, 3.0)
Rows = np.ndarray[Any, Any]


def read(paths: list[Path]) -> list[Pixels]:
    return [decode(path.read_bytes()) for path in paths]


def pooled_encoders() -> list[TrunkEncoder]:
    """One encoder for each power of the generalised mean; they share a forward pass."""
    trunk = load_trunk(LoadOptions())

    def pool(place: int) -> Callable[[Any], Rows]:
        columns = slice(place * NUM_FEATURES, (place + 1) * NUM_FEATURES)
        return lambda statistics: statistics[:, columns].cpu().numpy()

    places = enumerate(POWERS)
    return [TrunkEncoder(f"p{p}", trunk, NUM_FEATURES, "", pool=pool(n)) for n, p in places]


def fit_variants(fit_on: dict[float, Rows]) -> dict[str, tuple[float, Callable[[Rows], Rows]]]:
    variants: dict[str, tuple[float, Callable[[Rows], Rows]]] = {}
    for p in POWERS:
        variants[f"GeM {p:.0f}, not whitened"] = p, unit_rows
        for width in (128, 256, 384, 512) if p == 3 else (256, 512):
            variants[f"GeM {p:.0f}, whitened to {width}"] = (
                p,
                fit_pca_whitening(fit_on[p], width).apply,
            )
    shrunk = fit_pca_whitening(fit_on[3.0], 512, shrinkage=1.0)
    variants["GeM 3, whitened to 512, shrunk"] = 3.0, shrunk.apply
    from embedder.encoders.lite import WHITENING_FILE

    variants["lite-copy as shipped"] = 3.0, load_whitening(WHITENING_FILE).apply
    return variants


def cells(scores: CopyScores) -> str:
    threshold = scores.threshold_at_precision(0.99)
    found, pairs = scores.recall(threshold), scores.recall_of_pairs(threshold)
    return f"{threshold:.2f} | {found:.4f} | {pairs:.4f} | {scores.innocents(threshold):.3f}"


def print_own_thresholds(scores: dict[str, CopyScores], thresholds: Thresholds) -> None:
    print("\nAt lite-copy's own thresholds, share of copies found by edit:\n")
    print("| set | threshold |", " | ".join(EDITS), "| precision | innocents |")
    print("|---|---|" + "---|" * (len(EDITS) + 2))
    for name, found in scores.items():
        for threshold in (thresholds.dedup, thresholds.leak):
            shares = " | ".join(f"{v:.3f}" for v in found.recall_by_edit(threshold).values())
            ends = f"{found.precision(threshold):.4f} | {found.innocents(threshold):.3f}"
            print(f"| {name} | {threshold} | {shares} | {ends} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    data = parser.parse_args().data
    photos = sorted((data / "photos").glob("*.jpg"))
    train, val = (sorted((data / "imagenette" / s).glob("*/*")) for s in ("train", "val"))
    encoders = pooled_encoders()
    fit_on = dict(zip(POWERS, embed_images(encoders, read(train)), strict=True))
    sets = {
        name: dict(zip(POWERS, embed_images(encoders, with_copies(read(paths))), strict=True))
        for name, paths in {"photos": photos, "imagenette/val": val}.items()
    }
    print("Copies, at the lowest threshold with precision 0.99 among all pairs of pictures:\n")
    print("| encoder | photos: threshold | copies found | pairs found | innocents ", end="")
    print("| imagenette: threshold | copies found | pairs found | innocents |")
    print("|---|" + "---|" * 8)
    shipped: dict[str, CopyScores] = {}
    for variant, (p, whiten) in fit_variants(fit_on).items():
        shipped = {n: compare(whiten(rows[p]), tuple(EDITS)) for n, rows in sets.items()}
        print(f"| {variant} |", " | ".join(cells(s) for s in shipped.values()), "|", flush=True)
    copy = load_encoder("lite-copy")
    assert copy.thresholds is not None, "lite-copy is calibrated"
    print_own_thresholds(shipped, copy.thresholds)
    own = load_whitening(Path(__file__).parents[1] / "embedder/encoders/lite_copy_whitening.npz")
    pool, benchmark = (own.apply(rows) for rows in (sets["photos"][3.0][::8], fit_on[3.0]))
    nearest = (pool @ benchmark.T).max(1)
    leaks = float((nearest > copy.thresholds.leak).mean())
    print(f"\nPhotos that fall as leaks of {len(benchmark)} unrelated images: {leaks:.4f}")
    classes = {n: i for i, n in enumerate(sorted({path.parent.name for path in train}))}
    labels = [np.array([classes[path.parent.name] for path in paths]) for paths in (train, val)]
    val_rows = sets["imagenette/val"][1.0][:: 1 + len(EDITS)]
    accuracy = nearest_neighbour_accuracy(fit_on[1.0], labels[0], val_rows, labels[1])
    print(f"lite-semantic, 5 nearest neighbours on imagenette/val: {accuracy:.4f}")


if __name__ == "__main__":
    main()
