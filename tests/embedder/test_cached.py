from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from embedder import cached

TOKENS, WIDTH, HIDDEN = 37, 6, 12


def plain_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [x.requires_grad_() for x in drawn]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "BLOCK_VALUES", 8 * HIDDEN)  # 8 tokens a block, the last shorter


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("ours", "plain", "shapes"),
    [
        (cached.linear, F.linear, [(TOKENS, WIDTH), (HIDDEN, WIDTH), (HIDDEN,)]),
        (
            cached.mlp,
            plain_mlp,
            [(TOKENS, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,)],
        ),
    ],
)
def test_layers__values_and_gradients_of_the_plain_ones(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], shapes: list[tuple[int, ...]]
) -> None:
    leaves = tensors(*shapes)
    got, wanted = ours(*leaves), plain(*leaves)
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        torch.testing.assert_close(ours(*leaves), wanted)
    pull = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, pull),
        torch.autograd.grad(wanted, leaves, pull),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("small_blocks")
def test_mlp__autocast_is_that_of_plain_layers() -> None:
    shapes = [(TOKENS, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,)]
    leaves = tensors(*shapes, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = cached.mlp(*leaves), plain_mlp(*leaves)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted)
    for mine, theirs in zip(
        torch.autograd.grad(got.sum(), leaves),
        torch.autograd.grad(wanted.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)


def test_pays__only_beyond_one_block() -> None:
    x = torch.zeros(100, 4)
    assert cached.pays(x, cached.BLOCK_VALUES // 50)
    assert not cached.pays(x, cached.BLOCK_VALUES // 200)
    assert not cached.pays(x.to("meta"), cached.BLOCK_VALUES // 50)
