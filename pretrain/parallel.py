"""Several processes: how they meet, and how the networks are divided among them (FSDP2)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from curation.errors import ConfigError
from embedder.vit import VisionTransformer
from pretrain.config import TrainConfig
from pretrain.distributed import world_size
from pretrain.methods.dinov2 import Network
from pretrain.methods.distillation import FeatureStudent


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
    """Give the device of this process; each has a GPU of its own.

    Raises:
        ConfigError: another name than auto, cpu and cuda, or CUDA does not work here.
    """
    works = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if works else "cpu"
    if name == "cpu":
        return torch.device(name)
    if name != "cuda" or not works:
        found = "CUDA does not work here" if name == "cuda" else "is no device of ours"
        raise ConfigError(f"device {name}: {found}; use auto or cpu, or cuda where there is a GPU")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return torch.device(name, index)


def divide(method: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Divide parameters, gradients and optimizer state among the processes, block by block.

    Every unit is resharded after its forward pass, the roots too: the EMA then always sees both
    networks in shards.
    """
    if world_size() == 1:
        return
    mesh = init_device_mesh(device.type, (world_size(),))
    divided: set[int] = set()
    for network in [*method.modules()]:
        if isinstance(network, Network | FeatureStudent):
            divided.update(map(id, network.modules()))
            _divide_network(network, mesh, config, device)
    for network in [*method.modules()]:  # a teacher without heads
        if isinstance(network, VisionTransformer) and id(network) not in divided:
            _divide_backbone(network, mesh, config, device)


def _divide_network(
    network: nn.Module, mesh: Any, config: TrainConfig, device: torch.device
) -> None:
    _divide_backbone(network.get_submodule("backbone"), mesh, config, device)
    head = {"mesh": mesh, "reshard_after_forward": True, **_precision(config, device, half=False)}
    for name, module in network.named_children():
        if name != "backbone":
            fully_shard(module, **head)


def _divide_backbone(backbone: Any, mesh: Any, config: TrainConfig, device: torch.device) -> None:
    settings = {
        "mesh": mesh,
        "reshard_after_forward": True,
        **_precision(config, device, half=True),
    }
    for block in backbone.blocks:
        fully_shard(block, **settings)
    fully_shard(backbone, **settings)
    register_fsdp_forward_method(backbone, "forward_packed")


def _precision(
    config: TrainConfig, device: torch.device, *, half: bool
) -> dict[str, MixedPrecisionPolicy]:
    """On GPUs, weights travel in half precision, and so do the backbone's gradients."""
    if device.type != "cuda" or config.run.precision == "float32":
        return {}
    dtype = getattr(torch, config.run.precision)
    reduced = dtype if half else torch.float32
    return {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced)}
