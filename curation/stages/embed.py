"""Embeds images with one or several encoders in one pass: each image is decoded once."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Self

import numpy as np
import pyarrow as pa
from pydantic import Field, PrivateAttr

from curation.config import Name
from curation.errors import ConfigError, SpaceError
from curation.schema import embedding_schema
from curation.stage import DEVICE_BUSY_S, Engine, Json, Resources, Shard, ShardStage, Task, reject
from embedder.encoder import (
    BusyClock,
    Encoder,
    EncoderFacts,
    Precision,
    available_cpus,
    embed_images,
    load_encoder,
)
from embedder.errors import ImageError
from embedder.images import Pixels, blur_boxes, decode

_SHARD_BYTES = 2 << 30
"""Of a shard's images and vectors, and of the pictures that are being decoded."""
_LOADING_BYTES = 8 << 30
"""Asked for to load encoders of which nothing is known yet: enough for a ViT-g."""


class Embed(ShardStage):
    """One side-car of unit vectors an encoder, named by the keys of `encoders`.

    What the encoders are is found out by a worker (`informed`), not where the runner runs; every
    worker checks that its own are the same before its first image.
    """

    encoders: dict[Name, str] = Field(
        {"copy": "lite-copy", "semantic": "lite-semantic"}, min_length=1
    )
    """Name of the side-car -> encoder, such as lite-copy, sscd:FILE or open_clip:MODEL/FILE."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """float32, bfloat16 or float16; auto: the fastest on the workers, settled when a work folder
    first needs it."""
    gpus: float = Field(0, ge=0)
    """Share of a GPU that one worker takes on a Ray cluster."""
    allow_hub: bool = False
    """Whether weights that are not on this machine may be fetched from a hub."""
    compile: bool = False
    """Whether torch compiles the encoders: minutes at first in each worker, then often faster."""
    batch_size: int | None = Field(None, ge=1)
    """Images a forward pass takes; null: on a GPU as many as its memory holds, on a CPU 8."""
    _facts: dict[str, EncoderFacts] = PrivateAttr(default_factory=dict)

    reasons = ("unreadable", "bad_vector")
    on_sets = True
    runs_on_gpus = True

    def required_columns(self) -> tuple[str, ...]:
        """The canonical image, and where it is from."""
        return ("image", "source")

    def optional_columns(self) -> tuple[str, ...]:
        """Faces, which are blurred in all that is made of the image."""
        return ("boxes",)

    def outputs(self) -> dict[str, pa.Schema]:
        """A side-car of vectors for each encoder."""
        return {name: embedding_schema(one.width) for name, one in self.facts().items()}

    def output_columns(self) -> dict[str, tuple[str, ...]]:
        """Names of the columns of each side-car."""
        return dict.fromkeys(self.encoders, ("id", "source", "embedding"))

    def attributes(self) -> dict[str, dict[str, Json]]:
        """The embedding space of each side-car, and the encoder's own thresholds."""
        return {name: _describe(one) for name, one in self.facts().items()}

    def settled(self, engine: Engine) -> Self:
        """The stage in the precision that is the fastest on all workers.

        Raises:
            ConfigError: they differ in that.
        """
        if self.precision != "auto":
            return self
        fastest = _FastestPrecision(self.device, Resources(gpus=self.gpus))
        found = engine.everywhere(fastest, "embed")
        places: dict[Precision, list[str]] = {}
        for where, precision in found:
            places.setdefault(precision, []).append(where)
        if len(places) > 1:
            means = "; ".join(f"{one} on {', '.join(at)}" for one, at in sorted(places.items()))
            raise ConfigError(
                f"embed: precision auto is {means}; set `precision` under embed, or let only "
                "workers of one kind embed (`gpus`)"
            )
        return self.replace(precision=found[0][1])

    def informed(self, engine: Engine) -> Self:
        """The stage with what a worker says of the encoders."""
        look = _LookAtEncoders(self)
        ((_, facts),) = engine.map(look, ["encoders"], "embed: open encoders")
        return self.knowing(facts)

    def knowing(self, facts: Mapping[str, EncoderFacts]) -> Self:
        """A copy that holds its encoders to these facts."""
        informed = self.model_copy()
        informed._facts = dict(facts)
        return informed

    def facts(self) -> dict[str, EncoderFacts]:
        """What is true of each encoder; loads them here if no worker was asked."""
        return self._facts or {n: EncoderFacts.of(one) for n, one in self._loaded().items()}

    def fingerprint(self) -> str:
        """Weights, preprocessing, precision and whitening of every encoder."""
        return " ".join(one.space for one in self.facts().values())

    def resources(self) -> Resources:
        """What one shard's task needs."""
        held = [one.memory for one in self.facts().values()]
        models = sum(one.loading + one.batch for one in held)
        return Resources(cpus=1, gpus=self.gpus, memory=_SHARD_BYTES + models)

    def open(self) -> dict[str, Encoder]:
        """Load the encoders.

        Raises:
            SpaceError: one is not what it was where the stage was informed.
        """
        opened = self._loaded()
        for name, expected in self._facts.items():
            _check_space(expected, opened[name])
        return opened

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
                encoder,
                self.device,
                self.precision,
                self.allow_hub,
                self.compile,
                self.batch_size,
                self._share(),
            )
            for name, encoder in self.encoders.items()
        }

    def _share(self) -> float:
        """Share of a GPU's memory for each encoder, where several workers or encoders use it."""
        return min(1.0, self.gpus or 1.0) / len(self.encoders)


@dataclass(frozen=True)
class _FastestPrecision(Task[None, None, Precision]):
    """What `auto` is in this worker."""

    device: str
    needed: Resources

    @property
    def resources(self) -> Resources:
        return self.needed

    def __call__(self, item: None, opened: None) -> Precision:
        from embedder.encoders.torch_trunk import fastest_precision

        return fastest_precision(self.device)


@dataclass(frozen=True)
class _LookAtEncoders(Task[str, None, dict[str, EncoderFacts]]):
    """What is true of the encoders of a stage."""

    stage: Embed

    @property
    def resources(self) -> Resources:
        return Resources(cpus=1, gpus=self.stage.gpus, memory=_LOADING_BYTES)

    def __call__(self, item: str, opened: None) -> dict[str, EncoderFacts]:
        return self.stage.facts()


def _check_space(expected: EncoderFacts, encoder: Encoder) -> None:
    if encoder.space != expected.space:
        differs = ", ".join(expected.differences(encoder.parts))
        raise SpaceError(
            f"{platform.node()} ({encoder.device}): '{encoder.name}' embeds into another space "
            f"than the stage: {differs}; make this node like the others or leave it out "
            "(`curate preflight` compares them)"
        )


@cache
def _load(
    name: str,
    device: str,
    precision: Precision,
    allow_hub: bool,
    compile: bool,
    batch_size: int | None,
    device_share: float,
) -> Encoder:
    """An encoder is asked for its space and its width again and again: open it once a process."""
    return load_encoder(
        name,
        device=device,
        precision=precision,
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


def _describe(facts: EncoderFacts) -> dict[str, Json]:
    thresholds = facts.thresholds
    return {
        "encoder": facts.name,
        "space": facts.space,
        "precision": dict(facts.parts).get("precision"),
        "width": facts.width,
        "license": facts.license,
        "thresholds": (
            None if thresholds is None else {"dedup": thresholds.dedup, "leak": thresholds.leak}
        ),
    }
