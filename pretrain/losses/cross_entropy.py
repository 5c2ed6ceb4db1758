r"""Cross-entropy of the student's prototypes against targets, in blocks.

::

    loss = sum_i w_i sum_n sum_k -q_(n,i),k log softmax(s_i / temperature)_k
         = sum_i w_i (mass_i * logsumexp(s_i / temperature) - sum_k q_ik s_ik / temperature)

with q_i the sum of the targets of row i. Logits s exist for one block of rows and prototypes at a
time, small enough for a CPU's cache; they are computed twice, first for the logsumexp. The
gradients are taken in the same pass, so that nothing of size (M, K) is kept for the backward pass.

Legend: M rows, b bottleneck, K prototypes, r rows and c prototypes of a block, n targets a row.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain.heads import Projected
from pretrain.losses.targets import (
    ALL,
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
        whole = len(features) <= block_rows  # then no gradient is a sum over blocks of rows
        loss = weights.new_zeros((), dtype=full)
        features_grad = torch.zeros_like(features, dtype=full)
        prototypes_grad = torch.zeros_like(prototypes, dtype=features.dtype if whole else full)
        for rows in row_blocks(len(features), block_rows):
            block = Projected(features[rows], prototypes)
            normalizer = log_sums(block, temperature, block_rows=block_rows)  # (r,)
            row_weights = weights[rows].to(full)
            loss += mass * torch.dot(row_weights, normalizer)
            scale = (row_weights * (headroom / temperature))[:, None]
            for columns in column_blocks(block, rows):
                q = _summed(targets, target_rows[rows], columns)  # (r, c)
                logits = scaled_scores(block, ALL, columns, temperature)
                loss -= torch.dot(row_weights, torch.linalg.vecdot(q, logits))
                grad = logits.sub_(normalizer[:, None]).exp_()
                grad = (grad if mass == 1 else grad.mul_(mass)).sub_(q).mul_(scale)
                grad = grad.to(features.dtype)
                features_grad[rows] += grad @ prototypes[columns]
                prototypes_grad[columns] += grad.T @ block.features  # (c, b)
        ctx.save_for_backward(features_grad, prototypes_grad)
        ctx.headroom = headroom
        ctx.dtype = features.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        features_grad, prototypes_grad = ctx.saved_tensors
        scale = grads[0] / ctx.headroom
        rest = (None,) * 5
        scaled = (grad.mul(scale).to(ctx.dtype) for grad in (features_grad, prototypes_grad))
        return *scaled, *rest


def _summed(targets: Targets, rows: Tensor, columns: slice) -> Tensor:
    """Add up the targets of each row: (r, n) -> (r, c)."""
    q = targets.rows(rows[:, 0], columns)
    for column in range(1, rows.shape[1]):
        q += targets.rows(rows[:, column], columns)
    return q
