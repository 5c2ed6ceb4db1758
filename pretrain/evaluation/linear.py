"""Linear classifiers on frozen features: a whole grid of them, trained in one pass.

For every choice of features (class tokens of the last layers, with or without the mean patch) all
learning rates share one matrix product. Legend: N rows, b rows of a batch, D features, C classes,
R learning rates.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from curation.config import Settings
from pretrain.evaluation.features import Features, class_numbers

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


class LinearSettings(Settings):
    """The grid of the public evaluation."""

    features: Literal["layers", "vectors"] = "layers"
    """What is looked at: layers of the model, or the vectors that `curate embed` stores (only
    these where stored features are read)."""
    layers: tuple[PositiveInt, ...] = Field(default=(1, 4), min_length=1)
    """Class tokens of the last 1 and of the last 4 layers."""
    pooling: tuple[bool, ...] = Field(default=(False, True), min_length=1)
    """Without and with the mean of the last layer's patches."""
    learning_rates: tuple[PositiveFloat, ...] = Field(default=RATES, min_length=1)
    """At a batch of 256."""
    steps: int = Field(default=12_500, gt=0)
    """Steps of SGD with momentum 0.9 and a cosine to 0."""
    batch_size: int = Field(default=128, gt=0)
    """Rows a step."""
    views: int = Field(default=0, ge=0)
    """Random crops held of each training image; 0 takes the center alone. The public evaluation
    draws anew each epoch: as many views as epochs (10)."""
    seed: int = 0
    """Seeds weights, order and views."""


@dataclass(frozen=True)
class Choice:
    """One kind of input."""

    layers: int
    pooled: bool

    def rows(self, features: Tensor) -> Tensor:
        """Features (b, n + 1, D), or vectors (b, D), to inputs (b, D')."""
        if features.ndim == 2:
            return features.float()
        tokens = features[:, -1 - self.layers : -1]
        if self.pooled:
            tokens = torch.cat([tokens, features[:, -1:]], dim=1)
        return tokens.flatten(1).float()

    def __str__(self) -> str:
        return f"layers {self.layers}{', mean patch' if self.pooled else ''}"


class HeadGroup:
    """Heads of all learning rates on one kind of input, trained with closed-form gradients."""

    def __init__(self, choice: Choice, width: int, classes: int, rates: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(rates), classes, width)
        self.choice = choice
        self.rates = rates  # (R,)
        self.weight = 0.01 * torch.randn(shape, generator=generator).to(rates.device)
        self.bias = torch.zeros(shape[:2], device=rates.device)
        self.momenta = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, x: Tensor) -> Tensor:
        """Inputs (b, D') to (b, R, C)."""
        flat = torch.addmm(self.bias.flatten(), x, self.weight.flatten(0, 1).T)
        return flat.view(len(x), *self.bias.shape)

    def step(self, x: Tensor, labels: Tensor, share: float) -> None:
        """Take one step of SGD; share: of the peak learning rate."""
        slope = self.logits(x).softmax(-1)  # d loss / d logits, times b
        index = labels[:, None, None].expand(-1, slope.shape[1], 1)
        slope.scatter_add_(2, index, torch.full_like(index, -1, dtype=slope.dtype))
        slope /= len(x)
        gradients = (slope.flatten(1).T @ x).view_as(self.weight), slope.sum(0)
        rates = share * self.rates
        for momentum, gradient, value in zip(
            self.momenta, gradients, (self.weight, self.bias), strict=True
        ):
            momentum.mul_(0.9).add_(gradient)
            value.sub_(momentum * rates.view(-1, *[1] * (value.ndim - 1)))


def linear_probe(
    train: list[Features], test: Features, settings: LinearSettings, device: str | torch.device
) -> dict[str, float]:
    """Train the grid and test every head: the best accuracy, its place, and that of each input.

    train: one set of features for each view of the same images.
    """
    labels, truth, names = class_numbers(train[0], test)
    labels, truth = labels.to(device), truth.to(device)
    views = [view.rows.to(device) for view in train]
    groups = _groups(views[0], len(names), settings)
    order = np.random.default_rng(settings.seed)
    for step in range(settings.steps):
        view, rows = _batch(step, len(labels), len(views), settings.batch_size, order)
        share = 0.5 * (1 + np.cos(np.pi * step / settings.steps))
        features, wanted = views[view][rows.to(device)], labels[rows.to(device)]
        for group in groups:
            group.step(group.choice.rows(features), wanted, share)
    return _tested(groups, test.rows.to(device), truth, settings)


def _groups(rows: Tensor, classes: int, settings: LinearSettings) -> list[HeadGroup]:
    scale = settings.batch_size / 256
    rates = scale * torch.tensor(settings.learning_rates, device=rows.device)
    if rows.ndim == 2:
        choices = [Choice(1, pooled=False)]
    else:
        have = rows.shape[1] - 1
        pairs = {(min(n, have), p): None for n in settings.layers for p in settings.pooling}
        choices = [Choice(layers, pooled=pooled) for layers, pooled in pairs]
    return [
        HeadGroup(choice, choice.rows(rows[:1]).shape[1], classes, rates, settings.seed)
        for choice in choices
    ]


def _batch(
    step: int, count: int, views: int, batch_size: int, rng: np.random.Generator
) -> tuple[int, Tensor]:
    """The view, and the rows (b,) of a step, all different; views change with the epochs."""
    epoch = step * batch_size // count
    rows = rng.choice(count, min(batch_size, count), replace=False)
    return epoch % views, torch.from_numpy(rows)


def _tested(
    groups: list[HeadGroup], rows: Tensor, truth: Tensor, settings: LinearSettings
) -> dict[str, float]:
    result: dict[str, float] = {}
    best = (-1.0, 0, False, 0.0)
    for group in groups:
        hits = torch.zeros(len(settings.learning_rates), device=rows.device)
        for start in range(0, len(rows), 1024):
            part = slice(start, start + 1024)
            guesses = group.logits(group.choice.rows(rows[part])).argmax(-1)  # (b, R)
            hits += (guesses == truth[part, None]).sum(0)
        found = (hits / len(rows)).tolist()
        for accuracy, rate in zip(found, settings.learning_rates, strict=True):
            best = max(best, (accuracy, group.choice.layers, group.choice.pooled, rate))
        result[f"linear ({group.choice})"] = max(found)
    accuracy, layers, pooled, rate = best
    chosen = {"layers": float(layers), "mean_patch": float(pooled), "learning_rate": rate}
    return {"linear": accuracy, **result, **{f"best_{k}": v for k, v in chosen.items()}}
