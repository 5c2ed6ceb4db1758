"""How many patch tokens are artifacts: tokens of far larger norm than the others of their model.

Without registers, large models keep global information in a few patches of even background
(arXiv 2309.16588), and these spoil dense features. Legend: B images, P patches, D width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from curation.config import Settings
from curation.sources.shards import StoredImage
from embedder.feature_maps import FeatureModel
from embedder.images import Pixels
from pretrain.distributed import sum_over_ranks
from pretrain.evaluation.bad_images import Reading
from pretrain.evaluation.dense import share_of
from pretrain.evaluation.features import gathered
from pretrain.evaluation.knn import center_crop


class ArtifactSettings(Settings):
    """When a token counts as an artifact."""

    cutoff: float = Field(default=150.0, gt=0)
    """Norm before the final layer norm above which the paper counts a token of ViT-L and g."""
    times_median: float = Field(default=3.0, gt=1)
    """Or: times the median norm of all tokens, which holds for a model of any scale."""


def artifacts(
    model: FeatureModel, images: Sequence[StoredImage], settings: ArtifactSettings
) -> dict[str, float]:
    """Give the share of patch tokens with outlier norms, and what norms there are."""
    reading = Reading(images)
    rows = [_norms(model, read()) for read in share_of(reading.readers())]
    if not rows:  # fewer images than processes: no rows, of the shape that all agree on
        rows = [_norms(model, np.zeros((1, 1, 3), np.uint8))]
    mine = torch.stack(rows)[: len(share_of(images))]
    is_bad = sum_over_ranks(reading.is_bad)
    norms = gathered(mine, len(images))[reading.good(is_bad)].numpy()
    median = float(np.median(norms))
    return {
        "outlier_share": float((norms > settings.times_median * median).mean()),
        "share_above_cutoff": float((norms > settings.cutoff).mean()),
        "median_norm": median,
        "norm_99": float(np.quantile(norms, 0.99)),
        "max_norm": float(norms.max()),
        "bad_images": float(is_bad.sum()),
    }


def _norms(model: FeatureModel, pixels: Pixels) -> Tensor:
    """Norms (P,) of the patch tokens of an image's center."""
    crop = torch.from_numpy(center_crop(pixels, model.image_size).copy())
    norms: Tensor = model.raw_patches(crop.permute(2, 0, 1)[None])[0].norm(dim=-1).cpu()
    return norms
