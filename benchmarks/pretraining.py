"""Speed of pretraining against others, all in one run of `python benchmarks/pretraining.py`.

ViT-S/14, batch 16, 2 x 224 + 8 x 98 px, one process, as many threads as cores, no loader
processes, every rival under the same allocator setting. `lightly-train` runs from an interpreter
of its own (--lightly PYTHON; its pins differ from ours) and is left out without one. Printed are
the median wall time and CPU time of a step and the peak memory of the process; on a busy machine
only the CPU time means anything. About five minutes a rival on two quiet cores.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""Keeps freed pages: by default up to a third of a step goes into giving them back and faulting."""

OURS = """
import json, resource, sys, time
from curation.config import parse_settings
from pretrain.config import PretrainConfig
from pretrain.train import run
data, out, steps, prototypes, precision, *compiled = sys.argv[1:]
head = {"prototypes": int(prototypes)}
config = parse_settings(PretrainConfig, {
    "model": {"arch": "vits14", "drop_path": 0.0}, "data": {"workers": 0},
    "loss": {"centering": "centering", "separate_heads": False, "dino_head": head},
    "optim": {"batch_size": 16, "steps": int(steps)},
    "run": {"precision": precision, "device": "cpu", "log_every_steps": 1,
            "compile": bool(compiled)}}, "benchmark")
marks = [(time.perf_counter(), time.process_time())]
def mark(record):
    marks.append((time.perf_counter(), time.process_time()))
run(config, data, out, progress=mark)
print(json.dumps({"marks": marks, "kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""

LIGHTLY = """
import json, resource, sys, time
import lightly_train
from lightly_train._methods.dinov2.dinov2 import DINOv2
data, out, steps, prototypes, precision = sys.argv[1:]
marks = []
step = DINOv2.training_step_impl
def timed(self, *args, **kwargs):
    marks.append((time.perf_counter(), time.process_time()))
    return step(self, *args, **kwargs)
DINOv2.training_step_impl = timed
lightly_train.pretrain(out=out, data=data, model="dinov2/vits14-notpretrained", method="dinov2",
    batch_size=16, num_workers=0, accelerator="cpu", devices=1, precision=precision, epochs=1,
    method_args={"output_dim": int(prototypes)}, model_args={"drop_path_rate": 0.0},
    trainer_args={"max_steps": int(steps) + 1})
print(json.dumps({"marks": marks, "kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def run_rival(python: str, script: str, options: argparse.Namespace, *how: str) -> dict[str, float]:
    """Steps of a script; how: its precision, and for ours `compiled`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", script, options.data, f"{folder}/out", str(options.steps)]
        command += [str(options.prototypes), *how]
        environment = {**os.environ, **ALLOCATOR, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": "."}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {**step_times(found["marks"]), "GB": found["kb"] / 1e6}


def step_times(marks: list[list[float]]) -> dict[str, float]:
    """Medians over all steps but the first, which builds caches."""
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)][1:]
    wall, cpu = (statistics.median(column) for column in zip(*steps, strict=True))
    return {"wall s": wall, "cpu s": cpu, "images/s": 16 / wall}


def crop_times(data: str, count: int = 40) -> dict[str, float]:
    """CPU milliseconds an image: our multi-crop, and the public recipe on torchvision."""
    import numpy as np
    from PIL import Image

    from pretrain.config import CropSettings
    from pretrain.crops import crop_recipes, multi_crop

    files = sorted(Path(data).rglob("*.jpg"))[:count]
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    recipes, rng = crop_recipes(CropSettings()), np.random.default_rng(0)
    theirs = torchvision_crops()
    ours_ms = cpu_ms(lambda image: multi_crop(image, recipes, rng), images)
    return {"ours": ours_ms, "torchvision": cpu_ms(lambda x: theirs(Image.fromarray(x)), images)}


def cpu_ms(work: Callable[[Any], object], images: list[Any]) -> float:
    work(images[0])
    start = time.process_time()
    for image in images:
        work(image)
    return (time.process_time() - start) / len(images) * 1e3


def torchvision_crops() -> Callable[[Any], list[Any]]:
    """The public recipe, as torchvision's own transforms do it."""
    from torchvision import transforms as t

    def recipe(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
        steps = [
            t.RandomResizedCrop(size, scale, interpolation=t.InterpolationMode.BICUBIC),
            t.RandomHorizontalFlip(),
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            t.RandomGrayscale(0.2),
            t.RandomApply([t.GaussianBlur(9, (0.1, 2.0))], blur),
            t.RandomSolarize(128, solarize),
            t.ToTensor(),
            t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
        return t.Compose(steps)

    first, second = recipe(224, (0.32, 1.0), 0.0, 0.0), recipe(224, (0.32, 1.0), 0.9, 0.2)
    local = recipe(98, (0.05, 0.32), 0.5, 0.0)
    return lambda image: [first(image), second(image), *[local(image) for _ in range(8)]]


def packing_times() -> dict[str, float]:
    """CPU seconds of the student's forward and backward pass, packed and one pass a size."""
    import torch

    from embedder.vit import VisionTransformer, vit_config

    model = VisionTransformer(vit_config("vits14", image_size=224)).train()
    crops = [torch.randn(32, 3, 224, 224), torch.randn(128, 3, 98, 98)]

    def packed() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.forward_packed(crops, [None, None])
            torch.stack([token.cls.float().square().sum() for token in tokens]).sum().backward()

    def apart() -> None:
        for crop in crops:
            with torch.autocast("cpu", torch.bfloat16):
                model(crop).cls.float().square().sum().backward()

    return {"packed": best_cpu_s(packed), "one a size": best_cpu_s(apart)}


def best_cpu_s(work: Callable[[], None], times: int = 3) -> float:
    work()
    marks = []
    for _ in range(times):
        start = time.process_time()
        work()
        marks.append(time.process_time() - start)
    return min(marks)


def show(name: str, row: dict[str, float]) -> None:
    cells = "  ".join(f"{key} {value:.2f}" for key, value in row.items())
    print(f"{name:38s} {cells}", flush=True)


def main() -> None:
    sys.path[0] = str(ROOT)  # this file's folder would make it the package `pretrain`
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(PHOTOS), help="folder of images")
    parser.add_argument("--lightly", help="interpreter that has lightly-train")
    parser.add_argument("--compiled", action="store_true", help="ours with torch.compile, too")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prototypes", type=int, default=65536)
    options = parser.parse_args()
    if not Path(options.data).is_dir():
        print(f"{options.data}: no such folder; nothing to measure on (--data FOLDER)")
        return
    show("ours, bfloat16", run_rival(sys.executable, OURS, options, "bfloat16"))
    if options.compiled:
        times = run_rival(sys.executable, OURS, options, "bfloat16", "compiled")
        show("ours, bfloat16, torch.compile", times)
    if options.lightly:
        show("lightly-train, default", run_rival(options.lightly, LIGHTLY, options, "auto"))
        show("lightly-train, bfloat16", run_rival(options.lightly, LIGHTLY, options, "bf16-mixed"))
    show("crops, CPU ms an image", crop_times(options.data))
    show("forward and backward, CPU s", packing_times())


if __name__ == "__main__":
    main()
