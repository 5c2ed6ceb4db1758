"""The DINOv2 backbone: a ViT whose parameter names and shapes are those of the released files.

Crops of several sizes go through together: their tokens are packed into one matrix for everything
that works on single tokens, and only attention looks at one group of equal images at a time.

Legend: G groups of crops, B images of a group, N tokens of an image (class, registers, patches),
P patches, R registers, D width, H heads, T tokens of all groups.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from embedder import cached

Layout = tuple[tuple[int, int], ...]
"""(images, tokens per image) of each packed group."""

SIZES = {
    "t": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "g": (1536, 40, 24),
}
"""Width, depth and heads by letter; t is ours, for small machines."""

SIDE = 224
"""Pixels along a side of an image in the public k-NN evaluation."""
NORM_EPS = 1e-6
MAX_SCORES = 2**27
"""Attention scores held at once when they are computed by plain products (256 MiB in bfloat16)."""


@dataclass(frozen=True)
class ViTConfig:
    """The architecture of one backbone; saved with its weights.

    `image_size` is the side in pixels that the position embedding was made for: other sizes are
    interpolated. `layerscale` is the initial gamma, None for none. `interpolate_offset` is added
    to the patch counts for the factors by which positions are resized (the plain released models);
    without it, or with `antialias` (those with registers), they are resized to the counts.
    """

    width: int
    depth: int
    heads: int
    patch: int = 14
    image_size: int = 518
    ffn: Literal["mlp", "swiglu"] = "mlp"
    ffn_ratio: float = 4.0
    registers: int = 0
    layerscale: float | None = 1.0
    drop_path: float = 0.0
    interpolate_offset: float = 0.1
    antialias: bool = False

    def __post_init__(self) -> None:
        """Refuse shapes that no model can have.

        Raises:
            ValueError: naming the two numbers that do not fit.
        """
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")
        if self.image_size % self.patch:
            raise ValueError(f"image size {self.image_size} is not a multiple of {self.patch}")

    @property
    def side(self) -> int:
        """Side in pixels at which images are seen: 224, or what it was made for; whole patches."""
        return max(min(SIDE, self.image_size) // self.patch, 1) * self.patch

    @property
    def grid(self) -> int:
        """Patches along one side of the position embedding."""
        return self.image_size // self.patch


def vit_config(name: str, **changes: Any) -> ViTConfig:
    """Give the architecture of a name such as vits14, vitb16 or vitg14_reg.

    Raises:
        ValueError: the name is of no known form.
    """
    match = re.fullmatch(r"vit([tsblg])(14|16)(_reg)?", name)
    if match is None:
        raise ValueError(f"'{name}': want vit, one of t s b l g, 14 or 16, and perhaps _reg")
    width, depth, heads = SIZES[match[1]]
    patch = int(match[2])
    config = ViTConfig(width, depth, heads, patch, image_size=518 if patch == 14 else 224)
    if match[1] == "g":
        config = replace(config, ffn="swiglu")
    if match[3]:
        config = replace(config, registers=4, antialias=True, interpolate_offset=0.0)
    return replace(config, **changes)


class Tokens(NamedTuple):
    """What the backbone says about a batch of images of one size."""

    cls: Tensor
    """(B, D), after the final norm."""
    registers: Tensor
    """(B, R, D), after the final norm."""
    patches: Tensor
    """(B, P, D), after the final norm, rows of the image first."""
    prenorm: Tensor
    """(B, N, D), before the final norm."""


class Subset(NamedTuple):
    """The images of a packed batch that one residual branch sees (stochastic depth)."""

    rows: Tensor
    """(t,) indices of their tokens in the packed matrix."""
    layout: Layout
    """Their groups."""
    scale: Tensor
    """(t, 1): images of the group / images kept, so that the branch keeps its expectation."""


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each: a convolution, done as one product."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, h, w) to patches (B, P, D)."""
        images_count, channels, height, width = images.shape
        side = self.patch
        if height % side or width % side:
            raise ValueError(f"image of {height}x{width} px is no multiple of the patch {side}")
        rows, columns = height // side, width // side
        cut = images.reshape(images_count, channels, rows, side, columns, side)
        cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, P, 3 side^2)
        return F.linear(cut, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention within each image of a packed batch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: Layout, gamma: Tensor | None) -> Tensor:
        """Map packed tokens (T, D) to (T, D), times gamma (D,)."""
        qkv = linear(x, self.qkv.weight, self.qkv.bias)  # (T, 3D)
        sizes = [images * tokens for images, tokens in layout]
        parts: tuple[Tensor, ...] = torch.split(qkv, sizes)
        mixed = [self._mix(part, *shape) for part, shape in zip(parts, layout, strict=True)]
        packed = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        return linear(packed, *scaled(self.proj, gamma))

    def class_weights(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """Give the softmax weights (B, H, N) of the class tokens of packed images (T, D)."""
        q, k, _ = self.qkv(x).view(*shape, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores: Tensor = q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, 1, N)
        return scores.softmax(-1)[:, :, 0]

    def _mix(self, qkv: Tensor, images: int, tokens: int) -> Tensor:
        qkv = qkv.view(images, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, H, N, D / H)
        return attend(q, k, v).transpose(1, 2).reshape(images * tokens, -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q, k, v (B, H, N, d), by the way that is fastest on the device.

    On CPUs plain products beat torch's fused kernel in bfloat16 (see docs/pretraining.md) while
    their scores fit; elsewhere the fused kernel is used.
    """
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or scores > MAX_SCORES:
        return F.scaled_dot_product_attention(q, k, v)
    weights: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
    return weights.softmax(-1, dtype=weights.dtype) @ v  # (B, H, N, d)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        """Map (T, D) to (T, D), times gamma (D,)."""
        weight, bias = scaled(self.fc2, gamma)
        if cached.pays(x, self.fc1.out_features):
            return cached.mlp(x, self.fc1.weight, self.fc1.bias, weight, bias)
        return F.linear(F.gelu(self.fc1(x)), weight, bias)


class SwiGLU(nn.Module):
    """silu(x1) * x2, projected; 2/3 of the hidden width, rounded up to a multiple of 8."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        """Map (T, D) to (T, D), times gamma (D,)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, *scaled(self.w3, gamma))


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch; the branch's last layer applies it."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))


def scaled(layer: nn.Linear, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give weight and bias of gamma * layer(x).

    Scaling the D x D weight instead of the T x D result spares several passes over all tokens.
    """
    if gamma is None:
        return layer.weight, layer.bias
    return layer.weight * gamma[:, None], layer.bias * gamma


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Give x @ weight.T + bias of tokens (T, D)."""
    widest = max(weight.shape)
    return cached.linear(x, weight, bias) if cached.pays(x, widest) else F.linear(x, weight, bias)


class Block(nn.Module):
    """x += ls1(attn(norm1 x)); x += ls2(mlp(norm2 x)), each on its own subset of the images."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        hidden = int(config.width * config.ffn_ratio)
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = Attention(config.width, config.heads)
        self.ls1 = _layerscale(config)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = (Mlp if config.ffn == "mlp" else SwiGLU)(config.width, hidden)
        self.ls2 = _layerscale(config)

    def forward(
        self, x: Tensor, layout: Layout, kept: tuple[Subset | None, Subset | None]
    ) -> Tensor:
        """Map packed tokens (T, D) to (T, D); `kept` holds the subsets of the two branches."""
        part = _select(x, kept[0])
        part_layout = layout if kept[0] is None else kept[0].layout
        x = _add(x, self.attn(self.norm1(part), part_layout, _gamma(self.ls1)), kept[0])
        part = _select(x, kept[1])
        return _add(x, self.mlp(self.norm2(part), _gamma(self.ls2)), kept[1])


def _layerscale(config: ViTConfig) -> nn.Module:
    if config.layerscale is None:
        return nn.Identity()
    return LayerScale(config.width, config.layerscale)


def _gamma(layerscale: nn.Module) -> Tensor | None:
    return layerscale.gamma if isinstance(layerscale, LayerScale) else None


def _select(x: Tensor, subset: Subset | None) -> Tensor:
    return x if subset is None else x.index_select(0, subset.rows)


def _add(x: Tensor, residual: Tensor, subset: Subset | None) -> Tensor:
    if subset is None:
        return x + residual
    return x.index_add(0, subset.rows, (residual * subset.scale).to(x.dtype))


def draw_subset(
    layout: Layout, rate: float, generator: torch.Generator | None, device: torch.device
) -> Subset | None:
    """Choose, group by group, the images that a branch with drop rate `rate` sees.

    A group of b images keeps max(int(b (1 - rate)), 1) of them. None stands for all.
    """
    if rate <= 0:
        return None
    rows, kept_layout, scales, start = [], [], [], 0
    for images, tokens in layout:
        kept = max(int(images * (1 - rate)), 1)
        chosen = torch.randperm(images, generator=generator)[:kept]
        rows.append((start + chosen[:, None] * tokens + torch.arange(tokens)).flatten())
        scales.append(torch.full((kept * tokens, 1), images / kept))
        kept_layout.append((kept, tokens))
        start += images * tokens
    return Subset(
        torch.cat(rows).to(device), tuple(kept_layout), torch.cat(scales).to(device)
    )  # (t,), (t, 1)


class VisionTransformer(nn.Module):
    """The backbone. Call it on images of one size, or `forward_packed` on several sizes at once."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.checkpoint_blocks = False
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = PatchEmbed(config.patch, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw fresh weights, from torch's global generator as every module does."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.config.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        self.mask_token.zero_()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tokens:
        """Describe images (B, 3, h, w); masked patches (B, P) are replaced by the mask token."""
        return self.forward_packed([images], [masks])[0]

    def forward_packed(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        generator: torch.Generator | None = None,
    ) -> list[Tokens]:
        """Describe groups of crops, each (B, 3, h, w), in one pass.

        `generator` draws the stochastic depth; it must live on the CPU.
        """
        x, layout = self._pack(crops, masks)
        plan = self._draw_depth(layout, generator, x.device)
        for block, kept in zip(self.blocks, plan, strict=True):
            x = self._run(block, x, layout, kept)
        return self._unpack(x, layout)

    def intermediate(self, images: Tensor, layers: Sequence[int]) -> list[Tokens]:
        """Give the normed tokens after the named blocks (counted from 0, negative from the end)."""
        wanted = {layer % len(self.blocks) for layer in layers}
        x, layout = self._pack([images], [None])
        found = {}
        for index, block in enumerate(self.blocks):
            x = self._run(block, x, layout, (None, None))
            if index in wanted:
                found[index] = self._unpack(x, layout)[0]
        return [found[layer % len(self.blocks)] for layer in layers]

    def class_attention(self, images: Tensor) -> Tensor:
        """Give the weights (B, H, P) of the last block's class token on patches."""
        x, layout = self._pack([images], [None])
        *before, last = self.blocks
        for block in before:
            x = self._run(block, x, layout, (None, None))
        return last.attn.class_weights(last.norm1(x), layout[0])[..., 1 + self.config.registers :]  # type: ignore[no-any-return, operator, union-attr]

    def interpolated_pos_embed(self, rows: int, columns: int) -> Tensor:
        """Give the position embedding (1, 1 + P, D) of a grid of rows x columns patches."""
        grid, config = self.config.grid, self.config
        if rows == columns == grid:
            return self.pos_embed
        plane = self.pos_embed[:, 1:].float().view(1, grid, grid, -1).permute(0, 3, 1, 2)
        offset = config.interpolate_offset
        if config.antialias or not offset:  # a factor without offset may round to one row less
            antialias = config.antialias
            plane = F.interpolate(plane, (rows, columns), mode="bicubic", antialias=antialias)
        else:
            scale = ((rows + offset) / grid, (columns + offset) / grid)
            plane = F.interpolate(plane, scale_factor=scale, mode="bicubic")  # (1, D, rows, cols)
        patches = plane.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)

    def _run(
        self, block: nn.Module, x: Tensor, layout: Layout, kept: tuple[Subset | None, Subset | None]
    ) -> Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, x, layout, kept, use_reentrant=False)  # type: ignore[no-any-return]
        return block(x, layout, kept)  # type: ignore[no-any-return]

    def _pack(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> tuple[Tensor, Layout]:
        groups = [self._embed(*pair) for pair in zip(crops, masks, strict=True)]
        layout = tuple((group.shape[0], group.shape[1]) for group in groups)
        return torch.cat([group.flatten(0, 1) for group in groups]), layout  # (T, D)

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Give the tokens (B, N, D) that enter the first block."""
        side = self.config.patch
        x = self.patch_embed(images)  # (B, P, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + P, D)
        x = x + self.interpolated_pos_embed(images.shape[2] // side, images.shape[3] // side)
        if not self.config.registers:
            return x
        registers = self.register_tokens.expand(len(x), -1, -1)
        return torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)  # (B, N, D)

    def _draw_depth(
        self, layout: Layout, generator: torch.Generator | None, device: torch.device
    ) -> list[tuple[Subset | None, Subset | None]]:
        """Draw the whole pass beforehand, so that recomputed activations see the same subsets."""
        rate = self.config.drop_path if self.training else 0.0

        def draw() -> Subset | None:
            return draw_subset(layout, rate, generator, device)

        return [(draw(), draw()) for _ in self.blocks]

    def _unpack(self, x: Tensor, layout: Layout) -> list[Tokens]:
        first = 1 + self.config.registers
        sizes = [images * tokens for images, tokens in layout]
        normed_parts: tuple[Tensor, ...] = torch.split(self.norm(x), sizes)
        result = []
        for raw, normed, shape in zip(torch.split(x, sizes), normed_parts, layout, strict=True):
            normed = normed.view(*shape, -1)  # (B, N, D)
            tokens = (normed[:, 0], normed[:, 1:first], normed[:, first:])
            result.append(Tokens(*tokens, raw.view(*shape, -1)))
        return result


def token_count(config: ViTConfig, image_size: int) -> int:
    """Count the tokens of a square image: class, registers and patches."""
    return 1 + config.registers + math.prod([image_size // config.patch] * 2)
