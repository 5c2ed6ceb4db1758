"""Settings of a pretraining run. Defaults are those of the paper's ViT-L/14 recipe."""

import copy
import logging
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, Field, model_validator

from curation.config import Settings, apply_changes, find_config, parse_settings, read_mapping
from curation.errors import ConfigError
from embedder.vit import ViTConfig, vit_config
from pretrain.schedules import Cosine, Linear

logger = logging.getLogger(__name__)


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("goes from the larger to the smaller; turn it round")
    return pair


def _not_all_zero(weights: dict[str, float]) -> dict[str, float]:
    if not any(weights.values()):
        raise ValueError("gives no set a share; one must be above 0")
    return weights


_Share = Annotated[float, Field(ge=0, le=1)]
_PartOfArea = Annotated[float, Field(gt=0, le=1)]
_NotNegative = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_BelowOne = Annotated[float, Field(ge=0, lt=1)]
Shares = Annotated[tuple[_Share, _Share], AfterValidator(_ascending)]
Areas = Annotated[tuple[_PartOfArea, _PartOfArea], AfterValidator(_ascending)]
Weights = Annotated[dict[str, _NotNegative], AfterValidator(_not_all_zero)]

_FREEZE = ("optim", "freeze_backbone_steps")
SCHEDULES = (
    ("optim", "warmup_steps"),
    ("teacher", "temperature_warmup_steps"),
    ("optim", "freeze_last_layer_steps"),
    _FREEZE,
)
"""What is given in steps, by section."""


class ModelSettings(Settings):
    """The backbone."""

    arch: str = "vitl14"
    """vit, one of t s b l g, patch 14 or 16, and perhaps _reg for 4 registers."""
    drop_path: float = Field(default=0.4, ge=0, lt=1)
    """Share of images that each residual branch leaves out (stochastic depth)."""
    layerscale: float | None = 1.0e-5
    """Initial LayerScale gamma; null for none."""
    ffn: Literal["mlp", "swiglu"] | None = None
    """Feed-forward layer; null for that of the arch."""
    width: int | None = Field(default=None, gt=0)
    """Width other than the arch's."""
    depth: int | None = Field(default=None, gt=0)
    """Number of blocks other than the arch's."""
    heads: int | None = Field(default=None, gt=0)
    """Attention heads other than the arch's."""
    patch: int | None = Field(default=None, gt=0)
    """Side of a patch in pixels other than the arch's."""


class CropSettings(Settings):
    """Multi-crop augmentation: 2 global crops and `local_count` local ones an image."""

    global_size: int = Field(default=224, gt=0)
    """Side of a global crop in pixels."""
    global_scale: Areas = (0.32, 1.0)
    """Area of a global crop as a share of the image."""
    local_size: int = Field(default=98, gt=0)
    """Side of a local crop in pixels."""
    local_scale: Areas = (0.05, 0.32)
    """Area of a local crop as a share of the image."""
    local_count: int = Field(default=8, ge=0)
    """Local crops an image."""
    blur: Literal["released", "nominal"] = "released"
    """Probabilities of blur in the two global crops: 0 and 0.9 as the released models were trained
    (the public code passes 1 - p), or 1 and 0.1 as its settings say."""


class MaskSettings(Settings):
    """Block masks for iBOT."""

    probability: float = Field(default=0.5, ge=0, le=1)
    """Share of the global crops that are masked."""
    ratio: Shares = (0.1, 0.5)
    """Share of the patches that a masked crop hides: from, to."""


class HeadSettings(Settings):
    """One projection head."""

    prototypes: int = Field(default=131072, gt=1)
    """Outputs of the head."""
    hidden: int = Field(default=2048, gt=0)
    """Width of its hidden layers."""
    bottleneck: int = Field(default=256, gt=0)
    """Width before the prototypes."""
    layers: int = Field(default=3, ge=2)
    """Linear layers before the prototypes."""


