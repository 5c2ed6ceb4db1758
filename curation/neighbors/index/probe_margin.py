"""The narrowest probe margin that gives the recall asked for, from what sampled rows need.

T sampled rows that have something to find.
"""

from dataclasses import dataclass

import numpy as np

DEVIATIONS = 1.645
"""Standard deviations within which 19 of 20 measurements lie on one side."""
ENOUGH_ROWS = 2000
"""Sampled rows that have something to find: at a share of 0.994 their bound lies 0.0035 below."""
TELLING_ROWS = 500
"""Fewer would not prove a recall of 0.99 unless all of them found what they seek."""


@dataclass(frozen=True)
class ProbeMargin:
    """A margin, and the recall that it gives on a sample."""

    margin: float
    recall: float | None
    """Share of the rows that find what they seek; None where no sampled row seeks anything."""
    at_least: float | None
    """What that share is at least, 19 times in 20: Wilson's bound."""


def narrowest_margin(
    needed: np.ndarray, target: float, widest: float, *, is_sample: bool = True
) -> ProbeMargin:
    """The smallest margin whose recall is surely the target.

    Where none is: the smallest that meets all that any margin meets, or the widest where too few
    rows say so.

    needed: (T,) float16, the margin from which on a row finds what it seeks; infinity: never.
    is_sample: whether there are rows that were not asked.
    """
    margins, counts = np.unique(needed[np.isfinite(needed)], return_counts=True)
    enough = np.flatnonzero(_bound(np.cumsum(counts), len(needed), is_sample) >= target)
    if len(enough):
        margin = float(margins[enough[0]])
    else:
        all_known = len(margins) and (len(needed) >= TELLING_ROWS or not is_sample)
        margin = float(margins[-1]) if all_known else widest
    return recall_within(needed, margin, is_sample=is_sample)


def recall_within(needed: np.ndarray, margin: float, *, is_sample: bool = True) -> ProbeMargin:
    """What a margin gives. needed, is_sample: see `narrowest_margin`."""
    if not len(needed):
        return ProbeMargin(margin, None, None)
    found = int((needed <= np.float16(margin)).sum())
    bound = float(_bound(np.array(found), len(needed), is_sample))
    return ProbeMargin(margin, found / len(needed), bound)


def rows_wanted(target: float) -> int:
    """Sampled rows that have something to find, so that a target can be proved by them."""
    return max(ENOUGH_ROWS, round(4 * DEVIATIONS**2 / max(1e-9, 1 - target)))


def _bound(found: np.ndarray, asked: int, is_sample: bool) -> np.ndarray:
    asked = max(1, asked)
    return wilson_bound(found, asked) if is_sample else found / asked


def wilson_bound(found: np.ndarray, asked: int) -> np.ndarray:
    """Lower bound of a share of which `found` of `asked` were seen (Wilson 1927)."""
    squared, share = DEVIATIONS**2, found / asked
    spread = DEVIATIONS * np.sqrt(share * (1 - share) / asked + squared / (4 * asked**2))
    return np.asarray((share + squared / (2 * asked) - spread) / (1 + squared / asked))
