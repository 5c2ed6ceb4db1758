"""How well vectors tell copies on images that were held out, and where that draws the line.

Legend: N images, V views (the image itself, then its edits), K dimensions.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedder.encoder import Thresholds
from pretrain.copy_config import HeldOutSettings

BINS = 4000
"""Of the cosines from -1 to 1; thresholds are exact to one of them."""
LISTED = 20
"""Closest pairs of unlike images that are named."""
BLOCK = 256
"""Images compared with all at a time."""


@dataclass(frozen=True)
class CopyFigures:
    """What was measured."""

    thresholds: Thresholds
    recall: float
    """Share of the edits that lie above the threshold for duplicates to their image."""
    false_pairs: float
    """Share of the pairs of unlike images, edited ones included, above that threshold."""
    innocents: float
    """Share of the images that have another image, unedited, above that threshold."""
    pairs: int
    """Pairs of unlike images."""
    closest: list[tuple[float, int, int]]
    """Cosine and numbers of the closest pairs of unedited images: look for true copies there."""

    def logged(self) -> dict[str, float]:
        """What log and file say of it."""
        return {
            "recall": self.recall,
            "threshold": self.thresholds.dedup,
            "false_pairs": self.false_pairs,
            "innocents": self.innocents,
        }


def measure_copies(rows: NDArray[np.float32], settings: HeldOutSettings) -> CopyFigures:
    """Measure unit rows (N, V, K), and draw the lines that the settings ask for.

    Images that are held out are seldom all unlike: true copies among them would push the threshold
    beyond what edits reach, so recall bounds it.
    """
    counts = np.zeros(BINS, np.int64)
    nearest = np.full(len(rows), -1.0)
    closest: list[tuple[float, int, int]] = []
    every = rows.reshape(-1, rows.shape[2])  # (N V, K)
    for start in range(0, len(rows), BLOCK):
        images = rows[start : start + BLOCK, 0]  # (b, K)
        cosines = (images @ every.T).reshape(len(images), *rows.shape[:2])  # (b, N, V)
        own = np.arange(len(images))
        cosines[own, start + own] = -1
        counts += np.histogram(cosines, BINS, (-1, 1))[0]
        counts[0] -= len(images) * rows.shape[1]
        nearest[start + own] = cosines[:, :, 0].max(1)
        closest = _closest(closest, cosines[:, :, 0], start)
    edits = np.einsum("nk,nvk->nv", rows[:, 0], rows[:, 1:])  # (N, V - 1)
    highest = math.floor(100 * float(np.quantile(edits, 1 - settings.recall, method="lower"))) / 100
    shares = (settings.false_pairs, settings.false_leaks)
    thresholds = Thresholds(*(min(highest, _threshold(counts, share)) for share in shares))
    above = counts[_bin(thresholds.dedup) :].sum()
    return CopyFigures(
        thresholds,
        float((edits > thresholds.dedup).mean()),
        float(above / counts.sum()),
        float((nearest > thresholds.dedup).mean()),
        int(counts.sum()),
        closest,
    )


def _threshold(counts: NDArray[np.int64], share: float) -> float:
    """Give the lowest hundredth above which lies no larger share of the pairs."""
    above = counts[::-1].cumsum()[::-1]  # from each bin on
    first = int(np.argmax(np.append(above, 0) <= share * counts.sum()))
    return math.ceil(round((first * 2 / BINS - 1) * 100, 6)) / 100


def _bin(cosine: float) -> int:
    return round((cosine + 1) * BINS / 2)


def _closest(
    known: list[tuple[float, int, int]], cosines: NDArray[np.float32], start: int
) -> list[tuple[float, int, int]]:
    """Add the closest pairs of a block (b, N), each seen once, to those known."""
    later = np.triu(cosines, start + 1)
    places = np.argsort(later, axis=None)[-LISTED:]
    found = (divmod(int(place), later.shape[1]) for place in places)
    pairs = [(float(later[row, column]), start + row, column) for row, column in found]
    return sorted([*known, *pairs], reverse=True)[:LISTED]
