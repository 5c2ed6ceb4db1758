"""Wrong input to `curate pretrain` ends in one line with the remedy, before the first step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from curation.errors import CurateError
from embedder.checkpoint import save_backbone
from embedder.vit import VisionTransformer, vit_config
from pipelines.cli.app import app
from tests.pretrain.small_runs import small_config, write_folder, write_shards

Case = Callable[[Path], list[str]]


def set_(change: str) -> Case:
    return lambda folder: ["--set", change]


def empty_manifest(folder: Path) -> list[str]:
    packed = write_shards(folder / "packed", [[]])  # one shard without rows
    return ["--data", str(packed)]


def weights(**shape: int) -> Case:
    def case(folder: Path) -> list[str]:
        config = {"width": 24, "depth": 2, "heads": 3, "image_size": 56, **shape}
        save_backbone(VisionTransformer(vit_config("vits14", **config)), folder / "w.safetensors")
        return ["--set", f"init={folder / 'w.safetensors'}"]

    return case


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (set_("crops.global_size=50"), r"crops\.global_size 50 .* multiple of the patch 14.* 56"),
        (set_("optim.stps=3"), r"optim\.stps.*did you mean 'steps'"),
        (empty_manifest, r"packed: holds no images; its shards are empty"),
        (weights(width=48), r"w\.safetensors.*weights do not fit"),
        (weights(depth=3), r"w\.safetensors.*weights do not fit"),
        (
            set_("crops.global_scale=[1.0, 0.3]"),
            r"crops\.global_scale' is \[1\.0, 0\.3\]: .* turn it",
        ),
        (
            set_("crops.global_scale=[2, 3]"),
            r"crops\.global_scale\.0' is 2: .*less than or equal to 1",
        ),
        (set_("crops.local_scale=[0, 1]"), r"crops\.local_scale\.0' is 0: .*greater than 0"),
        (set_("masks.ratio=[0.5, 0.1]"), r"masks\.ratio' is \[0\.5, 0\.1\]: .* turn it"),
        (set_("masks.ratio=[0.1, 3]"), r"masks\.ratio\.1' is 3: .*less than or equal to 1"),
        (set_("optim.betas=[0.9, 1.5]"), r"optim\.betas\.1' is 1\.5: .*less than 1"),
        (set_("optim.weight_decay=[-1, 0]"), r"optim\.weight_decay\.0' is -1: .*equal to 0"),
        (set_("teacher.momentum=[1.5, 1.0]"), r"teacher\.momentum\.0' is 1\.5: .*equal to 1"),
        (set_("teacher.momentum=[1.0, 0.9]"), r"teacher\.momentum' is \[1\.0, 0\.9\]: .* turn it"),
        (set_("teacher.temperature=[0.0, 0.1]"), r"teacher\.temperature\.0' is 0\.0: .*than 0"),
        (set_("data.seed_set_weights={a: -1}"), r"data\.seed_set_weights\.a' is -1: .*equal to 0"),
        (
            set_("data.seed_set_weights={a: 0}"),
            r"data\.seed_set_weights' is .*gives no set a share",
        ),
    ],
    ids=["crop", "key", "manifest", "width", "depth", *(str(i) for i in range(12))],
)
def test_pretrain__refuses_before_the_first_step(tmp_path: Path, case: Case, says: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(small_config().model_dump(mode="json")))
    images = write_folder(tmp_path / "images", 4)
    out = tmp_path / "out"
    given = case(tmp_path)
    data = [] if "--data" in given else ["--data", str(images)]
    command = ["pretrain", str(config), "--out", str(out), *data, *given]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, CurateError)
    with pytest.raises(CurateError, match=f"(?s){says}"):
        raise result.exception
    assert not (out / "log.jsonl").exists()
    assert not (out / "checkpoints").exists()
