"""Results: one Parquet row a run, and a table that sets them beside the paper's numbers."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation import storage
from curation.config import Settings, read_yaml
from curation.digest import digest_of
from curation.errors import ConfigError

SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("task", pa.string()),
        ("encoder", pa.string()),
        ("space", pa.string()),
        ("license", pa.string()),
        ("train", pa.string()),
        ("test", pa.string()),
        ("num_train", pa.int64()),
        ("num_test", pa.int64()),
        ("metrics", pa.map_(pa.string(), pa.float64())),
        ("settings", pa.string()),
        ("seconds", pa.float64()),
        ("finished_at", pa.timestamp("ms", tz="UTC")),
    ]
)
MAIN_METRICS = {
    "knn": ("knn_10", "knn_20", "knn_100", "knn_200"),
    "linear": ("linear",),
    "logreg": ("logreg",),
    "retrieval": ("map", "map_medium", "map_hard"),
    "segmentation": ("miou", "pixel_accuracy"),
    "depth": ("rmse", "abs_rel", "delta_1"),
    "artifacts": ("outlier_share", "share_above_cutoff"),
}
"""What the table shows of each task; the row holds all."""
_NOT_SHARES = ("rmse", "abs_rel")
Row = tuple[str, str, str, str]


@dataclass(frozen=True)
class Result:
    """What one evaluation found."""

    task: str
    encoder: str
    space: str
    """Digest of the encoder; empty where features of unknown origin were read."""
    license: str
    train: str
    test: str
    num_train: int
    num_test: int
    metrics: Mapping[str, float]
    settings: Settings
    seconds: float
    finished_at: float = field(default_factory=time.time)

    @property
    def run(self) -> str:
        """Digest of what decides the numbers: the same evaluation replaces its row."""
        decides = (self.task, self.space or self.encoder, self.train, self.test)
        return digest_of(*decides, self.settings.model_dump_json())[:16]

    def row(self) -> dict[str, Any]:
        """The row of the Parquet file."""
        return {
            "run": self.run,
            **{name: getattr(self, name) for name in ("task", "encoder", "space", "license")},
            **{name: getattr(self, name) for name in ("train", "test", "num_train", "num_test")},
            "metrics": list(self.metrics.items()),
            "settings": self.settings.model_dump_json(),
            "seconds": self.seconds,
            "finished_at": round(self.finished_at * 1000),
        }


def write_result(result: Result, folder: str) -> str:
    """Write one file with one row; give its path."""
    path = storage.join(folder, f"{result.task}-{result.run}.parquet")
    storage.write_parquet(path, pa.Table.from_pylist([result.row()], schema=SCHEMA))
    return path


def read_results(folder: str) -> pa.Table:
    """Read all rows of a folder, oldest first.

    Raises:
        ConfigError: there are none.
    """
    names = storage.list_files(folder, ".parquet") if storage.exists(folder) else []
    if not names:
        raise ConfigError(f"{folder}: holds no results; `curate evaluate TASK --out {folder}` does")
    tables = [storage.read_parquet(storage.join(folder, name)) for name in names]
    tables = [table.rename_columns(SCHEMA.names) for table in tables]  # `licence` of before
    return pa.concat_tables(tables).sort_by("finished_at")


def comparison(rows: pa.Table) -> list[Row]:
    """Set rows beside the paper's numbers for their tasks: (model, data, metric, value)."""
    lines: list[Row] = []
    for row in rows.to_pylist():
        metrics = dict(row["metrics"])
        data = Path(row["test"]).name or row["test"]
        head = json.loads(row["settings"]).get("head")
        lines += [
            (row["encoder"], f"{data}{f' {head}' if head else ''}", name, _shown(name, value))
            for name in MAIN_METRICS.get(row["task"], ())
            if (value := metrics.get(name)) is not None
        ]
    for task in sorted(set(rows["task"].to_pylist())):
        lines += _paper_lines(task)
    return lines


def paper_numbers() -> list[dict[str, Any]]:
    """What the paper reports, from configs/evaluate/paper.yaml."""
    shipped = resources.files("configs").joinpath("evaluate").joinpath("paper.yaml")
    found: list[dict[str, Any]] = read_yaml(Path(str(shipped)))
    return found


def _paper_lines(task: str) -> list[Row]:
    return [
        (f"paper, ViT-{size}/14", entry["set"], entry["metric"], _paper_value(entry, value))
        for entry in paper_numbers()
        if entry["task"] == task
        for size, value in entry["values"].items()
    ]


def _paper_value(entry: dict[str, Any], value: float) -> str:
    return f"{value:.3f}" if entry["metric"] == "RMSE" else f"{value:.1f} %"


def _shown(name: str, value: float) -> str:
    return f"{value:.3f}" if name in _NOT_SHARES else f"{value:.1%}".replace("%", " %")
