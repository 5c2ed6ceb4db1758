"""Batches of any step, made from the seed and the position alone."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from embedder.errors import CurateError, ImageError
from embedder.images import decode
from pretrain.batch import BadImage, Batch, collate
from pretrain.config import PretrainConfig
from pretrain.crops import Pixels, crop_recipes, multi_crop
from pretrain.errors import TrainingError
from pretrain.masks import block_mask, draw_targets
from pretrain.order import Order, WeightedOrder
from pretrain.random_streams import Purpose, stream
from pretrain.sources import Source

STOPS = (signal.SIGTERM, signal.SIGINT)
"""Signals by which a run is asked to end."""
CHECKED_EVERY_S = 1.0
"""How often a loader worker looks whether its driver lives."""
SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2
"""Batches that each loader worker holds ready."""
_BYTES_A_PATCH = 1 + 8 + 4
"""Its mask, its place and its weight."""
_TELLS_WHO_ASKS = hasattr(signal, "sigtimedwait")
MAX_SUBSTITUTES = 100
"""Bad images in a row after which the data are not believed to be images."""


class Part(NamedTuple):
    """One process's share of one step, or of one accumulated part of it."""

    step_start: int
    """First position of the step in the stream."""
    step_size: int
    """Images of the step over all processes: the effective batch."""
    first: int
    """First image of this part, counted within the step."""
    size: int
    """Images of this part."""


class Batches(TorchDataset[Batch | CurateError]):
    """Any part of any step, made from the seed alone: who asks, and when, does not matter."""

    def __init__(self, source: Source, config: PretrainConfig) -> None:
        self._source = source
        self._config = config
        self._seed = config.run.seed
        self._recipes = crop_recipes(config.crops)
        weights = config.data.seed_set_weights
        self._order: Order | WeightedOrder = (
            Order(source.sizes, self._seed, config.data.window_shards)
            if weights is None
            else WeightedOrder(source, self._seed, weights)
        )

    def __getitem__(self, part: Part) -> Batch | CurateError:
        """Read, crop and mask the images of a part; an error of ours is given, not raised.

        On its way out of a worker torch would bury its line in a traceback.
        """
        try:
            return self.batch(part)
        except CurateError as error:
            return error

    def batch(self, part: Part) -> Batch:
        """Read, crop and mask the images of a part."""
        bad: list[BadImage] = []
        ids, crops = [], []
        for position in range(
            part.step_start + part.first, part.step_start + part.first + part.size
        ):
            name, pixels = self._readable(position, bad)
            rng = stream(self._seed, Purpose.CROPS, position)
            ids.append(name)
            crops.append(multi_crop(pixels, self._recipes, rng))
        return collate(crops, self._masks(part), tuple(ids), tuple(bad))

    def _readable(self, position: int, bad: list[BadImage]) -> tuple[str, Pixels]:
        """Give the image at a position; a bad one is noted, and another drawn in its stead."""
        place = self._order[position]
        for attempt in range(MAX_SUBSTITUTES):
            try:
                name, data = self._source.read(*place)
                return name, decode(data)
            except ImageError as error:
                bad.append((self._source.name(*place), error.reason))
            rng = stream(self._seed, Purpose.SUBSTITUTE, position, attempt)
            place = self._order[int(rng.integers(2**40))]
        raise TrainingError(
            f"{MAX_SUBSTITUTES} images in a row could not be read, the last '{bad[-1][0]}' "
            f"({bad[-1][1]}); check that the data are images"
        )

    def _masks(self, part: Part) -> NDArray[np.bool_]:
        """Draw the masks (2 size, P) of a part; how much each crop hides is drawn globally."""
        grid = self._config.crops.global_size // self._config.vit().patch
        rng = stream(self._seed, Purpose.MASK_TARGETS, part.step_start)
        targets = draw_targets(2 * part.step_size, grid, self._config.masks, rng)
        targets = targets.reshape(2, -1)[:, part.first : part.first + part.size]
        masks = np.zeros((2, part.size, grid * grid), bool)
        for (crop, image), target in np.ndenumerate(targets):
            position = part.step_start + part.first + image
            rng = stream(self._seed, Purpose.MASK_BLOCKS, position, crop)
            masks[crop, image] = block_mask(grid, int(target), rng).ravel()
        return masks.reshape(2 * part.size, -1)


