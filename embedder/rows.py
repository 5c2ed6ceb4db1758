"""Rows of numbers as directions, whatever their lengths. N rows, D width."""

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.floating]

_PLAIN = 40
"""Rows whose largest number lies between 2^-40 and 2^40 have squares that float32 can add up."""


def unit_rows(rows: Rows) -> NDArray[np.float64]:
    """(N, D) float64, every row divided by its length; a row of zeros stays as it is."""
    found = rows.astype(np.float64)
    if rows.dtype == np.float64:  # squares of float32 fit into float64, but not those of float64
        found = np.asarray(leveled(found), np.float64)
    lengths = np.sqrt(np.einsum("nd,nd->n", found, found))
    found /= np.where(lengths > 0, lengths, 1)[:, None]
    return found


def leveled(rows: Rows) -> Rows:
    """The rows, those of extreme length scaled by a power of two, which keeps directions exactly.

    Rows of zeros, or with NaN or Inf, stay as they are. rows: (N, D) float32 or float64.
    """
    largest = largest_of(rows)
    exponents = np.frexp(largest)[1]  # (N,)
    extreme = np.flatnonzero(np.isfinite(largest) & (np.abs(exponents) > _PLAIN))
    if len(extreme):
        rows = rows.copy()
        rows[extreme] = np.ldexp(rows[extreme], -exponents[extreme, None])
    return rows


def largest_of(rows: Rows) -> Rows:
    """(N,) the largest size of a number in each row; NaN where there is one. D is at least 1."""
    found: Rows = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    return found
