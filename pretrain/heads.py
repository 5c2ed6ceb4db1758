"""The projection head of DINO and iBOT.

Legend: M rows, D width, b bottleneck, K prototypes.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import HeadSettings

BLOCK_VALUES = 2**20
"""Weights of a block: 4 MiB in float32."""


class Projected(NamedTuple):
    """What a head gives: the logits are `features @ prototypes.T`, which no one holds whole."""

    features: Tensor
    """(M, b), unit rows."""
    prototypes: Tensor
    """(K, b)."""


class WeightNormed(nn.Module):
    """The rows of a matrix as direction and length; both are learned, as in the public code."""

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

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """Give the matrix (K, b), in the dtype of the weights or another."""
        matrix: Tensor = _WeightNorm.apply(
            self.weight_v, self.weight_g, dtype or self.weight_v.dtype
        )
        return matrix


class _WeightNorm(torch.autograd.Function):
    """w = g v / |v|, in blocks of rows: the matrix is as large as a small backbone.

    dg = dw.v / |v|;  dv = g / |v| * (dw - v (dw.v) / |v|^2)
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        matrix = torch.empty_like(v, dtype=dtype)
        lengths = torch.empty_like(g)
        for rows in _row_blocks(v):
            lengths[rows] = v[rows].norm(dim=1, keepdim=True)
            matrix[rows] = v[rows] * (g[rows] / lengths[rows])
        ctx.save_for_backward(v, g, lengths)
        return matrix

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, g, lengths = ctx.saved_tensors
        dv, dg = torch.empty_like(v), torch.empty_like(g)
        for rows in _row_blocks(v):
            unit = v[rows] / lengths[rows]
            dw = grads[0][rows].to(v.dtype)
            dg[rows] = along = (dw * unit).sum(1, keepdim=True)
            dv[rows] = dw.addcmul(unit, along, value=-1).mul_(g[rows] / lengths[rows])
        return dv, dg, None


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Cut rows so that a block stays in a CPU's cache; elsewhere all are one block."""
    size = len(matrix) if matrix.device.type != "cpu" else BLOCK_VALUES // matrix.shape[1]
    return (slice(start, start + size) for start in range(0, len(matrix), size))


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
        device, dtype = x.device.type, None
        if torch.is_autocast_enabled(device):
            # Once here rather than in every product: the matrix is as large as the backbone.
            dtype = torch.get_autocast_dtype(device)
        return Projected(F.normalize(x, dim=-1, eps=1e-12), self.last_layer(dtype))

    def logits(self, x: Tensor) -> Tensor:
        """Give the logits (M, K) of tokens (M, D) whole: for tests and small inputs."""
        features, prototypes = self(x)
        return F.linear(features, prototypes)
