import numpy as np

from embedder.calibration import (
    ComponentScores,
    compare,
    nearest_neighbor_accuracy,
    score_components,
    with_copies,
)
from embedder.edits import EDITS


def test_with_copies__images_then_their_copies_the_same_every_time() -> None:
    images = [
        np.random.default_rng(i).integers(0, 255, (24, 32, 3)).astype(np.uint8) for i in range(2)
    ]
    once, again = (
        [image() if callable(image) else image for image in with_copies(images)] for _ in range(2)
    )
    assert len(once) == 2 * (1 + len(EDITS))
    assert once[1 + len(EDITS)] is images[1]
    assert all(map(np.array_equal, once, again))


def test_compare__counts_by_hand() -> None:
    # two images with one copy each: the second image's copy looks like the first image
    rows = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.96, 0.28]])
    scores = compare(rows, ("edit",))
    assert np.allclose(scores.copies, [[0.8], [0.28]])
    assert np.allclose(sorted(scores.pairs), [0.28, 0.8])
    assert np.allclose(sorted(scores.strangers), [0, 0.6, 0.936, 0.96], atol=1e-6)
    assert np.allclose(scores.nearest, [0, 0])
    assert scores.recall(0.5) == 0.5
    assert scores.precision(0.5) == 1 / 4
    assert scores.recall_by_edit(0.2) == {"edit": 1.0}
    assert scores.innocents(0.5) == 0
    assert scores.threshold_at_precision(0.99) == 0.96


def test_nearest_neighbor_accuracy__by_vote() -> None:
    train = np.array([[1, 0], [0.99, 0.1], [0, 1], [0.1, 0.99], [-1, 0]])
    labels = np.array([0, 0, 1, 1, 1])
    test = np.array([[1, 0.05], [0.05, 1]])
    assert nearest_neighbor_accuracy(train, labels, test, np.array([0, 1]), k=3) == 1
    assert nearest_neighbor_accuracy(train, labels, test, np.array([1, 1]), k=3) == 0.5


def test_score_components__a_picture_between_two_images_costs_one_of_them() -> None:
    rows = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]])  # image, its copy; image, its copy
    apart = score_components(rows[[0, 0, 2, 2]], 1, 0.9)
    assert (apart.precision, apart.lost) == (1, 0)
    chained = score_components(rows, 1, 0.75)
    assert (chained.precision, chained.lost) == (2 / 6, 0.5)
    assert score_components(rows, 1, 0.97) == ComponentScores(1, 0)