@dataclass(frozen=True)
class Parts(Sampler[Part]):
    """The parts of one process, step after step without end, from any position."""

    start: int
    rank: int
    processes: int
    batch_size: int
    accumulate: int

    def __iter__(self) -> Iterator[Part]:
        """Give `accumulate` parts a step."""
        own = self.batch_size * self.accumulate
        step_size = own * self.processes
        step_start = self.start
        while True:
            for part in range(self.accumulate):
                first = self.rank * own + part * self.batch_size
                yield Part(step_start, step_size, first, self.batch_size)
            step_start += step_size


def read_batches(
    source: Source, config: PretrainConfig, position: int, rank: int, processes: int
) -> Iterator[Batch]:
    """Read the stream of one process from a position on.

    Raises:
        CurateError: what a worker met, in one line.
    """
    optim = config.optim
    if SHARED_MEMORY.is_dir():
        refuse_little_shared_memory(config, shutil.disk_usage(SHARED_MEMORY).free)
    # Crops are too small to share between threads, and workers forked from a process whose
    # OpenCV threads are alive would wait for them for ever.
    cv2.setNumThreads(1)
    loader = DataLoader(
        Batches(source, config),
        batch_size=None,
        sampler=Parts(position, rank, processes, optim.batch_size, optim.accumulate),
        num_workers=config.data.workers,
        prefetch_factor=PREFETCHED if config.data.workers else None,
        worker_init_fn=_end_with_driver,
    )
    with _signals_held():
        batches = iter(loader)
    for batch in batches:
        if isinstance(batch, CurateError):
            raise batch
        yield batch


def refuse_little_shared_memory(config: PretrainConfig, free: int) -> None:
    """Batches of workers wait in shared memory; without room for them loading hangs for ever.

    Raises:
        TrainingError: with the bytes that are needed.
    """
    workers = config.data.workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = batch_bytes(config) * (PREFETCHED * workers + 1) * processes
    if workers and free < needed:
        raise TrainingError(
            f"data.workers = {workers}: their batches need {needed / 1e6:,.1f} MB of shared "
            f"memory, and {SHARED_MEMORY} has {free / 1e6:,.1f} MB free; set data.workers to fewer "
            f"or 0, or give the container more (docker run --shm-size={needed // 2**20 + 2}m)"
        )


def batch_bytes(config: PretrainConfig) -> int:
    """Most bytes that the crops and masks of one batch take."""
    crops, images = config.crops, config.optim.batch_size
    patches = (crops.global_size // config.vit().patch) ** 2
    pixels = 2 * crops.global_size**2 + crops.local_count * crops.local_size**2
    return images * (3 * pixels + 2 * patches * _BYTES_A_PATCH)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Start loader workers in here: they never hear what their driver is asked by STOPS.

    Whoever stops a job signals all of its processes, and a run whose workers are gone can save
    nothing. Where a worker cannot tell who asks (macOS), they hear it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS if _TELLS_WHO_ASKS else ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_driver(worker: int) -> None:
    """Let a worker end when its driver asks, or is gone, and for no one else."""
    driver = multiprocessing.parent_process()
    assert driver is not None, "runs in a worker"
    threading.Thread(target=_await_end, args=(driver.pid,), daemon=True).start()


def _await_end(driver: int) -> None:
    while os.getppid() == driver and _who_asks() != driver:
        pass
    os._exit(0)


def _who_asks() -> int | None:
    """Wait a while for SIGTERM, and give the process that sent it."""
    if not _TELLS_WHO_ASKS:
        time.sleep(CHECKED_EVERY_S)
        return None
    asked = signal.sigtimedwait([signal.SIGTERM], CHECKED_EVERY_S)
    return None if asked is None else asked.si_pid
