"""Logistic regression on frozen vectors, its strength chosen on a tenth of the training rows.

Minimized is what scikit-learn minimizes: half the squared weights plus C times the summed losses.
Legend: N rows, D width, K classes.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from curation.config import Settings
from pretrain.evaluation.features import Features, class_numbers


class LogisticSettings(Settings):
    """The public evaluation's."""

    strengths: tuple[float, float, int] = (-6.0, 5.0, 45)
    """log10 of the first and last C, and how many."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows on which C is chosen."""
    max_iterations: int = Field(default=1000, gt=0)
    """L-BFGS iterations of a fit."""
    tolerance: float = Field(default=1.0e-12, gt=0)
    """Change of the loss at which a fit ends."""
    seed: int = 0
    """Seeds the choice of the held-out rows."""


def logistic_regression(
    train: Features, test: Features, settings: LogisticSettings, device: str | torch.device
) -> dict[str, float]:
    """Fit along growing C, each from the one before; test the best, fitted again on all rows."""
    labels, truth, names = class_numbers(train, test)
    rows, labels = train.rows.double().to(device), labels.to(device)
    held = _held_out(labels, settings)
    grid = np.logspace(*settings.strengths[:2], settings.strengths[2]).tolist()
    weights = None
    scores: dict[float, float] = {}
    for strength in grid:
        weights = fit(rows[~held], labels[~held], len(names), strength, settings, start=weights)
        scores[strength] = _accuracy(weights, rows[held], labels[held])
    best = max(scores, key=lambda strength: (scores[strength], -strength))
    weights = fit(rows, labels, len(names), best, settings)
    accuracy = _accuracy(weights, test.rows.double().to(device), truth.to(device))
    return {"logreg": accuracy, "log10_C": math.log10(best), "held_out": scores[best]}


def fit(
    rows: Tensor,
    labels: Tensor,
    classes: int,
    strength: float,
    settings: LogisticSettings,
    start: Tensor | None = None,
) -> Tensor:
    """Fit weights and bias (K, D + 1), the bias last and not penalized. rows: (N, D) float64."""
    width = rows.shape[1]
    weights = torch.zeros(classes, width + 1, dtype=rows.dtype, device=rows.device)
    if start is not None:
        weights.copy_(start)
    weights.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=settings.max_iterations,
        tolerance_grad=1e-9,
        tolerance_change=settings.tolerance,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    scale = 1 / (strength * len(rows))  # the sum divided by C N: well conditioned for every C

    def loss() -> Tensor:
        optimizer.zero_grad()
        fitted = F.cross_entropy(rows @ weights[:, :-1].T + weights[:, -1], labels)
        value = fitted + 0.5 * scale * weights[:, :-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach()


def _held_out(labels: Tensor, settings: LogisticSettings) -> Tensor:
    """(N,) bool: a share of the rows; a class keeps at least one to learn from."""
    rng = np.random.default_rng(settings.seed)
    held = np.zeros(len(labels), bool)
    numbers = labels.cpu().numpy()
    for label in np.unique(numbers):
        members = rng.permutation(np.flatnonzero(numbers == label))
        held[members[: round(settings.held_out * len(members))]] = True
    if not held.any():
        held[rng.integers(len(held))] = True
    return torch.from_numpy(held).to(labels.device)


def _accuracy(weights: Tensor, rows: Tensor, labels: Tensor) -> float:
    guesses = (rows @ weights[:, :-1].T + weights[:, -1]).argmax(1)
    return (guesses == labels).double().mean().item()
