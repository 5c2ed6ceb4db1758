"""What a model sees, as pictures: principal components of patches, attention maps, neighbors.

Legend: n images, P patches of all images, D width, H heads, rows x columns patches of one image.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from curation.errors import ConfigError
from embedder.feature_maps import FeatureModel
from embedder.images import Pixels, resize

Plane = NDArray[np.float32]
"""(rows, columns)."""


def fitted(pixels: Pixels, model: FeatureModel, short_side: int | None = None) -> Pixels:
    """Scale an image to about `short_side`, both sides whole patches; its aspect stays."""
    if model.fixed_size:
        return resize(pixels, model.image_size, model.image_size)
    height, width = pixels.shape[:2]
    scale = (short_side or model.image_size) / min(height, width)
    sides = (max(1, round(side * scale / model.patch)) * model.patch for side in (width, height))
    return resize(pixels, *sides)


def patch_rows(model: FeatureModel, images: Sequence[Pixels]) -> list[NDArray[np.float32]]:
    """Patch features of the last layer of each image: n of (rows, columns, D)."""
    found = []
    for image in images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        (layer,) = model.layers(pixels, [-1])
        found.append(layer.map[0].permute(1, 2, 0).cpu().numpy())
    return found


def pca_pictures(features: Sequence[NDArray[np.float32]]) -> list[Pixels]:
    """Color patches by the first three principal components of the foreground of all images.

    Foreground is where the first component of all patches together is positive; its sign is chosen
    so that patches at the borders of the images lie on the negative side in the mean. Background
    is black. features: n of (rows, columns, D). Gives n of (rows, columns, 3).

    Raises:
        ConfigError: too few patches.
    """
    flat = np.concatenate([one.reshape(-1, one.shape[-1]) for one in features])  # (P, D)
    if len(flat) < 8:
        raise ConfigError(f"{len(flat)} patches are too few for a picture; take larger images")
    score = principal(flat, 1)[:, 0]
    border = np.concatenate([_border(*one.shape[:2]).ravel() for one in features])
    if score[border].mean() > score[~border].mean():
        score = -score
    foreground = score > 0
    colors = np.zeros((len(flat), 3))
    if foreground.sum() >= 4:
        colors[foreground] = _spread(principal(flat[foreground], 3))
    sizes = np.cumsum([one.shape[0] * one.shape[1] for one in features])[:-1]
    parts = np.split((colors * 255).round().astype(np.uint8), sizes)
    return [p.reshape(*one.shape[:2], 3) for p, one in zip(parts, features, strict=True)]


def principal(rows: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """Scores (P, count) of rows (P, D) on their first principal components.

    Signs are fixed: the entry of a component that is largest in size is positive.
    """
    centered = rows.astype(np.float64) - rows.mean(0)
    _, vectors = np.linalg.eigh(centered.T @ centered)  # ascending
    axes = vectors[:, ::-1][:, :count]  # (D, count)
    signs = np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    scores: NDArray[np.float64] = centered @ (axes * signs)
    return scores


def _spread(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map each component from its 1st..99th percentile to 0.1..1: darker is background only."""
    low, high = np.percentile(scores, [1, 99], axis=0)
    shares: NDArray[np.float64] = ((scores - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    shares = np.pad(shares, [(0, 0), (0, 3 - shares.shape[1])])
    return 0.1 + 0.9 * shares


def _border(rows: int, columns: int) -> NDArray[np.bool_]:
    border = np.ones((rows, columns), bool)
    border[1:-1, 1:-1] = False
    return border


def attention_pictures(model: FeatureModel, images: Sequence[Pixels]) -> list[list[Plane]]:
    """How much the class token looks at each patch in the last layer: the mean, then each head.

    Gives n of 1 + H planes from 0 to 1, each scaled by its own maximum.
    """
    found = []
    for image in images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        weights = model.attention(pixels)[0]  # (H, rows, columns)
        planes = torch.cat([weights.mean(0, keepdim=True), weights]).cpu().numpy()
        found.append([plane / plane.max() for plane in planes])
    return found


def neighbors(
    queries: NDArray[np.float32], database: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k most similar database rows of each query: (Q, k) positions and cosines.

    queries: (Q, D), database: (N, D), unit rows.
    """
    similarity = queries @ database.T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(similarity, order, 1)