class LossSettings(Settings):
    """Losses, their weights, and how the teacher's targets are made."""

    dino_weight: float = Field(default=1.0, ge=0)
    """Weight of the image-level loss."""
    ibot_weight: float = Field(default=1.0, ge=0)
    """Weight of the masked-patch loss."""
    koleo_weight: float = Field(default=0.1, ge=0)
    """Weight of the KoLeo loss, summed over both global crops."""
    koleo_gathered: bool = False
    """Seek KoLeo's nearest neighbors over all processes; the paper's stays within each."""
    centering: Literal["sinkhorn_knopp", "centering"] = "sinkhorn_knopp"
    """How the teacher's outputs become targets."""
    sinkhorn_iterations: int = Field(default=3, gt=0)
    """Iterations of Sinkhorn-Knopp."""
    center_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the center."""
    student_temperature: float = Field(default=0.1, gt=0)
    """Temperature of the student's softmax."""
    separate_heads: bool = True
    """Whether iBOT has a head of its own."""
    dino_head: HeadSettings = HeadSettings(bottleneck=384)
    """The image-level head (both, where they are shared)."""
    ibot_head: HeadSettings = HeadSettings()
    """The patch-level head."""
    max_logit_bytes: int = Field(default=2**31, gt=0)
    """Memory that cached teacher outputs may take; beyond it they are computed anew, block by
    block."""
    block_rows: int = Field(default=1024, gt=0)
    """Rows whose scores exist at once in the cross-entropies, for some prototypes at a time."""


class TeacherSettings(Settings):
    """Schedules of the EMA teacher."""

    momentum: Shares = (0.994, 1.0)
    """Momentum at the start and at the end, along a cosine."""
    temperature: tuple[_Positive, _Positive] = (0.04, 0.07)
    """Temperature at the start and after its warm-up, along a line."""
    temperature_warmup_steps: int = Field(default=37_500, ge=0)
    """Steps of that warm-up."""


