"""Linear layers on CPUs in blocks of tokens, so that what lies between them stays in the cache.

Whole, the hidden layer of a multi-crop batch is tens of megabytes that are written and read again
three times a block of the network; in blocks it never leaves the cache, and the products run at
twice the speed (docs/pretraining.md has the measurement). Values are those of the plain layers;
weights' gradients are single products over all tokens.

Legend: T tokens, D width, H hidden width, t tokens of a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_VALUES = 2**22
"""Values of the widest matrix of a block: 8 MiB in bfloat16."""


def pays(x: Tensor, widest: int) -> bool:
    """Whether tokens (T, D) are more than one block; graphs that are traced stay plain."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return x.shape[0] > block_tokens(widest)


def block_tokens(widest: int) -> int:
    """Tokens of a block whose widest matrix has so many columns."""
    return max(BLOCK_VALUES // widest, 1)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Give linear(gelu(linear(x, w1, b1)), w2, b2) of tokens (T, D), w1 (H, D), w2 (D, H)."""
    return _apply(_Mlp, x, w1, b1, w2, b2)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Give x @ weight.T + bias of tokens (T, D)."""
    return _apply(_Linear, x, weight, bias)


def _apply(function: type[torch.autograd.Function], *tensors: Tensor) -> Tensor:
    """Cast as autocast would, and keep it out of the function."""
    dtype = tensors[0].dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    cast = [tensor.to(dtype) for tensor in tensors]
    with torch.autocast("cpu", enabled=False):
        result: Tensor = function.apply(*cast)
    return result


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        kept = any(ctx.needs_input_grad)
        size = block_tokens(len(w1))
        y = x.new_empty(len(x), len(w2))
        hidden = x.new_empty(len(x) if kept else size, len(w1))  # (T or t, H), before GELU
        active = torch.empty_like(hidden)  # after it
        for rows in _blocks(len(x), size):
            held = rows if kept else slice(0, rows.stop - rows.start)
            torch.addmm(b1, x[rows], w1.T, out=hidden[held])
            torch.ops.aten.gelu.out(hidden[held], out=active[held])
            torch.addmm(b2, active[held], w2.T, out=y[rows])
        ctx.save_for_backward(x, w1, w2, hidden, active)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, w1, w2, hidden, active = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx, dhidden = torch.empty_like(x), torch.empty_like(hidden)
        for rows in _blocks(len(x), block_tokens(len(w1))):
            above = dy[rows] @ w2  # (t, H)
            torch.ops.aten.gelu_backward.grad_input(above, hidden[rows], grad_input=dhidden[rows])
            torch.mm(dhidden[rows], w1, out=dx[rows])
        return dx, dhidden.T @ x, dhidden.sum(0), dy.T @ active, dy.sum(0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = x.new_empty(len(x), len(weight))
        for rows in _blocks(len(x), block_tokens(len(weight))):
            torch.addmm(bias, x[rows], weight.T, out=y[rows])
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx = torch.empty_like(x)
        for rows in _blocks(len(x), block_tokens(len(weight))):
            torch.mm(dy[rows], weight, out=dx[rows])
        return dx, dy.T @ x, dy.sum(0)


def _blocks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))
