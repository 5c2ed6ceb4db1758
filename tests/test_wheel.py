"""What a user installs: the four packages and the configs, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_wheel__ships_packages_configs_and_data(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        *("embedder", "curation", "pretrain", "pipelines", "configs")
    }
    for needed in (
        "configs/recipes/demo.yaml",
        "configs/recipes/lvd142m.yaml",
        "configs/pretrain/demo.yaml",
        "embedder/encoders/lite_copy.safetensors",
        "pipelines/web/templates/base.html.j2",
    ):
        assert needed in names
    shipped = {name for name in names if name.startswith("pipelines/web/report/")}
    here = (ROOT / "pipelines" / "web" / "report").rglob("*")
    ours = {str(f.relative_to(ROOT)) for f in here if f.is_file() and "__pycache__" not in f.parts}
    assert shipped == ours
