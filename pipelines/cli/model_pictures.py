"""Pictures of what a model sees, as one self-contained page or one PNG."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from curation.sources.shards import StoredImage
from embedder.encoder import LoadOptions, embed_images
from embedder.images import Pixels
from pretrain.evaluation.pictures import (
    attention_pictures,
    fitted,
    neighbors,
    patch_rows,
    pca_pictures,
)
from pretrain.evaluation.tasks import open_encoder, open_feature_model

SHOWN_HEIGHT = 224
"""Height of a picture in pixels."""
MAX_IMAGES = 64
MAX_HEADS = 6
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px system-ui;margin:24px;background:#fff;color:#222}}
.row{{display:flex;gap:8px;margin-bottom:16px;flex-wrap:wrap}}
figure{{margin:0}}figcaption{{font-size:12px;max-width:224px;overflow-wrap:anywhere}}
img{{display:block;height:224px}}</style>
<h1>{title}</h1>{rows}</html>
"""


@dataclass(frozen=True)
class Shown:
    """One picture and what stands below it."""

    pixels: Pixels
    caption: str


def map_rows(
    kind: str, files: Sequence[StoredImage], encoder: str, side: int | None
) -> list[list[Shown]]:
    """A row an image: principal components of its patches (`pca`), or attention."""
    model = open_feature_model(encoder, LoadOptions())
    images = [fitted(file.pixels(), model, side) for file in files]
    rows = [[Shown(image, _caption(file))] for image, file in zip(images, files, strict=True)]
    if kind == "pca":
        colors = pca_pictures(patch_rows(model, images))
        for row, image, picture in zip(rows, images, colors, strict=True):
            row.append(Shown(_enlarged(picture, image), "principal components"))
        return rows
    for row, image, planes in zip(rows, images, attention_pictures(model, images), strict=True):
        names = ["mean of the heads", *(f"head {i}" for i in range(len(planes) - 1))]
        for name, plane in list(zip(names, planes, strict=True))[: MAX_HEADS + 1]:
            # Values from 0 to 1 as colors from black over red and yellow to white.
            channels = np.stack([3 * plane, 3 * plane - 1, 3 * plane - 2], -1).clip(0, 1)
            row.append(Shown(_enlarged((255 * channels).astype(np.uint8), image), name))
    return rows


def knn_rows(
    files: Sequence[StoredImage], encoder: str, database: Sequence[StoredImage], k: int
) -> list[list[Shown]]:
    """A row an image: its nearest others."""
    opened = open_encoder(encoder, LoadOptions())
    queries, bank = (
        embed_images([opened], [file.pixels for file in some])[0].astype(np.float32)
        for some in (files, database)
    )
    order, cosines = neighbors(queries, bank, k + 1)
    rows = []
    for file, places, values in zip(files, order, cosines, strict=True):
        row = [Shown(file.pixels(), _caption(file))]
        found = [(database[i], v) for i, v in zip(places, values, strict=True)]
        own = Path(file.path).resolve()
        others = [(other, v) for other, v in found if Path(other.path).resolve() != own][:k]
        row += [Shown(one.pixels(), f"{value:.3f} {_caption(one)}") for one, value in others]
        rows.append(row)
    return rows


def _caption(image: StoredImage) -> str:
    return image.name.rpartition("/")[2]


def _enlarged(picture: Pixels, like: Pixels) -> Pixels:
    """Show patches as squares, at the size of their image."""
    size = (like.shape[1], like.shape[0])
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST))


def _scaled(pixels: Pixels) -> Image.Image:
    height, width = pixels.shape[:2]
    return Image.fromarray(pixels).resize((max(1, width * SHOWN_HEIGHT // height), SHOWN_HEIGHT))


def page(title: str, rows: list[list[Shown]]) -> str:
    """All pictures as one HTML page."""
    body = "".join(f'<div class="row">{"".join(map(_figure, row))}</div>' for row in rows)
    return _PAGE.format(title=html.escape(title), rows=body)


def _figure(shown: Shown) -> str:
    buffer = io.BytesIO()
    _scaled(shown.pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = html.escape(shown.caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def sheet(rows: list[list[Shown]], gap: int = 4) -> Image.Image:
    """All pictures on one white sheet, a row an image."""
    scaled = [[_scaled(shown.pixels) for shown in row] for row in rows]
    width = max(sum(one.width + gap for one in row) for row in scaled)
    sheet = Image.new("RGB", (width, len(rows) * (SHOWN_HEIGHT + gap)), "white")
    for y, row in enumerate(scaled):
        x = 0
        for one in row:
            sheet.paste(one, (x, y * (SHOWN_HEIGHT + gap)))
            x += one.width + gap
    return sheet
