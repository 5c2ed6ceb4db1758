"""Settings of a run of the copy method: a head on a frozen trunk learns to tell copies."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from curation.config import Settings, find_config, read_mapping
from pretrain.config import OptimSettings, TrainConfig, load_as, load_config

REHEARSED = 64
"""Images of a dry run."""


def _within_one(share: float) -> float:
    if not 0 < share < 1:
        raise ValueError("must lie between 0 and 1, both left out")
    return share


PartOf = Annotated[float, AfterValidator(_within_one)]


class ViewSettings(Settings):
    """Edited views of each image, whose features are computed once."""

    per_image: int = Field(default=4, gt=1)
    """Views of each image; the first is the image as it is."""
    strong: float = Field(default=0.5, ge=0, le=1)
    """Share of the edited views that are edited strongly (`embedder.edits.strong_edit`)."""


class CopyLossSettings(Settings):
    """InfoNCE and the entropy term."""

    temperature: float = Field(default=0.05, gt=0)
    """Temperature of InfoNCE."""
    entropy_weight: float = Field(default=0.5, ge=0)
    """Weight of the entropy term beside InfoNCE."""


class CopyOptimSettings(OptimSettings):
    """Optimizer, schedules and length; the head is all that learns."""

    steps: int = Field(default=1200, gt=0)
    """Training steps."""
    batch_size: int = Field(default=256, gt=1)
    """Images a step, two views of each."""
    base_lr: float = Field(default=1.0e-3, gt=0)
    """Learning rate at an effective batch of 1024."""
    lr_scaling: Literal["sqrt_wrt_1024", "none"] = "none"
    """lr = base_lr * sqrt(effective batch / 1024), or base_lr as it is."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps of linear warm-up."""
    weight_decay: tuple[float, float] = (1.0e-4, 1.0e-4)
    """Weight decay at the start and at the end, along a cosine."""
    freeze_last_layer_steps: int = Field(default=0, ge=0, le=0)
    """There are no prototypes here."""


class HeldOutSettings(Settings):
    """Images that are never trained on: they measure recall, and the thresholds that are kept."""

    share: PartOf = 0.25
    """Share of the images, those whose names have the smallest hashes."""
    every_steps: int = Field(default=200, gt=0)
    """Steps between measurements."""
    recall: PartOf = 0.9
    """Share of the edits that the threshold for duplicates finds at least."""
    false_pairs: PartOf = 1.0e-6
    """Share of the pairs of unlike images that may lie above it, where that leaves the recall."""
    false_leaks: PartOf = 1.0e-5
    """The same of the threshold for leaks: looser, since a leak costs more than an image."""


class CopyConfig(TrainConfig):
    """Everything that decides a run of the copy method but its data."""

    method: Literal["copy"] = "copy"
    """Tells these settings from those of DINOv2."""
    trunk: str = "lite"
    """Frozen network whose feature maps are read: lite, or dinov2:FILE as `embed` takes it."""
    width: int = Field(default=512, gt=1)
    """Dimensions of the vectors."""
    views: ViewSettings = ViewSettings()
    """Edited views of each image."""
    loss: CopyLossSettings = CopyLossSettings()
    """InfoNCE and the entropy term."""
    optim: CopyOptimSettings = CopyOptimSettings()
    """Optimizer, schedules and length."""
    held_out: HeldOutSettings = HeldOutSettings()
    """What is measured on, and never trained on."""
    max_images: int | None = Field(default=None, gt=7)
    """At most so many images, those whose names have the smallest hashes; null takes all."""

    @model_validator(mode="after")
    def _check_optim(self) -> Self:
        if self.optim.accumulate != 1:
            raise ValueError("optim.accumulate: views are compared within one pass; make it 1")
        return self

    def rehearsed(self) -> Self:
        """The same on so few images that their features cost seconds."""
        return self.replace(max_images=min(REHEARSED, self.max_images or REHEARSED))

    @property
    def probe_every_steps(self) -> int | None:
        """Steps between measurements on the images held out."""
        return self.held_out.every_steps

    def temperature(self, step: int) -> float:
        """Temperature of InfoNCE, the same at every step."""
        return self.loss.temperature


def load_training_config(
    path_or_name: str, overrides: list[str] | tuple[str, ...] = ()
) -> TrainConfig:
    """Do as `load_config` does, for any method: a config of the copy method says `method: copy`.

    Raises:
        ConfigError: no such file or name, or a setting that cannot be.
    """
    if read_mapping(find_config("pretrain", path_or_name)).get("method") == "copy":
        return load_as(CopyConfig, "pretrain", path_or_name, overrides)
    return load_config(path_or_name, overrides)
