"""Load and save backbone weights, strictly.

Read are safetensors files and torch files (never pickled code), as released, as saved by training
(`teacher` / `backbone.` prefixes), with chunked blocks (`blocks.<chunk>.<i>`), and under the names
of `transformers` and `timm`, whose folders are read, too, and without their classifiers. Whatever
does not fit is an error that lists the keys: a silently half-loaded backbone is the worst outcome.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from embedder import peers
from embedder.errors import CheckpointError, foreign_weights, reason_of
from embedder.vit import VisionTransformer, ViTConfig

CONFIG_KEY = "vit_config"
"""Name of the architecture in the metadata of our safetensors files."""
DIGEST_KEY = "sha256"
"""Name of the digest of all that is there; files of others have none."""
LICENSE_KEY = "license"
"""Name of the license that the weights were exported under."""
UNKNOWN = "unknown"

WRAPPERS = ("teacher", "model", "state_dict", "student")
PREFIXES = (
    *("module.", "teacher.", "backbone.", "_orig_mod."),
    *("dinov2.", "dinov2_with_registers."),
)
HEADS = ("dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.")
CLASSIFIERS = ("classifier.", "head.", "linear_head.")
"""Of `transformers`, `timm` and the public hub."""
PEER_FILES = ("model.safetensors", "pytorch_model.bin")
PEER_CONFIG = "config.json"
_POSITIONS = ("pos_embed", "position_embeddings")
"""Ends of the names of position embeddings."""

logger = logging.getLogger(__name__)


def save_backbone(model: VisionTransformer, path: Path | str) -> None:
    """Write weights and architecture to one safetensors file, whole or not at all."""
    path = Path(path)
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    save_state(weights, model.config, path)


def save_state(
    weights: Mapping[str, Tensor],
    config: ViTConfig,
    path: Path,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write a backbone's state dict, its architecture and `about` it; see `save_backbone`."""
    metadata = {CONFIG_KEY: json.dumps(asdict(config)), **(about or {})}
    write_safetensors(weights, path, metadata)


def write_safetensors(
    weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write named tensors to a file, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(weights), partial, {**metadata, DIGEST_KEY: _digest_of(weights, metadata)})
        partial.chmod(0o644)  # safetensors makes files for their owner only
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        size = sum(value.nbytes for value in weights.values()) / 1e6
        raise CheckpointError(
            f"{path}: cannot be written, and takes {size:,.1f} MB: {reason_of(error)}"
        ) from error


def _digest_of(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hex SHA-256 of tensors, by name, type, shape and value, and of what is said of them."""
    said = {key: value for key, value in metadata.items() if key != DIGEST_KEY}
    content = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        content.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        content.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


def load_backbone(path: Path | str, config: ViTConfig | None = None) -> VisionTransformer:
    """Build the model that a weight file holds, in evaluation mode.

    The architecture comes from `config`, else from the file's metadata, else (released files) from
    the shapes. A position embedding of another grid than `config`'s is kept: the model
    interpolates it.

    Raises:
        CheckpointError: the file cannot be read or does not fit `config`.
    """
    weights, saved = read_weights(path)
    config = config or saved or infer_config(weights, where=str(path))
    return build_backbone(weights, config, where=str(path))


def build_backbone(
    weights: Mapping[str, Tensor], config: ViTConfig, where: str
) -> VisionTransformer:
    """Build the model of an architecture with these weights; see `load_backbone`."""
    model = _described_model(weights, config, where)
    refuse_misfit(model, weights, where)
    model.to_empty(device="cpu")
    load_state(model, weights, where)
    return model.eval()


def _described_model(
    weights: Mapping[str, Tensor], config: ViTConfig, where: str
) -> VisionTransformer:
    """Build a model without memory: what a file says of it may have no bounds."""
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    with foreign_weights(f"{where}: describes no backbone", CheckpointError), torch.device("meta"):
        if config.depth > len(blocks):
            raise CheckpointError(
                f"{where}: weights do not fit the model: missing: {config.depth - len(blocks)} of "
                f"its {config.depth} blocks"
            )
        return VisionTransformer(
            replace(config, image_size=position_grid(weights, where) * config.patch)
        )


def load_state(model: VisionTransformer, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into a model; every key must be there and fit.

    Raises:
        CheckpointError: listing missing, unexpected and misshapen keys.
    """
    refuse_misfit(model, weights, where)
    model.load_state_dict(dict(weights))


def refuse_misfit(model: VisionTransformer, weights: Mapping[str, Tensor], where: str) -> None:
    """Hold weights against a model's names and shapes.

    Raises:
        CheckpointError: listing missing, unexpected and misshapen keys.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    troubles = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(troubles.values()):
        listed = "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in troubles.items() if keys)
        raise CheckpointError(f"{where}: weights do not fit the model: {listed}")


def read_weights(path: Path | str) -> tuple[dict[str, Tensor], ViTConfig | None]:
    """Read a backbone's weights under their public names, and the architecture if it is saved.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no backbone.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weight file")
    if path.suffix == ".safetensors":
        state, config = _read_safetensors(path)
    else:
        state, config = _read_torch(path), None
    weights = public_names(state, str(path), path.stat().st_size)
    if config is None and path.name in PEER_FILES and (path.parent / PEER_CONFIG).is_file():
        config = _described_by(path.parent / PEER_CONFIG, weights)
    return weights, config


def _file_in(folder: Path) -> Path:
    """The weights in a folder that `transformers` or `timm` wrote, or that is written for them."""
    found = next((folder / name for name in PEER_FILES if (folder / name).is_file()), None)
    if found is None or not (folder / PEER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: is a folder; expected {PEER_FILES[0]} and {PEER_CONFIG} in it; of a run, "
            "name what `curate export` writes, or its backbone.safetensors"
        )
    return found


def _described_by(path: Path, weights: Mapping[str, Tensor]) -> ViTConfig:
    with foreign_weights(f"{path}: describes no DINOv2 backbone", CheckpointError):
        values = json.loads(path.read_text())
        if "architecture" in values:
            return peers.config_of_timm(values, infer_config(weights, where=str(path.parent)))
        return peers.config_of_huggingface(values)


def license_in(metadata: Mapping[str, object]) -> str:
    """The license that metadata names; files of before spelled the key `licence`."""
    return str(metadata.get(LICENSE_KEY) or metadata.get("licence") or UNKNOWN)


def license_of(path: Path | str) -> str:
    """The license that a file or folder of weights was exported under, if it is known.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(path)
    path = _file_in(path) if path.is_dir() else path
    if path.suffix != ".safetensors":
        return UNKNOWN
    with (
        foreign_weights(f"{path}: not a readable safetensors file", CheckpointError),
        safe_open(path, framework="pt") as file,
    ):
        return license_in(file.metadata() or {})


def _refuse_more_than_the_file(state: Mapping[str, Any], max_bytes: int, where: str) -> None:
    """Strides of zero make tensors of any size out of a few bytes."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: '{name}' is no tensor but a {type(value).__name__}")
        if value.layout != torch.strided or value.is_meta or value.nbytes > max_bytes:
            raise CheckpointError(f"{where}: '{name}' is said to be larger than the file")


