"""The training loop: `run` trains, saves, resumes, and leaves a backbone."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from embedder.errors import CheckpointError
from pretrain import checkpoint
from pretrain.batch import Batch
from pretrain.building import build_method, build_probe, open_feed, refuse_misfit
from pretrain.collapse import Flatness, alarms
from pretrain.config import TrainConfig
from pretrain.data import STOPS
from pretrain.digests import DIGESTS, write_digests
from pretrain.distributed import any_rank, barrier, rank, sum_over_ranks, world_size
from pretrain.errors import TrainingError
from pretrain.methods.learners import learners
from pretrain.optim import Schedules, clip_gradients, parameter_groups, prepare_state
from pretrain.parallel import divide, local_device, process_group
from pretrain.random_streams import Purpose, torch_stream
from pretrain.resuming import accepted_changes, facts_of
from pretrain.run_log import Record, RunLog, read_lines
from pretrain.sources import describe_source, open_source

logger = logging.getLogger(__name__)

Progress = Callable[[Record], None]

CONFIG = "config.yaml"

MIN_SCALE = 2.0**-10
"""Of the losses in float16: the scaler skips steps that overflow, and those that always do end."""

REPEATED_S = 1.0
"""Signals within this time are one request: torchrun and `timeout` send theirs to a process that
its group has reached already."""


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    checkpoint: Path
    """Folder of the last checkpoint."""
    backbone: Path
    """What the run leaves: the student's moving average with its architecture, or a copy head;
    absent while the run is unfinished. Of several students, that of the first."""
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
    config: TrainConfig,
    data: str,
    out: str,
    *,
    resume: bool = True,
    allow_changed: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train on packed shards or a folder of images; go on from the last checkpoint in `out`.

    allow_changed: go on with other data or settings; log, checkpoints and card tell them.

    SIGTERM or SIGINT ends the run after the step at hand with a checkpoint; a second one, at once.

    Raises:
        CurateError: the data, the weights or the run's folder do not fit, or the losses are no
            numbers.
    """
    device = local_device(config.run.device)
    with threads(config.run.threads), process_group(device):
        trainer = Trainer(
            config, data, Path(out), device, resume=resume, allow_changed=allow_changed
        )
        with _stop_request() as stop:
            return trainer.train(stop, progress)


