from importlib import resources
from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.copy_config import load_training_config

FOLDER = Path(str(resources.files("configs").joinpath("pretrain")))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_config__loads_and_names_command_and_cost(path: Path) -> None:
    load_training_config(path.stem)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"curate pretrain {path.stem} " in header[0]
    assert any(line.startswith("# Cost: ") for line in header)
    assert any("Expected: " in line for line in header)


@pytest.mark.parametrize(("name", "processes"), [("vitl14", 96), ("vitg14", 256), ("vits14", 48)])
def test_shipped_config__paper_s_batch_and_rate(name: str, processes: int) -> None:
    config = load_config(name)
    assert config.effective_batch(processes) == 3072
    assert config.peak_lr(processes) == pytest.approx(2e-4 * 3**0.5)
    assert (config.vit().ffn == "mlp") == (name == "vits14")


def test_shipped_config__short_run() -> None:
    config = load_config("vitl16_short")
    assert config.vit().grid == 14
    assert config.effective_batch(32) == 2048
    assert not config.loss.separate_heads
