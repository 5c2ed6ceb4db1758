"""The training loop: `run` trains, saves, resumes, and leaves a backbone."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from embedder.checkpoint import load_state, read_weights, save_backbone
from embedder.errors import CheckpointError
from embedder.vit import ViTConfig
from pretrain import checkpoint
from pretrain.batch import Batch
from pretrain.config import PretrainConfig
from pretrain.data import open_loader
from pretrain.distributed import rank, world_size
from pretrain.errors import TrainingError
from pretrain.methods.dinov2 import DINOv2
from pretrain.optim import Schedules, build_optimizer, clip_gradients
from pretrain.random_streams import Purpose, torch_stream
from pretrain.run_log import Record, RunLog, read_lines
from pretrain.schedules import Cosine, Linear
from pretrain.sources import open_source

logger = logging.getLogger(__name__)

Progress = Callable[[Record], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    checkpoint: Path
    """Folder of the last checkpoint."""
    backbone: Path
    """The EMA teacher's backbone, with its architecture; absent while the run is unfinished."""
    log: Path
    """JSON lines, one a logged step."""
    steps: int
    """Steps done."""
    finished: bool
    """Whether all steps are done; otherwise run again to go on."""
    first: Record
    """First logged step."""
    last: Record
    """Last logged step."""
    bad_images: int
    """Different images that could not be read; bad_images.jsonl lists them."""


def run(
    config: PretrainConfig,
    data: str,
    out: str,
    *,
    resume: bool = True,
    progress: Progress | None = None,
) -> TrainResult:
    """Train on packed shards or a folder of images; go on from the last checkpoint in `out`.

    SIGTERM ends the run after the step at hand with a checkpoint.

    Raises:
        CurateError: the data, the weights or the run's folder do not fit, or the losses are no
            numbers.
    """
    with _threads(config.run.threads), _stop_request() as stop:
        trainer = Trainer(config, data, Path(out), resume=resume)
        return trainer.train(stop, progress)


