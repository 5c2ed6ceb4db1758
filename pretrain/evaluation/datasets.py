"""Where benchmarks lie: the layouts that evaluation reads, and how their targets are read.

A path may name its layout in front, `ade20k:PATH`; otherwise the layout is recognized.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from curation.errors import ConfigError
from curation.sources.folders import Listing, list_files
from curation.sources.names import kind_of
from curation.sources.shards import StoredImage, image_file, images_below
from pretrain.evaluation.targets import (
    Scene,
    Targets,
    read_depth,
    read_labels,
    read_labels_from_1,
)

logger = logging.getLogger(__name__)

Split = Literal["train", "test"]


@dataclass(frozen=True)
class LabeledImage:
    """An image and its class."""

    image: StoredImage
    label: str


class Found(NamedTuple):
    """The scenes of a split."""

    scenes: list[Scene]
    unpaired: int = 0
    """Images without a target, which are left out."""


@dataclass(frozen=True)
class Layout:
    """How one benchmark lies on a disk."""

    expected: str
    """What is looked for, for people."""
    find: Callable[[Path, Split], Found]
    num_classes: int | None = None
    """Known number of classes; None where the labels tell."""
    eigen_crop: bool = False
    """Whether depth is judged inside the crop of Eigen et al. for 480 x 640 pixels."""


# --- images with a class ------------------------------------------------------------------------


def labeled_images(path: str) -> list[LabeledImage]:
    """Read ROOT/CLASS/**/IMAGE, as ImageNet's train and val folders lie, or ROOT/labels.csv.

    Of tars the class is the first folder inside, or the tar where there is none.

    Raises:
        ConfigError: neither is there.
    """
    root = Path(path)
    if (root / "labels.csv").is_file():
        return _listed_images(root)
    classes = [(image, _class_of(image.name)) for image in images_below(path)]
    found = [LabeledImage(image, label) for image, label in classes if label is not None]
    if not found:
        raise ConfigError(
            f"{path}: no labeled images there; expected {path}/CLASS/IMAGE.jpg, or "
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


def _listed_images(root: Path) -> list[LabeledImage]:
    rows = [line.rpartition(",") for line in (root / "labels.csv").read_text().splitlines()]
    named = [(root / file, label.strip()) for file, _, label in rows if file]
    missing = next((file for file, _ in named if not file.is_file()), None)
    if missing is not None or not named:
        raise ConfigError(f"{root}/labels.csv: names {missing or 'no file'}, which is not there")
    return [LabeledImage(image_file(str(file)), label) for file, label in named]


# --- a target for each pixel --------------------------------------------------------------------


def open_scenes(path: str, split: Split, layouts: dict[str, Layout]) -> tuple[Found, Layout]:
    """List the scenes of a split, in the layout that the path names or shows.

    Raises:
        ConfigError: no layout of those fits, with what each expects where.
    """
    name, colon, rest = path.partition(":")
    if colon and name in layouts:
        found = layouts[name].find(Path(rest), split)
        if not found.scenes:
            raise ConfigError(
                f"{rest}: holds no {name} images to {split}; expected {layouts[name].expected}"
            )
        return found, layouts[name]
    for layout in layouts.values():
        if (found := layout.find(Path(path), split)).scenes:
            return found, layout
    expected = "; or ".join(f"{name}: {layout.expected}" for name, layout in layouts.items())
    raise ConfigError(f"{path}: no images to {split} there; expected {expected}")


def _ade20k(root: Path, split: Split) -> Found:
    part = {"train": "training", "test": "validation"}[split]
    images, labels = root / "images" / part, root / "annotations" / part
    return _paired(images, labels, (".png",), read_labels_from_1)


def _voc(root: Path, split: Split) -> Found:
    lists = root / "ImageSets" / "Segmentation"
    names = {"train": ("trainaug.txt", "train.txt"), "test": ("val.txt",)}[split]
    found = next((lists / name for name in names if (lists / name).is_file()), None)
    if found is None:
        return Found([])
    labels = next(
        (root / n for n in ("SegmentationClassAug", "SegmentationClass") if (root / n).is_dir()),
        root / "SegmentationClass",
    )
    return Found(
        [
            Scene(root / "JPEGImages" / f"{name}.jpg", labels / f"{name}.png", read_labels)
            for name in found.read_text().split()
        ]
    )


def _nyu(root: Path, split: Split) -> Found:
    listed = root / {"train": "nyu_train.txt", "test": "nyu_test.txt"}[split]
    if not listed.is_file():
        return Found([])
    rows = [line.split() for line in listed.read_text().splitlines() if line.strip()]
    pairs = [row for row in rows if len(row) > 1 and row[1] != "None"]
    scenes = [
        Scene(root / row[0].lstrip("/"), root / row[1].lstrip("/"), read_depth) for row in pairs
    ]
    return Found(scenes, len(rows) - len(pairs))


def _plain_labels(root: Path, split: Split) -> Found:
    return _paired(root / "images", root / "labels", (".png",), read_labels)


def _plain_depth(root: Path, split: Split) -> Found:
    return _paired(root / "images", root / "depth", (".png", ".npy"), read_depth)


def _paired(
    images: Path, targets: Path, suffixes: Sequence[str], read: Callable[[Path], Targets]
) -> Found:
    """Images and targets of the same relative name."""
    found = list_files(str(images)) if images.is_dir() else Listing(str(images))
    scenes, unpaired = [], 0
    for name in found.images:
        stem = targets / name
        target = next((t for s in suffixes if (t := stem.with_suffix(s)).is_file()), None)
        unpaired += target is None
        scenes += [] if target is None else [Scene(images / name, target, read)]
    return Found(scenes, unpaired)


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
        "millimeters, 0 for none",
        _nyu,
        eigen_crop=True,
    ),
    "plain": Layout(
        "ROOT/images/NAME.jpg and ROOT/depth/NAME.png (16 bits, millimeters) or NAME.npy (meters), "
        "0 for none",
        _plain_depth,
    ),
}
