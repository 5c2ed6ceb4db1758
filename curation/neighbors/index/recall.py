"""Which margin a search needs, by the neighbors of sampled queries. S steps of the margin."""

import numpy as np

from curation.neighbors.index.probe_margin import DEVIATIONS
from curation.neighbors.rows.routes import Routes

_STEPS = 256
"""Margins that are tried."""


def margin_steps(limits: float) -> np.ndarray:
    """(S + 1,) float16: margins that a visit may be allowed, from none to the largest."""
    return np.linspace(0, limits, _STEPS + 1).astype(np.float16)


def lists_within(routes: Routes, margin: float) -> float:
    """Lists that a row meets on average, its own included."""
    return 1 + len(routes.within(margin)[0]) / max(1, len(routes))


def first_enough(needed: np.ndarray, target: float) -> tuple[int, float, float]:
    """The first step whose share is the target 19 times in 20, else the last; both numbers.

    needed: as in `shares_met`.
    """
    met, errors = shares_met(needed)
    enough = np.flatnonzero(met - DEVIATIONS * errors >= target)
    step = int(enough[0]) if len(enough) else len(met) - 1
    return step, float(met[step]), float(errors[step])


def shares_met(needed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the pairs met with each margin, and its standard error: (S + 1,) both.

    needed: (Q, S + 2) pairs of each sampled row by the step of the margin that they need; the last
    column counts those that no visit meets. Rows are drawn, not pairs: the error is that of a
    ratio of sums over rows.
    """
    of_row = needed.sum(axis=1)[:, None]  # (Q, 1)
    met = np.cumsum(needed[:, :-1], axis=1)  # (Q, S + 1)
    shares = met.sum(axis=0) / of_row.sum()
    errors = np.sqrt(((met - shares * of_row) ** 2).sum(axis=0)) / of_row.sum()
    return shares, errors
