"""How batches come to a device: the rule of the batch size, and what only a GPU does."""

import pytest
import torch

from embedder.encoders.lane import CudaLane, Lane, largest_batch

GB = 1 << 30


@pytest.mark.parametrize(
    ("each", "room", "expected"),
    [
        (GB // 100, 10 * GB, 512),  # bounded by what a batch gains at most
        (GB // 10, 10 * GB, 64),
        (GB, 10 * GB, 8),
        (2 * GB, 10 * GB, 4),
        (8 * GB, 10 * GB, 1),
    ],
)
def test_largest_batch__fills_the_room_and_no_more(each: int, room: int, expected: int) -> None:
    weights, tried = GB // 2, []

    def peak_bytes(count: int) -> int | None:
        tried.append(count)
        used = weights + count * each
        return used if used <= room else None

    assert largest_batch(peak_bytes, room) == expected
    assert expected == 1 or weights + expected * each <= room
    assert max(tried) <= 8


def test_lane__of_a_cpu_leaves_batches_where_they_are() -> None:
    lane, batch = Lane.to(torch.device("cpu")), torch.ones(2)
    assert lane.arrived(lane.moved(batch)) is batch
    assert lane.room_bytes(1.0) is None
    assert lane.peak_bytes(lambda: None) == 0
    with lane.turn():
        pass


@pytest.mark.gpu
def test_lane__of_a_gpu_copies_whole_batches_beside_the_work() -> None:
    lane = Lane.to(torch.device("cuda:0"))
    assert isinstance(lane, CudaLane)
    batches = [torch.full((1 << 20,), number, dtype=torch.uint8) for number in range(20)]
    moved = [lane.moved(batch) for batch in batches]
    for number, batch in enumerate(moved):
        with lane.turn():
            assert int(lane.arrived(batch).float().mean()) == number
    assert lane.peak_bytes(lambda: torch.empty(1 << 50, dtype=torch.uint8, device="cuda")) is None
    assert lane.peak_bytes(lambda: torch.empty(1 << 20, device="cuda")) >= 4 << 20
