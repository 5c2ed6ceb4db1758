r"""Cross-entropy of the student's prototypes against targets, in blocks.

::

    loss = sum_i w_i sum_n sum_k -q_(n,i),k log softmax(s_i / temperature)_k
         = sum_i w_i (mass_i * logsumexp(s_i / temperature) - sum_k q_ik s_ik / temperature)

with q_i the sum of the targets of row i. Logits s exist for one block of rows and prototypes at a
time, small enough for a CPU's cache; they are computed twice, first for the logsumexp. The
gradients are taken in the same pass, so that nothing of size (M, K) is kept for the backward pass;
those of a block of prototypes are complete when it is left, so that they are written once.

Legend: M rows, b bottleneck, K prototypes, r rows and c prototypes of a block, n targets a row.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain.heads import Projected
from pretrain.losses.targets import (
    Targets,
    column_blocks,
    log_sums,
    row_blocks,
    scaled_scores,
)

FLOAT16_HEADROOM = 4096.0
"""Lifts gradients of single prototypes (down to 1e-8) above float16's smallest number."""


def cross_entropy(
    projected: Projected,
    targets: Targets,
    target_rows: Tensor,
    weights: Tensor,
    temperature: float,
    block_rows: int = 1024,
) -> Tensor:
    """Give the weighted sum of cross-entropies, a scalar.

    target_rows: (M, n), the rows of `targets` that each student row is held against.
    weights: (M,).
    """
    device = projected.features.device.type
    dtype = projected.features.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    features, prototypes = projected.features.to(dtype), projected.prototypes.to(dtype)
    with torch.autocast(device, enabled=False):
        loss: Tensor = _CrossEntropy.apply(
            features, prototypes, targets, target_rows, weights, temperature, block_rows
        )
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        prototypes: Tensor,
        targets: Targets,
        target_rows: Tensor,
        weights: Tensor,
        temperature: float,
        block_rows: int,
    ) -> Tensor:
        full = torch.promote_types(features.dtype, torch.float32)
        # The loss scaler acts after this pass, so float16 needs a scale of its own here.
        headroom = FLOAT16_HEADROOM if features.dtype == torch.float16 else 1.0
        mass = target_rows.shape[1]
        blocks = list(row_blocks(len(features), block_rows))
        whole = Projected(features, prototypes)
        normalizer = log_sums(whole, temperature, block_rows=block_rows)  # (M,)
        row_weights = weights.to(full)
        scale = (row_weights * (headroom / temperature))[:, None]
        loss = mass * torch.dot(row_weights, normalizer)
        features_grad = torch.zeros_like(features, dtype=full)
        prototypes_grad = torch.empty_like(prototypes) if blocks else torch.zeros_like(prototypes)
        for columns in column_blocks(whole, blocks[0]) if blocks else ():
            parts = []
            for rows in blocks:
                q = _summed(targets, target_rows[rows], columns)  # (r, c)
                logits = scaled_scores(whole, rows, columns, temperature)
                loss -= torch.dot(row_weights[rows], torch.linalg.vecdot(q, logits))
                grad = logits.sub_(normalizer[rows, None]).exp_()
                grad = (grad if mass == 1 else grad.mul_(mass)).sub_(q).mul_(scale[rows])
                grad = grad.to(features.dtype)
                features_grad[rows] += grad @ prototypes[columns]
                parts.append(grad.T @ features[rows])  # (c, b)
            prototypes_grad[columns] = _added(parts, full)
        ctx.save_for_backward(features_grad, prototypes_grad)
        ctx.headroom = headroom
        ctx.dtype = features.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0] / ctx.headroom
        rest = (None,) * 5
        return *(_times(grad, scale).to(ctx.dtype) for grad in ctx.saved_tensors), *rest


def _added(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Add up products of blocks of rows in a wider type; a single one needs none."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].to(dtype)
    for part in parts[1:]:
        total += part
    return total


def _times(grad: Tensor, scale: Tensor) -> Tensor:
    """Give grad * scale. Most losses have weight 1: that spares a pass over all prototypes."""
    if scale.device.type == "cpu" and scale.item() == 1:
        return grad
    return grad.mul(scale)


def _summed(targets: Targets, rows: Tensor, columns: slice) -> Tensor:
    """Add up the targets of each row: (r, n) -> (r, c)."""
    q = targets.rows(rows[:, 0], columns)
    for column in range(1, rows.shape[1]):
        q += targets.rows(rows[:, column], columns)
    return q
