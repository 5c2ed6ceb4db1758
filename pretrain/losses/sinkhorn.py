r"""Sinkhorn-Knopp: targets under which all prototypes are used equally over the whole batch.

The public iteration divides Q = exp(logits / temperature) in turn by its sums over the batch
(times K) and by its sums over prototypes (times M). Constants cancel, so it comes to one scale u
a prototype::

    u_k = 1 / sum_b v_b Q_bk,   v_b = 1 / sum_k Q_bk u_k   (v = 1 at first)
    targets_bk = Q_bk u_k / sum_j Q_bj u_j

Q overflows in float32 at logits above 88.7 * temperature. Where the spread of the logits allows
it, Q is held divided by exp of the global maximum and the sums are plain products; elsewhere, and
where Q is too large to hold, the same sums are taken in the log domain, block by block.

Legend: M rows of this process, K prototypes, r rows of a block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain.distributed import max_over_ranks, sum_over_ranks
from pretrain.heads import Projected
from pretrain.losses.targets import ScaledTargets, SoftmaxTargets, Targets, scores, wide

MAX_SPREAD = 60.0
"""Largest range of logits / temperature for plain products: e^-60 is 10^12 times the smallest
float32, which leaves room for every sum."""


def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Give the targets (M, K) of logits (M, K)."""
    projected = Projected(logits, torch.eye(logits.shape[1], dtype=logits.dtype))
    targets = sinkhorn_targets(projected, temperature, iterations)
    return targets.rows(torch.arange(len(logits), device=logits.device))


@torch.no_grad()
def sinkhorn_targets(
    projected: Projected,
    temperature: float,
    iterations: int = 3,
    *,
    block_rows: int = 256,
    max_bytes: int = 2**31,
) -> Targets:
    """Give the targets of the teacher's outputs, balanced over all processes."""
    blocks = [slice(i, i + block_rows) for i in range(0, len(projected.features), block_rows)]
    kept, peak = _hold(projected, temperature, blocks, max_bytes)
    if kept is not None:
        scale = _scale(kept.sub_(peak).exp_(), blocks, iterations)
        return ScaledTargets(kept, scale)
    bias = _log_scale(projected, temperature, blocks, iterations)
    return SoftmaxTargets(projected, temperature, bias)


def _hold(
    projected: Projected, temperature: float, blocks: list[slice], max_bytes: int
) -> tuple[Tensor | None, Tensor]:
    """Give logits / temperature whole and their global peak; None where that does not do.

    All processes must decide alike, as their sums are added up.
    """
    features, prototypes = projected
    dtype = torch.promote_types(features.dtype, torch.float32)
    peak = torch.zeros((), dtype=dtype, device=features.device)
    num_bytes = torch.tensor(float(len(features) * len(prototypes) * dtype.itemsize))
    if max_over_ranks(num_bytes.to(peak.device)) > max_bytes:
        return None, peak
    kept = torch.empty(len(features), len(prototypes), dtype=dtype, device=features.device)
    for block in blocks:
        kept[block] = scores(projected, block)
    kept.div_(temperature)
    ends = torch.tensor([-torch.inf, -torch.inf], dtype=dtype, device=features.device)
    if len(kept):
        low, high = kept.aminmax()
        ends = torch.stack([high, -low])
    ends = max_over_ranks(ends)
    return (kept if ends.sum() <= MAX_SPREAD else None), ends[0]


def _scale(q: Tensor, blocks: list[slice], iterations: int) -> Tensor:
    """Give u (K,) of Q (M, K) by plain products, never in half precision."""
    with torch.autocast(q.device.type, enabled=False):
        return _iterate(q, blocks, iterations)


def _iterate(q: Tensor, blocks: list[slice], iterations: int) -> Tensor:
    u = None
    for _ in range(iterations):
        sums = torch.zeros_like(q[:0].sum(0))  # (K,)
        for block in blocks:
            part = q[block]  # (r, K)
            v = part.new_ones(len(part)) if u is None else 1 / (part @ u)
            sums += v @ part
        u = 1 / sum_over_ranks(sums)
    assert u is not None, "at least one iteration"
    return u


def _log_scale(
    projected: Projected, temperature: float, blocks: list[slice], iterations: int
) -> Tensor:
    """Give log u (K,) without holding Q and without leaving the range of the dtype."""
    bias: Tensor | None = None
    for _ in range(iterations):
        parts = [_log_sums(part, bias) for part in _logits(projected, temperature, blocks)]
        empty = wide(projected.prototypes[:, 0]).fill_(-torch.inf)
        bias = -_logsumexp_over_ranks(torch.stack([empty, *parts]).logsumexp(0))
    assert bias is not None, "at least one iteration"
    return bias


def _logits(projected: Projected, temperature: float, blocks: list[slice]) -> Iterator[Tensor]:
    for block in blocks:
        yield wide(scores(projected, block)).div_(temperature)


def _log_sums(logits: Tensor, bias: Tensor | None) -> Tensor:
    """Give log sum_b v_b Q_bk (K,) of a block (r, K)."""
    if bias is not None:
        logits = logits - (logits + bias).logsumexp(1, keepdim=True)
    return logits.logsumexp(0)


def _logsumexp_over_ranks(x: Tensor) -> Tensor:
    peak = max_over_ranks(x)
    floor = torch.where(peak.isfinite(), peak, 0.0)
    return sum_over_ranks((x - floor).exp()).log() + floor
