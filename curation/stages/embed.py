"""Embeds images with one or several encoders in one pass: each image is decoded once."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.schema import embedding_schema
from curation.stage import DEVICE_BUSY_S, Resources, Shard, ShardStage, reject
from embedder.encoder import BusyClock, Encoder, available_cpus, embed_images, load_encoder
from embedder.errors import ImageError
from embedder.images import Pixels, blur_boxes, decode

_SHARD_BYTES = 2 << 30
"""Of a shard's images and vectors, and of the pictures that are being decoded."""


class Embed(ShardStage):
    """One side-car of unit vectors an encoder, named by the keys of `encoders`."""

    encoders: dict[str, str] = Field(
        {"copy": "lite-copy", "semantic": "lite-semantic"}, min_length=1
    )
    """Name of the side-car -> encoder, such as lite-copy, sscd:FILE or open_clip:MODEL/FILE."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    gpus: float = Field(0, ge=0)
    """Share of a GPU that one worker takes on a Ray cluster."""
    allow_hub: bool = False
    """Whether weights that are not on this machine may be fetched from a hub."""
    compile: bool = False
    """Whether torch compiles the encoders: minutes at first in each worker, then often faster."""
    batch_size: int | None = Field(None, ge=1)
    """Images a forward pass takes; null: on a GPU as many as its memory holds, on a CPU 8."""

    reasons = ("unreadable", "bad_vector")
    on_sets = True

    def needs(self) -> tuple[str, ...]:
        """The canonical image, and where it is from."""
        return ("image", "source")

    def uses(self) -> tuple[str, ...]:
        """Faces, which are blurred in all that is made of the image."""
        return ("boxes",)

    def outputs(self) -> dict[str, pa.Schema]:
        """A side-car of vectors for each encoder."""
        return {name: embedding_schema(encoder.width) for name, encoder in self._loaded().items()}

    def makes(self) -> dict[str, tuple[str, ...]]:
        """Names of the columns of each side-car."""
        return dict.fromkeys(self.encoders, ("id", "source", "embedding"))

    def attributes(self) -> dict[str, dict[str, Any]]:
        """The embedding space of each side-car, and the encoder's own thresholds."""
        return {name: _describe(encoder) for name, encoder in self._loaded().items()}

    def fingerprint(self) -> str:
        """Weights, preprocessing, precision and whitening of every encoder."""
        return " ".join(encoder.space for encoder in self._loaded().values())

    def resources(self) -> Resources:
        """What one shard's task needs."""
        held = [encoder.memory for encoder in self._loaded().values()]
        models = sum(one.loading + one.batch for one in held)
        return Resources(cpus=1, gpus=self.gpus, memory=_SHARD_BYTES + models)

    def open(self) -> dict[str, Encoder]:
        """Load the encoders."""
        return self._loaded()

    def process(self, shard: Shard, opened: dict[str, Encoder]) -> None:
        """Embed each image; one that does not decode or has no finite vector is dropped."""
        unreadable = np.zeros(shard.num_rows, bool)
        images = [_reader(shard, row, unreadable) for row in range(shard.num_rows)]
        on_gpu = any(encoder.device != "cpu" for encoder in opened.values())
        busy = BusyClock(1 if on_gpu else available_cpus())
        vectors = embed_images(list(opened.values()), images, busy=busy)
        shard.count(DEVICE_BUSY_S, round(busy.seconds, 3))
        reject(shard, unreadable, "unreadable")
        for name, rows in zip(opened, vectors, strict=True):
            finite = np.isfinite(rows.astype(np.float32)).all(axis=1)
            reject(shard, np.logical_not(finite), "bad_vector")
            shard.emit(name, {"embedding": rows})

    def _loaded(self) -> dict[str, Encoder]:
        return {
            name: _load(
                encoder, self.device, self.allow_hub, self.compile, self.batch_size, self._share()
            )
            for name, encoder in self.encoders.items()
        }

    def _share(self) -> float:
        """Share of a GPU's memory for each encoder, where several workers or encoders use it."""
        return min(1.0, self.gpus or 1.0) / len(self.encoders)


@cache
def _load(
    name: str,
    device: str,
    allow_hub: bool,
    compile: bool,
    batch_size: int | None,
    device_share: float,
) -> Encoder:
    """An encoder is asked for its space and its width again and again: open it once a process."""
    return load_encoder(
        name,
        device=device,
        allow_hub=allow_hub,
        compile=compile,
        batch_size=batch_size,
        device_share=device_share,
    )


def _reader(shard: Shard, row: int, unreadable: np.ndarray) -> Callable[[], Pixels]:
    """What decodes one image in a worker thread, and marks it where that fails."""
    boxes = shard.table["boxes"] if "boxes" in shard.table.column_names else None

    def read() -> Pixels:
        try:
            pixels = decode(shard.table["image"][row].as_py() or b"")
        except ImageError:
            unreadable[row] = True
            return np.zeros((8, 8, 3), np.uint8)
        found = boxes[row].as_py() if boxes is not None else None
        return blur_boxes(pixels, found) if found else pixels

    return read


def _describe(encoder: Encoder) -> dict[str, Any]:
    thresholds = encoder.thresholds
    return {
        "encoder": encoder.name,
        "space": encoder.space,
        "width": encoder.width,
        "licence": encoder.licence,
        "thresholds": (
            None if thresholds is None else {"dedup": thresholds.dedup, "leak": thresholds.leak}
        ),
    }
