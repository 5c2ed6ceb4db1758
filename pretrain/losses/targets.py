"""The teacher's targets: probabilities over prototypes, a block of rows at a time.

Both ways to centre (Sinkhorn-Knopp, moving centre) come to the same form: the softmax of
logits / temperature plus one bias a prototype.

Legend: M rows, b bottleneck, K prototypes, r rows of a block.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.heads import Projected


class Targets(Protocol):
    """Probabilities (M, K), given by rows."""

    def rows(self, index: Tensor) -> Tensor:
        """Give the rows (r, K) at positions (r,)."""


@dataclass(frozen=True)
class SoftmaxTargets:
    """softmax(logits / temperature + bias), computed when asked for."""

    projected: Projected
    temperature: float
    bias: Tensor
    """(K,)."""

    def rows(self, index: Tensor) -> Tensor:
        """Give the rows (r, K) at positions (r,)."""
        logits = wide(scores(self.projected, index))
        return (logits.div_(self.temperature).add_(self.bias)).softmax(-1)


@dataclass(frozen=True)
class ScaledTargets:
    """Rows of `exponentials * scale`, normalised: a softmax whose exponentials are held."""

    exponentials: Tensor
    """(M, K)."""
    scale: Tensor
    """(K,)."""

    def rows(self, index: Tensor) -> Tensor:
        """Give the rows (r, K) at positions (r,)."""
        weights = self.exponentials.index_select(0, index).mul_(self.scale)
        return weights.div_(weights.sum(1, keepdim=True))


def scores(projected: Projected, index: Tensor | slice) -> Tensor:
    """Give the logits (r, K) of some rows, in the dtype of the prototypes."""
    features, prototypes = projected.features[index], projected.prototypes
    return F.linear(features.to(prototypes.dtype), prototypes)


def wide(x: Tensor) -> Tensor:
    """Give a copy in float32, or float64 where it already is: nothing of it is shared."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype, copy=True)
