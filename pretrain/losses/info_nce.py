"""InfoNCE: each view finds the other view of its image among all views of the batch.

loss = -mean_i log( exp(z_i . z_p(i) / t) / sum_{j != i} exp(z_i . z_j / t) ) over unit rows z;
p(i) is the other view of the image of i, t the temperature.

Legend: B images, D width. Rows are crop-major: view 0 of all images, then view 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce_loss(rows: Tensor, temperature: float) -> Tensor:
    """Give the loss of unit rows (2 B, D), both views of B images."""
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)  # (2B, 2B)
    return F.cross_entropy(logits, partners(len(rows), rows.device))


def partners(count: int, device: torch.device) -> Tensor:
    """Give the position (2 B,) of each row's other view."""
    return torch.arange(count, device=device).roll(count // 2)