class Trainer:
    """One run: the method, its optimizer, its data and its place in time."""

    def __init__(
        self,
        config: TrainConfig,
        data: str,
        out: Path,
        device: torch.device,
        *,
        resume: bool = True,
        allow_changed: bool = False,
    ) -> None:
        self.config = config
        self.out = out
        self.device = device
        refuse_misfit(config, world_size())
        self.source = open_source(data)
        self.facts = facts_of(config, describe_source(data, self.source))
        self.changes: list[dict[str, Any]] = []
        begun = self._find_begun(resume=resume, allow_changed=allow_changed)
        self.feed = open_feed(config, self.source, out)
        self.probe = build_probe(config)
        self.method = build_method(config, begun, self.feed).to(device).train()
        divide(self.method, config, device)
        self.learners = learners(self.method)
        window = config.optim.stop_when_flat
        self.flatness = None if window is None else Flatness(window)
        self.flat = False
        self.optimizer = self._build_optimizer()
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.run.precision == "float16"
        )
        if misfits := config.misfits():
            logger.warning(
                "%s not through in %d steps", ", ".join(map(".".join, misfits)), config.optim.steps
            )
        self.schedules = Schedules.of(config, world_size())
        self.step = self.resumed_at = 0
        self.position = 0
        out.mkdir(parents=True, exist_ok=True)
        if begun is not None:
            self._restore(begun[1])
        if rank() == 0:
            self._write_config()
        self.log = RunLog(out, self.step, tensorboard=config.run.tensorboard)
        if self.flatness is not None:  # as if the run had never been stopped
            for record in self.log.records():
                self.flatness.add(record)

    def train(self, stop: threading.Event, progress: Progress | None) -> TrainResult:
        """Take the steps that are left, then write the backbone."""
        batches = iter(()) if self.done else self._batches()
        while not self.done and not any_rank(stop.is_set()):
            record = self._timed_step(batches)
            if self.flatness is not None and self._is_logged(self.step):
                self.flat = any_rank(self.flatness.add(record))
            self._log(record, progress)
            if self.step % self.config.run.checkpoint_every_steps == 0:
                self.save()
        if self.step not in checkpoint.saved_steps(self.out):
            self.save()
        if self.done:
            self._save_weights()
        return self._result()

    def try_steps(self, count: int) -> list[float]:
        """Take real steps and save nothing; give the seconds that each took."""
        batches, batch = self._batches(), self.config.effective_batch(world_size())
        records = [self._timed_step(batches) for _ in range(min(count, self.config.optim.steps))]
        return [batch / record["images_per_s"] for record in records]

    @property
    def done(self) -> bool:
        """Whether nothing is left to train."""
        return self.flat or self.step >= self.config.optim.steps

    def _build_optimizer(self) -> torch.optim.AdamW:
        settings = self.config.optim
        groups = [
            group
            for learner in self.learners.values()
            for group in parameter_groups(learner.student, learner.depth, settings)
        ]
        return torch.optim.AdamW(groups, betas=settings.betas, fused=True)

    def take_step(self, parts: list[Batch]) -> Record:
        """Take one optimizer step on the parts of an effective batch; give what to log."""
        self.schedules.apply(self.optimizer, self.step)
        losses = self._backward(parts)
        self._refuse_nan("losses", losses, losses["total_loss"], parts)
        self.scaler.unscale_(self.optimizer)
        clipped = clip_gradients(self._submodules(), self.config.optim.clip_norm)
        norms = {name: float(norm) for name, norm in clipped.items()}
        if not self.scaler.is_enabled() or self.scaler.get_scale() < MIN_SCALE:
            self._refuse_nan("gradients", norms, sum(norms.values()), parts)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for learner in self.learners.values():
            learner.update_teacher(self.config.momentum(self.step))
        self.step += 1
        self.position += self.config.effective_batch(world_size())
        loss = losses.pop("total_loss")
        return {
            "step": self.step,
            "loss": loss,
            **losses,
            "grad_norm": norms,
            **self.scheduled(self.step - 1),
            "images_seen": self.position,
        }

    def scheduled(self, step: int) -> dict[str, float]:
        """What the schedules gave a step; groups and layers take their share of the rate."""
        return {
            "lr": self.schedules.lr(step),
            "weight_decay": self.schedules.weight_decay(step),
            **self.config.scheduled(step),
        }

    def _submodules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, learner in self.learners.items():
            for part, module in learner.submodules():
                yield _named(name, part), module

    def save(self) -> Path:
        """Write a checkpoint and remove those that are no longer kept."""
        about = {
            "position": self.position,
            "scaler": self.scaler.state_dict(),
            "flat": self.flat,
            "changes": self.changes,
            **self.facts,
        }
        state = checkpoint.training_state(self.method, self.optimizer)
        folder = checkpoint.save(self.out, self.step, state, about)
        if rank() == 0:
            settings = self.config.run
            checkpoint.prune(self.out, settings.keep_checkpoints, settings.keep_every_steps)
            write_digests(self.out)
        return folder

    def _save_weights(self) -> None:
        for name, learner in self.learners.items():
            learner.save(self.out / name)
        if rank() == 0:
            write_digests(self.out)
        barrier()

    def _find_begun(self, *, resume: bool, allow_changed: bool) -> tuple[Path, int] | None:
        """Find the checkpoint to go on from, and hold this run against it."""
        steps = checkpoint.saved_steps(self.out)
        if not steps:
            return None
        step = steps[-1]
        if not resume:
            raise CheckpointError(
                f"{self.out}: holds a run of {step} steps; resume it, or name another folder"
            )
        saved = checkpoint.read_about(self.out, step)
        found = accepted_changes(saved, self.facts, self.out, allow_changed=allow_changed)
        for change in found:
            logger.warning("%s: up to step %d: %s", self.out, step, change)
        self.changes = [*saved.get("changes", []), *(change.record(step) for change in found)]
        self.facts["origins"] = saved.get("origins", {}) | self.facts["origins"]
        return self.out, step

    def _write_config(self) -> None:
        """Leave what the run is by, ready to be given again."""
        text = self.config.as_yaml()
        path = self.out / CONFIG
        if path.is_file() and path.read_text() == text:
            return
        path.write_text(text)
        if (self.out / DIGESTS).is_file():
            write_digests(self.out)

    def _restore(self, step: int) -> None:
        about = checkpoint.read_about(self.out, step)
        prepare_state(self.optimizer, checkpoint.stepped_parameters(self.out, step, self.method))
        checkpoint.load_into(self.out, step, checkpoint.training_state(self.method, self.optimizer))
        if about["scaler"]:
            self.scaler.load_state_dict(about["scaler"])
        self.step, self.position = about["step"], about["position"]
        self.resumed_at = self.step
        self.flat = about.get("flat", False)
        logger.info("%s: resumed at step %d", self.out, self.step)

    def _batches(self) -> Iterator[Batch]:
        return self.feed.batches(self.position)

    def _timed_step(self, batches: Iterator[Batch]) -> Record:
        start = time.perf_counter()
        parts = [next(batches).to(self.device) for _ in range(self.config.optim.accumulate)]
        waited = time.perf_counter() - start
        self.log.add_bad([bad for part in parts for bad in part.bad])
        record = self.take_step(parts)
        elapsed = time.perf_counter() - start
        record["images_per_s"] = self.config.effective_batch(world_size()) / elapsed
        record["data_wait_share"] = waited / elapsed
        return record

    def _backward(self, parts: list[Batch]) -> dict[str, float]:
        """Run teacher and student on all parts; give the mean losses."""
        seed = self.config.run.seed
        sums: list[Tensor] = []
        with self._autocast():
            watch = self._is_logged(self.step + 1)
            targets = self.method.targets(parts, self.config.temperature(self.step), watch=watch)
        for index, part in enumerate(parts):
            found: dict[str, Tensor] = {}
            for name, learner in self.learners.items():
                generator = torch_stream(seed, Purpose.DEPTH, self.step, rank(), index)
                with self._autocast():
                    losses = learner.losses(part, targets, index, generator)
                self.scaler.scale(losses["total_loss"] / len(parts)).backward()
                found |= {_named(name, key): loss.detach() for key, loss in losses.items()}
            sums.append(torch.stack(list(found.values())))
        means = sum_over_ranks(torch.stack(sums).mean(0)) / world_size()
        values = dict(zip(found, means.tolist(), strict=True))
        values.setdefault("total_loss", sum(values[key] for key in values if "total" in key))
        return {**values, **targets.health}

    def _autocast(self) -> torch.autocast:
        precision = self.config.run.precision
        if precision == "float32":
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, getattr(torch, precision))

    def _refuse_nan(
        self, kind: str, values: dict[str, float], total: float, parts: list[Batch]
    ) -> None:
        if math.isfinite(total):
            return
        ids = [name for part in parts for name in part.ids]
        raise TrainingError(
            f"step {self.step + 1}: the {kind} are no longer numbers: {values}; images of the "
            f"batch: {', '.join(ids)}; lower optim.base_lr, or use run.precision float32, with "
            f"--allow-changed, and {self._way_back()}"
        )

    def _way_back(self) -> str:
        """Where to go on after a step that failed; one after a checkpoint fails again."""
        folder = checkpoint.checkpoint_folder(self.out, self.step)
        if self.step and self.step == self.resumed_at:
            return f"remove {folder}: it is finite, but past mending"
        return "resume from the last checkpoint"

    def _log(self, record: Record, progress: Progress | None) -> None:
        if self._is_probed(record["step"]):
            for name, learner in self.learners.items():
                record |= {_named(name, key): x for key, x in self.probe(learner).items()}
        if not self._is_logged(record["step"]) or rank() > 0:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        totals = {"steps": self.config.optim.steps, "bad_images": self.log.num_bad}
        record = {**record, **totals, "time": now}
        record["alarms"] = alarms(record)
        if changed := [one for one in self.changes if one["step"] >= self.log.last_step]:
            record["changed"] = changed
        for alarm in record["alarms"]:
            logger.warning("step %d: %s", record["step"], alarm)
        self.log.add(record)
        if progress is not None:
            progress(record)

    def _is_logged(self, step: int) -> bool:
        regular = step % self.config.run.log_every_steps == 0
        return self._is_probed(step) or regular or step in (1, self.config.optim.steps)

    def _is_probed(self, step: int) -> bool:
        every = self.config.probe_every_steps
        return every is not None and step % every == 0

    def _result(self) -> TrainResult:
        records = read_lines(self.log.path) or [{}]
        name, learner = next(iter(self.learners.items()))
        return TrainResult(
            checkpoint.checkpoint_folder(self.out, self.step),
            self.out / name / learner.file_name,
            self.log.path,
            self.step,
            self.done,
            records[0],
            records[-1],
            self.log.num_bad,
        )


def _named(student: str, key: str) -> str:
    """Name what is of one of several students."""
    return f"{student}.{key}" if student else key


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set torch's threads for the run only."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stop_request() -> Iterator[threading.Event]:
    """Give an event that SIGTERM and SIGINT set; signals only reach the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    first = math.inf

    def request(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if time.monotonic() - first > REPEATED_S:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        first = min(first, time.monotonic())
        stop.set()

    before = {kind: signal.signal(kind, request) for kind in STOPS}
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
