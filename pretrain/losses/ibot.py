"""The patch-level loss: the student guesses the teacher's targets of the patches it cannot see.

loss = 1 / 2B * sum over masked patches of w * CE, with w = 1 / masked patches of the crop; the
sum is divided by all global crops, unmasked ones included.

Legend: B images, M masked patches of the batch.
"""

import torch
from torch import Tensor

from pretrain.heads import Projected
from pretrain.losses.cross_entropy import cross_entropy
from pretrain.losses.targets import Targets


def ibot_loss(
    student: Projected,
    targets: Targets,
    first_row: int,
    mask_weights: Tensor,
    crops: int,
    temperature: float,
    block_rows: int = 1024,
) -> Tensor:
    """Hold masked patches (M rows) against the teacher's, whose rows begin at `first_row`.

    mask_weights: (M,). crops: 2B.
    """
    index = torch.arange(len(student.features), device=student.features.device)
    rows = (first_row + index)[:, None]  # (M, 1)
    return cross_entropy(student, targets, rows, mask_weights / crops, temperature, block_rows)
