"""Several processes: how they meet, and how the networks are divided among them (FSDP2)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from pretrain.config import PretrainConfig
from pretrain.distributed import world_size
from pretrain.methods.dinov2 import DINOv2, Network


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started; alone, or where they met already, do nothing."""
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_device(name: str) -> torch.device:
    """Give the device of this process; each has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return torch.device(name, index)


def divide(method: DINOv2, config: PretrainConfig, device: torch.device) -> None:
    """Divide parameters, gradients and optimiser state among the processes, block by block.

    Every unit is resharded after its forward pass, the roots too: the EMA then always sees both
    networks in shards.
    """
    if world_size() == 1:
        return
    mesh = init_device_mesh(device.type, (world_size(),))
    for network in method.children():
        if isinstance(network, Network):
            _divide_network(network, mesh, config, device)


def whole(x: Tensor) -> Tensor:
    """Gather a divided tensor; every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Gather a module's state dict on the CPU; every process must ask."""
    return {name: whole(value).detach().cpu() for name, value in module.state_dict().items()}


def _divide_network(
    network: Network, mesh: Any, config: PretrainConfig, device: torch.device
) -> None:
    backbone = {
        "mesh": mesh,
        "reshard_after_forward": True,
        **_precision(config, device, half=True),
    }
    head = {"mesh": mesh, "reshard_after_forward": True, **_precision(config, device, half=False)}
    for block in network.backbone.blocks:
        fully_shard(block, **backbone)
    fully_shard(network.backbone, **backbone)
    register_fsdp_forward_method(network.backbone, "forward_packed")
    for name, module in network.named_children():
        if name != "backbone":
            fully_shard(module, **head)


def _precision(
    config: PretrainConfig, device: torch.device, *, half: bool
) -> dict[str, MixedPrecisionPolicy]:
    """On GPUs, weights travel in half precision, and so do the backbone's gradients."""
    if device.type != "cuda" or config.run.precision == "float32":
        return {}
    dtype = getattr(torch, config.run.precision)
    reduced = dtype if half else torch.float32
    return {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced)}
