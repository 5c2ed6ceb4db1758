import numpy as np
import pytest

from curation.neighbors.dedup.pool_threshold import choose_threshold
from curation.neighbors.rows.vectors import VectorSource
from pipelines.engines.local_engine import LocalEngine
from tests.curation.neighbors.dedup.test_unrelated_tail import pool_with_copies, unrelated_per_row


def choose(pool, folder, given, max_component=1000):
    return choose_threshold(
        [VectorSource(pool, "copy")], given, max_component, str(folder), LocalEngine(), 0
    )


@pytest.mark.parametrize("num_rows", [1000, 4000])
def test_choose_threshold__auto_has_few_unrelated_rows_by_brute_force(embed, tmp_path, num_rows):
    rows, owner = pool_with_copies(num_rows)
    chosen = choose(embed(rows), tmp_path, "auto")
    assert chosen.value == chosen.proposed
    assert unrelated_per_row(rows, owner, chosen.value) <= 0.005
    assert chosen.figures["unrelated_per_row"] <= 0.001


def test_choose_threshold__what_is_given_stays(embed, tmp_path, caplog):
    rows, owner = pool_with_copies(2000)
    chosen = choose(embed(rows), tmp_path, 0.45)
    counted = unrelated_per_row(rows, owner, 0.45)
    assert chosen.value == 0.45
    assert 0.3 * counted < chosen.figures["unrelated_per_row"] < 3 * counted
    assert "above 0.45 a row of this pool has" in caplog.text


def test_choose_threshold__the_encoder_s_is_raised_only_where_components_would_run_together(
    embed, tmp_path
):
    rows = np.random.default_rng(0).standard_normal((1200, 16))
    pool = embed(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    assert choose(pool, tmp_path / "a", None, 1200).value == 0.6
    raised = choose(pool, tmp_path / "b", None, 1000)
    assert raised.value == raised.proposed > 0.75