def public_names(state: Mapping[str, Any], where: str, max_bytes: int) -> dict[str, Tensor]:
    """Unwrap a checkpoint and rename its keys to those of the released files; heads are left out.

    max_bytes: of the file; no tensor has more.

    Raises:
        CheckpointError: no backbone is in it, or two keys get one name.
    """
    while wrapper := next((key for key in WRAPPERS if isinstance(state.get(key), Mapping)), None):
        state = state[wrapper]
    _refuse_more_than_the_file(state, max_bytes, where)
    state = _without_heads(_unprefixed(state, where), where)
    if not any(name.endswith("cls_token") for name in state):
        raise CheckpointError(f"{where}: holds no backbone; its keys: {_listed(sorted(state))}")
    if not any(name.endswith(_POSITIONS) for name in state):
        raise CheckpointError(
            f"{where}: is no DINOv2 but a backbone without position embeddings, as DINOv3 is; "
            "timm's files of DINOv3 load as timm:NAME:FILE"
        )
    with foreign_weights(f"{where}: holds no backbone", CheckpointError):
        return peers.to_ours(state) or state


def _unprefixed(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _public_name(key)
        if name in result and not name.startswith(HEADS):
            raise CheckpointError(f"{where}: two keys stand for '{name}', '{key}' is the second")
        result[name] = value
    return result


def _without_heads(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Leave out what training projects by, and what a classifier ends in; the latter is said."""
    if classifiers := [name for name in state if name.startswith(CLASSIFIERS)]:
        logger.warning("%s: left out its classifier (%s)", where, _listed(sorted(classifiers)))
    left_out = (*HEADS, *CLASSIFIERS)
    return {name: value for name, value in state.items() if not name.startswith(left_out)}


def infer_config(weights: Mapping[str, Tensor], where: str) -> ViTConfig:
    """Read the architecture off the shapes; heads are 64 wide, as in every released model.

    Raises:
        CheckpointError: a shape that no such model has.
    """
    try:
        width = weights["cls_token"].shape[-1]
        patch = weights["patch_embed.proj.weight"].shape[-1]
        blocks = {int(key.split(".")[1]) for key in weights if key.startswith("blocks.")}
        registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
        ffn: Literal["mlp", "swiglu"] = "swiglu" if "blocks.0.mlp.w12.weight" in weights else "mlp"
        grid = position_grid(weights, where)
        return ViTConfig(
            width, 1 + max(blocks), max(width // 64, 1), patch, grid * patch, ffn,
            registers=registers, antialias=registers > 0,
            interpolate_offset=0.0 if registers else 0.1,
            layerscale=1.0 if "blocks.0.ls1.gamma" in weights else None,
        )  # fmt: skip
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where}: not a DINOv2 backbone: {error}") from error


def position_grid(weights: Mapping[str, Tensor], where: str) -> int:
    """Patches along one side of a position embedding.

    Raises:
        CheckpointError: it is missing, or no square.
    """
    shape = weights["pos_embed"].shape if "pos_embed" in weights else ()
    positions = shape[1] - 1 if len(shape) == 3 and shape[1] else 0
    grid = math.isqrt(positions)
    if not positions or grid * grid != positions:
        raise CheckpointError(f"{where}: pos_embed holds {positions} patches, not a square of them")
    return grid


def _public_name(key: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)


def _listed(keys: list[str], limit: int = 8) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], ViTConfig | None]:
    with foreign_weights(f"{path}: not a readable safetensors file", CheckpointError):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            saved = metadata.get(CONFIG_KEY)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if DIGEST_KEY in metadata and metadata[DIGEST_KEY] != _digest_of(state, metadata):
            raise CheckpointError(f"{path}: is damaged: its weights are not those that were saved")
        return state, ViTConfig(**json.loads(saved)) if saved else None


def _read_torch(path: Path) -> dict[str, Any]:
    with foreign_weights(f"{path}: not a readable torch file of weights", CheckpointError):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not weights by name")
    return dict(state)
