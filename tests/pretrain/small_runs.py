"""Runs small enough for tests: a toy ViT on a handful of made-up images."""

import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from curation.config import parse_settings
from pretrain.config import PretrainConfig

HEAD = {"prototypes": 32, "hidden": 32, "bottleneck": 16}


def small_config(**changes: Any) -> PretrainConfig:
    """Settings by section; `changes` are sections whose keys are laid over these."""
    values: dict[str, Any] = {
        "model": {"arch": "vits14", "width": 24, "depth": 2, "heads": 3, "drop_path": 0.2,
                  "layerscale": 1.0},
        "crops": {"global_size": 56, "local_size": 28, "local_count": 2},
        "loss": {"dino_head": HEAD, "ibot_head": HEAD},
        "teacher": {"temperature_warmup_steps": 4},
        "optim": {"steps": 6, "batch_size": 4, "base_lr": 1e-3, "lr_scaling": "none",
                  "warmup_steps": 2, "freeze_last_layer_steps": 1},
        "data": {"workers": 0},
        "run": {"threads": 1, "device": "cpu", "log_every_steps": 1, "checkpoint_every_steps": 100},
    }  # fmt: skip
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return parse_settings(PretrainConfig, values, "small")


def stop_after(step: int) -> Callable[[dict[str, Any]], None]:
    """Progress that asks the run to end after a step, as a cluster does."""

    def progress(record: dict[str, Any]) -> None:
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return progress


def jpeg(number: int, side: int = 64) -> bytes:
    """A smooth image of its own."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((side + 16, side), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def write_folder(path: Path, count: int = 10) -> Path:
    path.mkdir(parents=True)
    for i in range(count):
        (path / f"{i:03d}.jpg").write_bytes(jpeg(i))
    return path


def write_shards(path: Path, shards: list[list[tuple[str, bytes, str | None]]]) -> Path:
    """Packed shards as `pack` writes them, from (id, file, seed set)."""
    path.mkdir(parents=True)
    infos = []
    for i, images in enumerate(shards):
        table = _write_shard(path / f"shard-{i:05d}", images)
        infos.append(_info(f"shard-{i:05d}.parquet", table))
    columns = {name: str(table.schema.field(name).type) for name in table.column_names}
    manifest = {"columns": columns, "num_rows": sum(info["num_rows"] for info in infos),
                "content_digest": "", "files_digest": "", "shards": infos}  # fmt: skip
    (path / "_manifest.json").write_text(json.dumps(manifest))
    return path


def _write_shard(stem: Path, images: list[tuple[str, bytes, str | None]]) -> pa.Table:
    with tarfile.open(stem.with_suffix(".tar"), "w") as tar:
        for name, data, _ in images:
            member = tarfile.TarInfo(f"{name}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(stem.with_suffix(".tar")) as tar:
        offsets = [member.offset_data for member in tar]
    table = pa.table(
        {
            "id": pa.array([name for name, _, _ in images], pa.string()),
            "offset": pa.array(offsets, pa.int64()),
            "num_bytes": pa.array([len(data) for _, data, _ in images], pa.int32()),
            "width": pa.array([80] * len(images), pa.int32()),
            "height": pa.array([64] * len(images), pa.int32()),
            "seed_set": pa.array([seed_set for _, _, seed_set in images], pa.string()),
        }
    )
    pa.parquet.write_table(table, stem.with_suffix(".parquet"))
    return table


def _info(name: str, table: pa.Table) -> dict[str, Any]:
    return {"name": name, "num_rows": table.num_rows, "num_bytes": 0, "sha256": "", "content": ""}
