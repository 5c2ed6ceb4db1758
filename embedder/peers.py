"""The same backbone under the names of `transformers` and `timm`: there and back.

Legend: D width, h hidden width of SwiGLU.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from embedder.vit import NORM_EPS, ViTConfig

Peer = Literal["huggingface", "timm"]
Weights = dict[str, Tensor]

_HF_PLAIN = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "norm.": "layernorm.",
}
_HF_BLOCK = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attn.proj.": "attention.output.dense.",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
    "mlp.w12.": "mlp.weights_in.",
    "mlp.w3.": "mlp.weights_out.",
}
"""Names inside a block, ours -> those of the files on the hub."""
_HF_QKV = [f"attention.attention.{part}." for part in ("query", "key", "value")]
_HF_LATER = {
    "attention.q_proj.": _HF_QKV[0],
    "attention.k_proj.": _HF_QKV[1],
    "attention.v_proj.": _HF_QKV[2],
    "attention.o_proj.": "attention.output.dense.",
    "mlp.down_proj.": "mlp.weights_out.",
}
"""Names that version 5 of `transformers` uses in memory -> those of its files."""


def with_interpolation(config: ViTConfig, peer: Peer | Literal["released"]) -> ViTConfig:
    """Interpolate positions as a peer does: its results then agree at every image size.

    The public plain models add 0.1 to the patch counts; `transformers` does not, and `timm`
    antialiases besides. For models with registers all three do the same.
    """
    if peer == "released":
        return replace(config, **_released_interpolation(config.registers))
    return replace(config, interpolate_offset=0.0, antialias=peer == "timm" or config.registers > 0)


def _released_interpolation(registers: int) -> dict[str, Any]:
    return {"interpolate_offset": 0.0 if registers else 0.1, "antialias": registers > 0}


# --- transformers -------------------------------------------------------------------------------


def to_huggingface(weights: Mapping[str, Tensor]) -> Weights:
    """Rename a backbone's weights to those of Dinov2Model or Dinov2WithRegistersModel."""
    result: Weights = {}
    for name, value in weights.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match is None:
            result[_renamed(name, _HF_PLAIN)] = value
            continue
        block, rest = f"encoder.layer.{match[1]}.", match[2]
        if rest.startswith("attn.qkv."):
            kind = rest.removeprefix("attn.qkv.")
            parts = value.chunk(3)  # 3 x (D, …)
            result |= {block + q + kind: part for q, part in zip(_HF_QKV, parts, strict=True)}
        else:
            result[block + _renamed(rest, _HF_BLOCK)] = value
    return result


def from_huggingface(state: Mapping[str, Tensor]) -> Weights:
    """Undo `to_huggingface`; a missing mask token becomes zeros."""
    state = {_replaced(name, _HF_LATER): value for name, value in state.items()}
    plain = {theirs: ours for ours, theirs in _HF_PLAIN.items()}
    inside = {theirs: ours for ours, theirs in _HF_BLOCK.items()}
    result: Weights = {}
    for name, value in state.items():
        match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        if match is None:
            result[_renamed(name, plain)] = value
            continue
        block, rest = f"blocks.{match[1]}.", match[2]
        part = next((i for i, q in enumerate(_HF_QKV) if rest.startswith(q)), None)
        if part == 0:
            others = [name.replace(_HF_QKV[0], q) for q in _HF_QKV]
            kind = rest.removeprefix(_HF_QKV[0])
            result[f"{block}attn.qkv.{kind}"] = torch.cat([state[other] for other in others])
        elif "mlp.gate_proj." in rest:
            both = [state[name], state[name.replace("gate_proj", "up_proj")]]
            result[block + rest.replace("gate_proj", "w12")] = torch.cat(both)  # (2h, …)
        elif part is None and "mlp.up_proj." not in rest:
            result[block + _renamed(rest, inside)] = value
    return _with_mask_token(result)


def huggingface_config(config: ViTConfig) -> dict[str, Any]:
    """What `transformers` reads beside the weights.

    Raises:
        ValueError: a shape that its classes cannot have.
    """
    if config.layerscale is None:
        raise ValueError("transformers has no DINOv2 without LayerScale")
    if not float(config.ffn_ratio).is_integer():
        raise ValueError(f"transformers wants a whole mlp_ratio, this is {config.ffn_ratio}")
    names = [f"stage{i}" for i in range(1, config.depth + 1)]
    kind = "dinov2_with_registers" if config.registers else "dinov2"
    architecture = "Dinov2WithRegistersModel" if config.registers else "Dinov2Model"
    registers = {"num_register_tokens": config.registers} if config.registers else {}
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "mlp_ratio": int(config.ffn_ratio),
        "patch_size": config.patch,
        "image_size": config.image_size,
        "use_swiglu_ffn": config.ffn == "swiglu",
        "layerscale_value": config.layerscale,
        "layer_norm_eps": NORM_EPS,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "num_channels": 3,
        "stage_names": ["stem", *names],
        "out_features": names[-1:],
        "out_indices": [config.depth],
        "torch_dtype": "float32",
        **registers,
    }


