"""Curves of pretraining runs as one picture, from their logs.

`python benchmarks/learning_curves.py RUN… --out docs/img/tiny.svg` draws the DINO loss as a share
of log K (1 is trivial), the masked-patch loss, the rank of the features, and k-NN where it was
measured, one line a run (smoothed over `--window` logged steps).
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEIGHT = 300
STYLE = (
    "text{font:13px sans-serif;fill:#222}.tick,.muted{fill:#666}.tick{font-size:11px}"
    ".title{font-weight:650}.axis{stroke:#666}.grid{stroke:#ddd}.line{fill:none;stroke-width:2}"
    "polyline.line-0{stroke:#2563a8}polyline.line-1{stroke:#b4540a;stroke-dasharray:7 3}"
    "polyline.line-2{stroke:#2a7d4f;stroke-dasharray:2 3}polyline.line-3{stroke:#8a3fa0}"
    "polyline.line-4{stroke:#555}"
)


def dino_share(line: dict[str, Any], prototypes: int) -> float | None:
    loss = line["dino_global_crops_loss"] + line.get("dino_local_crops_loss", 0)
    return float(loss / math.log(prototypes))


CHARTS: dict[str, Callable[[dict[str, Any], int], float | None]] = {
    "DINO loss as a share of log K": dino_share,
    "iBOT loss": lambda line, _: 2 * line["ibot_loss"] if "ibot_loss" in line else None,
    "rank of the class tokens": lambda line, _: line["feature_rank"],
    "k-NN (20) of the teacher, %": lambda line, _: 100 * line["knn"] if "knn" in line else None,
}


def smooth(points: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    means = []
    for end in range(1, len(points) + 1):
        part = points[max(end - window, 0) : end]
        means.append((points[end - 1][0], sum(y for _, y in part) / len(part)))
    return means


def draw(runs: list[Path], window: int) -> str:
    from pipelines.web.charts import Series, line_chart
    from pretrain.checkpoint import read_about, saved_steps
    from pretrain.run_log import read_lines

    parts = []
    for title, measure in CHARTS.items():
        series = []
        for run in runs:
            config = read_about(run, saved_steps(run)[-1])["config"]
            prototypes = config["loss"]["dino_head"]["prototypes"]
            values = [(x["step"], measure(x, prototypes)) for x in read_lines(run / "log.jsonl")]
            points = [(float(step), y) for step, y in values if y is not None]
            points = smooth(points, 1 if "k-NN" in title else window)
            series += [Series(run.name, points)] if points else []
        if series:
            top = HEIGHT * len(parts)
            chart = str(line_chart(series, "step", title)).replace("<svg ", f'<svg y="{top + 28}" ')
            parts.append(f'<text class="title" x="46" y="{top + 20}">{title}</text>{chart}')
    height = HEIGHT * len(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 {height}" width="680" '
        f'height="{height}"><style>{STYLE}</style><rect width="680" height="{height}" '
        f'fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    sys.path[0] = str(ROOT)  # this file's folder would make it the package `pretrain`
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="SVG file")
    parser.add_argument("--window", type=int, default=10)
    options = parser.parse_args()
    options.out.write_text(draw(options.runs, options.window))
    print(json.dumps({"out": str(options.out), "runs": len(options.runs)}))


if __name__ == "__main__":
    main()
