"""The image-level loss: crops of one image should choose the same prototypes.

The student's crop s is held against the teacher's targets of every other global crop::

    global = 2 / (2 + pairs) * mean_2B CE(student crop A, teacher crop B), and B against A
    local  = 1 / (2 + pairs) * sum over local crops, teacher crops of mean_B CE

where pairs = max(2 L, 1): the public scaling.

Legend: B images, L local crops, M rows, K prototypes; rows are crop-major.
"""

import torch
from torch import Tensor

from pretrain.heads import Projected
from pretrain.losses.cross_entropy import cross_entropy
from pretrain.losses.targets import Targets


def dino_global_loss(
    student: Projected,
    targets: Targets,
    first_row: int,
    local_count: int,
    temperature: float,
) -> Tensor:
    """Hold the student's global crops (2B rows) against the teacher's, swapped.

    The teacher's rows of this batch begin at `first_row`.
    """
    crops = len(student.features)
    index = torch.arange(crops, device=student.features.device)
    swapped = first_row + index.roll(crops // 2)  # (2B,)
    weights = torch.full((crops,), 2 / (_terms(local_count) * crops), dtype=torch.float64)
    weights = weights.to(index.device)
    return cross_entropy(student, targets, swapped[:, None], weights, temperature)


def dino_local_loss(
    student: Projected,
    targets: Targets,
    first_row: int,
    local_count: int,
    temperature: float,
) -> Tensor:
    """Hold the student's local crops (L B rows) against both global crops of the teacher."""
    images = len(student.features) // local_count
    image = torch.arange(images, device=student.features.device).repeat(local_count)  # (L B,)
    rows = first_row + torch.stack([image, image + images], dim=1)  # (L B, 2)
    weights = torch.full((len(image),), 1 / (_terms(local_count) * images), dtype=torch.float64)
    weights = weights.to(image.device)
    return cross_entropy(student, targets, rows, weights, temperature)


def _terms(local_count: int) -> int:
    return 2 + max(2 * local_count, 1)
