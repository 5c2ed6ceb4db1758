"""Semantic segmentation on frozen features: linear, multi-scale, and a light decoder; mean IoU.

Legend: B images, h w pixels, C classes, rows x columns positions of a feature map.
"""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from curation.errors import ConfigError
from embedder.feature_maps import FeatureModel
from embedder.images import Pixels
from pretrain.distributed import sum_over_ranks
from pretrain.evaluation.datasets import Layout
from pretrain.evaluation.dense import (
    CropPlan,
    DenseSettings,
    FeatureBatches,
    Maps,
    StackedMaps,
    share_of,
    train_head,
    widths_of,
)
from pretrain.evaluation.survey import Surveyed, survey
from pretrain.evaluation.targets import IGNORED, MAX_CLASSES, Scene, Targets

logger = logging.getLogger(__name__)

TEST_SCALES = (1.0, 1.32, 1.73, 2.28, 3.0)
DECODER_WIDTH = 128


class SegmentationSettings(DenseSettings):
    """The paper's linear protocols, and a light decoder."""

    head: Literal["linear", "multiscale", "decoder"] = "linear"
    """A linear layer on the last layer at 512 pixels; on 4 layers at 640 pixels, tested at 5
    scales; or a light convolutional decoder on 4 layers at 512 pixels."""
    crop: int | None = Field(default=None, gt=0)
    """Side of crops and windows other than the head's, rounded up to whole patches."""
    test_scales: tuple[float, ...] | None = None
    """Scales at which images are tested, other than the head's."""

    @property
    def crop_size(self) -> int:
        """Side of crops and windows in pixels."""
        return self.crop or (640 if self.head == "multiscale" else 512)

    @property
    def scales(self) -> tuple[float, ...]:
        """Scales at which images are tested."""
        return self.test_scales or (TEST_SCALES if self.head == "multiscale" else (1.0,))


class LinearHead(nn.Module):
    """Batch norm and one linear layer on each position."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.stacked = StackedMaps(widths, with_cls=False)
        self.classify = nn.Conv2d(self.stacked.width, classes, 1)

    def forward(self, maps: Maps) -> Tensor:
        """Layers to logits (B, C, rows, columns)."""
        logits: Tensor = self.classify(self.stacked(maps))
        return logits


class LightDecoder(nn.Module):
    """Four layers projected and summed, then twice doubled and convolved."""

    def __init__(self, widths: Sequence[int], classes: int, width: int = DECODER_WIDTH) -> None:
        super().__init__()
        self.stacked = StackedMaps(widths, with_cls=False)
        self.project = nn.Conv2d(self.stacked.width, width, 1)
        self.refine = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU())
            for _ in range(2)
        )
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Maps) -> Tensor:
        """Layers to logits (B, C, 4 rows, 4 columns)."""
        x = F.gelu(self.project(self.stacked(maps)))
        for block in self.refine:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = x + block(x)
        logits: Tensor = self.classify(x)
        return logits


class Confusion:
    """Counts of (truth, guess) pairs of pixels."""

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)  # (C, C)

    def add(self, truth: Tensor, guess: Tensor) -> None:
        """Count pixels (any shape, int64); ignored ones do not count."""
        classes = len(self.counts)
        valid = (truth != IGNORED) & (truth >= 0) & (truth < classes)
        pairs = truth[valid] * classes + guess[valid]
        self.counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()

    def metrics(self, unseen: Sequence[int] = ()) -> dict[str, float]:
        """Mean IoU and recall over the classes that occur, and the share of right pixels.

        unseen: classes that the head never learned; a hit there is chance, and counts for nothing.
        """
        counts = sum_over_ranks(self.counts).double()
        hits, truth, guess = counts.diag().clone(), counts.sum(1), counts.sum(0)
        hits[list(unseen)] = 0
        union = truth + guess - hits
        iou = hits[union > 0] / union[union > 0]
        recall = hits[truth > 0] / truth[truth > 0]
        return {
            "miou": iou.mean().item(),
            "pixel_accuracy": (hits.sum() / counts.sum()).item(),
            "mean_recall": recall.mean().item(),
        }


def segmentation(
    model: FeatureModel,
    train: Sequence[Scene],
    test: Sequence[Scene],
    layout: Layout,
    settings: SegmentationSettings,
) -> dict[str, float]:
    """Train a head on frozen features and give its mean IoU on the test scenes."""
    torch.manual_seed(settings.seed)
    taught, asked = (_look_at_labels(scenes, layout) for scenes in (train, test))
    classes = layout.num_classes or 1 + max(_classes(taught)[-1], _classes(asked)[-1])
    unseen = sorted(set(_classes(asked)) - set(_classes(taught)))
    if unseen:
        logger.warning("classes %s are tested and never taught: they count as 0", unseen)
    layers = (-1,) if settings.head == "linear" else model.evenly_spaced(4)
    kind = LightDecoder if settings.head == "decoder" else LinearHead
    head = kind(widths_of(model, layers), classes).to(model.placement.device)
    side = model.side(settings.crop_size)
    plan = CropPlan(side, side, (0.5, 2.0), IGNORED)
    batches = FeatureBatches(model, layers, taught.scenes, plan, settings)
    losses = train_head(head, batches, pixel_loss, settings, lambda step: 1 - step / settings.steps)
    confusion = Confusion(classes)
    for scene in share_of(asked.scenes):
        truth = torch.from_numpy(scene.values())
        guess = segment(model, head, layers, scene.pixels(), side, settings.scales)
        confusion.add(truth, _fitted(guess, truth))
    return {
        **confusion.metrics(unseen),
        "classes": float(classes),
        "unseen_classes": float(len(unseen)),
        "ignored_share": (asked.totals[IGNORED] / asked.totals.sum()).item(),
        "bad_images": float(taught.bad_images + asked.bad_images),
        "last_loss": losses[-1],
    }


def _look_at_labels(scenes: Sequence[Scene], layout: Layout) -> Surveyed:
    """Pixels of each class, `IGNORED` among them: totals (MAX_CLASSES,).

    Raises:
        ConfigError: fewer than two classes, or more than the layout has.
    """

    def count(labels: Targets) -> Tensor:
        return torch.bincount(torch.from_numpy(labels).flatten(), minlength=MAX_CLASSES)

    found = survey(scenes, count, MAX_CLASSES)
    classes = _classes(found)
    first = scenes[0].target
    if len(classes) < 2:
        share = (found.totals[IGNORED] / found.totals.sum()).item()
        raise ConfigError(
            f"{first.parent}: the masks hold {len(classes)} class, and at least two are needed; "
            f"{IGNORED} stands for pixels without a class ({share:.0%} of them here): where it "
            "marks an object, write 1"
        )
    if layout.num_classes is not None and classes[-1] >= layout.num_classes:
        raise ConfigError(
            f"{first.parent}: masks hold more than the {layout.num_classes} classes of this "
            f"layout; expected {layout.expected}"
        )
    return found


def _classes(found: Surveyed) -> list[int]:
    """The classes that any pixel has, in order."""
    present: list[int] = found.totals.nonzero()[:, 0].tolist()
    return [label for label in present if label != IGNORED]


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C, rows, columns), scaled up, with labels (B, h, w)."""
    size = labels.shape[1:]
    scaled = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
    return F.cross_entropy(scaled, labels, ignore_index=IGNORED)


