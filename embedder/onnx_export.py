"""Write a backbone as ONNX that takes any batch and any image size in multiples of the patch.

Positions are interpolated inside the graph, by products with two matrices made of comparisons and
polynomials: runtimes differ in what their own bicubic resizing does.

Legend: B images, N tokens, R registers, P patches, D width, n positions out, g of the saved grid.
"""

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from embedder.encoders.torch_trunk import IMAGENET_MEAN, IMAGENET_STD
from embedder.errors import CheckpointError
from embedder.vit import VisionTransformer

OPSET = 18
MAX_INLINE_BYTES = 1 << 30
"""Protobuf holds 2 GB; larger weights lie in a file beside the graph."""
OUTPUTS = ("cls", "registers", "patches")


def export_onnx(model: VisionTransformer, path: Path, metadata: Mapping[str, str]) -> list[Path]:
    """Write `images` (B, 3, h, w), normalized, to `cls` (B, D), `registers` and `patches`.

    Gives the files: models beyond 2 GB keep their weights beside the graph.

    Raises:
        CheckpointError: the packages that write ONNX are missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"ONNX needs {' and '.join(missing)}: pip install 'lvd-curate[export]'"
        )
    patch = model.config.patch
    example = torch.zeros(2, 3, 2 * patch, 3 * patch)
    rows, columns = (torch.export.Dim(name, min=1, max=512) for name in ("rows", "columns"))
    shapes = {0: torch.export.Dim("batch", min=1), 2: patch * rows, 3: patch * columns}
    with _quiet():
        program = torch.onnx.export(
            DynamicBackbone(model.eval()),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(OUTPUTS if model.config.registers else ("cls", "patches")),
            dynamic_shapes=(shapes,),
            verbose=False,
        )
    assert program is not None, "the exporter returns its program"
    described = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "image_size": model.config.side}
    program.model.metadata_props.update({k: json.dumps(v) for k, v in described.items()})
    program.model.metadata_props.update(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    large = sum(4 * weight.numel() for weight in model.parameters()) > MAX_INLINE_BYTES
    program.save(path, external_data=large)
    return [path, path.with_name(path.name + ".data")] if large else [path]


class DynamicBackbone(nn.Module):
    """A backbone whose graph holds for every batch and image size."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, h, w) to class tokens (B, D), registers (B, R, D) if any, patches (B, P, D)."""
        model, registers = self.backbone, self.backbone.config.registers
        x = model.patch_embed.proj(images)  # (B, D, rows, columns)
        positions = self._positions(x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2) + positions  # (B, P, D)
        prefix = [model.cls_token + model.pos_embed[:, :1]]
        if registers:
            prefix.append(model.register_tokens)
        x = torch.cat([*(part.expand(x.shape[0], -1, -1) for part in prefix), x], dim=1)
        batch, tokens = x.shape[0], x.shape[1]
        x = x.flatten(0, 1)  # (B N, D)
        for block in model.blocks:
            x = block(x, ((batch, tokens),), (None, None))
        x = model.norm(x).view(batch, tokens, -1)
        parts = (x[:, 0], x[:, 1 : 1 + registers], x[:, 1 + registers :])
        return parts if registers else parts[::2]

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Give the interpolated positions (P, D) of a grid, as `interpolated_pos_embed` does."""
        config = self.backbone.config
        plane = self.backbone.pos_embed[0, 1:].view(config.grid, config.grid, -1)
        counts = [torch.ones(side).sum() for side in (rows, columns)]
        fits = (counts[0] == config.grid) & (counts[1] == config.grid)
        offset = torch.where(fits, 0.0, 0.0 if config.antialias else config.interpolate_offset)
        down, across = (
            resize_matrix(side, count + offset, config.grid, antialias=config.antialias)
            for side, count in zip((rows, columns), counts, strict=True)
        )
        return torch.einsum("ia,jb,abd->ijd", down, across, plane).flatten(0, 1)


def resize_matrix(count: int, stretched: Tensor, grid: int, *, antialias: bool) -> Tensor:
    """Give the matrix (n, g) by which torch's bicubic interpolation resizes g positions to n.

    stretched: n as the scale sees it, perhaps with an offset.
    """
    step = grid / stretched  # positions of the grid from one to the next
    center = (torch.arange(count, dtype=torch.float32) + 0.5) * step  # (n,)
    columns = torch.arange(grid, dtype=torch.float32)
    if antialias:  # the kernel widens where positions get fewer
        distance = (columns + 0.5 - center[:, None]).abs() / step.clamp(min=1.0)  # (n, g)
        weights = _cubic(distance, -0.5)
        return weights / weights.sum(1, keepdim=True)
    source = center - 0.5
    taps = [source.floor() + k for k in (-1, 0, 1, 2)]
    hits = [tap.clamp(0, grid - 1)[:, None] == columns for tap in taps]  # borders are repeated
    parts = [
        torch.where(hit, _cubic((source - tap).abs(), -0.75)[:, None], 0.0)
        for tap, hit in zip(taps, hits, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic kernel at distances x >= 0; torch takes a = -0.75, and -0.5 to antialias."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about its own insides, and logs each step."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
