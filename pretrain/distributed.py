"""The few collective operations of training; each is the identity in a single process."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def world_size() -> int:
    """Count the training processes."""
    return dist.get_world_size() if _several() else 1


def rank() -> int:
    """Give this process's number, from 0."""
    return dist.get_rank() if _several() else 0


def barrier() -> None:
    """Wait for all processes."""
    if _several():
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether it holds in any process: for decisions that all must take alike."""
    return bool(max_over_ranks(torch.tensor(float(flag)))) if _several() else flag


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a tensor without gradient over all processes; the argument is left as it is."""
    return _reduced(x, dist.ReduceOp.SUM) if _several() else x


def max_over_ranks(x: Tensor) -> Tensor:
    """Take the elementwise maximum over all processes; the argument is left as it is."""
    return _reduced(x, dist.ReduceOp.MAX) if _several() else x


def gather_lists(values: list[T]) -> list[T]:
    """Put the lists of all processes together, in their order."""
    if not _several():
        return values
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, values)
    return [value for part in found for value in part]


def gather_rows(x: Tensor) -> Tensor:
    """Put the rows of all processes together, in their order; gradients find their way back."""
    return _Gather.apply(x) if _several() else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = sum_over_ranks(grads[0])
        return total.chunk(world_size())[rank()]


def whole(x: Tensor) -> Tensor:
    """Gather a divided tensor; every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Gather a module's state dict on the CPU; every process must ask."""
    return {name: whole(value).detach().cpu() for name, value in module.state_dict().items()}


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _reduced(x: Tensor, op: "dist.ReduceOp.RedOpType") -> Tensor:
    result = torch.clone(x, memory_format=torch.contiguous_format)
    dist.all_reduce(result, op)
    return result
