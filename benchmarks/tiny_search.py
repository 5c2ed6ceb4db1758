"""The search behind configs/pretrain/tiny.yaml: candidates of equal CPU time, compared by k-NN.

`python benchmarks/tiny_search.py NAME… --cpu-s 180` trains each named candidate (a set of changes
to the settings in this file) on Imagenette at 64 px with one thread for about so much CPU time,
all schedules stretched to fit, and prints a line of JSON: steps, samples, leave-one-out k-NN (20)
of the teacher on the training images (the test images choose nothing; 9,469 queries leave a
standard error of half a point), and the DINO loss as a share of log K. `baselines` prints what
raw pixels and untrained networks reach, and `RUN` (a run's folder) what its backbone reaches: k-NN
of the test images, their mean distance to the nearest other one (what KoLeo spreads), and how well
masked patches are guessed (what iBOT teaches): its loss as it is logged, and, without heads, the
cosine of the student's masked patches with the teacher's, less their mean.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
TRAIN = DATA / "imagenette-96" / "train"
GALLERIES = {"1,500": DATA / "imagenette" / "train", "9,469": TRAIN}
TEST = DATA / "imagenette" / "val"

SKETCH = {
    "model": {"arch": "vitt16", "patch": 8, "width": 192, "depth": 6, "heads": 3,
              "drop_path": 0.0, "layerscale": 1.0},
    "crops": {"global_size": 64, "local_size": 32, "local_count": 4, "blur": "nominal"},
    "loss": {
        "centering": "centering",
        "dino_head": {"prototypes": 256, "hidden": 512, "bottleneck": 128},
        "ibot_head": {"prototypes": 256, "hidden": 512, "bottleneck": 128},
    },
    "teacher": {"momentum": [0.98, 1.0], "temperature": [0.04, 0.04],
                "temperature_warmup_steps": 0},
    "optim": {"batch_size": 64, "base_lr": 5.0e-4, "lr_scaling": "none",
              "weight_decay": [0.04, 0.2], "freeze_last_layer_steps": 0},
    "data": {"workers": 0},
    "run": {"precision": "bfloat16", "device": "cpu", "threads": 1},
}  # fmt: skip
"""Where the search began."""

SMALL = {"model.width": 128, "model.depth": 4, "model.heads": 2}
BUNDLE = {
    **SMALL,
    "optim.base_lr": 1.0e-3,
    "optim.patch_embed_lr": 1.0,
    "optim.weight_decay": [0.04, 0.04],
    "crops.global_scale": [0.25, 1.0],
    "crops.local_scale": [0.08, 0.4],
}
EASY = {"crops.global_scale": [0.5, 1.0], "crops.local_scale": [0.2, 0.5]}
BOTH = {**SMALL, **EASY, "model.layerscale": 4.0}
CANDIDATES: dict[str, dict[str, Any]] = {
    "sketch": {},
    "small": SMALL,
    "bundle": BUNDLE,
    "p16": {"model.patch": 16, "crops.local_size": 48},
    "easy": {**SMALL, **EASY},
    "sharp": {**SMALL, "crops.blur": "released"},
    "fast": {**SMALL, "optim.base_lr": 2.0e-3},
    "spread": {**SMALL, "loss.koleo_weight": 0.5},
    "balanced": {**SMALL, "loss.centering": "sinkhorn_knopp"},
    "few": {**SMALL, "loss.dino_head.prototypes": 64, "loss.ibot_head.prototypes": 64},
    "strong_init": {**SMALL, "model.layerscale": 4.0},
    "both": BOTH,
    "both_sharp": {**BOTH, "crops.blur": "released"},
    "both_slow": {**BOTH, "optim.base_lr": 2.5e-4},
    "both_easier": {
        **BOTH,
        "crops.blur": "released",
        "crops.global_scale": [0.7, 1.0],
        "crops.local_scale": [0.3, 0.6],
    },
    "both_no_ibot": {**BOTH, "loss.ibot_weight": 0.0},
}
"""Changes to SKETCH by dotted key."""


def settings(changes: dict[str, Any], steps: int, seed: int) -> dict[str, Any]:
    values = json.loads(json.dumps(SKETCH))
    values["optim"] |= {"steps": steps, "warmup_steps": steps // 10}
    values["run"] |= {"seed": seed, "log_every_steps": max(steps // 20, 1),
                      "checkpoint_every_steps": steps}  # fmt: skip
    for key, value in changes.items():
        section = values
        *path, last = key.split(".")
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return values


def train(
    changes: dict[str, Any],
    steps: int,
    seed: int,
    out: str,
    progress: Callable[[Any], None] | None = None,
) -> Any:
    from curation.config import parse_settings
    from pretrain.config import PretrainConfig
    from pretrain.train import run

    config = parse_settings(PretrainConfig, settings(changes, steps, seed), "search")
    return run(config, str(TRAIN), out, progress=progress)


def step_cpu_s(changes: dict[str, Any], seed: int) -> float:
    """CPU seconds of a step, probes aside: the median of a few."""
    marks: list[float] = []
    quick = {**changes, "run.log_every_steps": 1}
    with tempfile.TemporaryDirectory() as out:
        train(quick, 8, seed, out, lambda _: marks.append(time.process_time()))
    return statistics.median(after - before for before, after in itertools.pairwise(marks))


def search(name: str, cpu_s: float, seed: int) -> dict[str, Any]:
    changes = CANDIDATES[name]
    steps = round(cpu_s / step_cpu_s(changes, seed))
    print(f"{name}: {steps} steps", file=sys.stderr, flush=True)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        result = train(changes, steps, seed, out)
        spent = round(time.process_time() - start)
        knn = leave_one_out(result.backbone)
    values = settings(changes, steps, seed)
    prototypes = values["loss"]["dino_head"]["prototypes"]
    last = result.last
    dino = last["dino_global_crops_loss"] + last.get("dino_local_crops_loss", 0)
    return {
        "name": name,
        "seed": seed,
        "steps": steps,
        "samples": steps * values["optim"]["batch_size"],
        "cpu_s": spent,
        "knn": knn,
        "dino_share": round(dino / math.log(prototypes), 3),
        "ibot": round(2 * last.get("ibot_loss", 0), 3),
        "feature_rank": round(last["feature_rank"], 1),
        "prototypes_in_use": last["prototypes_in_use"],
        "alarms": last["alarms"],
    }


def leave_one_out(backbone: Path) -> float:
    """k-NN (20) accuracy, in percent, of each training image among all others."""
    import torch
    import torch.nn.functional as F

    from embedder.checkpoint import load_backbone
    from pretrain.evaluation.knn import class_tokens, labeled_folder

    images = labeled_folder(TRAIN)
    names = sorted({label for _, label in images})
    labels = torch.tensor([names.index(label) for _, label in images])
    with torch.autocast("cpu", torch.bfloat16):
        features = class_tokens(load_backbone(backbone), [file for file, _ in images], 64)
    features = F.normalize(features, dim=1)
    right = 0
    for block in torch.arange(len(features)).split(1024):
        similarity = features[block] @ features.T
        similarity[torch.arange(len(block)), block] = -1
        values, index = similarity.topk(20)
        votes = F.one_hot(labels[index], len(names)) * (values / 0.07).softmax(1)[..., None]
        right += int((votes.sum(1).argmax(1) == labels[block]).sum())
    return round(100 * right / len(features), 1)


def baselines() -> list[dict[str, Any]]:
    """k-NN (20) of raw pixels and of untrained networks with LayerScale 1."""
    import torch

    from curation.config import parse_settings
    from pretrain.building import build_method
    from pretrain.config import PretrainConfig
    from pretrain.evaluation.knn import center_crop

    def pixels(files: list[Any]) -> Any:
        crops = [torch.from_numpy(center_crop(file.pixels(), 64).copy()) for file in files]
        flat = torch.stack(crops).flatten(1).float()
        return flat - flat.mean(0)

    rows = [{"name": "pixels", **test_accuracy(pixels)}]
    for name, seed in itertools.product(("sketch", "small"), range(3)):
        config = parse_settings(PretrainConfig, settings(CANDIDATES[name], 10, seed), "search")
        network = build_method(config).teacher.backbone
        rows.append({"name": f"untrained {name}", "seed": seed, **test_accuracy(of(network))})
    return rows


def of(network: Any) -> Callable[[list[Any]], Any]:
    """Describe image files by a backbone's class tokens."""
    import torch

    from pretrain.evaluation.knn import class_tokens

    def describe(files: list[Any]) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return class_tokens(network, files, 64)

    return describe