class OptimSettings(Settings):
    """Optimizer, schedules and length."""

    steps: int = Field(default=625_000, gt=0)
    """Training steps."""
    batch_size: int = Field(default=64, gt=1)
    """Images a process in one forward pass."""
    accumulate: int = Field(default=1, gt=0)
    """Forward passes a step: the effective batch is batch_size * accumulate * processes."""
    base_lr: float = Field(default=2.0e-4, gt=0)
    """Learning rate at an effective batch of 1024."""
    lr_scaling: Literal["sqrt_wrt_1024", "none"] = "sqrt_wrt_1024"
    """lr = base_lr * sqrt(effective batch / 1024), or base_lr as it is."""
    min_lr: float = Field(default=1.0e-6, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(default=100_000, ge=0)
    """Steps of linear warm-up."""
    weight_decay: tuple[_NotNegative, _NotNegative] = (0.04, 0.2)
    """Weight decay at the start and at the end, along a cosine."""
    betas: tuple[_BelowOne, _BelowOne] = (0.9, 0.999)
    """AdamW's betas."""
    clip_norm: float | None = Field(default=3.0, gt=0)
    """Largest gradient norm of each submodule; null for no clipping."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of each layer as a share of the next one's."""
    patch_embed_lr: float = Field(default=0.2, ge=0)
    """Learning rate of the patch embedding as a share of its layer's."""
    freeze_last_layer_steps: int = Field(default=1250, ge=0)
    """Steps in which the prototypes stay as they are."""
    freeze_backbone_steps: int = Field(default=0, ge=0)
    """Steps in which the backbone stays as it is (for continued training with fresh heads). All of
    them: heads alone are fitted."""
    stop_when_flat: int | None = Field(default=None, gt=1)
    """End once loss and prototypes in use differ by less than 1 % between the last so many logged
    steps and those before them; null goes to the end."""


class DataSettings(Settings):
    """Reading images."""

    workers: int = Field(default=8, ge=0)
    """Loader processes; 0 loads in the training process. Does not change what is trained on."""
    window_shards: int = Field(default=64, gt=0)
    """Shards among which images are shuffled at a time; shards themselves are shuffled globally."""
    seed_set_weights: Weights | None = None
    """Share of the samples by seed set ("none" for rows without one); null takes every image once
    an epoch."""


class RunSettings(Settings):
    """The machine's side of a run."""

    seed: int = Field(default=0, ge=0)
    """Seed of weights, order, crops, masks and stochastic depth."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    threads: int | None = Field(default=None, gt=0)
    """Torch threads on the CPU; null leaves torch's choice."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the products; weights, losses and optimizer stay in float32."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile the backbone's blocks with torch.compile."""
    checkpoint_every_steps: int = Field(default=3750, gt=0)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=3, gt=0)
    """Latest checkpoints kept."""
    keep_every_steps: int | None = Field(default=None, gt=0)
    """Checkpoints at multiples of this are kept for good."""
    log_every_steps: int = Field(default=10, gt=0)
    """Steps between lines of log.jsonl and calls of `progress`."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the tensorboard package)."""


class KnnSettings(Settings):
    """k-NN during training, on two folders that hold a folder of images for each class."""

    train: str
    """Labeled images to ask."""
    test: str
    """Labeled images to classify."""
    every_steps: int = Field(default=12_500, gt=0)
    """Steps between evaluations of the teacher."""
    k: int = Field(default=20, gt=0)
    """Neighbors."""


class TrainConfig(Settings):
    """What the training loop goes by, whatever the method."""

    optim: OptimSettings = OptimSettings()
    """Optimizer, schedules and length."""
    data: DataSettings = DataSettings()
    """Reading images."""
    run: RunSettings = RunSettings()
    """Seed, device, precision, checkpoints."""

    def momentum(self, step: int) -> float:
        """Momentum of the student's moving average at a step; 0 where it is the student."""
        return 0.0

    def temperature(self, step: int) -> float:
        """Temperature of the targets at a step."""
        raise NotImplementedError

    def scheduled(self, step: int) -> dict[str, float]:
        """What is logged of the method's own schedules at a step."""
        return {}

    @property
    def probe_every_steps(self) -> int | None:
        """Steps between measurements on images that are not trained on; None for none."""
        return None

    def rehearsed(self) -> Self:
        """Settings by which a dry run takes its steps."""
        return self

    def as_yaml(self) -> str:
        """Every setting, as `load_config` reads it."""
        values = self.model_dump(mode="json")
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None)

    def misfits(self) -> list[tuple[str, str]]:
        """Schedules that would not be through within the run; a backbone may stay frozen."""
        optim = self.optim
        found = {
            ("optim", "warmup_steps"): optim.warmup_steps > optim.steps,
            ("optim", "freeze_last_layer_steps"): optim.freeze_last_layer_steps >= optim.steps,
        }
        return [key for key, is_longer in found.items() if is_longer]

    @property
    def fits_heads(self) -> bool:
        """Whether the backbone stays as it is throughout."""
        return self.optim.freeze_backbone_steps >= self.optim.steps

    def effective_batch(self, processes: int) -> int:
        """Images a step."""
        return self.optim.batch_size * self.optim.accumulate * processes

    def peak_lr(self, processes: int) -> float:
        """Learning rate after warm-up."""
        if self.optim.lr_scaling == "none":
            return self.optim.base_lr
        return self.optim.base_lr * math.sqrt(self.effective_batch(processes) / 1024)


