"""A run before it is one: what it would train on and how, and what a step costs. Keeps nothing."""

import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.config import TrainConfig
from pretrain.copy_config import REHEARSED, CopyConfig
from pretrain.distributed import world_size
from pretrain.parallel import local_device, process_group
from pretrain.train import Trainer, threads

STEPS_TAKEN = 2
"""The second says what a step costs: the first also starts workers and fills caches."""


@dataclass(frozen=True)
class Rehearsal:
    """What was found and measured."""

    data: dict[str, Any]
    """Path, images and digests."""
    batch: int
    """Images a step over all processes."""
    schedules: list[dict[str, float]]
    """What the schedules give at five steps, from the first to the last."""
    seconds_per_step: float
    seconds_before: float
    """Before the first step, where features are computed once."""
    peak_bytes: int
    """Most memory that this process held: of its GPU, where it has one."""


def rehearse(config: TrainConfig, data: str) -> Rehearsal:
    """Take two real steps in a folder that goes away.

    Raises:
        CurateError: what would have ended the run, too.
    """
    device = local_device(config.run.device)
    with (
        tempfile.TemporaryDirectory() as folder,
        threads(config.run.threads),
        process_group(device),
    ):
        begun = time.perf_counter()
        trainer = Trainer(config.rehearsed(), data, Path(folder), device)
        prepared = time.perf_counter() - begun
        seconds = trainer.try_steps(STEPS_TAKEN)
        last = config.optim.steps - 1
        return Rehearsal(
            trainer.facts["data"],
            config.effective_batch(world_size()),
            [{"step": step + 1, **trainer.scheduled(step)} for step in _five(last)],
            seconds[-1],
            prepared * _share_prepared(config, trainer.facts["data"]["images"]),
            _peak_bytes(device),
        )


def _share_prepared(config: TrainConfig, images: int) -> float:
    """How many times the images of the dry run those of the run are."""
    if not isinstance(config, CopyConfig):
        return 0.0
    return min(images, config.max_images or images) / min(images, REHEARSED)


def _five(last: int) -> list[int]:
    return sorted({round(last * quarter / 4) for quarter in range(5)})


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
