"""Depth on frozen features: one linear layer to 256 bins, on the last layer or on four.

Legend: B images, h w pixels, K bins, rows x columns positions of a feature map.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from curation.errors import ConfigError
from embedder.feature_maps import FeatureModel
from embedder.images import Pixels, resize
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
from pretrain.evaluation.targets import Scene, Targets, read_depth, usual_units

EIGEN_CROP = (45, 471, 41, 601)
"""Top, bottom, left, right, of 480 x 640 pixels."""
METRICS = ("rmse", "abs_rel", "delta_1")
EPS = 1e-3


class DepthSettings(DenseSettings):
    """The public evaluation's on NYU Depth v2."""

    head: Literal["lin1", "lin4"] = "lin1"
    """On the last layer, or on four."""
    bins: int = Field(default=256, gt=1)
    """Depths between which the head chooses, equally far apart."""
    units_per_meter: float | None = Field(default=None, gt=0)
    """What a meter is in the depth maps: 1000 where they hold millimeters, 256 in KITTI's. null:
    1000 in 16-bit images, 1 in .npy and float images; 8-bit images have no usual unit."""
    min_depth: float = Field(default=1.0e-3, gt=0)
    """Nearest depth in meters."""
    max_depth: float = Field(default=10.0, gt=0)
    """Farthest depth in meters; farther pixels do not count."""
    crop: tuple[int, int] = (416, 544)
    """Height and width of training crops, rounded up to whole patches."""
    steps: int = Field(default=38_400, gt=0)
    """Training steps."""
    learning_rate: float = Field(default=3.0e-4, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=1.0e-2, ge=0)
    """Of AdamW."""
    warmup_steps: int = Field(default=12_800, ge=0)
    """Steps of linear warm-up."""
    gradient_weight: float = Field(default=0.5, ge=0)
    """Weight of the gradient loss beside the scale-invariant one."""


class BinHead(nn.Module):
    """Patches with their class token, scaled up fourfold, to shares of depths."""

    def __init__(self, widths: Sequence[int], settings: DepthSettings) -> None:
        super().__init__()
        self.stacked = StackedMaps(widths, with_cls=True)
        self.score = nn.Conv2d(self.stacked.width, settings.bins, 1)
        depths = torch.linspace(settings.min_depth, settings.max_depth, settings.bins)
        self.register_buffer("depths", depths, persistent=False)
        self.depths: Tensor

    def forward(self, maps: Maps) -> Tensor:
        """Layers to depths (B, 4 rows, 4 columns) in meters."""
        scores = self.score(self.stacked(maps))  # scaling them up is cheaper, and the same
        scores = F.interpolate(scores, scale_factor=4, mode="bilinear", align_corners=False)
        shares = F.relu(scores) + 0.1  # (B, K, 4 rows, 4 columns)
        shares = shares / shares.sum(1, keepdim=True)
        return torch.einsum("bkhw,k->bhw", shares, self.depths)


class DepthErrors:
    """Errors of depth maps, averaged over images."""

    def __init__(self) -> None:
        self._sums = torch.zeros(len(METRICS) + 1, dtype=torch.float64)

    def add(self, truth: NDArray[np.float32], guess: NDArray[np.float32]) -> None:
        """Judge the pixels (N,) of one image that have a depth."""
        errors = depth_errors(truth, guess)
        self._sums += torch.tensor([*(errors[name] for name in METRICS), 1.0], dtype=torch.float64)

    def metrics(self) -> dict[str, float]:
        """Root mean square error in meters, mean relative error, share within a factor of 1.25."""
        sums = sum_over_ranks(self._sums)
        return dict(zip(METRICS, (sums[:-1] / sums[-1]).tolist(), strict=True))


def depth_errors(truth: NDArray[np.float32], guess: NDArray[np.float32]) -> dict[str, float]:
    """Errors of depths (N,) in meters, all positive."""
    true, found = truth.astype(np.float64), guess.astype(np.float64)
    ratio = np.maximum(true / found, found / true)
    return {
        "rmse": float(np.sqrt(np.mean((true - found) ** 2))),
        "abs_rel": float(np.mean(np.abs(true - found) / true)),
        "delta_1": float(np.mean(ratio < 1.25)),
    }


