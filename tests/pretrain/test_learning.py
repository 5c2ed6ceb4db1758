"""That training on real photos moves somewhere, and does not collapse on the way."""

import math
from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.run_log import Record, read_lines
from pretrain.train import run

CHANGES = (
    "optim.steps=240",
    "optim.warmup_steps=24",
    "run.device=cpu",
    "run.log_every_steps=20",
)


def dino_share(record: Record) -> float:
    """The DINO loss as a share of its trivial value: 1 where no crop tells anything."""
    loss = record["dino_global_crops_loss"] + record["dino_local_crops_loss"]
    return float(loss / math.log(256))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_tiny__does_not_collapse(shared_data: Path, tmp_path: Path, centering: str) -> None:
    config = load_config("tiny", [*CHANGES, f"loss.centering={centering}"])
    result = run(config, str(shared_data / "imagenette-96" / "train"), str(tmp_path))
    records = read_lines(result.log)
    late = [record for record in records if record["step"] > 120]
    assert not any(record["alarms"] for record in records)
    assert all(record["feature_rank"] > 10 for record in late)
    assert all(record["prototypes_in_use"] >= 4 for record in late)
    assert all(0.05 < record["teacher_entropy"] < 0.95 for record in late)
    assert sum(map(dino_share, late)) / len(late) < 0.97
    assert result.last["ibot_loss"] < 0.8 * result.first["ibot_loss"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tiny__uncentered_teacher_collapses_and_is_seen(shared_data: Path, tmp_path: Path) -> None:
    """The alarms are no ornament: a center that never moves and no KoLeo end in one prototype."""
    changes = ("loss.center_momentum=0.999999", "loss.koleo_weight=0", "loss.ibot_weight=0")
    config = load_config("tiny", [*CHANGES, *changes])
    result = run(config, str(shared_data / "imagenette-96" / "train"), str(tmp_path))
    last = result.last
    assert last["alarms"] or last["feature_rank"] < 10 or last["prototypes_in_use"] < 4
