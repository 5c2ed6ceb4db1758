"""Evaluation by name: `run_task` finds the data, the encoder and the settings, and measures."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from curation.config import Settings, apply_changes, parse_settings
from curation.dataset import Dataset
from curation.errors import ConfigError
from curation.sources.shards import image_file, images_below
from embedder.checkpoint import UNKNOWN, license_in
from embedder.encoder import Encoder, LoadOptions, load_encoder
from embedder.encoders import dinov2
from embedder.errors import EncoderError
from embedder.feature_maps import FeatureModel, load_feature_model
from embedder.images import Pixels
from pretrain.backbones import find_saved
from pretrain.evaluation.artifacts import ArtifactSettings, artifacts
from pretrain.evaluation.datasets import (
    DEPTH,
    SEGMENTATION,
    Layout,
    labeled_images,
    open_scenes,
)
from pretrain.evaluation.depth import DepthSettings, depth
from pretrain.evaluation.features import (
    Features,
    class_numbers,
    compare,
    image_vectors,
    is_stored,
    layer_features,
    stored_vectors,
    vectors,
)
from pretrain.evaluation.knn import KnnTaskSettings, knn_classify
from pretrain.evaluation.linear import LinearSettings, linear_probe
from pretrain.evaluation.logistic import LogisticSettings, logistic_regression
from pretrain.evaluation.results import Result
from pretrain.evaluation.retrieval import (
    RetrievalSettings,
    find_revisited,
    open_revisited,
    retrieve_classes,
    retrieve_revisited,
)
from pretrain.evaluation.segmentation import SegmentationSettings, segmentation
from pretrain.parallel import local_device, process_group


@dataclass(frozen=True)
class Request:
    """What is to be evaluated on what."""

    task: str
    encoder: str | None
    """Name of an encoder, or a file or folder with a backbone; None for stored features."""
    train: str | None
    test: str
    image_size: int | None = None
    device: str = "auto"
    allow_hub: bool = False
    changes: list[str] = field(default_factory=list)
    """KEY=VALUE of the task's settings."""

    @property
    def loading(self) -> LoadOptions:
        """How the encoder is to run."""
        return LoadOptions(self.device, "auto", self.allow_hub, self.image_size)


class Measured(NamedTuple):
    """What a task gives."""

    metrics: dict[str, float]
    num_train: int
    num_test: int
    encoder: str
    space: str
    license: str


@dataclass(frozen=True)
class Task:
    """One kind of evaluation."""

    about: str
    settings: type[Settings]
    measure: Callable[[Request, Any], Measured]


def run_task(request: Request) -> Result:
    """Evaluate, on all processes that torchrun started.

    Raises:
        ConfigError: an unknown task or setting, or data that is not where it is expected.
        EncoderError: the encoder is unknown, or shows too little for the task.
    """
    if request.task not in TASKS:
        known = ", ".join(TASKS)
        raise ConfigError(f"curate evaluate {request.task}: unknown task; known: {known}")
    task = TASKS[request.task]
    changes: dict[str, Any] = {}
    apply_changes(changes, request.changes)
    settings = parse_settings(task.settings, changes, f"--set of '{request.task}'")
    start = time.monotonic()
    device = local_device(request.device)
    with process_group(device):
        found = task.measure(replace(request, device=str(device)), settings)
    return Result(
        request.task,
        found.encoder,
        found.space,
        found.license,
        request.train or "",
        request.test,
        found.num_train,
        found.num_test,
        found.metrics,
        settings,
        time.monotonic() - start,
    )


# --- vectors ------------------------------------------------------------------------------------


def _knn(request: Request, settings: KnnTaskSettings) -> Measured:
    train, test, about = _vector_pair(request)
    numbers, truth, _ = class_numbers(train, test)
    device = request.device
    guesses = knn_classify(
        train.rows.to(device),
        numbers.to(device),
        test.rows.to(device),
        k=settings.k,
        temperature=settings.temperature,
    )
    metrics = {
        f"knn_{k}": (guess.cpu() == truth).float().mean().item() for k, guess in guesses.items()
    }
    return Measured({**metrics, **compare(train, test)}, len(train), len(test), *about)


