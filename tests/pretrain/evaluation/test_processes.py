"""Two processes of torchrun find what one finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedder.checkpoint import save_backbone
from embedder.vit import VisionTransformer, ViTConfig
from tests.pretrain.evaluation.scenes import write_scenes

ROOT = Path(__file__).parents[3]
PROGRAM = (
    "import json, sys, torch\n"
    "from pretrain.evaluation.tasks import Request, run_task\n"
    "from pretrain.parallel import process_group\n"
    "with process_group(torch.device('cpu')):\n"
    "    for task, encoder, train, test, changes in json.loads(sys.argv[1]):\n"
    "        request = Request(task, encoder, train, test, device='cpu', changes=changes)\n"
    "        line = json.dumps([task, dict(run_task(request).metrics)])\n"
    "        sys.stdout.write(line + chr(10))\n"
    "        sys.stdout.flush()\n"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(24, 4, 3, patch=14, image_size=56))
    save_backbone(model, root / "b.safetensors")
    rng = np.random.default_rng(0)
    for part, count in (("train", 7), ("val", 4)):
        for name in ("a", "b", "c"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    write_scenes(root / "scenes", 5, seed=0)
    return root


def run_jobs(jobs: list[list[object]], processes: int) -> dict[str, dict[str, float]]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program = ["--no-python", sys.executable] if processes > 1 else []
    command = [sys.executable, *(launch if processes > 1 else []), *program, "-c", PROGRAM]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, json.dumps(jobs)], capture_output=True, text=True,
                          check=False, cwd=ROOT, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[:3000]
    found: dict[str, dict[str, float]] = {}
    for line in done.stdout.splitlines():
        task, metrics = json.loads(line)
        assert found.setdefault(task, metrics) == metrics  # the same on every process
    return found


def test_run_task__two_processes_find_what_one_finds(data: Path) -> None:
    both = [str(data / "b.safetensors"), str(data / "train"), str(data / "val")]
    dense = [both[0], str(data / "scenes"), str(data / "scenes")]
    steps = ["steps=3", "batch_size=2", "crop=56"]
    jobs = [
        ["knn", *both, ["k=[3]"]],
        ["linear", *both, ["steps=30", "views=1"]],
        ["artifacts", *both, []],
        ["segmentation", *dense, steps],
    ]
    one = data / "one"
    (one / "a").mkdir(parents=True)
    (one / "a" / "0.png").write_bytes((data / "val" / "a" / "0.png").read_bytes())
    few = [both[0], str(data / "train"), str(one)]  # fewer images than processes
    alone, together = run_jobs(jobs, 1), run_jobs(jobs, 2)
    jobs_of_few = [["linear", *few, ["steps=5"]], ["artifacts", *few, []]]
    assert run_jobs(jobs_of_few, 2).keys() == {"linear", "artifacts"}
    for task in ("knn", "linear", "artifacts"):
        assert together[task] == pytest.approx(alone[task], abs=1e-6)
    assert together["segmentation"].keys() == alone["segmentation"].keys()
