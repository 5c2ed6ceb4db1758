"""What `lite` promises, on photos that its head has not seen."""

from pathlib import Path

import numpy as np
import pytest

from embedder.calibration import CopyScores, nearest_neighbor_accuracy, score_copies
from embedder.encoder import embed_images, load_encoder
from embedder.images import decode

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no test photos in {DATA}")


@pytest.fixture(scope="module", params=[3, pytest.param(1, marks=pytest.mark.slow)])
def copies(request: pytest.FixtureRequest) -> CopyScores:
    """Scores of every third photo, or of all of them in `make test-slow`."""
    paths = sorted((DATA / "photos").glob("*.jpg"))[:: request.param]
    return score_copies(load_encoder("lite-copy"), [decode(path.read_bytes()) for path in paths])


def test_lite_copy__finds_edited_copies_at_its_own_threshold(copies: CopyScores) -> None:
    thresholds = load_encoder("lite-copy").thresholds
    assert thresholds is not None
    assert copies.recall(thresholds.dedup) >= 0.99
    assert copies.recall_of_pairs(thresholds.dedup) >= 0.99
    assert min(copies.recall_by_edit(thresholds.dedup).values()) >= 0.98
    assert copies.precision(thresholds.dedup) >= 0.999
    assert (copies.strangers > thresholds.dedup).mean() <= 1e-6


def test_lite_copy__spares_the_innocents(copies: CopyScores) -> None:
    thresholds = load_encoder("lite-copy").thresholds
    assert thresholds is not None
    assert thresholds.leak <= thresholds.dedup
    assert copies.innocents(thresholds.dedup) <= 0.003
    assert copies.innocents(thresholds.leak) <= 0.003


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_lite_semantic__nearest_neighbors_share_the_class(step: int) -> None:
    rows, labels = {}, {}
    for split in ("train", "val"):
        paths = sorted((DATA / "imagenette" / split).glob("*/*"))[::step]
        folders = sorted({path.parent.name for path in paths})
        labels[split] = np.array([folders.index(path.parent.name) for path in paths])
        images = (decode(path.read_bytes()) for path in paths)
        (rows[split],) = embed_images([load_encoder("lite-semantic")], images)
    accuracy = nearest_neighbor_accuracy(rows["train"], labels["train"], rows["val"], labels["val"])
    assert accuracy >= 0.93