def _linear(request: Request, settings: LinearSettings) -> Measured:
    stored = is_stored(_train_of(request)) or is_stored(request.test)
    if stored or settings.features == "vectors":
        train, test, about = _vector_pair(request)
        views = [train]
    else:
        model = _feature_model(request)
        about = (model.name, model.space, model.license)
        images = labeled_images(_train_of(request))
        most = max(settings.layers)
        test = layer_features(model, labeled_images(request.test), most)
        rng = np.random.default_rng(settings.seed)
        drawn = [layer_features(model, images, most, view=rng) for _ in range(settings.views)]
        views = drawn or [layer_features(model, images, most)]
    metrics = linear_probe(views, test, settings, request.device)
    metrics |= compare(views[0], test)
    return Measured(metrics, len(views[0]), len(test), *about)


def _logreg(request: Request, settings: LogisticSettings) -> Measured:
    train, test, about = _vector_pair(request)
    metrics = logistic_regression(train, test, settings, request.device)
    return Measured({**metrics, **compare(train, test)}, len(train), len(test), *about)


def _retrieval(request: Request, settings: RetrievalSettings) -> Measured:
    file = find_revisited(request.test)
    if file is None:
        train, test, about = _vector_pair(request)
        found = retrieve_classes(train, test, settings.precisions)
        return Measured({**found, **compare(train, test)}, len(train), len(test), *about)
    truth = open_revisited(file)
    encoder = _encoder(request)
    database = vectors(encoder, [_reader(path) for path in truth.images])
    queries = vectors(
        encoder, [_reader(p, box) for p, box in zip(truth.queries, truth.boxes, strict=True)]
    )
    about = (encoder.name, encoder.space, encoder.license)
    found = retrieve_revisited(database, queries, truth)
    return Measured(found, len(truth.images), len(truth.queries), *about)


def _vector_pair(request: Request) -> tuple[Features, Features, tuple[str, str, str]]:
    """Features of both sets, and name, space and license of what made them.

    Raises:
        ConfigError: stored features of two spaces.
    """
    paths = (_train_of(request), request.test)
    if not any(is_stored(path) for path in paths):
        encoder = _encoder(request)
        sets = [labeled_images(path) for path in paths]
        train, test = (image_vectors(encoder, items) for items in sets)
        return train, test, (encoder.name, encoder.space, encoder.license)
    if not all(is_stored(path) for path in paths):
        raise ConfigError(f"{paths[0]}, {paths[1]}: give images for both, or features for both")
    attributes = [Dataset.open(path).attributes for path in paths]
    spaces = [str(one.get("space", "")) for one in attributes]
    if spaces[0] != spaces[1]:
        raise ConfigError(
            f"{paths[1]}: embeddings of space {spaces[1] or 'unknown'}, those of {paths[0]} are "
            f"of {spaces[0] or 'unknown'}; embed one like the other"
        )
    name = str(attributes[0].get("encoder", request.encoder or "unknown"))
    license = license_in(attributes[0])
    return stored_vectors(paths[0]), stored_vectors(paths[1]), (name, spaces[0], license)


def _reader(
    path: Path, box: tuple[float, float, float, float] | None = None
) -> Callable[[], Pixels]:
    """What decodes an image, or a box of it (left, top, right, bottom), when it is asked to."""

    def read() -> Pixels:
        pixels = image_file(str(path)).pixels()
        if box is None:
            return pixels
        left, top, right, bottom = (round(side) for side in box)
        return pixels[top : bottom + 1, left : right + 1]

    return read


# --- maps ---------------------------------------------------------------------------------------


