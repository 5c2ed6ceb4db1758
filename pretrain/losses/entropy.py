"""The entropy term of SSCD: push each view away from the nearest view of another image.

loss = -mean_i log(min_{j not of i's image} |z_i - z_j| + eps), over unit rows z (Pizzi et al. 2022,
eq. 4): vectors that fill the sphere evenly leave unlike images at one low cosine, so that a single
threshold serves all of them.

Legend: B images, D width. Rows are crop-major: view 0 of all images, then view 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.losses.info_nce import partners

EPS = 1e-8


def entropy_loss(rows: Tensor) -> Tensor:
    """Give the loss of unit rows (2 B, D), both views of B images."""
    with torch.no_grad():
        cosines = rows @ rows.T  # (2B, 2B)
        cosines.fill_diagonal_(-torch.inf)
        own = partners(len(rows), rows.device)[:, None]
        nearest = cosines.scatter_(1, own, -torch.inf).argmax(1)
    # index_select, as plain indexing adds up its gradients in no fixed order on CPUs.
    distances = F.pairwise_distance(rows, rows.index_select(0, nearest), eps=EPS)
    return -(distances + EPS).log().mean()
