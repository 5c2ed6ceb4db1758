"""Does distillation pay, and how without the teacher's heads? A small student, as many steps each.

    python benchmarks/distillation.py --teacher RUN [--steps 1500] [--seeds 3] [--methods ...]

RUN is a finished run of `curate pretrain tiny --data ../shared/data/imagenette-96/train`. Each seed
trains a student (4 blocks, 96 wide) on those images in several ways:

- scratch: DINOv2 without a teacher;
- prototypes: distilled from RUN by its heads;
- fitted: as if only RUN's backbone were at hand: heads are fitted on it in a third of the steps,
  and the student is distilled by them in the others;
- features: from RUN's backbone without heads.

Judged are the moving averages: leave-one-out k-NN (k = 20) of the 2,000 images of
../shared/data/imagenette, and mean IoU of a linear head on rendered scenes (those of our tests).
Runs that are finished are kept in --work, so that the same command goes on after a stop.
"""

import argparse
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from curation.config import laid_over, parse_settings
from embedder.checkpoint import load_backbone
from embedder.feature_maps import load_feature_model
from pretrain.config import DistillConfig, PretrainConfig, load_config
from pretrain.evaluation.datasets import SEGMENTATION, open_scenes
from pretrain.evaluation.knn import class_tokens, default_size, labeled_folder
from pretrain.evaluation.segmentation import SegmentationSettings, segmentation
from pretrain.train import run

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
STUDENT = {"arch": "vitt16", "patch": 8, "width": 96, "depth": 4, "heads": 3, "drop_path": 0.0,
           "layerscale": 4.0}  # fmt: skip
K = 20


@dataclass(frozen=True)
class Bench:
    """Where students come from and go to."""

    teacher: Path
    work: Path
    steps: int

    def train(self, method: str, seed: int) -> Path:
        """Train a student, or find it trained, and give its backbone."""
        out = self.work / f"{method}-{self.steps}-{seed}"
        if method == "scratch":
            return self.pretrained(out, seed, self.steps)
        if method == "prototypes":
            return self.distilled(out, seed, self.steps, teacher_run=self.teacher)
        backbone = self.teacher / "backbone.safetensors"
        if method == "features":
            changes = {"objective": "features", "crops": {"local_count": 0}}
            return self.distilled(out, seed, self.steps, teacher_run=backbone, **changes)
        fit_steps = self.steps // 3
        heads = out.with_name(f"{out.name}-heads")
        self.pretrained(heads, seed, fit_steps, **fitting(backbone, fit_steps))
        return self.distilled(out, seed, self.steps - fit_steps, teacher_run=heads)

    def pretrained(self, out: Path, seed: int, steps: int, **changes: Any) -> Path:
        """Train by DINOv2, by default a student from scratch."""
        values = laid_over(settings_of(seed, steps), {"model": STUDENT} | changes)
        return finished(parse_settings(PretrainConfig, values, out.name), out)

    def distilled(self, out: Path, seed: int, steps: int, **changes: Any) -> Path:
        """Train a student of `teacher_run`."""
        changes["teacher_run"] = str(changes["teacher_run"])
        values = laid_over(settings_of(seed, steps), {"model": STUDENT} | changes)
        return finished(parse_settings(DistillConfig, values, out.name), out)


def settings_of(seed: int, steps: int) -> dict[str, Any]:
    optim = {"steps": steps, "warmup_steps": min(100, steps // 4)}
    run_settings = {"seed": seed, "threads": 1, "checkpoint_every_steps": 100}
    values: dict[str, Any] = load_config("tiny").model_dump(mode="json")
    return laid_over(values, {"optim": optim, "run": run_settings})


def fitting(backbone: Path, steps: int) -> dict[str, Any]:
    """What `configs/pretrain/fit_heads.yaml` changes, at this size."""
    tiny = load_config("tiny").model_dump(mode="json")
    return {
        "model": tiny["model"],
        "init": str(backbone),
        "loss": {"koleo_weight": 0.0, "separate_heads": True},
        "optim": {"freeze_backbone_steps": steps, "base_lr": 1e-3},
    }


def finished(config: PretrainConfig, out: Path) -> Path:
    return Path(run(config, str(DATA / "imagenette-96" / "train"), str(out)).backbone)


@torch.no_grad()
def leave_one_out(backbone: Path) -> float:
    """Share of images that their K nearest others give their class, by the public weighting."""
    model = load_backbone(backbone)
    parts = [labeled_folder(DATA / "imagenette" / part) for part in ("train", "val")]
    images = [item for part in parts for item in part]
    names = sorted({label for _, label in images})
    labels = torch.tensor([names.index(label) for _, label in images])
    tokens = class_tokens(model, [file for file, _ in images], default_size(model))
    rows = F.normalize(tokens, dim=1)
    similarity = rows @ rows.T
    similarity.fill_diagonal_(-1)
    values, index = similarity.topk(K)
    votes = F.one_hot(labels[index], len(names)) * (values / 0.07).softmax(1)[..., None]
    return (votes.sum(1).argmax(1) == labels).float().mean().item()


def mean_iou(backbone: Path, scenes: Path) -> float:
    """Mean IoU of a linear head on the last layer's patches, 12 rendered scenes after 32."""
    settings = SegmentationSettings(crop=128, steps=200, warmup_steps=20, learning_rate=5e-3,
                                    batch_size=8, augment=False)  # fmt: skip
    model = load_feature_model(f"dinov2:{backbone}", device="cpu", image_size=128)
    train, _ = open_scenes(str(scenes / "train"), "train", SEGMENTATION)
    test, layout = open_scenes(str(scenes / "test"), "test", SEGMENTATION)
    return segmentation(model, train.scenes, test.scenes, layout, settings)["miou"]


def rendered_scenes(root: Path) -> Path:
    sys.path.insert(0, str(ROOT))
    from tests.pretrain.evaluation.scenes import write_scenes

    for part, count in (("train", 32), ("test", 12)):
        if not (root / part / "images" / f"{count - 1:03d}.png").is_file():
            shutil.rmtree(root / part, ignore_errors=True)
            write_scenes(root / part, count, seed=count)
    return root


def summary(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * statistics.mean(values):.1f} | {100 * spread:.1f} | {each}"


def gain(values: list[float], others: list[float]) -> str:
    gains = [100 * (a - b) for a, b in zip(values, others, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return f"{statistics.mean(gains):+.1f} ± {error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=Path("build/tiny"))
    parser.add_argument("--work", type=Path, default=Path("build/distillation"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="scratch,prototypes,fitted,features")
    options = parser.parse_args()
    teacher = options.teacher / "backbone.safetensors"
    if not teacher.is_file():
        print(f"left out: {options.teacher} holds no finished run; see --help")
        return
    bench = Bench(options.teacher, options.work, options.steps)
    scenes = rendered_scenes(options.work / "scenes")
    scores = {"k-NN": leave_one_out, "mean IoU": lambda file: mean_iou(file, scenes)}
    print("teacher:", {name: round(100 * score(teacher), 1) for name, score in scores.items()})
    methods = options.methods.split(",")
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(options.seeds):
        for method in methods:
            backbone = bench.train(method, seed)
            for name, score in scores.items():
                found.setdefault((name, method), []).append(score(backbone))
    print("| score, % | student | mean | deviation | each seed | against the first |")
    print("|---|---|---|---|---|---|")
    for (name, method), values in found.items():
        print(
            f"| {name} | {method} | {summary(values)} | {gain(values, found[name, methods[0]])} |"
        )


if __name__ == "__main__":
    main()
