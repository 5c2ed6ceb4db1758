"""One forward pass's worth of crops and masks.

Legend: B images, L local crops, P patches of a global crop, M masked patches of the batch.
Stacks are crop-major: crop 0 of all images, then crop 1 of all images.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.crops import MEAN, STD, Pixels

BadImage = tuple[str, str]
"""(id, reason)."""


@dataclass(frozen=True)
class Batch:
    """Crops of B images and the masks of their global crops."""

    global_crops: Tensor
    """(2 B, 3, S, S); uint8 from the loader, normalized floats in training."""
    local_crops: Tensor | None
    """(L B, 3, s, s), or None without local crops."""
    masks: Tensor
    """(2 B, P) bool, True where hidden."""
    mask_index: Tensor
    """(M,) positions of the hidden patches among all 2 B P."""
    mask_weights: Tensor
    """(M,) 1 / hidden patches of the crop."""
    ids: tuple[str, ...] = ()
    """The images."""
    bad: tuple[BadImage, ...] = ()
    """Images that could not be read and were replaced."""

    @property
    def num_images(self) -> int:
        """B."""
        return len(self.global_crops) // 2

    @property
    def local_count(self) -> int:
        """L."""
        return 0 if self.local_crops is None else len(self.local_crops) // self.num_images

    def to(self, device: torch.device) -> "Batch":
        """Move all tensors and normalize the crops there."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        for name in ("global_crops", "local_crops"):
            if name in moved:
                moved[name] = normalize(moved[name])
        return replace(self, **moved)


def normalize(pixels: Tensor) -> Tensor:
    """Map uint8 pixels (…, 3, h, w) to floats of ImageNet's mean and deviation."""
    scale = torch.tensor(STD, device=pixels.device).mul_(255)[:, None, None]
    shift = torch.tensor(MEAN, device=pixels.device).mul_(255)[:, None, None]
    return pixels.float().sub_(shift).div_(scale)


def collate(
    crops: list[list[Pixels]],
    masks: NDArray[np.bool_],
    ids: tuple[str, ...] = (),
    bad: tuple[BadImage, ...] = (),
) -> Batch:
    """Stack the crops of B images, each a list of 2 global and L local (h, w, 3) crops.

    masks: (2 B, P).
    """
    columns = list(zip(*crops, strict=True))  # 2 + L columns of B crops
    local_crops = _stack(columns[2:]) if columns[2:] else None
    return Batch(_stack(columns[:2]), local_crops, *index_masks(torch.from_numpy(masks)), ids, bad)


def index_masks(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give masks (2B, P) with the positions (M,) and the weights (M,) of the hidden patches."""
    index = masks.flatten().nonzero().flatten()
    hidden = masks.sum(1).clamp(min=1).float()  # (2B,)
    weights = (1 / hidden)[:, None].expand_as(masks)[masks]
    return masks, index, weights


def _stack(columns: list[tuple[Pixels, ...]]) -> Tensor:
    array = np.stack([crop for column in columns for crop in column])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
