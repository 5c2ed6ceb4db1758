"""What segmentation and depth share: batches of frozen feature maps, and the loop of their heads.

Legend: B images, h w pixels of a crop, C outputs, rows x columns positions of a feature map.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from curation.config import Settings
from embedder.encoder import available_cpus
from embedder.feature_maps import FeatureModel, Layer
from embedder.images import Pixels
from pretrain.distributed import rank, sum_over_ranks, world_size
from pretrain.evaluation.targets import Scene

Maps = list[Layer]


class DenseSettings(Settings):
    """How a head on feature maps is trained."""

    steps: int = Field(default=40_000, gt=0)
    """Training steps."""
    batch_size: int = Field(default=16, gt=0)
    """Crops a step, over all processes."""
    learning_rate: float = Field(default=1.0e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=1.0e-4, ge=0)
    """Of AdamW."""
    warmup_steps: int = Field(default=1500, ge=0)
    """Steps of linear warm-up."""
    augment: bool = True
    """Draw scale, place, mirror and brightness of each crop anew; without it, features are computed
    once and held in memory."""
    seed: int = 0
    """Seeds weights, order and crops."""


class Crop(NamedTuple):
    """A square of a scene."""

    pixels: Pixels
    """(h, w, 3)."""
    target: NDArray[Any]
    """(h, w)."""


@dataclass(frozen=True)
class CropPlan:
    """How crops are cut from scenes."""

    height: int
    width: int
    scales: tuple[float, float]
    """Short side of the scene, as a share of that at which the crop just fits."""
    empty: float
    """What targets hold where there is no scene."""

    def draw(self, scene: Scene, rng: np.random.Generator) -> Crop:
        """Cut at a random scale and place, perhaps mirrored."""
        crop = self._cut(scene, rng.uniform(*self.scales), rng)
        if rng.random() < 0.5:
            crop = Crop(crop.pixels[:, ::-1], crop.target[:, ::-1])
        light = rng.uniform(0.8, 1.2)
        pixels = (crop.pixels * light).clip(0, 255).astype(np.uint8)
        return Crop(pixels, crop.target)

    def center(self, scene: Scene) -> Crop:
        """Cut the middle of the scene, scaled so that the crop just fits."""
        return self._cut(scene, 1.0, None)

    def _cut(self, scene: Scene, scale: float, rng: np.random.Generator | None) -> Crop:
        pixels, target = scene.pixels(), scene.values()
        sides = pixels.shape[:2]
        scale *= max(self.height / sides[0], self.width / sides[1])
        high, wide = (max(1, round(side * scale)) for side in sides)
        image = np.asarray(Image.fromarray(pixels).resize((wide, high), Image.Resampling.BILINEAR))
        values = nearest(target, high, wide)
        top, left = (
            _place(side - wanted, rng) for side, wanted in ((high, self.height), (wide, self.width))
        )
        return Crop(self._window(image, top, left, 0), self._window(values, top, left, self.empty))

    def _window(self, array: NDArray[Any], top: int, left: int, fill: float) -> NDArray[Any]:
        """Cut (height, width), filled up where the array ends."""
        part = array[top : top + self.height, left : left + self.width]
        missing = (self.height - part.shape[0], self.width - part.shape[1])
        padding = [(0, missing[0]), (0, missing[1]), *[(0, 0)] * (array.ndim - 2)]
        return np.pad(part, padding, constant_values=fill)


def _place(room: int, rng: np.random.Generator | None) -> int:
    if room <= 0:
        return 0
    return room // 2 if rng is None else int(rng.integers(room + 1))


def nearest(target: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Resize (H, W) by taking the nearest value."""
    rows = ((np.arange(height) + 0.5) * target.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * target.shape[1] / width).astype(np.int64)
    resized: NDArray[Any] = target[rows[:, None], columns]
    return resized