class PretrainConfig(TrainConfig):
    """Everything that decides a pretraining run but its data."""

    model: ModelSettings = ModelSettings()
    """The backbone."""
    crops: CropSettings = CropSettings()
    """Augmentation."""
    masks: MaskSettings = MaskSettings()
    """iBOT's masks."""
    loss: LossSettings = LossSettings()
    """Losses and heads."""
    teacher: TeacherSettings = TeacherSettings()
    """The EMA teacher."""
    knn: KnnSettings | None = None
    """k-NN during training; null for none."""
    init: str | None = None
    """Backbone weights to start from (heads start fresh)."""
    continue_run: str | None = None
    """Run whose networks, heads included, go on at these crop sizes; `--continue` names it."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        try:
            vit = self.vit()
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        for name in ("global_size", "local_size"):
            size = getattr(self.crops, name)
            if size % vit.patch:
                low, high = size // vit.patch * vit.patch, -(-size // vit.patch) * vit.patch
                raise ValueError(
                    f"crops.{name} {size} is no multiple of the patch {vit.patch}: "
                    f"use {low or high} or {high}"
                )
        return self

    def vit(self) -> ViTConfig:
        """Give the backbone's architecture; its position embedding fits the global crop.

        Raises:
            ValueError: there is no such architecture.
        """
        names = ("ffn", "width", "depth", "heads", "patch")
        chosen = {name: getattr(self.model, name) for name in names}
        changes: dict[str, Any] = {name: value for name, value in chosen.items() if value}
        patch = self.model.patch or vit_config(self.model.arch).patch
        return vit_config(
            self.model.arch,
            drop_path=self.model.drop_path,
            layerscale=self.model.layerscale,
            image_size=max(self.crops.global_size // patch, 1) * patch,
            **changes,
        )

    def momentum(self, step: int) -> float:
        """Momentum of the teacher at a step."""
        return Cosine(*self.teacher.momentum, self.optim.steps)(step)

    def temperature(self, step: int) -> float:
        """Temperature of the teacher at a step."""
        teacher = self.teacher
        return Linear(*teacher.temperature, teacher.temperature_warmup_steps)(step)

    def scheduled(self, step: int) -> dict[str, float]:
        """Momentum and temperature of the teacher at a step."""
        return {
            "teacher_momentum": self.momentum(step),
            "teacher_temperature": self.temperature(step),
        }

    @property
    def probe_every_steps(self) -> int | None:
        """Steps between k-NN classifications."""
        return None if self.knn is None else self.knn.every_steps

    def misfits(self) -> list[tuple[str, str]]:
        """Schedules that would not be through within the run; a backbone may stay frozen."""
        found = super().misfits()
        if self.teacher.temperature_warmup_steps > self.optim.steps:
            found.insert(1, ("teacher", "temperature_warmup_steps"))
        return found


C = TypeVar("C", bound=TrainConfig)


class StudentSettings(ModelSettings):
    """The student's backbone in distillation."""

    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Share of images that each residual branch leaves out; distillation needs none."""


class NamedStudent(StudentSettings):
    """One of several students."""

    name: str = Field(pattern=r"^[\w-]+$")
    """Names its folder, and its figures in the log."""


class DistillConfig(PretrainConfig):
    """Everything that decides a distillation run but its data.

    `teacher.temperature` is that of the frozen teacher's targets, `teacher.momentum` that of the
    student's moving average.
    """

    model: StudentSettings = StudentSettings()
    """The student's backbone; its patch must be the teacher's."""
    students: tuple[str | NamedStudent, ...] = ()
    """Several students of one teacher in place of `model`: sizes (s, b, l), archs, or settings
    with a name. OUT/NAME/backbone.safetensors is what each leaves."""
    objective: Literal["prototypes", "features"] = "prototypes"
    """What the student matches: the teacher's choices among prototypes, by its heads; or, where
    there are no heads, its class and patch tokens, by linear maps and cosine."""
    teacher_run: str | None = None
    """Folder of the pretraining run whose last checkpoint teaches; `--teacher` names it too. For
    `features` it may be a file of weights."""
    ibot_tokens: Literal["all", "masked"] = "all"
    """Patches of the global crops that iBOT compares: all, or those that `masks` would hide.
    The student sees every patch either way."""

    def single(self) -> "dict[str, DistillConfig]":
        """Settings of each student's own run, by name; a single one has the empty name.

        Raises:
            ConfigError: two students have one name.
        """
        if not self.students:
            return {"": self}
        found: dict[str, DistillConfig] = {}
        for student in self.students:
            name, model = self._student(student)
            if name in found:
                raise ConfigError(f"students: two are named '{name}'; give one another name")
            values = {**self.model_dump(mode="json"), "model": model, "students": []}
            found[name] = parse_settings(DistillConfig, values, f"student '{name}'")
        return found

    def _student(self, student: str | NamedStudent) -> tuple[str, dict[str, Any]]:
        """Name and model settings; what a bare size leaves open is that of `model`."""
        if isinstance(student, NamedStudent):
            values = student.model_dump(mode="json")
            return values.pop("name"), values
        patch = self.vit().patch
        arch = student if student.startswith("vit") else f"vit{student}{patch}"
        return student, {**self.model.model_dump(mode="json"), "arch": arch}


def load_config(path_or_name: str, overrides: list[str] | tuple[str, ...] = ()) -> PretrainConfig:
    """Read a YAML file, or one of the shipped configs by name, and apply `key.path=value` changes.

    Raises:
        ConfigError: no such file or name, or a setting that cannot be.
    """
    return load_as(PretrainConfig, "pretrain", path_or_name, overrides)


def load_distill_config(
    path_or_name: str, overrides: list[str] | tuple[str, ...] = ()
) -> DistillConfig:
    """Do as `load_config` does, for distillation.

    Raises:
        ConfigError: no such file or name, or a setting that cannot be.
    """
    return load_as(DistillConfig, "distill", path_or_name, overrides)


def load_as(
    model: type[C], kind: str, path_or_name: str, overrides: list[str] | tuple[str, ...]
) -> C:
    """Do as `load_config` does, for settings of a kind.

    Raises:
        ConfigError: no such file or name, or a setting that cannot be.
    """
    file = read_mapping(find_config(kind, path_or_name))
    values = copy.deepcopy(file)
    apply_changes(values, overrides)
    return fitted(parse_settings(model, values, where=path_or_name), [file], overrides)


def fitted(config: C, layers: list[dict[str, Any]], overrides: Iterable[str]) -> C:
    """Scale the schedules that are given in steps if a run is too short for one of them.

    layers: what the settings were read from, the last above the others. Each schedule keeps its
    share of the length that stood beside it; what an override names was meant for this run.

    Raises:
        ConfigError: one does not fit the length that it was written for.
    """
    named: dict[str, Any] = {}
    apply_changes(named, overrides)
    meant = _lengths_meant([type(config)().model_dump(), *layers, named])
    values, steps = config.model_dump(mode="json"), config.optim.steps
    unfit = config.misfits()
    if not unfit and not (config.fits_heads and meant[_FREEZE] > steps):
        return config
    for section, name in meant:
        if meant[section, name] > steps:
            scaled = round(values[section][name] * steps / meant[section, name])
            values[section][name] = min(scaled, steps)
        elif (section, name) in unfit:
            raise ConfigError(
                f"{section}.{name} = {values[section][name]} does not fit optim.steps = {steps}; "
                "make it smaller, or the run longer"
            )
    result = parse_settings(type(config), values, "schedules")
    told = ", ".join(f"{s}.{n} = {values[s][n]}" for s, n in meant if meant[s, n] > steps)
    logger.warning("schedules are scaled to optim.steps = %d: %s", steps, told)
    return result


def _lengths_meant(layers: list[dict[str, Any]]) -> dict[tuple[str, str], int]:
    """Length of the run that each schedule was written for."""
    steps, meant = 0, dict[tuple[str, str], int]()
    for layer in layers:
        steps = (layer.get("optim") or {}).get("steps", steps)
        given = (key for key in SCHEDULES if key[1] in (layer.get(key[0]) or {}))
        meant |= dict.fromkeys(given, steps)
    return meant
