"""How well an encoder tells copies from unrelated images, and where to draw the line.

Legend: N images, E edits, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from embedder.edits import EDITS, Edit
from embedder.encoder import Encoder, ImageSource, embed_images
from embedder.images import Pixels


def with_copies(
    images: Sequence[Pixels], seed: int = 0, edits: Mapping[str, Edit] = EDITS
) -> Iterator[ImageSource]:
    """Yield each image, then each of its edited copies: N x (1 + E), made when they are called."""
    for number, pixels in enumerate(images):
        yield pixels
        for kind, edit in enumerate(edits.values()):
            yield _Copy(pixels, edit, (seed, number, kind))


@dataclass(frozen=True, eq=False)
class _Copy:
    pixels: Pixels
    edit: Edit
    seed: tuple[int, ...]

    def __call__(self) -> Pixels:
        return self.edit(self.pixels, np.random.default_rng(self.seed))


@dataclass(frozen=True, eq=False)
class CopyScores:
    """Cosines of N unrelated images and their copies."""

    edits: tuple[str, ...]
    copies: NDArray[np.float32]
    """(N, E): each image with each copy of it."""
    pairs: NDArray[np.float32]
    """Any two pictures, copies too, that show the same image."""
    strangers: NDArray[np.float32]
    """Any two pictures, copies too, that show different images."""
    nearest: NDArray[np.float32]
    """(N,): each image with the most similar other image."""

    def recall(self, threshold: float) -> float:
        """Share of the copies that are found by their image."""
        return float((self.copies > threshold).mean())

    def recall_by_edit(self, threshold: float) -> dict[str, float]:
        """Share of the copies that are found, by edit."""
        return dict(zip(self.edits, (self.copies > threshold).mean(0).tolist(), strict=True))

    def recall_of_pairs(self, threshold: float) -> float:
        """Share of all pairs of pictures of one image, two copies included, that are found."""
        return float((self.pairs > threshold).mean())

    def precision(self, threshold: float) -> float:
        """Share of the pairs found, among all pictures, that show the same image."""
        right = int((self.pairs > threshold).sum())
        wrong = int((self.strangers > threshold).sum())
        return right / (right + wrong) if right + wrong else 1.0

    def innocents(self, threshold: float) -> float:
        """Share of the images that an unrelated image would drop."""
        return float((self.nearest > threshold).mean())

    def threshold_at_precision(self, precision: float) -> float:
        """Lowest threshold, in steps of 0.01, from which on the precision holds."""
        steps = np.arange(0.01, 1.0, 0.01)[::-1]
        held = [t for t in steps if self.precision(t) >= precision]
        return round(float(min(held)), 2) if held else 1.0


def score_copies(encoder: Encoder, images: Sequence[Pixels], seed: int = 0) -> CopyScores:
    """Embed images and their edited copies, and compare all with all."""
    (rows,) = embed_images([encoder], with_copies(images, seed))
    return compare(rows, tuple(EDITS))


def compare(rows: NDArray[np.floating], edits: tuple[str, ...]) -> CopyScores:
    """Score unit rows (N x (1 + E), D) in the order of `with_copies`."""
    step = 1 + len(edits)
    rows = rows.astype(np.float32)
    cosines = rows @ rows.T  # (N (1 + E), N (1 + E))
    image = np.arange(len(rows)) // step
    upper = np.triu(np.ones(cosines.shape, bool), 1)
    same = image[:, None] == image
    originals = cosines[::step, ::step].copy()  # (N, N)
    np.fill_diagonal(originals, -1)
    own = np.arange(len(originals))
    return CopyScores(
        edits,
        cosines[::step].reshape(len(own), len(own), step)[own, own, 1:],
        cosines[upper & same],
        cosines[upper & ~same],
        originals.max(1),
    )


@dataclass(frozen=True)
class ComponentScores:
    """What the components of all pairs above a threshold are worth, one picture of each kept."""

    precision: float
    """Share of the pairs of pictures in one component that show the same image."""
    lost: float
    """Share of the images of which no picture is kept."""


def score_components(
    rows: NDArray[np.floating], num_edits: int, threshold: float
) -> ComponentScores:
    """Unite unit rows (N x (1 + E), D) in the order of `with_copies`; the first of each stays."""
    image = np.arange(len(rows)) // (1 + num_edits)
    rows = rows.astype(np.float32)
    number, component = connected_components(coo_array(rows @ rows.T > threshold), directed=False)
    sizes = np.bincount(component, minlength=number)
    together = np.unique(component * len(rows) + image, return_counts=True)[1]
    pairs = (sizes * (sizes - 1)).sum()
    right = (together * (together - 1)).sum()
    kept = np.unique(image[np.unique(component, return_index=True)[1]])
    return ComponentScores(float(right / pairs) if pairs else 1.0, 1 - len(kept) / (image[-1] + 1))


def nearest_neighbor_accuracy(
    train: NDArray[np.floating],
    train_labels: NDArray[np.integer],
    test: NDArray[np.floating],
    test_labels: NDArray[np.integer],
    k: int = 5,
) -> float:
    """Share of test rows whose k nearest training rows vote for their label (ties: smallest)."""
    cosines = test.astype(np.float32) @ train.astype(np.float32).T  # (tests, trains)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    votes = np.stack(
        [np.bincount(v, minlength=train_labels.max() + 1) for v in train_labels[nearest]]
    )
    return float((votes.argmax(1) == test_labels).mean())
