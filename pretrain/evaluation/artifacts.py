"""How many patch tokens are artefacts: tokens of far larger norm than the others of their model.

Without registers, large models keep global information in a few patches of even background
(arXiv 2309.16588), and these spoil dense features. Legend: B images, P patches, D width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field

from curation.config import Settings
from curation.sources.shards import StoredImage
from embedder.feature_maps import FeatureModel
from pretrain.evaluation.dense import share_of
from pretrain.evaluation.features import gathered
from pretrain.evaluation.knn import center_crop


class ArtifactSettings(Settings):
    """When a token counts as an artefact."""

    cutoff: float = Field(default=150.0, gt=0)
    """Norm before the final layer norm above which the paper counts a token of ViT-L and g."""
    times_median: float = Field(default=3.0, gt=1)
    """Or: times the median norm of all tokens, which holds for a model of any scale."""


def artifacts(
    model: FeatureModel, images: Sequence[StoredImage], settings: ArtifactSettings
) -> dict[str, float]:
    """Give the share of patch tokens with outlier norms, and what norms there are."""
    rows = []
    for image in share_of(images):
        crop = center_crop(image.pixels(), model.image_size)
        pixels = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None]
        rows.append(model.raw_patches(pixels)[0].norm(dim=-1).cpu())  # (P,)
    norms = gathered(torch.stack(rows), len(images)).numpy()
    median = float(np.median(norms))
    return {
        "outlier_share": float((norms > settings.times_median * median).mean()),
        "share_above_cutoff": float((norms > settings.cutoff).mean()),
        "median_norm": median,
        "norm_99": float(np.quantile(norms, 0.99)),
        "max_norm": float(norms.max()),
    }
