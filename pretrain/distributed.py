"""The few collective operations of training; each is the identity in a single process."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Count the training processes."""
    return dist.get_world_size() if _several() else 1


def rank() -> int:
    """Give this process's number, from 0."""
    return dist.get_rank() if _several() else 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a tensor without gradient over all processes; the argument is left as it is."""
    return _reduced(x, dist.ReduceOp.SUM) if _several() else x


def max_over_ranks(x: Tensor) -> Tensor:
    """Take the elementwise maximum over all processes; the argument is left as it is."""
    return _reduced(x, dist.ReduceOp.MAX) if _several() else x


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _reduced(x: Tensor, op: "dist.ReduceOp.RedOpType") -> Tensor:
    result = torch.clone(x, memory_format=torch.contiguous_format)
    dist.all_reduce(result, op)
    return result