def test_accuracy(describe: Callable[[list[Any]], Any]) -> dict[str, float]:
    """k-NN (20), in percent, of the 500 test images among two sets of training images."""
    import torch

    from pretrain.evaluation.knn import knn_classify, labeled_folder

    test = labeled_folder(TEST)
    asked = describe([file for file, _ in test])
    found = {}
    for gallery, folder in GALLERIES.items():
        images = labeled_folder(folder)
        names = sorted({label for _, label in images})
        labels, truth = (
            torch.tensor([names.index(label) for _, label in part]) for part in (images, test)
        )
        bank = describe([file for file, _ in images])
        guess = knn_classify(bank, labels, asked, k=(20,))[20]
        found[f"knn, {gallery}"] = round(100 * (guess == truth).float().mean().item(), 1)
    return found


def main() -> None:
    sys.path[0] = str(ROOT)  # this file's folder would make it the package `pretrain`
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help=f"baselines, a run, or of {', '.join(CANDIDATES)}")
    parser.add_argument("--cpu-s", type=float, default=180)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.names:
        for row in rows_of(name, options):
            print(json.dumps(row), flush=True)


def rows_of(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    if name == "baselines":
        return baselines()
    if name in CANDIDATES:
        return [search(name, options.cpu_s, options.seed)]
    return [measure_run(Path(name))]


def measure_run(run: Path) -> dict[str, Any]:
    """k-NN of the teacher in a run's last checkpoint, finished or not, and its last losses."""
    from curation.config import parse_settings
    from pretrain.building import build_method
    from pretrain.checkpoint import load_into, read_about, saved_steps
    from pretrain.config import PretrainConfig
    from pretrain.run_log import read_lines

    step = saved_steps(run)[-1]
    values = read_about(run, step)["config"]
    values["loss"]["ibot_weight"] = 1.0  # to be measured in a run that did without, too
    config = parse_settings(PretrainConfig, values, str(run))
    method = build_method(config)
    load_into(run, step, {f"method.{name}": x for name, x in method.state_dict().items()})
    network = method.teacher.backbone
    window = [line for line in read_lines(run / "log.jsonl") if step - 50 < line["step"] <= step]
    means = {
        name: sum(line[name] for line in window) / len(window)
        for name in ("dino_global_crops_loss", "dino_local_crops_loss", "ibot_loss", "koleo_loss")
        if name in window[-1]
    }
    dino = means["dino_global_crops_loss"] + means["dino_local_crops_loss"]
    return {
        "name": run.name,
        "step": step,
        "steps": config.optim.steps,
        **test_accuracy(of(network)),
        "dino_share": round(dino / math.log(config.loss.dino_head.prototypes), 3),
        **{name: round(value, 3) for name, value in means.items()},
        "nearest": round(nearest_distance(network), 3),
        **masked_guesses(method, config),
    }


def nearest_distance(network: Any) -> float:
    """Mean distance of the test images' class tokens, as unit rows, to the nearest other one."""
    import torch.nn.functional as F

    from pretrain.evaluation.knn import labeled_folder
    from pretrain.losses.koleo import nearest

    rows = F.normalize(of(network)([file for file, _ in labeled_folder(TEST)]), dim=1)
    return float((rows - rows[nearest(rows)]).norm(dim=1).mean())


def masked_guesses(method: Any, config: Any, batches: int = 8) -> dict[str, float]:
    """How well the student guesses masked patches of the first batches of the stream."""
    import torch
    import torch.nn.functional as F

    from pretrain.data import read_batches
    from pretrain.sources import open_source

    losses, cosines = [], []
    loader = read_batches(open_source(str(TRAIN)), config, 0, 0, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for batch in (raw.to(torch.device("cpu")) for raw in itertools.islice(loader, batches)):
            targets = method.targets([batch], config.teacher.temperature[0])
            found = method.losses(batch, targets, 0, torch.Generator())
            losses.append(float(found["ibot_loss"]))
            masked, seen = (
                backbone.forward_packed([batch.global_crops], [masks])[0].patches.flatten(0, 1)
                for backbone, masks in (
                    (method.student.backbone, batch.masks),
                    (method.teacher.backbone, None),
                )
            )
            pair = (
                part[batch.mask_index].float() - part.float().mean(0) for part in (masked, seen)
            )
            cosines.append(float(F.cosine_similarity(*pair, dim=1).mean()))
    return {
        "masked loss": round(statistics.mean(losses), 3),
        "masked cosine": round(statistics.mean(cosines), 3),
    }


if __name__ == "__main__":
    main()
