"""What the grid of the linear probe costs beyond a single head: `python benchmarks/linear_grid.py`.

Both evaluate the same images from their files on: decode, features of the last layers, then SGD.
CPU seconds on one thread, rounds interleaved, the best of each.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from embedder.feature_maps import load_feature_model
from pretrain.evaluation.datasets import labeled_images
from pretrain.evaluation.features import Features, layer_features
from pretrain.evaluation.linear import LinearSettings, linear_probe

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenette"
STEPS = 500
GRID = LinearSettings(steps=STEPS)
SINGLE = LinearSettings(steps=STEPS, layers=(4,), pooling=(True,), learning_rates=(1e-3,))
ROUNDS = 2


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    model = load_feature_model("dinov2:vits14:random", device="cpu")
    train = labeled_images(str(DATA / "train"))[::3]
    test = labeled_images(str(DATA / "val"))[::5]
    held: list[Features] = []

    def look() -> None:
        held[:] = [layer_features(model, images, 4) for images in (train, test)]

    def probe(settings: LinearSettings) -> Callable[[], object]:
        return lambda: linear_probe([held[0]], held[1], settings, "cpu")

    features = cpu_seconds(look)
    heads: dict[str, list[float]] = {"single": [], "grid": []}
    for _ in range(ROUNDS):
        for name, settings in (("single", SINGLE), ("grid", GRID)):
            heads[name].append(cpu_seconds(probe(settings)))
    single, grid = min(heads["single"]), min(heads["grid"])
    print(f"{len(train)} + {len(test)} images, ViT-S/14, {STEPS} steps of 128; CPU seconds\n")
    print("| | features | heads | together |\n|---|---|---|---|")
    print(f"| one head | {features:.1f} | {single:.1f} | {features + single:.1f} |")
    print(f"| the grid of 52 | {features:.1f} | {grid:.1f} | {features + grid:.1f} |")
    print(f"\nThe grid costs {(features + grid) / (features + single):.2f} times one head.")


if __name__ == "__main__":
    main()
