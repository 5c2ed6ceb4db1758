import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from curation.errors import ConfigError
from pretrain.evaluation.features import Features
from pretrain.evaluation.retrieval import (
    Truth,
    average_precision,
    mean_average_precision,
    open_revisited,
    rank_database,
    retrieve_classes,
    retrieve_revisited,
    trapezoid_precision,
)
from tests.pretrain.small_runs import jpeg

NONE = np.zeros(0, np.int64)


def test_average_precision__by_hand() -> None:
    ranking = np.array([True, False, True, False, False, True])
    assert average_precision(ranking, 3) == pytest.approx((1 / 1 + 2 / 3 + 3 / 6) / 3)
    assert average_precision(ranking, 4) == pytest.approx((1 / 1 + 2 / 3 + 3 / 6) / 4)


def test_trapezoid_precision__by_hand() -> None:
    """Precision before and at the place of each relevant image: (1, 1), (1/2, 2/3), (2/5, 3/6)."""
    ranking = np.array([True, False, True, False, False, True])
    expected = ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2 + (2 / 5 + 3 / 6) / 2) / 3
    assert trapezoid_precision(ranking, 3) == pytest.approx(expected)


def test_mean_average_precision__junk_is_taken_out_and_empty_queries_do_not_count() -> None:
    ranking = np.array([[3, 0, 1, 2], [0, 1, 2, 3]])
    truths = [Truth(np.array([0]), np.array([3])), Truth(NONE, NONE)]
    assert mean_average_precision(ranking, truths) == 1.0
    with pytest.raises(ConfigError, match="no query has a relevant image"):
        mean_average_precision(ranking, [Truth(NONE, NONE)] * 2)


def test_retrieve_classes__by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    database = Features(rows, ["a", "b", "a"], ["1", "2", "3"])
    queries = Features(torch.tensor([[2.0, 0.1]]), ["a"], ["4"])
    assert rank_database(queries.rows, database.rows).tolist() == [[0, 1, 2]]
    found = retrieve_classes(database, queries, (1, 2))
    assert found["map"] == pytest.approx((1 + 2 / 3) / 2)
    assert (found["precision_1"], found["precision_2"]) == (1.0, 0.5)


def test_retrieve_classes__a_query_in_the_database_is_no_answer_to_itself() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    both = Features(rows, ["a", "b", "a"], ["1", "2", "3"])
    found = retrieve_classes(both, both, (1, 2))
    # Each "a" finds the "b" first and the other "a" second; "b" has no other of its class.
    assert found["map"] == pytest.approx(1 / 2)
    assert found["precision_1"] == 0
    assert found["precision_2"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)


def write_revisited(root: Path, values: object) -> Path:
    (root / "jpg").mkdir(parents=True)
    for name in ("d0", "d1", "d2", "d3", "q0"):
        (root / "jpg" / f"{name}.jpg").write_bytes(jpeg(0))
    file = root / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps(values))
    return file


def test_retrieve_revisited__medium_and_hard_by_hand(tmp_path: Path) -> None:
    row = {"bbx": [0.0, 0.0, 20.0, 20.0], "easy": [0], "hard": np.array([2]), "junk": [1]}
    values = {"imlist": ["d0", "d1", "d2", "d3"], "qimlist": ["q0"], "gnd": [row]}
    truth = open_revisited(write_revisited(tmp_path, values))
    assert [path.name for path in truth.queries] == ["q0.jpg"]
    database = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.5, 0.5]])
    found = retrieve_revisited(database, torch.tensor([[1.0, 0.0]]), truth)
    # Ranked 0 1 3 2. Medium: 0 3 2 with 0 and 2 relevant; hard: 3 2 with 2 relevant.
    assert found["map_medium"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert found["map_hard"] == pytest.approx((0 + 1 / 2) / 2)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1 + 1",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (Hostile(), r"names builtins\.eval, which is not allowed"),
        ([1], "holds a list"),
        ({"imlist": []}, "no truth of revisited"),
    ],
)
def test_open_revisited__refuses_code_and_other_files(
    tmp_path: Path, values: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_revisited(write_revisited(tmp_path, values))
