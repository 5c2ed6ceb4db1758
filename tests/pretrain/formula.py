"""The inputs and weights that the golden numbers stand on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent


def g(shape: tuple[int, ...], a: float = 0.37, b: float = 0.0) -> Tensor:
    count = int(np.prod(shape))
    return torch.from_numpy(np.sin(a * np.arange(count) + b).astype(np.float32)).view(shape)


def golden(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def fill_backbone(model: nn.Module, shift: float = 0.0) -> None:
    for i, (name, parameter) in enumerate(model.named_parameters()):
        one = 1.0 if ("norm" in name and name.endswith("weight")) or "gamma" in name else 0.0
        parameter.data = 0.05 * g(tuple(parameter.shape), 0.37, i + shift) + one


def fill_head(head: nn.Module, shift: float = 0.0) -> None:
    for i, (name, parameter) in enumerate(head.named_parameters()):
        value = 0.2 * g(tuple(parameter.shape), 0.37, i + shift)
        parameter.data = torch.ones_like(parameter) if name.endswith("weight_g") else value


def near(ours: Tensor, expected: Any, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(
        ours.detach(), torch.tensor(expected, dtype=ours.dtype), rtol=rtol, atol=1e-6
    )
