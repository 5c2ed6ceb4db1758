import time

import pytest
from slot_holder import holding

from curation.errors import StageError
from curation.fetching import machine
from curation.fetching.machine import MachineSlots


def test_machine_slots__count_within_a_process(tmp_path):
    slots = MachineSlots(tmp_path)
    assert [slots.try_start("a", 2, 0) for _ in range(2)] == [0, 0]
    assert slots.try_start("a", 2, 0) > 0
    assert slots.try_start("b", 2, 0) == 0
    slots.end("a")
    assert slots.try_start("a", 2, 0) == 0


def test_machine_slots__are_shared_and_given_back_by_the_killed(tmp_path):
    slots = MachineSlots(tmp_path)
    with holding(tmp_path, "a", 2):
        assert slots.try_start("a", 3, 0) == 0
        assert slots.try_start("a", 3, 0) > 0
        assert slots.try_start("b", 3, 0) == 0
    assert [slots.try_start("a", 3, 0) for _ in range(2)] == [0, 0]


def test_machine_slots__starts_are_apart(tmp_path):
    first, second = MachineSlots(tmp_path), MachineSlots(tmp_path)
    assert first.try_start("a", 9, 0.2) == 0
    wait_s = second.try_start("a", 9, 0.2)
    assert 0 < wait_s <= 0.2
    time.sleep(wait_s)
    assert second.try_start("a", 9, 0.2) == 0


def test_machine_slots__a_clock_from_before_a_restart_does_not_count(tmp_path, monkeypatch):
    slots = MachineSlots(tmp_path)
    monkeypatch.setattr(machine.time, "monotonic", lambda: 1e9)
    assert slots.try_start("a", 9, 5) == 0
    monkeypatch.undo()
    assert slots.try_start("a", 9, 5) == 0


def test_machine_slots__another_users_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os, "getuid", lambda: 12345)
    with pytest.raises(StageError, match="belongs to another user"):
        MachineSlots(tmp_path)