class Trainer:
    """One run: the method, its optimiser, its data and its place in time."""

    def __init__(self, config: PretrainConfig, data: str, out: Path, *, resume: bool) -> None:
        self.config = config
        self.out = out
        self.device = _device(config)
        self.source = open_source(data)
        self.method = build_method(config).to(self.device).train()
        depth = self.method.student.backbone.config.depth
        self.optimizer = build_optimizer(self.method.student, depth, config.optim)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.run.precision == "float16"
        )
        self.schedules = Schedules.of(config, world_size())
        self.momentum = Cosine(*config.teacher.momentum, config.optim.steps)
        self.temperature = Linear(
            *config.teacher.temperature, config.teacher.temperature_warmup_steps
        )
        self.step = 0
        self.position = 0
        self._prepare_folder(resume)
        self.log = RunLog(out, self.step)

    def train(self, stop: threading.Event, progress: Progress | None) -> TrainResult:
        """Take the steps that are left, then write the backbone."""
        steps = self.config.optim.steps
        batches = self._batches() if self.step < steps else iter(())
        while self.step < steps and not stop.is_set():
            self._log(self._timed_step(batches), progress)
            if self.step % self.config.run.checkpoint_every_steps == 0:
                self.save()
        if self.step not in checkpoint.saved_steps(self.out):
            self.save()
        if self.step >= steps:
            save_backbone(self.method.teacher.backbone, self._backbone)
        return self._result()

    def take_step(self, parts: list[Batch]) -> Record:
        """Take one optimiser step on the parts of an effective batch; give what to log."""
        self.schedules.apply(self.optimizer, self.step)
        losses = self._backward(parts)
        self._refuse_nan(losses, parts)
        self.scaler.unscale_(self.optimizer)
        norms = clip_gradients(self.method.submodules(), self.config.optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.update_teacher(self.momentum(self.step))
        self.step += 1
        self.position += self.config.effective_batch(world_size())
        loss = losses.pop("total_loss")
        return {
            "step": self.step,
            "loss": loss,
            **losses,
            "grad_norm": {k: float(v) for k, v in norms.items()},
        }

    def save(self) -> Path:
        """Write a checkpoint and remove those that are no longer kept."""
        state = {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "position": self.position,
        }
        about = {"position": self.position, "config": self.config.model_dump(mode="json")}
        folder = checkpoint.save(self.out, self.step, state, about)
        settings = self.config.run
        checkpoint.prune(self.out, settings.keep_checkpoints, settings.keep_every_steps)
        return folder

    def _prepare_folder(self, resume: bool) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        steps = checkpoint.saved_steps(self.out)
        if steps and not resume:
            raise CheckpointError(
                f"{self.out}: holds a run of {steps[-1]} steps; resume it, or name another folder"
            )
        if steps:
            self._restore(steps[-1])

    def _restore(self, step: int) -> None:
        state, about = checkpoint.load(self.out, step)
        _refuse_other_model(about["config"], self.config, self.out)
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.position = state["step"], state["position"]
        logger.info("%s: resumed at step %d", self.out, self.step)

    def _batches(self) -> Iterator[Batch]:
        return iter(open_loader(self.source, self.config, self.position, rank(), world_size()))

    def _timed_step(self, batches: Iterator[Batch]) -> Record:
        start = time.perf_counter()
        parts = [next(batches).to(self.device) for _ in range(self.config.optim.accumulate)]
        waited = time.perf_counter() - start
        for part in parts:
            self.log.add_bad(part.bad)
        record = self.take_step(parts)
        elapsed = time.perf_counter() - start
        record["images_per_s"] = self.config.effective_batch(world_size()) / elapsed
        record["data_wait_share"] = waited / elapsed
        return record

    def _backward(self, parts: list[Batch]) -> dict[str, float]:
        """Run teacher and student on all parts; give the mean losses."""
        precision = self.config.run.precision
        dtype = torch.float32 if precision == "float32" else getattr(torch, precision)
        sums: dict[str, Tensor] = {}
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            targets = self.method.targets(parts, self.temperature(self.step))
        for index, part in enumerate(parts):
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                generator = torch_stream(
                    self.config.run.seed, Purpose.DEPTH, self.step, rank(), index
                )
                losses = self.method.losses(part, targets, index, generator)
            self.scaler.scale(losses["total_loss"] / len(parts)).backward()  # type: ignore[no-untyped-call]
            for name, loss in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(loss)) + loss.detach() / len(parts)
        return {name: float(value) for name, value in sums.items()}

    def _refuse_nan(self, losses: dict[str, float], parts: list[Batch]) -> None:
        if math.isfinite(losses["total_loss"]):
            return
        ids = [name for part in parts for name in part.ids]
        raise TrainingError(
            f"step {self.step + 1}: the losses are no longer numbers: {losses}; images of the "
            f"batch: {', '.join(ids)}; lower optim.base_lr, or use run.precision float32, and "
            "resume from the last checkpoint"
        )

    def _log(self, record: Record, progress: Progress | None) -> None:
        every = self.config.run.log_every_steps
        if record["step"] % every and record["step"] not in (1, self.config.optim.steps):
            return
        record = {**record, "steps": self.config.optim.steps, "bad_images": self.log.num_bad}
        self.log.add(record)
        if progress is not None:
            progress(record)

    @property
    def _backbone(self) -> Path:
        return self.out / "backbone.safetensors"

    def _result(self) -> TrainResult:
        records = read_lines(self.log.path) or [{}]
        return TrainResult(
            checkpoint.checkpoint_folder(self.out, self.step),
            self._backbone,
            self.log.path,
            self.step,
            self.step >= self.config.optim.steps,
            records[0],
            records[-1],
            self.log.num_bad,
        )


def build_method(config: PretrainConfig) -> DINOv2:
    """Build student and teacher from the run's seed, and from `init` where it is given.

    Raises:
        CheckpointError: the weights of `init` do not fit.
    """
    vit = config.vit()
    weights, vit = (None, vit) if config.init is None else _initial_weights(config.init, vit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        method = DINOv2(config, vit)
    if weights is not None:
        for network in (method.student, method.teacher):
            load_state(network.backbone, weights, where=str(config.init))
    for network in (method.student, method.teacher):
        network.backbone.checkpoint_blocks = config.run.checkpoint_activations
    return method


def _initial_weights(path: str, vit: ViTConfig) -> tuple[dict[str, Tensor], ViTConfig]:
    """Read weights to start from; their position embedding keeps its grid and is interpolated."""
    weights, _ = read_weights(path)
    positions = weights["pos_embed"].shape[1] - 1
    return weights, replace(vit, image_size=math.isqrt(positions) * vit.patch)


def _refuse_other_model(saved: dict[str, Any], config: PretrainConfig, out: Path) -> None:
    """A run may change its length, data reading and logging, but not what it trains."""
    ours = config.model_dump(mode="json")
    for section in ("model", "crops", "loss"):
        changed = [key for key in ours[section] if ours[section][key] != saved[section].get(key)]
        if changed:
            key = changed[0]
            raise CheckpointError(
                f"{out}: was trained with {section}.{key} = {saved[section].get(key)}, now it is "
                f"{ours[section][key]}; name another folder, or set it back"
            )


def _device(config: PretrainConfig) -> torch.device:
    name = config.run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set torch's threads for the run only."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stop_request() -> Iterator[threading.Event]:
    """Give an event that SIGTERM sets; signals only reach the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(signum: int, frame: FrameType | None) -> None:
        stop.set()

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