def _segmentation(request: Request, settings: SegmentationSettings) -> Measured:
    return _dense(request, settings, SEGMENTATION, segmentation)


def _depth(request: Request, settings: DepthSettings) -> Measured:
    return _dense(request, settings, DEPTH, depth)


def _dense(
    request: Request,
    settings: Any,
    layouts: dict[str, Layout],
    measure: Callable[..., dict[str, float]],
) -> Measured:
    train, _ = open_scenes(_train_of(request), "train", layouts)
    test, layout = open_scenes(request.test, "test", layouts)
    model = _feature_model(request)
    metrics = measure(model, train.scenes, test.scenes, layout, settings)
    metrics["images_without_target"] = float(train.unpaired + test.unpaired)
    about = (model.name, model.space, model.license)
    return Measured(metrics, len(train.scenes), len(test.scenes), *about)


def _artifacts(request: Request, settings: ArtifactSettings) -> Measured:
    images = images_below(request.test)
    model = _feature_model(request)
    metrics = artifacts(model, images, settings)
    return Measured(metrics, 0, len(images), model.name, model.space, model.license)


# --- what is evaluated --------------------------------------------------------------------------


def encoder_name(name: str) -> str:
    """The name of an encoder; files and folders with a backbone stand for themselves.

    Raises:
        ConfigError: what looks like a file is none.
    """
    path = Path(name)
    if (path / "backbone.safetensors").is_file():  # a run whose checkpoints are gone
        return f"dinov2:{path / 'backbone.safetensors'}"
    if path.exists():
        return f"dinov2:{name}"
    if ":" not in name and ("/" in name or Path(name).suffix in (".pth", ".safetensors")):
        raise ConfigError(f"{name}: no such file or folder with a backbone")
    return name


def open_encoder(name: str, options: LoadOptions) -> Encoder:
    """Load an encoder by name, or the backbone of a file, a folder, a run or a checkpoint.

    Raises:
        CurateError: there is none.
    """
    saved = find_saved(Path(name.removeprefix("dinov2:")))
    if saved is not None:
        return dinov2.encoder_of(saved.load(), saved.name, options, UNKNOWN)
    return load_encoder(
        encoder_name(name),
        device=options.device,
        allow_hub=options.allow_hub,
        image_size=options.image_size,
    )


def open_feature_model(name: str, options: LoadOptions) -> FeatureModel:
    """Load what shows its layers, named as for `open_encoder`."""
    saved = find_saved(Path(name.removeprefix("dinov2:")))
    if saved is not None:
        return dinov2.features_of(saved.load(), saved.name, options, UNKNOWN)
    return load_feature_model(
        encoder_name(name),
        device=options.device,
        allow_hub=options.allow_hub,
        image_size=options.image_size,
    )


def _encoder(request: Request) -> Encoder:
    return open_encoder(_named(request), request.loading)


def _feature_model(request: Request) -> FeatureModel:
    return open_feature_model(_named(request), request.loading)


def _named(request: Request) -> str:
    if request.encoder is None:
        raise EncoderError("no encoder: name one with --encoder, such as dinov2:vits14 or a file")
    return request.encoder


def _train_of(request: Request) -> str:
    if request.train is None:
        raise ConfigError(f"curate evaluate {request.task}: name the images to learn from: --train")
    return request.train


TASKS: dict[str, Task] = {
    "knn": Task("k nearest neighbors vote", KnnTaskSettings, _knn),
    "linear": Task("a grid of linear classifiers", LinearSettings, _linear),
    "logreg": Task("logistic regression", LogisticSettings, _logreg),
    "retrieval": Task("mean average precision of ranking", RetrievalSettings, _retrieval),
    "segmentation": Task("mean IoU of a head on patches", SegmentationSettings, _segmentation),
    "depth": Task("errors of a linear depth head", DepthSettings, _depth),
    "artifacts": Task("share of patches with outlier norms", ArtifactSettings, _artifacts),
}
