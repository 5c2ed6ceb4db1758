"""Centering: subtract a moving mean of the teacher's logits before the softmax.

targets = softmax((logits - c) / temperature);  c <- m c + (1 - m) mean(logits), used at the next
step. The mean runs over all rows of all processes; as logits are products, it is the product of
the mean features.

Legend: M rows, K prototypes, b bottleneck.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.distributed import sum_over_ranks
from pretrain.heads import Projected
from pretrain.losses.targets import SoftmaxTargets, wide


class Center(nn.Module):
    """The moving center of one head's logits."""

    center: Tensor
    """(K,)."""

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))

    @torch.no_grad()
    def targets(self, projected: Projected, temperature: float) -> SoftmaxTargets:
        """Give the targets by the present center, then move it."""
        targets = SoftmaxTargets(projected, temperature, -self.center / temperature)
        self._update(projected)
        return targets

    def _update(self, projected: Projected) -> None:
        features = wide(projected.features)
        count = features.new_full((1,), len(features))
        total = sum_over_ranks(torch.cat([features.sum(0), count]))  # (b + 1,)
        mean = total[:-1] / total[-1].clamp(min=1)
        with torch.autocast(mean.device.type, enabled=False):
            logits = F.linear(mean, projected.prototypes.to(mean.dtype))  # (K,)
        self.center = torch.lerp(logits.to(self.center.dtype), self.center, self.momentum)
