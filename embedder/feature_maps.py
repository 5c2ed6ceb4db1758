"""Features of every layer and place of an image, for models that have them: what probes learn on.

Legend: B images, h w pixels, D width, rows x columns positions of a feature map.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from embedder.encoder import FAMILIES, LoadOptions, family_of
from embedder.encoders.torch_trunk import IMAGENET_MEAN, IMAGENET_STD, Placement
from embedder.errors import EncoderError


class Layer(NamedTuple):
    """What one layer says about images of one size."""

    cls: Tensor
    """(B, D): the class token; the mean of the map where the model has none."""
    map: Tensor
    """(B, D, rows, columns)."""


@dataclass(frozen=True, eq=False)
class FeatureModel:
    """A frozen model, seen from inside."""

    name: str
    space: str
    """Digest of weights, preprocessing and precision."""
    license: str
    depth: int
    """Layers; the last is depth - 1."""
    patch: int
    """Image sides are multiples of it."""
    image_size: int
    """Side at which whole images are classified."""
    placement: Placement
    run: Callable[[Tensor, Sequence[int]], list[Layer]]
    """Normalized images (B, 3, h, w) and layers to features, layers counted from 0."""
    fixed_size: bool = False
    """Whether it takes squares of `image_size` only."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    run_raw: Callable[[Tensor], Tensor] | None = None
    """Normalized images to patch tokens (B, P, D) before the final norm; None where unknown."""
    run_attention: Callable[[Tensor], Tensor] | None = None
    """Normalized images to weights (B, H, P) of the class token; None where unknown."""

    @torch.inference_mode()
    def layers(self, pixels: Tensor, indices: Sequence[int]) -> list[Layer]:
        """Pixels (B, 3, h, w), uint8 or floats from 0 to 255, to float32 features of some layers.

        indices: negative ones count from the end.
        """
        wanted = [index % self.depth for index in indices]
        found = self.run(self._normalized(pixels), wanted)
        return [Layer(layer.cls.float(), layer.map.float()) for layer in found]

    @torch.inference_mode()
    def raw_patches(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, h, w) to float32 patch tokens (B, P, D) before the final norm.

        Raises: EncoderError where the model does not show them.
        """
        if self.run_raw is None:
            raise EncoderError(
                f"encoder {self.name!r} shows no tokens before its norm; dinov2 does"
            )
        return self.run_raw(self._normalized(pixels)).float()

    @torch.inference_mode()
    def attention(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, h, w) to the last layer's weights on patches (B, H, rows, columns).

        Raises: EncoderError where the model does not show them.
        """
        if self.run_attention is None:
            raise EncoderError(f"encoder {self.name!r} shows no attention; dinov2 does")
        weights = self.run_attention(self._normalized(pixels)).float()
        rows, columns = (side // self.patch for side in pixels.shape[2:])
        return weights.view(*weights.shape[:2], rows, columns)

    def _normalized(self, pixels: Tensor) -> Tensor:
        device = self.placement.device
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (self.mean, self.std))
        return ((pixels.to(device).float() / 255 - mean) / std).to(self.placement.dtype)

    def side(self, wanted: int) -> int:
        """The nearest side at or above `wanted` that the model takes."""
        if self.fixed_size:
            return self.image_size
        return -(-wanted // self.patch) * self.patch

    def evenly_spaced(self, count: int) -> tuple[int, ...]:
        """Layers that divide the depth: of 12, 4 give 2, 5, 8, 11."""
        if self.depth % count == 0 or self.depth < count:
            return tuple(max(self.depth * (i + 1) // count - 1, 0) for i in range(count))
        return tuple(round(self.depth * (i + 1) / count) - 1 for i in range(count))


def load_feature_model(
    name: str,
    *,
    device: str = "auto",
    allow_hub: bool = False,
    image_size: int | None = None,
) -> FeatureModel:
    """Load a model by the name of its encoder.

    Raises: EncoderError where it is unknown, or shows its last vectors only.
    """
    key, argument = family_of(name)
    module = importlib.import_module(FAMILIES[key].module)
    load = getattr(module, "load_features", None)
    if load is None:
        raise EncoderError(
            f"encoder {name!r} shows no layers; dinov2, timm, open_clip and lite-semantic do"
        )
    found: FeatureModel = load(name, argument, LoadOptions(device, "auto", allow_hub, image_size))
    return found


def with_mean(maps: Tensor) -> Layer:
    """A layer of a model without class token: map (B, D, rows, columns)."""
    return Layer(maps.mean((2, 3)), maps)
