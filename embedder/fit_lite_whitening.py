"""Fit the whitening that ships with `lite-copy`, or one of your own.

    python -m embedder.fit_lite_whitening FOLDER… --out FILE.npz

The shipped file was made from the folders imagenette/train, imagenette-96/train and faces of the
project's test data, and the sample photos of scikit-image and scikit-learn, with the defaults below
(about three minutes on two cores). Only means and directions enter the file, no image does.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from embedder.encoder import LoadOptions, embed_images
from embedder.encoders.lite import WHITENING_FILE, copy_features_encoder, load_trunk
from embedder.errors import ImageError
from embedder.images import Pixels, decode
from embedder.whitening import Whitening, fit_pca_whitening

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
MIN_SIDE = 64
"""Icons and test patterns are no photos."""


def fit(images: Iterable[Pixels], width: int) -> Whitening:
    """Fit PCA whitening on the pooled features of images, in float32."""
    encoder = copy_features_encoder(load_trunk(LoadOptions(precision="float32")))
    (rows,) = embed_images([encoder], images)
    return fit_pca_whitening(rows, width)


def list_images(folder: Path, limit: int) -> list[Path]:
    """Up to `limit` image files below a folder: those whose relative path has the smallest hash."""
    files = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    return sorted(files, key=partial(_path_hash, folder))[:limit]


def _path_hash(folder: Path, path: Path) -> bytes:
    return hashlib.blake2b(path.relative_to(folder).as_posix().encode()).digest()


def read_photos(paths: Iterable[Path]) -> Iterator[Pixels]:
    """Decode files; those that are no image or too small are left out."""
    for path in paths:
        try:
            pixels = decode(path.read_bytes())
        except ImageError:
            continue
        if min(pixels.shape[:2]) >= MIN_SIDE:
            yield pixels


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="embedder.fit_lite_whitening", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=WHITENING_FILE)
    parser.add_argument("--width", type=int, default=512, help="dimensions that are kept")
    parser.add_argument("--limit", type=int, default=3000, help="images of each folder")
    options = parser.parse_args(arguments)
    paths = [path for folder in options.folders for path in list_images(folder, options.limit)]
    whitening = fit(read_photos(paths), options.width)
    whitening.save(options.out)
    sys.stdout.write(f"{options.out}: {whitening.width} dimensions from {len(paths)} files\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
