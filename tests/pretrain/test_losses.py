import pytest
import torch
from torch import Tensor

from pretrain import heads
from pretrain.heads import Projected, WeightNormed
from pretrain.losses.cross_entropy import cross_entropy
from pretrain.losses.dino import dino_global_loss, dino_local_loss
from pretrain.losses.koleo import koleo_loss
from pretrain.losses.sinkhorn import sinkhorn_targets
from pretrain.losses.targets import SoftmaxTargets


def projected(rows: int, seed: int = 0, scale: float = 1.0) -> Projected:
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(rows, 6, generator=generator), dim=1)
    prototypes = scale * torch.nn.functional.normalize(
        torch.randn(9, 6, generator=generator), dim=1
    )
    return Projected(features.double(), prototypes.double())


def public_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """The iteration as published, in the log domain and float64."""
    q = (logits.double() / temperature).T
    k, b = q.shape
    q = q - q.flatten().logsumexp(0)
    for _ in range(3):
        q = q - q.logsumexp(1, keepdim=True) - torch.tensor(k).log()
        q = q - q.logsumexp(0, keepdim=True) - torch.tensor(b).log()
    return (q + torch.tensor(b).log()).exp().T


@pytest.mark.parametrize("scale", [1.0, 10.0, 300.0])
@pytest.mark.parametrize("max_bytes", [2**31, 0])
def test_sinkhorn_targets__public_result_at_any_size(scale: float, max_bytes: int) -> None:
    outputs = projected(20, scale=scale)
    targets = sinkhorn_targets(outputs, 0.04, block_rows=7, max_bytes=max_bytes)
    expected = public_sinkhorn(outputs.features @ outputs.prototypes.T, 0.04)
    torch.testing.assert_close(targets.rows(torch.arange(20)), expected, rtol=1e-4, atol=1e-7)


def test_sinkhorn_targets__float32_beyond_the_public_overflow() -> None:
    outputs = Projected(*(part.float() for part in projected(20, scale=50.0)))
    rows = sinkhorn_targets(outputs, 0.04).rows(torch.arange(20))
    assert rows.isfinite().all()
    torch.testing.assert_close(rows.sum(1), torch.ones(20))


def test_cross_entropy__gradients_are_autograd_s() -> None:
    student, teacher = projected(10, 1), projected(10, 2)
    targets = SoftmaxTargets(teacher, 0.05, torch.zeros(9).double())
    rows = torch.stack([torch.arange(10), torch.arange(10).flip(0)], dim=1)
    weights = torch.linspace(0.1, 1, 10).double()
    leaves = [part.clone().requires_grad_() for part in student]
    q = targets.rows(rows[:, 0]) + targets.rows(rows[:, 1])
    logp = (leaves[0] @ leaves[1].T / 0.1).log_softmax(1)
    expected = -(weights[:, None] * q * logp).sum()
    wanted = torch.autograd.grad(3 * expected, leaves)
    ours = cross_entropy(Projected(*leaves), targets, rows, weights, 0.1, block_rows=4)
    torch.testing.assert_close(ours, expected)
    for got, want in zip(torch.autograd.grad(3 * ours, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_cross_entropy__no_rows() -> None:
    features = torch.zeros(0, 6, requires_grad=True)
    prototypes = torch.ones(9, 6, requires_grad=True)
    targets = SoftmaxTargets(projected(3), 0.05, torch.zeros(9))
    empty = torch.zeros(0, 1, dtype=torch.long)
    loss = cross_entropy(Projected(features, prototypes), targets, empty, torch.zeros(0), 0.1)
    loss.backward()
    assert loss == 0
    assert prototypes.grad is not None
    assert not prototypes.grad.any()


def test_dino_losses__public_scaling() -> None:
    images, local_count = 3, 4
    student, teacher = projected(2 * images, 1), projected(2 * images, 2)
    local = Projected(projected(local_count * images, 3).features, student.prototypes)
    targets = SoftmaxTargets(teacher, 0.05, torch.zeros(9).double())
    q = targets.rows(torch.arange(2 * images)).view(2, images, -1)

    def mean_ce(logits: Tensor, target: Tensor) -> Tensor:
        return -(target * (logits / 0.1).log_softmax(1)).sum(1).mean()

    seen = (student.features @ student.prototypes.T).view(2, images, -1)
    wanted = (mean_ce(seen[0], q[1]) + mean_ce(seen[1], q[0])) / 2 * 2 / (2 + 2 * local_count)
    torch.testing.assert_close(dino_global_loss(student, targets, 0, local_count, 0.1), wanted)
    crops = (local.features @ local.prototypes.T).view(local_count, images, -1)
    pairs = torch.stack([mean_ce(crop, target) for crop in crops for target in q])
    wanted = pairs.sum() / (2 + 2 * local_count)
    torch.testing.assert_close(dino_local_loss(local, targets, 0, local_count, 0.1), wanted)


def test_koleo_loss__equal_rows_and_half_precision_stay_finite() -> None:
    rows = torch.ones(4, 8, dtype=torch.float16)
    assert koleo_loss(rows).isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        assert koleo_loss(torch.randn(4, 8)).dtype == torch.float32


def test_sinkhorn_targets__autocast_leaves_the_sums_alone() -> None:
    outputs = Projected(*(part.float() for part in projected(20)))
    expected = sinkhorn_targets(outputs, 0.04).rows(torch.arange(20))
    with torch.autocast("cpu", torch.float16):
        rows = sinkhorn_targets(outputs, 0.04).rows(torch.arange(20))
    torch.testing.assert_close(rows, expected, rtol=0.1, atol=1e-3)


def test_weight_normed__gradients_are_autograd_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "BLOCK_VALUES", 12)  # 2 rows a block
    layer = WeightNormed(6, 9).double()
    torch.nn.init.uniform_(layer.weight_g, 0.5, 2.0)
    pull = torch.linspace(-1, 1, 54).double().view(9, 6)
    leaves = [layer.weight_v, layer.weight_g]
    expected = layer.weight_v * (layer.weight_g / layer.weight_v.norm(dim=1, keepdim=True))
    torch.testing.assert_close(layer(), expected)
    wanted = torch.autograd.grad(expected, leaves, pull)
    for got, want in zip(torch.autograd.grad(layer(), leaves, pull), wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert layer(torch.bfloat16).dtype == torch.bfloat16
