import numpy as np
import pytest

from curation.neighbors.index.probe_margin import (
    TELLING_ROWS,
    narrowest_margin,
    recall_within,
    rows_wanted,
    wilson_bound,
)


def needed(*parts: tuple[float, int]) -> np.ndarray:
    return np.concatenate([np.full(count, margin, np.float16) for margin, count in parts])


def test_wilson_bound__is_the_root_of_its_equation():
    bound = float(wilson_bound(np.array(991), 1000))
    below = abs(0.991 - bound) / np.sqrt(bound * (1 - bound) / 1000)
    assert below == pytest.approx(1.645)
    assert float(wilson_bound(np.array(300), 300)) == pytest.approx(300 / (300 + 1.645**2))


def test_narrowest_margin__is_the_first_whose_bound_reaches_the_target():
    rows = needed((0, 1970), (0.01, 20), (0.02, 9), (np.inf, 1))
    chosen = narrowest_margin(rows, 0.99, 0.5)
    assert chosen.margin == np.float16(0.01)  # 1,990 of 2,000: at least 0.9916 of all
    assert chosen.recall == 1990 / 2000
    assert chosen.at_least == pytest.approx(0.9916, abs=1e-4)
    assert narrowest_margin(rows, 0.97, 0.5).margin == 0


def test_narrowest_margin__of_all_rows_the_share_itself_counts():
    rows = needed((0, 98), (0.01, 1), (0.02, 1))
    assert narrowest_margin(rows, 0.99, 0.5, is_sample=False).margin == np.float16(0.01)
    assert narrowest_margin(rows, 0.99, 0.5, is_sample=False).at_least == 0.99


def test_narrowest_margin__that_is_not_reached_meets_all_that_any_does():
    rows = needed((0, TELLING_ROWS), (0.02, 40), (np.inf, 60))
    assert narrowest_margin(rows, 0.99, 0.5).margin == np.float16(0.02)
    assert narrowest_margin(rows[-70:], 0.99, 0.5).margin == 0.5  # too few rows to tell
    assert narrowest_margin(needed((np.inf, 9)), 0.99, 0.5, is_sample=False).recall == 0


def test_narrowest_margin__without_rows_is_the_widest():
    chosen = narrowest_margin(needed((0, 0)), 0.99, 0.5)
    assert (chosen.margin, chosen.recall, chosen.at_least) == (0.5, None, None)


def test_recall_within__counts_what_a_margin_meets():
    rows = needed((0, 3), (0.25, 1), (np.inf, 1))
    assert [recall_within(rows, margin).recall for margin in (0, 0.25)] == [0.6, 0.8]


def test_rows_wanted__grow_with_what_is_to_be_proved():
    assert rows_wanted(0.9) == rows_wanted(0.99) == 2000
    for target in (0.999, 0.9999):
        rows = rows_wanted(target)
        assert float(wilson_bound(np.array(rows), rows)) > target
