"""KoLeo: push each image away from its nearest neighbor in the batch.

loss = -mean_i log(min_j |x_i - x_j| + eps), over unit rows, always in float32 or wider: in half
precision eps vanishes and two equal rows give infinity.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.distributed import gather_rows

EPS = 1e-8


def koleo_loss(features: Tensor, *, gathered: bool = False) -> Tensor:
    """Give the loss of the class tokens (B, D) of one crop.

    gathered: over the rows of all processes; the paper's is within each.
    """
    with torch.autocast(features.device.type, enabled=False):
        x = features.to(torch.promote_types(features.dtype, torch.float32))
        x = F.normalize(gather_rows(x) if gathered else x, dim=-1, eps=EPS)
        # index_select, as plain indexing adds up its gradients in no fixed order on CPUs.
        neighbors = x.index_select(0, nearest(x.detach()))  # (B, D)
        distances = F.pairwise_distance(x, neighbors, eps=EPS)
        return -(distances + EPS).log().mean()


def nearest(x: Tensor) -> Tensor:
    """Give the position (B,) of each row's nearest other row, by dot product."""
    dots = x @ x.T  # (B, B)
    return dots.fill_diagonal_(-1).argmax(1)
