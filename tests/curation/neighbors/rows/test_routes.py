import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.neighbors.rows.routes import Routes, bounds_of

LISTS = 9
ANY_ROWS = st.lists(
    st.tuples(
        st.integers(0, LISTS - 1), st.dictionaries(st.integers(0, LISTS - 1), st.integers(1, 8))
    ),
    max_size=12,
)


def routes_of(rows):
    """Routes of (home, {list: eighths of margin}) pairs; a home is not probed."""
    probes = [(one, margin / 8) for home, of in rows for one, margin in of.items() if one != home]
    counts = [len(of.keys() - {home}) for home, of in rows]
    lists, margins = zip(*probes, strict=True) if probes else ((), ())
    return Routes(
        np.array([home for home, _ in rows], np.int32),
        bounds_of(np.array(counts, np.int64)).astype(np.int64),
        np.array(lists, np.int32),
        np.array(margins, np.float16),
    )


def margin_of(row, one):
    home, of = row
    return 0 if one == home else of.get(one, np.inf * 8) / 8


def same(left, right):
    names = ("home", "bounds", "probes", "margins")
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


@given(rows=ANY_ROWS, eighths=st.integers(0, 9))
def test_within__gives_the_probes_up_to_a_margin(rows, eighths):
    who, lists = routes_of(rows).within(eighths / 8)
    assert list(zip(who.tolist(), lists.tolist(), strict=True)) == [
        (number, one)
        for number, (home, of) in enumerate(rows)
        for one, margin in of.items()
        if one != home and margin <= eighths
    ]


@given(rows=ANY_ROWS)
def test_margins_to__says_at_which_margin_a_row_meets_a_list(rows):
    who, lists = (side.ravel() for side in np.meshgrid(range(len(rows)), range(LISTS)))
    found = routes_of(rows).margins_to(who.astype(int), lists.astype(int))
    wanted = [margin_of(rows[row], one) for row, one in zip(who, lists, strict=True)]
    assert found.tolist() == wanted


@given(rows=ANY_ROWS, data=st.data())
def test_take__is_that_of_the_rows_themselves_and_joined_puts_them_together(rows, data):
    numbers = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9)) if rows else []
    taken = routes_of(rows).take(np.array(numbers, np.int64))
    assert same(taken, routes_of([rows[number] for number in numbers]))
    cut = data.draw(st.integers(0, len(rows)))
    assert same(Routes.joined([routes_of(rows[:cut]), routes_of(rows[cut:])]), routes_of(rows))


@pytest.mark.parametrize("root", ["", "memory:/"])
def test_read__gives_what_was_written(tmp_path, root):
    rows = [(2, {3: 1, 4: 8}), (0, {}), (5, {1: 2})]
    for some in (rows, []):
        routes_of(some).write(f"{root}{tmp_path}/routes.bin")
        assert same(Routes.read(f"{root}{tmp_path}/routes.bin", len(some)), routes_of(some))
