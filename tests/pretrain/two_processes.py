"""What each of two gloo processes does in test_distributed.py."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.building import build_method
from pretrain.config import PretrainConfig
from pretrain.data import Batches, Part
from pretrain.distributed import rank, whole_state, world_size
from pretrain.optim import Schedules, build_optimizer, clip_gradients
from pretrain.parallel import divide
from pretrain.run_log import RunLog
from pretrain.schedules import Cosine
from pretrain.sources import open_source
from pretrain.train import run
from tests.pretrain.small_runs import small_config

CPU = torch.device("cpu")
STEPS = 20
WHOLE_BATCH = 8
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {"koleo_weight": 0.0}),
    "float64 koleo": (torch.float64, {"koleo_weight": 0.1, "koleo_gathered": True}),
    "centering": (torch.float32, {"koleo_weight": 0.0, "centering": "centering"}),
}


def case_config(loss: dict[str, Any], batch_size: int) -> PretrainConfig:
    return small_config(
        model={"drop_path": 0.0},
        loss={**small_config().loss.model_dump(), **loss},
        optim={"batch_size": batch_size, "steps": STEPS},
    )


def series(images: str, name: str) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """The losses of 20 steps, averaged over processes, and the teacher at the end."""
    dtype, loss = CASES[name]
    own = WHOLE_BATCH // world_size()
    config = case_config(loss, own)
    method = build_method(config).to(dtype).train()
    divide(method, config, CPU)
    optimizer = build_optimizer(method.student, 2, config.optim)
    batches = Batches(open_source(images), config)
    schedules, momentum = Schedules.of(config, world_size()), Cosine(0.99, 1.0, STEPS)
    table = []
    for step in range(STEPS):
        batch = batches.batch(Part(step * WHOLE_BATCH, WHOLE_BATCH, rank() * own, own)).to(CPU)
        assert batch.local_crops is not None
        batch = replace(batch, global_crops=batch.global_crops.to(dtype),
                        local_crops=batch.local_crops.to(dtype))  # fmt: skip
        schedules.apply(optimizer, step)
        targets = method.targets([batch], 0.05)
        losses = method.losses(batch, targets, 0, torch.Generator())
        losses["total_loss"].backward()
        clip_gradients(method.submodules(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
        method.update_teacher(momentum(step))
        row = torch.stack([loss.detach() for loss in losses.values()])
        if world_size() > 1:
            dist.all_reduce(row)
        table.append((row / world_size()).tolist())
    return table, whole_state(method.teacher)


def main(process: int, folder: str, images: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=process, world_size=2)
    found = {name: series(images, name) for name in CASES}
    run(resumable(2, 3), images, f"{folder}/run")
    log = RunLog(Path(folder) / "run", 3)
    log.add_bad([("both.jpg", "no_image"), (f"{process}.jpg", "empty")])
    log.add_bad([("both.jpg", "no_image")] if process else [])
    assert log.num_bad == 3
    if process == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def resumable(processes: int, steps: int) -> PretrainConfig:
    return small_config(
        model={"drop_path": 0.0},
        loss={**small_config().loss.model_dump(), "koleo_weight": 0.0},
        optim={"batch_size": 4 // processes, "steps": steps, "warmup_steps": 0, "min_lr": 1e-3},
        teacher={"momentum": [0.99, 0.99], "temperature": [0.05, 0.05]},
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], str(Path(sys.argv[3])))
