r"""Cross-entropy of the student's prototypes against targets, in blocks of rows.

::

    loss = sum_i w_i sum_n sum_k -q_(n,i),k log softmax(s_i / temperature)_k
         = sum_i w_i (mass_i * logsumexp(s_i / temperature) - sum_k q_ik s_ik / temperature)

with q_i the sum of the targets of row i. Logits s exist for one block at a time; the gradients
are taken in the same pass, so that nothing of size (M, K) is kept for the backward pass.

Legend: M rows, b bottleneck, K prototypes, r rows of a block, n targets a row.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain.heads import Projected
from pretrain.losses.targets import Targets

FLOAT16_HEADROOM = 4096.0
"""Lifts gradients of single prototypes (down to 1e-8) above float16's smallest number."""


def cross_entropy(
    projected: Projected,
    targets: Targets,
    target_rows: Tensor,
    weights: Tensor,
    temperature: float,
    block_rows: int = 256,
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
        loss = weights.new_zeros((), dtype=full)
        features_grad = torch.zeros_like(features, dtype=full)
        prototypes_grad: Tensor | None = None
        for start in range(0, len(features), block_rows):
            rows = slice(start, start + block_rows)
            block = features[rows]
            q = _summed(targets, target_rows[rows])  # (r, K)
            mass = target_rows.shape[1]
            logits = (block @ prototypes.T).to(full)
            part, grad = _block_loss(logits, q, mass, weights[rows], temperature)
            loss += part
            grad = (grad if headroom == 1 else grad.mul_(headroom)).to(block.dtype)
            features_grad[rows] = grad @ prototypes
            part_grad = grad.T @ block  # (K, b)
            if prototypes_grad is None:
                prototypes_grad = part_grad.to(full)
            else:
                prototypes_grad += part_grad
        if prototypes_grad is None:
            prototypes_grad = torch.zeros_like(prototypes, dtype=full)
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


def _summed(targets: Targets, rows: Tensor) -> Tensor:
    """Add up the targets of each row: (r, n) -> (r, K)."""
    q = targets.rows(rows[:, 0])
    for column in range(1, rows.shape[1]):
        q = q + targets.rows(rows[:, column])
    return q


def _block_loss(
    logits: Tensor, q: Tensor, mass: int, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Give a block's loss and its gradient (r, K) by the logits; `logits` is used up.

    mass: the sum of each row of q, the number of its targets.
    """
    logits.div_(temperature)
    weights = weights.to(logits.dtype)
    normalizer = logits.logsumexp(1)  # (r,)
    agreement = torch.linalg.vecdot(q, logits)  # (r,)
    loss = (weights * (mass * normalizer - agreement)).sum()
    grad = logits.sub_(normalizer[:, None]).exp_()
    grad = (grad if mass == 1 else grad.mul_(mass)).sub_(q)
    return loss, grad.mul_((weights / temperature)[:, None])