def config_of_huggingface(values: Mapping[str, Any]) -> ViTConfig:
    """Read the architecture from the config.json of `transformers`.

    Raises:
        ValueError: of another model, or with functions that DINOv2 does not have.
    """
    kind = values.get("model_type")
    if kind not in (None, "dinov2", "dinov2_with_registers"):
        raise ValueError(f"model_type is {kind}; dinov2 and dinov2_with_registers load")
    _refuse_other("layer_norm_eps", values.get("layer_norm_eps", NORM_EPS), NORM_EPS)
    if not values.get("use_swiglu_ffn"):
        _refuse_other("hidden_act", values.get("hidden_act", "gelu"), "gelu")
    registers = int(values.get("num_register_tokens", 0))
    return ViTConfig(
        values["hidden_size"],
        values["num_hidden_layers"],
        values["num_attention_heads"],
        values["patch_size"],
        values["image_size"],
        "swiglu" if values.get("use_swiglu_ffn") else "mlp",
        float(values.get("mlp_ratio", 4)),
        registers,
        values.get("layerscale_value", 1.0),
        **_released_interpolation(registers),
    )


def _refuse_other(setting: str, found: object, ours: object) -> None:
    if found != ours:
        raise ValueError(f"{setting} is {found}; DINOv2's is {ours}")


# --- timm ---------------------------------------------------------------------------------------


def to_timm(weights: Mapping[str, Tensor]) -> Weights:
    """Rename a backbone's weights to those of timm's VisionTransformer, which masks nothing.

    With registers its positions are those of patches only: the class token carries its own.
    """
    result = {_timm_mlp(name): value for name, value in weights.items() if name != "mask_token"}
    if "register_tokens" in result:
        result["reg_token"] = result.pop("register_tokens")
        positions = result["pos_embed"]
        result["cls_token"] = result["cls_token"] + positions[:, :1]
        result["pos_embed"] = positions[:, 1:]
    return {name: value.contiguous() for name, value in result.items()}


def from_timm(state: Mapping[str, Tensor]) -> Weights:
    """Undo `to_timm`: the mask token and the class token's position become zeros."""
    swiglu = any(
        name.endswith("mlp.fc1.weight")
        and value.shape[0] == 2 * state[name.replace("fc1", "fc2")].shape[1]
        for name, value in state.items()
    )
    result = {_from_timm_mlp(name) if swiglu else name: value for name, value in state.items()}
    if "reg_token" in result:
        result["register_tokens"] = result.pop("reg_token")
        none = torch.zeros_like(result["cls_token"])
        result["pos_embed"] = torch.cat([none, result["pos_embed"]], dim=1)
    return _with_mask_token(result)


def timm_model(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """The name of timm's architecture and the arguments that make it this one.

    Raises:
        ValueError: a shape that timm's named architectures cannot be brought to.
    """
    if config.layerscale is None:
        raise ValueError("timm's DINOv2 architectures have LayerScale")
    if config.ffn == "swiglu":
        name = "vit_giant_patch14_reg4_dinov2" if config.registers else "vit_giant_patch14_dinov2"
        hidden = (int(config.width * config.ffn_ratio * 2 / 3) + 7) // 8 * 8
        ratio = (2 * hidden + 0.5) / config.width  # timm takes int(width * ratio)
    else:
        name = "vit_small_patch14_reg4_dinov2" if config.registers else "vit_small_patch14_dinov2"
        ratio = config.ffn_ratio
    arguments: dict[str, Any] = {
        "patch_size": config.patch,
        "img_size": config.image_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": ratio,
        "init_values": config.layerscale,
        "dynamic_img_size": True,
    }
    return name, arguments | ({"reg_tokens": config.registers} if config.registers else {})


def timm_config(config: ViTConfig, license: str) -> dict[str, Any]:
    """What timm's `local-dir:` reads beside the weights."""
    name, arguments = timm_model(config)
    side = config.image_size
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": config.width,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "curate",
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": license,
        },
    }


def config_of_timm(values: Mapping[str, Any], inferred: ViTConfig) -> ViTConfig:
    """Complete what shapes say by the config.json of `timm`.

    Raises:
        ValueError: it names functions that DINOv2 does not have.
    """
    arguments = values.get("model_args") or {}
    for name in ("act_layer", "norm_layer"):
        _refuse_other(name, arguments.get(name), None)
    return replace(inferred, heads=int(arguments.get("num_heads", inferred.heads)))


# --- which names these are ----------------------------------------------------------------------


def to_ours(state: Mapping[str, Tensor]) -> Weights | None:
    """Rename weights of a peer; None where these are not a peer's."""
    if any(name.endswith("embeddings.cls_token") for name in state):
        return from_huggingface(state)
    is_block = "blocks.0.attn.qkv.weight" in state
    if is_block and ("reg_token" in state or "mask_token" not in state):
        return from_timm(state)
    return None


def _with_mask_token(weights: Weights) -> Weights:
    if "mask_token" not in weights and "cls_token" in weights:
        weights["mask_token"] = torch.zeros_like(weights["cls_token"][0])  # (1, D)
    return weights


def _timm_mlp(name: str) -> str:
    return name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.")


def _from_timm_mlp(name: str) -> str:
    return name.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3.")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Rename by the entry that the name equals, or begins with where the entry ends in a dot."""
    for old, new in names.items():
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name.removeprefix(old)
    return name


def _replaced(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name