@torch.inference_mode()
def segment(
    model: FeatureModel,
    head: nn.Module,
    layers: Sequence[int],
    pixels: Pixels,
    side: int,
    scales: Sequence[float],
) -> Tensor:
    """Probabilities (C, H, W) of an image: windows of `side` pixels, averaged over scales."""
    height, width = pixels.shape[:2]
    total: Tensor | None = None
    for scale in scales:
        ratio = scale * side / min(height, width)
        size = (max(side, round(width * ratio)), max(side, round(height * ratio)))
        image = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        logits = _slide(model, head, layers, image, side)[None]
        found = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        part = found[0].softmax(0)
        total = part if total is None else total + part
    assert total is not None, "there is at least one scale"
    return total / len(scales)


def _slide(
    model: FeatureModel, head: nn.Module, layers: Sequence[int], image: Pixels, side: int
) -> Tensor:
    """Mean logits (C, H, W) over windows that overlap by a third, each of them of `side` pixels."""
    height, width = image.shape[:2]
    tops, lefts = (window_starts(extent, side) for extent in (height, width))
    sums: Tensor | None = None
    counts = torch.zeros(height, width, device=model.placement.device)
    for top in tops:
        for left in lefts:
            window = image[top : top + side, left : left + side]
            pixels = torch.from_numpy(window.copy()).permute(2, 0, 1)[None]
            logits = head(model.layers(pixels, layers))
            found = F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=False)
            if sums is None:
                sums = found.new_zeros(found.shape[1], height, width)
            sums[:, top : top + side, left : left + side] += found[0]
            counts[top : top + side, left : left + side] += 1
    assert sums is not None, "there is at least one window"
    return sums / counts


def window_starts(extent: int, side: int) -> list[int]:
    """Where windows begin: two thirds of a window apart, the last one at the end."""
    step = max(2 * side // 3, 1)
    return sorted({min(start, extent - side) for start in range(0, extent - side + step, step)})


def _fitted(probabilities: Tensor, truth: Tensor) -> Tensor:
    """The most probable class (H, W), at the size of the truth."""
    if probabilities.shape[1:] != truth.shape:
        size = tuple(truth.shape)
        probabilities = F.interpolate(probabilities[None], size=size, mode="bilinear")[0]
    return probabilities.argmax(0).cpu()
