"""Whitening: rotate and scale vectors so that no direction dominates their cosines.

Legend: N rows, D dimensions in, K dimensions out.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.errors import EncoderError
from embedder.rows import Rows, unit_rows


@dataclass(frozen=True, eq=False)
class Whitening:
    """A fixed affine map to K dimensions, followed by scaling to unit length."""

    mean: NDArray[np.float32]
    """(D,)"""
    projection: NDArray[np.float32]
    """(D, K)"""

    @property
    def width(self) -> int:
        """Dimensions that come out."""
        return int(self.projection.shape[1])

    @property
    def digest(self) -> str:
        """Hex digest of the numbers."""
        content = hashlib.blake2b(digest_size=16)
        for part in (self.mean, self.projection):
            content.update(str(part.shape).encode() + np.ascontiguousarray(part).tobytes())
        return content.hexdigest()

    def apply(self, rows: Rows) -> NDArray[np.float32]:
        """Whiten rows (N, D) to unit rows (N, K).

        In float64, so that rounding hides the order of the sums: a row gives the same result
        whatever rows stand beside it.
        """
        import torch  # numpy's threads of several callers wait for each other: ten times the time

        centered = torch.from_numpy(rows.astype(np.float64) - self.mean)
        return unit_rows((centered @ self._projection64).numpy()).astype(np.float32)  # (N, K)

    @cached_property
    def _projection64(self) -> Any:
        import torch

        return torch.from_numpy(self.projection.astype(np.float64))


def fit_pca_whitening(rows: Rows, width: int, shrinkage: float = 0.0) -> Whitening:
    """Fit PCA whitening: the `width` strongest directions, each scaled to unit variance.

    shrinkage: share of the mean variance that is added to each; keeps weak directions weak.
    Raises: EncoderError where the rows cannot span `width` dimensions.
    """
    if width > min(rows.shape[0] - 1, rows.shape[1]):
        raise EncoderError(
            f"{rows.shape[0]} rows of {rows.shape[1]} cannot span {width} dimensions"
        )
    mean = rows.mean(0, dtype=np.float64)
    centered = rows.astype(np.float64) - mean
    variances, directions = _principal(centered.T @ centered / len(rows))
    scales = np.sqrt(variances[:width] + shrinkage * variances.mean())
    return _rounded(mean, directions[:, :width] / scales)


def _principal(covariance: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues, largest first, and eigenvectors as columns whose largest entry is positive."""
    variances, directions = np.linalg.eigh(covariance)
    variances, directions = np.maximum(variances[::-1], 0), directions[:, ::-1]
    largest = np.abs(directions).argmax(0)
    signs = np.sign(directions[largest, np.arange(directions.shape[1])])
    return variances, directions * signs


def _rounded(mean: NDArray[np.float64], projection: NDArray[np.float64]) -> Whitening:
    """Round to half precision, so that what is saved is what was fitted."""
    projection = projection / np.abs(projection).max()  # rows become unit rows anyway
    return Whitening(
        mean.astype(np.float16).astype(np.float32), projection.astype(np.float16).astype(np.float32)
    )
