"""Precision, recall and removals by threshold, estimated from rated samples of each bin.

A rated row stands for all rows of its bin: it weighs N_b / n_b, rows by rated rows. Intervals are
those of a bootstrap within the bins. Where all answers of a bin are the same, resampling them would
claim certainty; there the share is drawn from what such answers leave possible (Jeffreys).

Legend: S rated samples, T thresholds, R resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.web.calibration.questions import Sample
from pipelines.web.calibration.ratings import Answers

Floats = NDArray[np.float64]

_RESAMPLES = 400
_Z = 1.959964
"""Standard normal quantile of 95 % intervals."""


@dataclass(frozen=True)
class Effects:
    """What some thresholds do, counted in the whole run."""

    thresholds: Floats  # (T,)
    above: NDArray[np.int64]  # (T,)
    removed: NDArray[np.int64]  # (T,)


@dataclass(frozen=True)
class Point:
    """What one threshold would do."""

    threshold: float
    above: int
    """Rows with a score above it, in the whole run."""
    removed: int
    """Rows that would be dropped."""
    precision: float
    """Share of the rows above that are rightly there; 1 where there are none."""
    precision_low: float
    precision_high: float
    recall: float
    """Share of the rows that belong above, among all that have a score; 1 where there are none."""
    recall_low: float
    recall_high: float


@dataclass(frozen=True)
class Bin:
    """What was answered about one part of the score's range."""

    low: float
    high: float
    rows: int
    judged: int
    positive: float
    """Share of the answers."""
    positive_low: float
    positive_high: float


@dataclass(frozen=True)
class _Rated:
    """Rated samples side by side, with what each bin holds."""

    scores: Floats  # (S,)
    answers: Floats  # (S,) 1 positive, 0 negative
    bins: NDArray[np.int64]  # (S,)
    rows: Floats  # rows of each bin

    def shares(self, times: Floats, answers: Floats, thresholds: Floats) -> Floats:
        """(2, T) precision and recall, each sample counted some times."""
        counts = np.bincount(self.bins, times, minlength=len(self.rows))
        weights = times * self.rows[self.bins] / np.maximum(counts[self.bins], 1e-12)
        above = self.scores[None] > thresholds[:, None]  # (T, S)
        true = above @ (weights * answers)  # (T,)
        removed = above @ weights  # (T,)
        total = float(weights @ answers)
        precision = np.divide(true, removed, out=np.ones_like(true), where=removed > 0)
        return np.stack([precision, true / total if total else np.ones_like(true)])

    def resampled(self, thresholds: Floats, rng: np.random.Generator) -> Floats:
        """(2, T) of one resample: samples drawn again within their bins, or a plausible share."""
        times, answers = np.zeros_like(self.answers), self.answers.copy()
        for number in np.unique(self.bins):
            members = np.flatnonzero(self.bins == number)
            drawn = rng.choice(members, len(members))
            times += np.bincount(drawn, minlength=len(times))
            said = self.answers[members]
            if said.min() == said.max():
                answers[members] = rng.beta(said.sum() + 0.5, len(said) - said.sum() + 0.5)
        return self.shares(times, answers, thresholds)


def wilson(hits: float, tries: float) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score; all of it where nothing was tried."""
    if tries <= 0:
        return 0.0, 1.0
    share, z2 = hits / tries, _Z * _Z
    middle = (share + z2 / (2 * tries)) / (1 + z2 / tries)
    half = _Z / (1 + z2 / tries) * np.sqrt(share * (1 - share) / tries + z2 / (4 * tries**2))
    return float(max(middle - half, 0)), float(min(middle + half, 1))


def curve(
    sample: Sample, answers: Answers, effects: Effects, rng: np.random.Generator
) -> list[Point]:
    """What each threshold would do, as far as the answers tell; none where nothing was rated.

    answers: by the key of their question; those that are None are left out.
    """
    found = [
        (question.score, float(answer), number)
        for number, stratum in enumerate(sample.strata)
        for question in stratum.questions
        if (answer := answers.get(question.key)) is not None
    ]
    if not found:
        return []
    scores, said, bins = np.array(found, np.float64).T.copy()
    rows = np.array([stratum.rows for stratum in sample.strata], np.float64)
    rated, thresholds = _Rated(scores, said, bins.astype(np.int64), rows), effects.thresholds
    shares = rated.shares(np.ones_like(said), said, thresholds)  # (2, T)
    drawn = [rated.resampled(thresholds, rng) for _ in range(_RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)  # (2, T) each
    counts = (thresholds.tolist(), effects.above.tolist(), effects.removed.tolist())
    told = np.stack([shares, low, high]).transpose(2, 1, 0).reshape(-1, 6).tolist()  # (T, 6)
    return [Point(*one, *parts) for *one, parts in zip(*counts, told, strict=True)]


def by_bin(sample: Sample, answers: Answers) -> list[Bin]:
    """Of every bin: its rows, how many were rated, the positive share and its interval."""
    found = []
    for one in sample.strata:
        said = [a for q in one.questions if (a := answers.get(q.key)) is not None]
        share = sum(said) / len(said) if said else 0.0
        interval = wilson(sum(said), len(said))
        found.append(Bin(one.low, one.high, one.rows, len(said), share, *interval))
    return found
