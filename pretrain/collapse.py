"""Signs of collapse in the teacher's outputs, before Sinkhorn-Knopp hides them.

Legend: M class tokens of the step, D width, K prototypes.
"""

import math

import torch
from torch import Tensor

from pretrain.heads import Projected
from pretrain.losses.targets import scores, wide

MIN_RANK = 2.0
MAX_ENTROPY = 0.999
MIN_IN_USE = 2


@torch.no_grad()
def health(cls: Tensor, projected: Projected, temperature: float) -> dict[str, float]:
    """Measure the teacher on this process's class tokens (M, D) and their projections.

    teacher_entropy: of softmax(logits / temperature), as a share of log K; near 1 all prototypes
    look alike. prototypes_in_use: different winners. feature_rank: exp of the entropy of the
    centered tokens' singular values; near 1 all images look alike.
    """
    logits = wide(scores(projected, slice(None))).div_(temperature)  # (M, K)
    probabilities = logits.softmax(1)
    entropy = -(probabilities * logits.log_softmax(1)).sum(1).mean() / math.log(logits.shape[1])
    return {
        "teacher_entropy": float(entropy),
        "prototypes_in_use": float(len(set(logits.argmax(1).tolist()))),
        "feature_rank": float(effective_rank(wide(cls))),
    }


def effective_rank(x: Tensor) -> Tensor:
    """Give exp(entropy) of the singular values of centered rows (M, D); NaN if one is no number."""
    if not x.isfinite().all():
        return x.new_tensor(math.nan)
    values = torch.linalg.svdvals(x - x.mean(0))
    share = values / values.sum().clamp(min=1e-12)
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy.exp()


def alarms(measured: dict[str, float]) -> list[str]:
    """Say in words what looks like collapse."""
    found: list[str] = []
    if "feature_rank" not in measured:  # a method without prototypes
        return found
    if measured["feature_rank"] < MIN_RANK:
        found.append(f"features have rank {measured['feature_rank']:.1f}: all images look alike")
    if measured["prototypes_in_use"] < MIN_IN_USE:
        found.append("every image chooses the same prototype")
    if measured["teacher_entropy"] > MAX_ENTROPY:
        found.append("the teacher is uniform over prototypes: the loss stays at log K")
    return found


class Flatness:
    """Tells when loss and prototypes in use, where there are any, have stopped moving.

    Compared are the means of two windows of logged steps, one after the other.
    """

    def __init__(self, window: int, tolerance: float = 0.01) -> None:
        self._window, self._tolerance = window, tolerance
        self._seen: list[tuple[float, float]] = []

    def add(self, measured: dict[str, float]) -> bool:
        """Add a logged step; say whether both are flat by now."""
        self._seen = self._seen[1 - 2 * self._window :]
        self._seen.append((measured["loss"], measured.get("prototypes_in_use", 0.0)))
        if len(self._seen) < 2 * self._window:
            return False
        before, now = (
            torch.tensor(part).mean(0)
            for part in (self._seen[: self._window], self._seen[self._window :])
        )
        return bool(((now - before).abs() <= self._tolerance * before.abs()).all())
