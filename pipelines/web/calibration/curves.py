"""Precision, recall and removals by threshold, estimated from judged samples of each bin.

A judged row stands for all rows of its bin: it weighs N_b / n_b, rows by judged rows. Intervals are
those of a bootstrap within the bins. Where all answers of a bin are the same, resampling them would
claim certainty; there the share is drawn from what such answers leave possible (Jeffreys).

Legend: S judged samples, T thresholds, R resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.web.calibration.questions import Sample

Floats = NDArray[np.float64]

_RESAMPLES = 400
_Z = 1.959964
"""Standard normal quantile of 95 % intervals."""


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
class _Judged:
    """Judged samples side by side, with what each bin holds."""

    scores: Floats  # (S,)
    answers: Floats  # (S,) 1 positive, 0 negative
    bins: NDArray[np.int64]  # (S,)
    rows: Floats  # rows of each bin


def wilson(hits: float, tries: float) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score; all of it where nothing was tried."""
    if tries <= 0:
        return 0.0, 1.0
    share, z2 = hits / tries, _Z * _Z
    middle = (share + z2 / (2 * tries)) / (1 + z2 / tries)
    half = _Z / (1 + z2 / tries) * np.sqrt(share * (1 - share) / tries + z2 / (4 * tries**2))
    return float(max(middle - half, 0)), float(min(middle + half, 1))


@dataclass(frozen=True)
class Effects:
    """What some thresholds do, counted in the whole run."""

    thresholds: Floats  # (T,)
    above: NDArray[np.int64]  # (T,)
    removed: NDArray[np.int64]  # (T,)


def curve(
    sample: Sample, answers: dict[str, bool | None], effects: Effects, rng: np.random.Generator
) -> list[Point]:
    """What each threshold would do, as far as the answers tell; none where nothing was judged.

    answers: by the key of their question; those that are None are left out.
    """
    thresholds = effects.thresholds
    judged = _judged(sample, answers)
    if not len(judged.scores):
        return []
    weights = _weights(judged, np.ones_like(judged.answers))
    shares = _shares(judged, weights, judged.answers, thresholds)  # (2, T)
    drawn = np.stack([_resampled(judged, thresholds, rng) for _ in range(_RESAMPLES)])  # (R, 2, T)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)  # (2, T) each
    return [
        Point(
            float(threshold),
            int(effects.above[t]),
            int(effects.removed[t]),
            *(float(part[0, t]) for part in (shares, low, high)),
            *(float(part[1, t]) for part in (shares, low, high)),
        )
        for t, threshold in enumerate(thresholds)
    ]


def by_bin(sample: Sample, answers: dict[str, bool | None]) -> list[dict[str, float]]:
    """Of every bin: its rows, how many were judged, the positive share and its interval."""
    found = []
    for stratum in sample.strata:
        said = [answers.get(q.key) for q in stratum.questions]
        known = [one for one in said if one is not None]
        low, high = wilson(sum(known), len(known))
        found.append(
            {
                "low": stratum.low,
                "high": stratum.high,
                "rows": stratum.rows,
                "judged": len(known),
                "positive": sum(known) / len(known) if known else 0.0,
                "positive_low": low,
                "positive_high": high,
            }
        )
    return found


def _judged(sample: Sample, answers: dict[str, bool | None]) -> _Judged:
    found = [
        (question.score, float(answer), number)
        for number, stratum in enumerate(sample.strata)
        for question in stratum.questions
        if (answer := answers.get(question.key)) is not None
    ]
    scores, said, bins = (list(part) for part in zip(*found, strict=True)) if found else ([],) * 3
    rows = [float(stratum.rows) for stratum in sample.strata]
    return _Judged(
        np.array(scores, np.float64),
        np.array(said, np.float64),
        np.array(bins, np.int64),
        np.array(rows),
    )


def _weights(judged: _Judged, times: Floats) -> Floats:
    """(S,) rows that each sample stands for, each counted some times."""
    counts = np.bincount(judged.bins, times, minlength=len(judged.rows))
    return times * judged.rows[judged.bins] / np.maximum(counts[judged.bins], 1e-12)


def _shares(judged: _Judged, weights: Floats, answers: Floats, thresholds: Floats) -> Floats:
    """(2, T) precision and recall."""
    above = judged.scores[None] > thresholds[:, None]  # (T, S)
    true = above @ (weights * answers)  # (T,)
    removed = above @ weights  # (T,)
    total = float(weights @ answers)
    precision = np.divide(true, removed, out=np.ones_like(true), where=removed > 0)
    recall = true / total if total else np.ones_like(true)
    return np.stack([precision, recall])


def _resampled(judged: _Judged, thresholds: Floats, rng: np.random.Generator) -> Floats:
    """(2, T) of one resample: samples drawn again within their bins, or their shares by Wilson."""
    times = np.zeros_like(judged.answers)
    answers = judged.answers.copy()
    for number in np.unique(judged.bins):
        members = np.flatnonzero(judged.bins == number)
        drawn = rng.choice(members, len(members))
        times += np.bincount(drawn, minlength=len(times))
        said = judged.answers[members]
        if said.min() == said.max():
            answers[members] = _plausible_share(said, rng)
    return _shares(judged, _weights(judged, times), answers, thresholds)


def _plausible_share(said: Floats, rng: np.random.Generator) -> float:
    """A positive share that equal answers leave possible."""
    return float(rng.beta(said.sum() + 0.5, len(said) - said.sum() + 0.5))
