"""Does distillation pay? The same small student, distilled and from scratch, in as many steps.

    python benchmarks/distillation.py --teacher RUN [--steps 400] [--seeds 3]

RUN is a finished run of `curate pretrain tiny --data ../shared/data/imagenette-96/train`. Each seed
trains a student (4 blocks, 96 wide) three ways on those images: by DINOv2 from scratch, distilled
from RUN by its heads, and by features alone. Judged is leave-one-out k-NN (k = 20) of the 2,000
images of ../shared/data/imagenette, with the moving averages. Runs that are finished are kept in
--work, so that the same command goes on after a stop. Minutes a run on one core.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from curation.config import parse_settings
from embedder.checkpoint import load_backbone
from pretrain.config import DistillConfig, PretrainConfig, load_config
from pretrain.evaluation.knn import class_tokens, default_size, labeled_folder
from pretrain.train import run

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
STUDENT = {"arch": "vitt16", "patch": 8, "width": 96, "depth": 4, "heads": 3, "drop_path": 0.0,
           "layerscale": 1.0}  # fmt: skip
K = 20


def student_config(method: str, teacher: str, steps: int, seed: int) -> PretrainConfig:
    values: dict[str, Any] = load_config("tiny").model_dump(mode="json")
    values["model"] = STUDENT
    values["optim"] |= {"steps": steps, "warmup_steps": min(100, steps // 4)}
    values["run"] |= {"seed": seed, "threads": 1, "checkpoint_every_steps": 100}
    if method == "scratch":
        return parse_settings(PretrainConfig, values, method)
    values |= {"teacher_run": teacher}
    if method == "features":
        values |= {"objective": "features"}
        values["crops"] |= {"local_count": 0}
    return parse_settings(DistillConfig, values, method)


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


def summary(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * statistics.mean(values):.1f} | {100 * spread:.1f} | {each}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="build/tiny")
    parser.add_argument("--work", default="build/distillation")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="scratch,prototypes,features")
    options = parser.parse_args()
    if not (Path(options.teacher) / "backbone.safetensors").is_file():
        print(f"left out: {options.teacher} holds no finished run; see --help")
        return
    teacher = leave_one_out(Path(options.teacher) / "backbone.safetensors")
    print(f"teacher: {100 * teacher:.1f}", flush=True)
    print("| student | k-NN, mean | deviation | each seed |\n|---|---|---|---|")
    found: dict[str, list[float]] = {name: [] for name in options.methods.split(",")}
    data = str(DATA / "imagenette-96" / "train")
    for seed in range(options.seeds):
        for method in found:
            out = f"{options.work}/{method}-{options.steps}-{seed}"
            config = student_config(method, options.teacher, options.steps, seed)
            found[method].append(leave_one_out(run(config, data, out).backbone))
    for method, values in found.items():
        print(f"| {method} | {summary(values)} |")
    for method in found.keys() - {"scratch"}:
        gains = [a - b for a, b in zip(found[method], found["scratch"], strict=True)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        mean = statistics.mean(gains)
        print(f"{method} gains {100 * mean:.1f} ± {100 * error:.1f} points (standard error)")


if __name__ == "__main__":
    main()
