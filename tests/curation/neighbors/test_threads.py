import threading

import pytest
import torch

from curation.neighbors.threads import in_threads


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


def test_in_threads__an_error_reaches_the_caller():
    def fail(item):
        if item == 3:
            raise ValueError("item 3")
        return threading.get_ident()

    with pytest.raises(ValueError, match="item 3"):
        list(in_threads(fail, range(10), 2))
