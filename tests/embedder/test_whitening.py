import numpy as np
import pytest

from embedder.errors import EncoderError
from embedder.rows import unit_rows
from embedder.whitening import fit_pca_whitening


def rows(count: int = 400, width: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(width, width)) * np.arange(1, width + 1)
    return (rng.normal(size=(count, width)) @ mix + 3).astype(np.float32)


def test_fit_pca_whitening__unit_variance_without_correlation() -> None:
    whitening = fit_pca_whitening(rows(), 4)
    out = (rows() - whitening.mean) @ whitening.projection  # (400, 4), not yet unit rows
    covariance = np.cov(out.T)
    assert np.allclose(covariance / covariance[0, 0], np.eye(4), atol=0.01)


def test_fit_pca_whitening__same_whatever_the_order_of_rows() -> None:
    shuffled = np.random.default_rng(1).permutation(rows())
    one, other = fit_pca_whitening(rows(), 4), fit_pca_whitening(shuffled, 4)
    assert np.allclose(one.apply(rows()), other.apply(rows()), atol=1e-2)


def test_fit_pca_whitening__too_few_rows() -> None:
    with pytest.raises(EncoderError, match="4 rows of 6 cannot span 4 dimensions"):
        fit_pca_whitening(rows(4), 4)


def test_apply__a_row_alone_gives_the_same_bits() -> None:
    whitening = fit_pca_whitening(rows(), 4)
    together = whitening.apply(rows())
    alone = np.concatenate([whitening.apply(row[None]) for row in rows()])
    assert np.array_equal(together, alone)


def test_unit_rows__zero_stays_zero() -> None:
    out = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]]))
    assert np.allclose(out, [[0.6, 0.8], [0, 0]])
