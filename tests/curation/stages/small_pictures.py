"""Small pictures and pools of them, for the tests of stages."""

import numpy as np
import pyarrow as pa

from curation.dataset import write_dataset
from curation.pool import Pool
from curation.schema import IMAGE_COLUMNS, make_id, schema_of
from embedder.images import encode_jpeg

SCHEMA = schema_of(IMAGE_COLUMNS)


def picture(number: int, side: int = 64) -> np.ndarray:
    """A colored pattern that differs for every number."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return np.kron(small, np.ones((side // 8, side // 8, 1), np.uint8))


def image_row(number: int, name: str | None = None, **changes) -> dict:
    """A row of the images side-car."""
    pixels = picture(number)
    data = encode_jpeg(pixels)
    source = name or f"{number}.jpg"
    row = {
        "id": make_id(source),
        "image": data,
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "original_width": pixels.shape[1],
        "original_height": pixels.shape[0],
        "format": "jpeg",
        "num_bytes": len(data),
        "sha256": f"{number:064x}",
        "pixel_hash": f"{number * 7919:032x}",
        "phash": None,
        "phash_quality": None,
        "source": source,
        "source_set": "web",
    }
    return {**row, **changes}


def pool_of(folder, rows: list[dict], shards: int = 2, name: str = "pool") -> Pool:
    """Rows as a pool, sorted by id and cut into shards."""
    rows = sorted(rows, key=lambda row: row["id"])
    cuts = np.linspace(0, len(rows), shards + 1).astype(int)
    tables = [
        pa.Table.from_pylist(rows[a:b], SCHEMA) for a, b in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    return Pool.of(write_dataset(str(folder), tables, SCHEMA), name)