def depth(
    model: FeatureModel,
    train: Sequence[Scene],
    test: Sequence[Scene],
    layout: Layout,
    settings: DepthSettings,
) -> dict[str, float]:
    """Train a head on frozen features and give its errors on the test scenes."""
    torch.manual_seed(settings.seed)
    taught, asked = (_look_at_depths(scenes, layout, settings) for scenes in (train, test))
    layers = (-1,) if settings.head == "lin1" else model.evenly_spaced(4)
    head = BinHead(widths_of(model, layers), settings).to(model.placement.device)
    height, width = (model.side(side) for side in settings.crop)
    plan = CropPlan(height, width, (1.0, 1.5), 0.0)
    batches = FeatureBatches(model, layers, taught.scenes, plan, settings)

    def loss(found: Tensor, truth: Tensor) -> Tensor:
        return depth_loss(found, truth, settings)

    def share(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / settings.steps))

    losses = train_head(head, batches, loss, settings, share)
    errors = DepthErrors()
    for scene in share_of(asked.scenes):
        truth, found = scene.values(), predict_depth(model, head, layers, scene.pixels())
        if found.shape != truth.shape:
            found = _scaled(torch.from_numpy(found)[None], truth.shape)[0].numpy()
        valid = valid_pixels(truth, settings, layout)
        if valid.any():
            limited = found.clip(settings.min_depth, settings.max_depth)
            errors.add(truth[valid], limited[valid])
    return {
        **errors.metrics(),
        "units_per_meter": settings.units_per_meter or usual_units(test[0].target),
        "valid_share": (asked.totals[0] / asked.totals[1]).item(),
        "scenes_without_depth": float(len(asked.scenes) - int(asked.totals[2])),
        "bad_images": float(taught.bad_images + asked.bad_images),
        "last_loss": losses[-1],
    }


def _look_at_depths(scenes: Sequence[Scene], layout: Layout, settings: DepthSettings) -> Surveyed:
    """Read all in one unit; totals: valid pixels, all pixels, scenes with a valid one.

    Raises:
        ConfigError: no pixel of any scene has a depth in range.
    """
    read = partial(read_depth, units_per_meter=settings.units_per_meter)
    scenes = [replace(scene, read_target=read) for scene in scenes]

    def count(depths: Targets) -> Tensor:
        valid = int(valid_pixels(depths, settings, layout).sum())
        return torch.tensor([valid, depths.size, valid > 0])

    found = survey(scenes, count, 3)
    if found.totals[0] == 0:
        depths = scenes[0].values()
        raise ConfigError(
            f"{scenes[0].target.parent}: no pixel is between {settings.min_depth:g} and "
            f"{settings.max_depth:g} m; the first map holds {depths.min():g} to "
            f"{depths.max():g} m: set units_per_meter if that is another unit"
        )
    return found


def depth_loss(found: Tensor, truth: Tensor, settings: DepthSettings) -> Tensor:
    """Scale-invariant log error, and that of the gradients at 4 scales. truth: (B, h, w)."""
    scaled = _scaled(found, truth.shape[1:])
    valid = (truth > settings.min_depth) & (truth <= settings.max_depth)
    difference = torch.where(valid, (scaled + EPS).log() - (truth.clamp(min=EPS) + EPS).log(), 0.0)
    count = valid.sum().clamp(min=1)
    mean = difference.sum() / count
    variance = torch.where(valid, difference - mean, 0.0).square().sum() / count
    total = (variance + 0.15 * mean.square() + 1e-12).sqrt()
    if settings.gradient_weight:
        total = total + settings.gradient_weight * _gradient_loss(difference, valid)
    return total


def _gradient_loss(difference: Tensor, valid: Tensor) -> Tensor:
    """Mean absolute slope of the log error (B, h, w), over 4 scales."""
    parts = []
    for stride in (1, 2, 4, 8):
        d, v = difference[:, ::stride, ::stride], valid[:, ::stride, ::stride]
        down = (d[:, 1:] - d[:, :-1]).abs() * (v[:, 1:] & v[:, :-1])
        across = (d[..., 1:] - d[..., :-1]).abs() * (v[..., 1:] & v[..., :-1])
        parts.append((down.sum() + across.sum()) / v.sum().clamp(min=1))
    return torch.stack(parts).mean()


@torch.inference_mode()
def predict_depth(
    model: FeatureModel, head: nn.Module, layers: Sequence[int], pixels: Pixels
) -> NDArray[np.float32]:
    """Depths (H, W) of a whole image, the mean of those of the image and of its mirror."""
    height, width = pixels.shape[:2]
    size = (model.side(width), model.side(height))
    image = resize(pixels, *size, "bilinear")
    both = torch.from_numpy(np.stack([image, image[:, ::-1]])).permute(0, 3, 1, 2)
    found = _scaled(head(model.layers(both, layers)), (height, width))
    mean = (found[0] + found[1].flip(-1)) / 2
    result: NDArray[np.float32] = mean.cpu().numpy()
    return result


def valid_pixels(
    truth: NDArray[np.float32], settings: DepthSettings, layout: Layout
) -> NDArray[np.bool_]:
    """Pixels (H, W) that are judged."""
    valid: NDArray[np.bool_] = (truth > settings.min_depth) & (truth <= settings.max_depth)
    if layout.eigen_crop and truth.shape == (480, 640):
        top, bottom, left, right = EIGEN_CROP
        inside = np.zeros_like(valid)
        inside[top:bottom, left:right] = True
        valid &= inside
    return valid


def _scaled(depths: Tensor, size: Sequence[int]) -> Tensor:
    """Scale depth maps (B, h, w) to (B, *size)."""
    return F.interpolate(depths[:, None], size=tuple(size), mode="bilinear", align_corners=False)[
        :, 0
    ]
