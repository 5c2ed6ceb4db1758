"""Where benchmarks lie: the layouts that evaluation reads, and how their targets are read.

A path may name its layout in front, `ade20k:PATH`; otherwise the layout is recognised. Readers of
targets give arrays of the image's size.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curation.errors import ConfigError
from curation.sources.folders import Listing, list_files
from curation.sources.names import kind_of
from curation.sources.shards import StoredImage, image_file, images_below
from embedder.images import Pixels

logger = logging.getLogger(__name__)

Split = Literal["train", "test"]
IGNORED = 255
"""Label of pixels that count for nothing."""

Targets = NDArray[Any]


@dataclass(frozen=True)
class LabelledImage:
    """An image and its class."""

    image: StoredImage
    label: str


@dataclass(frozen=True)
class Scene:
    """An image with a target for each of its pixels."""

    path: Path
    target: Path
    read_target: Callable[[Path], Targets]
    """(H, W): int64 classes with `IGNORED`, or float32 depths in metres with 0 for none."""

    def pixels(self) -> Pixels:
        """(H, W, 3)."""
        return image_file(str(self.path)).pixels()

    def values(self) -> Targets:
        """(H, W)."""
        return self.read_target(self.target)


@dataclass(frozen=True)
class Layout:
    """How one benchmark lies on a disk."""

    expected: str
    """What is looked for, for people."""
    scenes: Callable[[Path, Split], list[Scene]]
    num_classes: int | None = None
    """Known number of classes; None where the labels tell."""
    eigen_crop: bool = False
    """Whether depth is judged inside the crop of Eigen et al. for 480 x 640 pixels."""


# --- images with a class ------------------------------------------------------------------------


def labelled_images(path: str) -> list[LabelledImage]:
    """Read ROOT/CLASS/**/IMAGE, as ImageNet's train and val folders lie, or ROOT/labels.csv.

    Of tars the class is the first folder inside, or the tar where there is none.

    Raises:
        ConfigError: neither is there.
    """
    root = Path(path)
    if (root / "labels.csv").is_file():
        return _listed_images(root)
    classes = [(image, _class_of(image.name)) for image in images_below(path)]
    found = [LabelledImage(image, label) for image, label in classes if label is not None]
    if not found:
        raise ConfigError(
            f"{path}: no labelled images there; expected {path}/CLASS/IMAGE.jpg, or "
            f"{path}/labels.csv with lines FILE,CLASS"
        )
    if len(found) < len(classes):
        logger.warning("%s: %d images lie in no class; left out", path, len(classes) - len(found))
    return sorted(found, key=lambda item: (item.label, item.image.name))


def _class_of(name: str) -> str | None:
    """The first folder that an image lies in; a tar only where there is no other."""
    folders = PurePosixPath(name).parts[:-1]
    is_tar = [kind_of(folder) == "tar" for folder in folders]
    plain = [folder for folder, tar in zip(folders, is_tar, strict=True) if not tar]
    named = plain or [PurePosixPath(folder).stem for folder in folders]
    return named[0] if named else None


def _listed_images(root: Path) -> list[LabelledImage]:
    rows = [line.rpartition(",") for line in (root / "labels.csv").read_text().splitlines()]
    named = [(root / file, label.strip()) for file, _, label in rows if file]
    missing = next((file for file, _ in named if not file.is_file()), None)
    if missing is not None or not named:
        raise ConfigError(f"{root}/labels.csv: names {missing or 'no file'}, which is not there")
    return [LabelledImage(image_file(str(file)), label) for file, label in named]


# --- a target for each pixel --------------------------------------------------------------------


def open_scenes(path: str, split: Split, layouts: dict[str, Layout]) -> tuple[list[Scene], Layout]:
    """List the scenes of a split, in the layout that the path names or shows.

    Raises:
        ConfigError: no layout of those fits, with what each expects where.
    """
    name, colon, rest = path.partition(":")
    if colon and name in layouts:
        scenes = layouts[name].scenes(Path(rest), split)
        if not scenes:
            raise ConfigError(
                f"{rest}: holds no {name} images to {split}; expected {layouts[name].expected}"
            )
        return scenes, layouts[name]
    for layout in layouts.values():
        if scenes := layout.scenes(Path(path), split):
            return scenes, layout
    expected = "; or ".join(f"{name}: {layout.expected}" for name, layout in layouts.items())
    raise ConfigError(f"{path}: no images to {split} there; expected {expected}")


def read_labels(path: Path) -> Targets:
    """A label image whose values are classes; 255 is ignored. (H, W) int64."""
    return np.asarray(_open(path), np.int64)


def read_labels_from_1(path: Path) -> Targets:
    """A label image that counts classes from 1; 0 is ignored, as in ADE20K. (H, W) int64."""
    labels = np.asarray(_open(path), np.int64)
    return np.where(labels == 0, IGNORED, labels - 1)


def read_depth(path: Path) -> Targets:
    """Depth in metres, 0 for none: 16-bit images in millimetres, or .npy in metres. (H, W)."""
    if path.suffix == ".npy":
        metres: Targets = np.nan_to_num(np.load(path, allow_pickle=False)).astype(np.float32)
        return metres
    return np.asarray(_open(path), np.float32) / 1000


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as targets: {error}") from error
    return image


def _ade20k(root: Path, split: Split) -> list[Scene]:
    part = {"train": "training", "test": "validation"}[split]
    images, labels = root / "images" / part, root / "annotations" / part
    return _paired(images, labels, (".png",), read_labels_from_1)


def _voc(root: Path, split: Split) -> list[Scene]:
    lists = root / "ImageSets" / "Segmentation"
    names = {"train": ("trainaug.txt", "train.txt"), "test": ("val.txt",)}[split]
    found = next((lists / name for name in names if (lists / name).is_file()), None)
    if found is None:
        return []
    labels = next(
        (root / n for n in ("SegmentationClassAug", "SegmentationClass") if (root / n).is_dir()),
        root / "SegmentationClass",
    )
    return [
        Scene(root / "JPEGImages" / f"{name}.jpg", labels / f"{name}.png", read_labels)
        for name in found.read_text().split()
    ]


def _nyu(root: Path, split: Split) -> list[Scene]:
    listed = root / {"train": "nyu_train.txt", "test": "nyu_test.txt"}[split]
    if not listed.is_file():
        return []
    rows = [line.split() for line in listed.read_text().splitlines()]
    pairs = [(row[0].lstrip("/"), row[1].lstrip("/")) for row in rows if len(row) > 1]
    return [
        Scene(root / image, root / depth, read_depth) for image, depth in pairs if depth != "None"
    ]


def _plain_labels(root: Path, split: Split) -> list[Scene]:
    return _paired(root / "images", root / "labels", (".png",), read_labels)


def _plain_depth(root: Path, split: Split) -> list[Scene]:
    return _paired(root / "images", root / "depth", (".png", ".npy"), read_depth)


def _paired(
    images: Path, targets: Path, suffixes: Sequence[str], read: Callable[[Path], Targets]
) -> list[Scene]:
    """Images and targets of the same relative name."""
    found = list_files(str(images)) if images.is_dir() else Listing(str(images))
    scenes = []
    for name in found.images:
        stem = targets / name
        target = next((t for s in suffixes if (t := stem.with_suffix(s)).is_file()), None)
        if target is not None and name not in found.odd:
            scenes.append(Scene(images / name, target, read))
    return scenes


SEGMENTATION: dict[str, Layout] = {
    "ade20k": Layout(
        "ROOT/images/{training,validation}/NAME.jpg and "
        "ROOT/annotations/{training,validation}/NAME.png, classes 1 to 150 and 0 for none",
        _ade20k,
        150,
    ),
    "voc": Layout(
        "ROOT/ImageSets/Segmentation/{train,val}.txt, ROOT/JPEGImages/NAME.jpg and "
        "ROOT/SegmentationClass/NAME.png, 255 for none",
        _voc,
        21,
    ),
    "plain": Layout(
        "ROOT/images/NAME.jpg and ROOT/labels/NAME.png, classes from 0 and 255 for none",
        _plain_labels,
    ),
}

DEPTH: dict[str, Layout] = {
    "nyu": Layout(
        "ROOT/nyu_{train,test}.txt with lines IMAGE DEPTH [FOCAL], DEPTH being 16-bit PNGs in "
        "millimetres, 0 for none",
        _nyu,
        eigen_crop=True,
    ),
    "plain": Layout(
        "ROOT/images/NAME.jpg and ROOT/depth/NAME.png (16 bits, millimetres) or NAME.npy (metres), "
        "0 for none",
        _plain_depth,
    ),
}
