import threading

import pytest

from curation.neighbors.threads import side_by_side


@pytest.fixture
def two_threads():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_side_by_side__every_item_once_and_each_on_one_thread(two_threads):
    import torch

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
