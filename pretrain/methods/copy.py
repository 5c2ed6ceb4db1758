"""Copies: a linear head on a frozen trunk brings the views of one image together, and no others.

SSCD's recipe (Pizzi et al. 2022) without its trunk: InfoNCE and the entropy term on the features
of edited views. The head begins as the PCA whitening of the images as they are.

Legend: B images, D statistics of the trunk, K dimensions.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from embedder.encoders.copy_head import FILE_NAME, CopyHead
from embedder.whitening import Whitening, fit_pca_whitening
from pretrain.copy_config import CopyConfig
from pretrain.evaluation.copies import CopyFigures, measure_copies
from pretrain.losses.entropy import entropy_loss
from pretrain.losses.info_nce import info_nce_loss
from pretrain.view_features import ViewBatch, ViewFeatures

CLOSEST = "closest.json"
"""The unlike images that come closest: true copies among them should leave the data."""
MAX_BEGUN_ON = 8192
"""Images of the first whitening."""
SHRINKAGE = 0.05
"""Of the first whitening: weak directions of few images are noise."""
MIN_DEVIATION = 1e-3
"""Of a statistic; one that hardly moves tells nothing."""


class CopyTargets(NamedTuple):
    """There is no teacher: views are each other's targets."""

    temperature: float
    health: dict[str, float] = {}


class Projection(nn.Module):
    """Statistics (D), each scaled to unit variance, to K dimensions."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, statistics: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(statistics))
        self.register_buffer("deviation", torch.ones(statistics))
        self.linear = nn.Linear(statistics, width, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """(n, D) to unit rows (n, K)."""
        return F.normalize(self.linear((rows - self.mean) / self.deviation), dim=1)

    @torch.no_grad()
    def begin(self, rows: NDArray[np.float32]) -> None:
        """Begin with the PCA whitening of rows (N, D)."""
        self.mean.copy_(torch.from_numpy(rows.mean(0)))
        self.deviation.copy_(torch.from_numpy(rows.std(0)).clamp(min=MIN_DEVIATION))
        scaled = ((torch.from_numpy(rows) - self.mean) / self.deviation).numpy()
        width = min(self.linear.out_features, len(rows) - 1, rows.shape[1])
        found = fit_pca_whitening(scaled, width, SHRINKAGE)
        self.linear.weight.zero_()[:width].copy_(torch.from_numpy(found.projection.T))
        self.linear.weight.mul_(scaled.shape[1] ** 0.5 / self.linear.weight.norm())

    def whitening(self) -> Whitening:
        """The same map for embedding: (x - mean) @ projection, in half precision's numbers."""
        projection = (self.linear.weight / self.deviation).T.detach().cpu()  # (D, K)
        projection = (projection / projection.abs().max()).half().float()
        return Whitening(self.mean.cpu().half().float().numpy(), projection.contiguous().numpy())


class CopyMethod(nn.Module):
    """The head, its losses, and the images by which it is measured."""

    depth = 0
    """Layers that the learning rate decays over."""
    file_name = FILE_NAME

    def __init__(self, config: CopyConfig, views: ViewFeatures) -> None:
        super().__init__()
        self.config, self._views = config, views
        self.student = Projection(views.num_statistics, config.width)

    def begin(self) -> None:
        """Begin with the whitening of the images as they are."""
        blocks = self._views.trained().blocks
        self._views.held_out()
        rows = np.concatenate([block[:, 0] for block in blocks])[:MAX_BEGUN_ON]
        self.student.begin(rows.astype(np.float32))

    def targets(
        self, parts: Sequence[ViewBatch], temperature: float, *, watch: bool = False
    ) -> CopyTargets:
        """Views are each other's targets; all that is given is the temperature."""
        return CopyTargets(temperature)

    def losses(
        self, batch: ViewBatch, targets: CopyTargets, part: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Run the head on two views of B images."""
        rows = self.student(batch.rows).float()  # (2B, K)
        nce = info_nce_loss(rows, targets.temperature)
        entropy = entropy_loss(rows)
        total = nce + self.config.loss.entropy_weight * entropy
        return {"info_nce_loss": nce, "entropy_loss": entropy, "total_loss": total}

    def update_teacher(self, momentum: float) -> None:
        """There is none."""

    def submodules(self) -> Iterator[tuple[str, nn.Module]]:
        """The parts whose gradients are clipped each on their own."""
        yield from self.student.named_children()

    def measure(self) -> CopyFigures:
        """Measure the head, in the precision that it is kept in, on the images held out."""
        project = self.student.whitening()
        blocks = self._views.held_out().blocks
        rows = np.concatenate([project.apply(b.reshape(-1, b.shape[2])) for b in blocks])
        rows = rows.reshape(-1, blocks[0].shape[1], rows.shape[1])  # (N, V, K)
        return measure_copies(rows, self.config.held_out)

    def save(self, folder: Path) -> None:
        """Leave the head with its thresholds, and the closest of unlike images to look at."""
        figures, ids = self.measure(), self._views.held_out().ids
        measured = {**figures.logged(), "pairs": figures.pairs}
        head = CopyHead(
            self.student.whitening(),
            self.config.trunk,
            self._views.trunk.parts["weights"],
            figures.thresholds,
            measured,
        )
        head.save(folder / FILE_NAME)
        closest = [
            {"cosine": round(c, 4), "images": [ids[a], ids[b]]} for c, a, b in figures.closest
        ]
        (folder / CLOSEST).write_text(json.dumps(closest, indent=1))
