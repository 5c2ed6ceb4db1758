"""The teacher's targets: probabilities over prototypes, a block at a time.

Both ways to center (Sinkhorn-Knopp, moving center) come to the same form: the softmax of
logits / temperature plus one bias a prototype.

Legend: M rows, b bottleneck, K prototypes, r rows of a block, c prototypes of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.heads import Projected

ALL = slice(None)
CACHED_SCORES = 2**22
"""Scores of a block on a CPU: 16 MiB in float32, so that it stays in the last cache."""
SCORES = 2**26
"""Scores of a block elsewhere."""


class Targets(Protocol):
    """Probabilities (M, K), given by blocks."""

    def rows(self, index: Tensor, columns: slice = ALL) -> Tensor:
        """Give the rows (r, c) at positions (r,), of all prototypes or of some."""


@dataclass(frozen=True)
class SoftmaxTargets:
    """softmax(logits / temperature + bias), computed when asked for."""

    projected: Projected
    temperature: float
    bias: Tensor
    """(K,)."""

    @cached_property
    def normalizer(self) -> Tensor:
        """(M,): the logarithm of each row's sum."""
        return log_sums(self.projected, self.temperature, self.bias)

    def rows(self, index: Tensor, columns: slice = ALL) -> Tensor:
        """Give the rows (r, c) at positions (r,), of all prototypes or of some."""
        logits = scaled_scores(self.projected, index, columns, self.temperature)
        return logits.add_(self.bias[columns]).sub_(self.normalizer[index, None]).exp_()


@dataclass(frozen=True)
class ScaledTargets:
    """Rows of `exponentials * scale`, normalized: a softmax whose exponentials are held."""

    exponentials: Tensor
    """(M, K)."""
    scale: Tensor
    """(K,)."""

    @cached_property
    def sums(self) -> Tensor:
        """(M,): each row's sum."""
        with torch.autocast(self.scale.device.type, enabled=False):
            return self.exponentials @ self.scale

    def rows(self, index: Tensor, columns: slice = ALL) -> Tensor:
        """Give the rows (r, c) at positions (r,), of all prototypes or of some."""
        weights = self.exponentials[:, columns].index_select(0, index)
        return weights.mul_(self.scale[columns]).div_(self.sums[index, None])


def scores(projected: Projected, index: Tensor | slice, columns: slice = ALL) -> Tensor:
    """Give the logits (r, c) of some rows, in the dtype of the prototypes."""
    features, prototypes = projected.features[index], projected.prototypes[columns]
    return F.linear(features.to(prototypes.dtype), prototypes)


def scaled_scores(
    projected: Projected, index: Tensor | slice, columns: slice, temperature: float
) -> Tensor:
    """Give logits / temperature (r, c) of some rows, in float32 or wider."""
    return wide(scores(projected, index, columns)).div_(temperature)


def log_sums(
    projected: Projected,
    temperature: float,
    bias: Tensor | None = None,
    block_rows: int = 1024,
) -> Tensor:
    """Give log sum_k exp(logits / temperature + bias) (M,), block by block."""
    parts = []
    for rows in row_blocks(len(projected.features), block_rows):
        total: Tensor | None = None
        for columns in column_blocks(projected, rows):
            logits = scaled_scores(projected, rows, columns, temperature)  # (r, c)
            if bias is not None:
                logits += bias[columns]
            peak = logits.amax(1, keepdim=True)
            part = logits.sub_(peak).exp_().sum(1).log_().add_(peak[:, 0])
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None, "heads have prototypes"
        parts.append(total)
    return torch.cat(parts) if parts else wide(projected.features[:, 0])


def row_blocks(count: int, size: int) -> Iterator[slice]:
    """Cut `count` rows into blocks."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def column_blocks(projected: Projected, rows: slice) -> Iterator[slice]:
    """Cut the prototypes so that a block of scores of some rows is small enough."""
    on_cpu = projected.prototypes.device.type == "cpu"
    most = CACHED_SCORES if on_cpu else SCORES
    return row_blocks(len(projected.prototypes), max(most // (rows.stop - rows.start), 1))


def wide(x: Tensor) -> Tensor:
    """Give a copy in float32, or float64 where it already is: nothing of it is shared."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype, copy=True)
