import math

import pytest
import torch
from torch import Tensor

from pretrain.losses.entropy import entropy_loss
from pretrain.losses.info_nce import info_nce_loss, partners


def views(images: int = 4, width: int = 8, seed: int = 0) -> Tensor:
    """Unit rows (2 B, D) in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * images, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def test_partners__the_other_view_of_each_image() -> None:
    assert partners(6, torch.device("cpu")).tolist() == [3, 4, 5, 0, 1, 2]


def test_info_nce_loss__as_the_equation_says() -> None:
    z, temperature = views(), 0.05
    expected = 0.0
    for i in range(8):
        exps = [math.exp(float(z[i] @ z[j]) / temperature) for j in range(8) if j != i]
        own = math.exp(float(z[i] @ z[(i + 4) % 8]) / temperature)
        expected -= math.log(own / sum(exps)) / 8
    assert float(info_nce_loss(z, temperature)) == pytest.approx(expected)


def test_info_nce_loss__least_where_views_agree_and_images_do_not() -> None:
    apart = torch.eye(4, 8).repeat(2, 1)
    alike = torch.ones(8, 8) / math.sqrt(8)
    assert info_nce_loss(apart, 0.05) < 1e-6
    assert info_nce_loss(alike, 0.05) == pytest.approx(math.log(7))


def test_entropy_loss__distance_to_the_nearest_view_of_another_image() -> None:
    z = views()
    expected = 0.0
    for i in range(8):
        others = [j for j in range(8) if j not in (i, (i + 4) % 8)]
        expected -= math.log(min(float((z[i] - z[j]).norm()) for j in others)) / 8
    assert float(entropy_loss(z)) == pytest.approx(expected, rel=1e-5)


def test_entropy_loss__equal_rows_stay_finite_with_their_gradient() -> None:
    z = (torch.ones(8, 8) / math.sqrt(8)).requires_grad_()
    loss = entropy_loss(z)
    loss.backward()
    assert loss.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()
