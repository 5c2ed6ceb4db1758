"""The projection head of DINO and iBOT.

Legend: M rows, D width, b bottleneck, K prototypes.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import HeadSettings


class Projected(NamedTuple):
    """What a head gives: the logits are `features @ prototypes.T`, which no one holds whole."""

    features: Tensor
    """(M, b), unit rows."""
    prototypes: Tensor
    """(K, b)."""


class WeightNormed(nn.Module):
    """The rows of a matrix as direction and length; both are learnt, as in the public code."""

    def __init__(self, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw directions as a linear layer's default does; lengths are 1."""
        bound = self.weight_v.shape[1] ** -0.5
        nn.init.uniform_(self.weight_v, -bound, bound)
        nn.init.ones_(self.weight_g)

    def forward(self) -> Tensor:
        """Give the matrix (K, b)."""
        lengths: Tensor = self.weight_v.norm(dim=1, keepdim=True)  # (K, 1)
        return self.weight_v * (self.weight_g / lengths)


class PrototypeHead(nn.Module):
    """MLP to a bottleneck, unit length, then weight-normed prototypes without bias."""

    def __init__(self, width: int, settings: HeadSettings) -> None:
        super().__init__()
        hidden = [settings.hidden] * (settings.layers - 1)
        widths = [width, *hidden, settings.bottleneck]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = WeightNormed(settings.bottleneck, settings.prototypes)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw fresh weights: linear layers as the ViT's, prototypes as a linear layer's."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer.initialize()

    def forward(self, x: Tensor) -> Projected:
        """Project tokens (M, D)."""
        x = self.mlp(x)  # (M, b)
        # Fresh heads give values near 1e-3, whose squares vanish in float16.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        prototypes = self.last_layer()
        if torch.is_autocast_enabled(x.device.type):
            # Once here rather than in every product: the matrix is as large as the backbone.
            prototypes = prototypes.to(torch.get_autocast_dtype(x.device.type))
        return Projected(F.normalize(x, dim=-1, eps=1e-12), prototypes)

    def logits(self, x: Tensor) -> Tensor:
        """Give the logits (M, K) of tokens (M, D) whole: for tests and small inputs."""
        features, prototypes = self(x)
        return F.linear(features, prototypes)
