import threading
import time
from collections import Counter

from slot_holder import holding

from curation.fetching.machine import MachineSlots
from curation.fetching.schedule import HostSchedule


def scheduled(folder, hosts, **limits):
    return HostSchedule(hosts, **limits, machine=MachineSlots(folder))


def test_schedule__hosts_take_turns(tmp_path):
    schedule = scheduled(tmp_path, ["a", "a", "a", "b", "c"], per_host=9, delay_s=0)
    assert [schedule.take() for _ in range(5)] == [0, 3, 4, 1, 2]


def test_schedule__a_busy_host_waits_without_a_thread(tmp_path):
    schedule = scheduled(tmp_path, ["a", "a", "b"], per_host=1, delay_s=0)
    assert [schedule.take(), schedule.take()] == [0, 2]
    schedule.give_back(0)
    assert schedule.take() == 1


def test_schedule__starts_of_one_host_are_apart(tmp_path):
    schedule = scheduled(tmp_path, ["a"] * 3 + ["b"], per_host=9, delay_s=0.1)
    began = time.monotonic()
    rows = [schedule.take() for _ in range(4)]
    assert rows == [0, 3, 1, 2]
    assert time.monotonic() - began >= 0.2


def test_schedule__a_retry_comes_back_when_its_pause_is_over(tmp_path):
    schedule = scheduled(tmp_path, ["a", "b"], per_host=1, delay_s=0)
    assert schedule.take() == 0
    schedule.give_back(0, retry_in_s=0.05)
    assert schedule.take() == 1
    schedule.give_back(1)
    assert schedule.take() == 0


def test_schedule__many_threads_get_every_row_within_the_limits(tmp_path):
    hosts = [f"h{i % 7}" for i in range(400)]
    schedule = scheduled(tmp_path, hosts, per_host=2, delay_s=0)
    lock = threading.Lock()
    active: Counter[str] = Counter()
    most: Counter[str] = Counter()
    taken: Counter[int] = Counter()

    def work() -> None:
        for _ in range(len(hosts) // 16):
            while True:
                row = schedule.take()
                with lock:
                    taken[row] += 1
                    active[hosts[row]] += 1
                    most[hosts[row]] = max(most[hosts[row]], active[hosts[row]])
                    again = taken[row] == 1 and row % 5 == 0
                time.sleep(0.0005)
                with lock:
                    active[hosts[row]] -= 1
                schedule.give_back(row, 0.01 if again else None)
                if not again:
                    break

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert taken == {row: 2 if row % 5 == 0 else 1 for row in range(400)}
    assert max(most.values()) == 2


def test_schedule__waits_for_slots_that_another_process_holds(tmp_path):
    with holding(tmp_path, "a", 1):
        schedule = scheduled(tmp_path, ["a", "b"], per_host=1, delay_s=0)
        assert schedule.take() == 1
        schedule.give_back(1)
    assert schedule.take() == 0  # its holder was killed
