"""What changes along a run: values by step, computed, never stored."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cosine:
    """A line from `start` to `base` over `warmup` steps, then a cosine to `final`.

    Warm-up includes both ends: its last step has the value `base` already.
    """

    base: float
    final: float
    total: int
    warmup: int = 0
    start: float = 0.0

    def __call__(self, step: int) -> float:
        """Give the value at a step, counted from 0."""
        if step >= self.total:
            return self.final
        if step < self.warmup:
            share = step / max(self.warmup - 1, 1)
            return self.start + (self.base - self.start) * share
        angle = math.pi * (step - self.warmup) / (self.total - self.warmup)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(angle))


@dataclass(frozen=True)
class Linear:
    """A line from `start` to `final` over `steps`, both ends included, then constant."""

    start: float
    final: float
    steps: int

    def __call__(self, step: int) -> float:
        """Give the value at a step, counted from 0."""
        if step >= self.steps:
            return self.final
        return self.start + (self.final - self.start) * step / max(self.steps - 1, 1)
