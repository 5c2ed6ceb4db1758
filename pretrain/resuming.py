"""What a run that goes on may change freely, what only if it is allowed to, and what never."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from curation.config import laid_over
from embedder.errors import CheckpointError
from pretrain import checkpoint
from pretrain.backbones import find_saved
from pretrain.config import SCHEDULES, DistillConfig, TrainConfig
from pretrain.continuing import find_checkpoint, has_checkpoint
from pretrain.digests import DIGESTS, digest_of
from pretrain.distributed import world_size

BACKBONE = "backbone.safetensors"

FREE = (
    "optim.stop_when_flat",
    "loss.block_rows",
    "loss.max_logit_bytes",
    "data.workers",
    "run.device",
    "run.threads",
    "run.checkpoint_activations",
    "run.compile",
    "run.checkpoint_every_steps",
    "run.keep_checkpoints",
    "run.keep_every_steps",
    "run.log_every_steps",
    "run.tensorboard",
    "knn",
    "held_out.every_steps",
    "held_out.recall",
    "held_out.false_pairs",
    "held_out.false_leaks",
)
"""What decides no number but by rounding: the machine, and what is written down."""

STEPS = "optim.steps"
LENGTHS = (STEPS, *map(".".join, SCHEDULES))
"""A run may become longer or shorter; schedules that are given in steps follow. It is recorded."""

BATCH = ("optim.batch_size", "optim.accumulate")
"""Compared with the processes: the same batch may be divided among others."""

ORIGINS = ("teacher_run", "init", "continue_run")
"""Paths of weights, known by what they hold."""

FIXED = (
    "init",
    "continue_run",
    "students",
    "objective",
    "model",
    "crops.global_size",
    "loss.separate_heads",
    "loss.dino_head",
    "loss.ibot_head",
    "trunk",
    "width",
)
"""What the tensors of a checkpoint have the shape of, or were begun with."""
RESHAPES_NOTHING = ("model.drop_path", "model.layerscale")


class Change(NamedTuple):
    """A setting that is another one from a step on."""

    setting: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.setting} = {self.before}, now it is {self.now}"

    def record(self, step: int) -> dict[str, Any]:
        """What log, checkpoints and card say of it."""
        return {"step": step, "setting": self.setting, "before": self.before, "now": self.now}


def facts_of(config: TrainConfig, data: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the numbers of a run, as its checkpoints hold it."""
    origins = {key: _origin_digest(config, key) for key in ORIGINS}
    return {
        "config": config.model_dump(mode="json"),
        "data": data,
        "processes": world_size(),
        "origins": {key: digest for key, digest in origins.items() if digest},
    }


def accepted_changes(
    saved: dict[str, Any], facts: dict[str, Any], out: Path, *, allow_changed: bool
) -> list[Change]:
    """Compare a run with its checkpoint; give the changes that it goes on with.

    Raises:
        CheckpointError: naming what differs and may not, with both values.
    """
    changes = list(_differences(saved, facts))
    longer = any(one.setting == STEPS for one in changes)
    asked = [one for one in changes if not (longer and one.setting in LENGTHS)]
    if any(_is_fixed(one.setting) for one in asked):
        raise _refusal(out, asked, "set it back, or name another folder")
    if asked and not allow_changed:
        remedy = (
            "set it back, name another folder or remove this one, or accept it with --allow-changed"
        )
        raise _refusal(out, asked, remedy)
    return changes


def _refusal(out: Path, changes: list[Change], remedy: str) -> CheckpointError:
    return CheckpointError(f"{out}: was trained with {', and '.join(map(str, changes))}; {remedy}")


def _is_fixed(setting: str) -> bool:
    return _below(setting, FIXED) and setting not in RESHAPES_NOTHING


def _differences(saved: dict[str, Any], facts: dict[str, Any]) -> Iterator[Change]:
    old, new = _settings(saved), _settings(facts)
    for key in ORIGINS:
        if _is_other_origin(key, saved, facts):
            same = " with other weights" if old[key] == new[key] else ""
            yield Change(key, old[key], f"{new[key]}{same}")
    if _is_other_data(saved.get("data") or {}, facts["data"]):
        yield Change("data", _told_data(saved["data"]), _told_data(facts["data"]))
    divided = saved.get("processes", facts["processes"]) != facts["processes"]
    if divided and _batch(saved) != _batch(facts):
        yield Change("the batch of all processes", _batch(saved), _batch(facts))
    apart = (*FREE, *ORIGINS, *(BATCH if divided else ()))
    for key in old | new:
        if old.get(key) != new.get(key) and not _below(key, apart):
            yield Change(key, old.get(key), new.get(key))


def _settings(facts: dict[str, Any]) -> dict[str, Any]:
    """All settings by dotted name; what older checkpoints lack has its default."""
    return dict(_flat(laid_over(DistillConfig().model_dump(mode="json"), facts["config"])))


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def _below(setting: str, names: tuple[str, ...]) -> bool:
    return any(setting == name or setting.startswith(f"{name}.") for name in names)


def _batch(facts: dict[str, Any]) -> int:
    optim = facts["config"]["optim"]
    return int(optim["batch_size"] * optim["accumulate"] * facts["processes"])


def _is_other_origin(key: str, saved: dict[str, Any], facts: dict[str, Any]) -> bool:
    before, now = saved["config"].get(key), facts["config"].get(key)
    old, new = (one.get("origins", {}).get(key) for one in (saved, facts))
    if before is None or now is None:
        return before is not now
    if before == now and (key != "teacher_run" or old is None):
        return False  # what a run began with is in its checkpoint
    return old is None or old != new


def _is_other_data(saved: dict[str, Any], data: dict[str, Any]) -> bool:
    known = [key for key in ("digest", "content_digest", "images") if saved.get(key)]
    return any(saved[key] != data[key] for key in known[:1])


def _told_data(data: dict[str, Any]) -> str:
    digest = data.get("digest") or data.get("content_digest") or "unknown"
    return f"{data['path']} ({data['images']:,} images, digest {digest[:12]})"


def _origin_digest(config: TrainConfig, key: str) -> str | None:
    """Digest of the weights that a setting names; None where there are none."""
    value = getattr(config, key, None)
    if value is None:
        return None
    path = Path(value)
    features = getattr(config, "objective", None) == "features"
    if features and (saved := find_saved(path)):
        path = saved.folder
    elif has_checkpoint(value):
        path = checkpoint.checkpoint_folder(*find_checkpoint(value))
    elif (path / BACKBONE).is_file():
        path = path / BACKBONE
    if path.is_file():
        return digest_of(path)["sha256"]
    return _folder_digest(path) if path.is_dir() else None


def _folder_digest(folder: Path) -> str:
    """Digest of what lies in a folder; a checkpoint's own digests say it already."""
    if (folder / DIGESTS).is_file():
        return digest_of(folder / DIGESTS)["sha256"]
    found = hashlib.sha256()
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        found.update(f"{path.relative_to(folder)} {digest_of(path)['sha256']}\n".encode())
    return found.hexdigest()
