import threading

import pytest
import torch

from curation.neighbors.kernels.threads import in_threads, side_by_side


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_in_threads__results_come_in_order_and_items_are_drawn_as_needed(threads):
    drawn, most = [], 0

    def items():
        for item in range(50):
            drawn.append(item)
            yield item

    for done, result in enumerate(in_threads(lambda item: item * item, items(), threads)):
        assert result == done * done
        most = max(most, len(drawn) - done)
    assert len(drawn) == 50
    assert most <= 2 * threads + 1


def test_in_threads__products_run_on_one_thread_each():
    limits = set(in_threads(lambda _: torch.get_num_threads(), range(8), 2))
    assert limits == {1}


def test_in_threads__the_number_of_threads_of_the_caller_stays(two_threads):
    limits = set(in_threads(lambda _: torch.get_num_threads(), range(8), 1))
    assert limits == {1}
    assert torch.get_num_threads() == 2


def test_in_threads__an_error_reaches_the_caller():
    def fail(item):
        if item == 3:
            raise ValueError("item 3")
        return threading.get_ident()

    with pytest.raises(ValueError, match="item 3"):
        list(in_threads(fail, range(10), 2))


def test_side_by_side__every_item_once_and_each_on_one_thread(two_threads):
    done, threads = [], set()

    def work(item):
        done.append(item)
        threads.add((threading.get_ident(), torch.get_num_threads()))

    side_by_side(work, range(50))
    assert sorted(done) == list(range(50))
    assert {count for _, count in threads} == {1}
    assert torch.get_num_threads() == 2  # the caller's number stays


def test_side_by_side__an_error_reaches_the_caller(two_threads):
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda item: 1 / item, range(3))
