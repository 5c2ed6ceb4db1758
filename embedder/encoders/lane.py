"""The way of batches to a device and through it: copies beside the work, turns, memory.

The same calls serve a CPU, where most of them have nothing to do.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CPU_BATCH_SIZE = 8
"""Images a CPU core works on at a time: more fall out of its caches."""
_MOST = 512
_FILLED = 0.8
"""Share of a device's memory that is filled: its allocator needs room to move in."""
_PROBED = (4, 8)


class Lane:
    """A CPU: batches are where they are needed, and every thread has a core of its own."""

    @staticmethod
    def to(device: torch.device) -> "Lane":
        """Return the lane of a device."""
        return CudaLane(device) if device.type == "cuda" else Lane()

    def moved(self, batch: Tensor) -> Tensor:
        """Begin to copy a batch to the device."""
        return batch

    def arrived(self, batch: Tensor) -> Tensor:
        """Let what follows wait for the copy."""
        return batch

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the device while a batch is handed to it."""
        yield

    def room_bytes(self, share: float) -> int | None:
        """Memory that batches may fill; None where it does not bound them."""
        return None

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Memory that running takes at its peak; None where there is too little."""
        run()
        return 0


class CudaLane(Lane):
    """A GPU: pinned memory, copies on a stream of their own, one batch at a time.

    The threads that decode also hand batches over; in turn, so that the memory of one is free
    before the next takes its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()

    def moved(self, batch: Tensor) -> Tensor:
        """Begin to copy a batch, while the one before it is at work."""
        with torch.cuda.stream(self._copies):
            return batch.pin_memory().to(self._device, non_blocking=True)

    def arrived(self, batch: Tensor) -> Tensor:
        """Let the work wait for the copy, and the copy's memory for the work."""
        work = torch.cuda.current_stream(self._device)
        work.wait_stream(self._copies)
        batch.record_stream(work)
        return batch

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the device while a batch is handed to it."""
        with self._lock, torch.cuda.device(self._device):
            yield

    def room_bytes(self, share: float) -> int | None:
        """A share of the whole memory: what is free now would differ from run to run."""
        return int(_FILLED * share * torch.cuda.get_device_properties(self._device).total_memory)

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Memory at the peak of running, what lies there before included."""
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            run()
            torch.cuda.synchronize(self._device)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        return torch.cuda.max_memory_allocated(self._device)


def largest_batch(peak_bytes: Callable[[int], int | None], room_bytes: int) -> int:
    """The largest power of two, up to 512, whose batches surely fit.

    peak_bytes: memory of a batch of so many at its peak, None where it does not fit. Two small
    batches are tried, and memory grows with the batch: trying up to the limit would leave other
    users of the device without any.
    """
    few, more = (peak_bytes(count) for count in _PROBED)
    if few is None:
        return 1
    if more is None:
        return _PROBED[0]
    each = max(1.0, (more - few) / (_PROBED[1] - _PROBED[0]))
    most = (room_bytes - few) / each + _PROBED[0]
    batch = 1
    while 2 * batch <= min(most, _MOST):
        batch *= 2
    return batch