class FeatureBatches:
    """An endless stream of feature maps and targets; this process's share of each batch."""

    def __init__(
        self,
        model: FeatureModel,
        layers: Sequence[int],
        scenes: Sequence[Scene],
        plan: CropPlan,
        settings: DenseSettings,
    ) -> None:
        self._model, self._layers, self._scenes = model, layers, scenes
        self._plan, self._settings = plan, settings
        self._held: dict[int, tuple[Maps, Tensor]] = {}

    def __iter__(self) -> Iterator[tuple[Maps, Tensor]]:
        own = max(self._settings.batch_size // world_size(), 1)
        order = np.random.default_rng([self._settings.seed, rank()])
        with ThreadPoolExecutor(available_cpus()) as pool:
            while True:
                chosen = order.integers(len(self._scenes), size=own).tolist()
                if self._settings.augment:
                    seeds = order.integers(2**63, size=own).tolist()
                    yield self._look(list(pool.map(self._draw, chosen, seeds)))
                else:
                    yield _joined([self._at_rest(index) for index in chosen])

    def _draw(self, index: int, seed: int) -> Crop:
        return self._plan.draw(self._scenes[index], np.random.default_rng(seed))

    def _at_rest(self, index: int) -> tuple[Maps, Tensor]:
        if index not in self._held:
            self._held[index] = self._look([self._plan.center(self._scenes[index])])
        return self._held[index]

    def _look(self, crops: list[Crop]) -> tuple[Maps, Tensor]:
        pixels = torch.from_numpy(np.stack([crop.pixels for crop in crops]))
        targets = torch.from_numpy(np.stack([crop.target for crop in crops]))
        maps = self._model.layers(pixels.permute(0, 3, 1, 2), self._layers)
        return maps, targets.to(self._model.placement.device)


def _joined(parts: list[tuple[Maps, Tensor]]) -> tuple[Maps, Tensor]:
    layers = zip(*(maps for maps, _ in parts), strict=True)
    maps = [
        Layer(torch.cat([one.cls for one in layer]), torch.cat([one.map for one in layer]))
        for layer in layers
    ]
    return maps, torch.cat([targets for _, targets in parts])


def train_head(
    head: nn.Module,
    batches: FeatureBatches,
    loss: Callable[[Tensor, Tensor], Tensor],
    settings: DenseSettings,
    share: Callable[[int], float],
) -> list[float]:
    """Train a head on frozen features; give the losses. share: of the peak rate, by step."""
    optimizer = torch.optim.AdamW(
        head.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    losses = []
    head.train()
    for step, (maps, targets) in zip(range(settings.steps), batches, strict=False):
        warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * share(step)
        value = loss(head(_cloned(maps)), targets)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        _average_gradients(head)
        nn.utils.clip_grad_norm_(head.parameters(), 35.0)
        optimizer.step()
        losses.append(value.item())
    for buffer in head.buffers():  # running means, which each process saw on its own share
        if buffer.is_floating_point():
            buffer.copy_(sum_over_ranks(buffer) / world_size())
    head.eval()
    return [float(x) / world_size() for x in sum_over_ranks(torch.tensor(losses))]


def _cloned(maps: Maps) -> Maps:
    """Tensors made in inference mode may not enter a graph; their copies may."""
    return [Layer(layer.cls.clone(), layer.map.clone()) for layer in maps]


def _average_gradients(head: nn.Module) -> None:
    if world_size() > 1:
        for parameter in head.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()


class StackedMaps(nn.Module):
    """Several layers' maps as one, brought to the largest grid and normalized.

    with_cls: class tokens are laid beside every position.
    """

    def __init__(self, widths: Sequence[int], *, with_cls: bool) -> None:
        super().__init__()
        self.with_cls = with_cls
        self.width = sum(widths) * (1 + with_cls)
        self.norm = nn.BatchNorm2d(self.width)

    def forward(self, maps: Maps) -> Tensor:
        """Layers of (B, D, rows, columns) to (B, width, rows, columns)."""
        size = max((layer.map.shape[2:] for layer in maps), key=lambda shape: shape.numel())
        planes = [_resized(layer.map, size) for layer in maps]
        if self.with_cls:
            planes += [layer.cls[:, :, None, None].expand(-1, -1, *size) for layer in maps]
        stacked: Tensor = self.norm(torch.cat(planes, dim=1))
        return stacked


def _resized(plane: Tensor, size: Sequence[int]) -> Tensor:
    if plane.shape[2:] == torch.Size(size):
        return plane
    return F.interpolate(plane, size=tuple(size), mode="bilinear", align_corners=False)


def widths_of(model: FeatureModel, layers: Sequence[int]) -> list[int]:
    """Channels of some layers' maps, found by looking at one empty image."""
    side = model.side(2 * model.patch)
    maps = model.layers(torch.zeros(1, 3, side, side), layers)
    return [layer.map.shape[1] for layer in maps]


def share_of(items: Sequence[Any]) -> Sequence[Any]:
    """The part of a list that is this process's."""
    return items[rank() :: world_size()]
