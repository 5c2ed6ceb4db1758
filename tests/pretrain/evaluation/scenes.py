"""Rendered scenes with exact truth: spheres and a floor under a lamp, class and depth per pixel."""

from pathlib import Path

import numpy as np
from PIL import Image

SKY, FLOOR, BALL, STRIPED = 0, 1, 2, 3
FAR = 9.5


def render(rng: np.random.Generator, side: int = 128) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image (S, S, 3), its classes (S, S) uint8 and its depths (S, S) float32 in meters.

    Colors are drawn anew for everything in each scene, so that they tell nothing of the class.
    """
    rays = directions(side)  # (S, S, 3)
    depth = np.full((side, side), FAR)
    labels = np.full((side, side), SKY, np.uint8)
    colors = np.broadcast_to(rng.uniform(60, 255, 3), (side, side, 3)).copy()
    colors *= (0.7 + 0.3 * np.linspace(0, 1, side))[:, None, None]
    paint_floor(rays, depth, labels, colors, rng)
    for kind in (BALL, STRIPED, *rng.choice([BALL, STRIPED], 2)):
        paint_sphere(rays, depth, labels, colors, rng, int(kind))
    noisy = colors + rng.normal(0, 4, colors.shape)
    return noisy.clip(0, 255).astype(np.uint8), labels, depth.astype(np.float32)


def directions(side: int) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(-0.7, 0.7, side), np.linspace(-0.7, 0.7, side))
    rays = np.stack([x, y, np.ones_like(x)], -1)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def paint_floor(rays, depth, labels, colors, rng) -> None:
    height = rng.uniform(0.8, 1.6)
    with np.errstate(divide="ignore"):
        distance = np.where(rays[..., 1] > 0.02, height / rays[..., 1], np.inf)
    hit = distance < FAR
    place = rays * np.where(hit, distance, 0)[..., None]
    tiles = (np.floor(place[..., 0] * 1.5) + np.floor(place[..., 2] * 1.5)) % 2
    pair = rng.uniform(20, 255, (2, 3))
    shade = (1 / (1 + 0.1 * distance))[..., None]
    colors[hit] = (pair[tiles.astype(int)] * shade)[hit]
    labels[hit], depth[hit] = FLOOR, distance[hit]


def paint_sphere(rays, depth, labels, colors, rng, kind: int) -> None:
    center = np.array([rng.uniform(-1.2, 1.2), rng.uniform(-0.9, 0.7), rng.uniform(2, 6)])
    radius = rng.uniform(0.5, 1.0)
    along = rays @ center
    room = radius**2 - (center @ center - along**2)
    distance = along - np.sqrt(np.maximum(room, 0))
    hit = (room > 0) & (distance > 0.2) & (distance < depth)
    normals = (rays * distance[..., None] - center) / radius
    light = (0.35 + 0.65 * np.clip(normals @ np.array([-0.5, -0.7, -0.5]), 0, 1))[..., None]
    pair = rng.uniform(20, 255, (2, 3))
    stripes = (np.floor(normals[..., 1] * 6) % 2).astype(int) if kind == STRIPED else 0
    colors[hit] = (np.broadcast_to(pair[stripes], colors.shape) * light)[hit]
    labels[hit], depth[hit] = kind, distance[hit]


def write_scenes(root: Path, count: int, seed: int) -> Path:
    """COUNT scenes in the plain layouts of segmentation and depth."""
    rng = np.random.default_rng(seed)
    for name in ("images", "labels", "depth"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        image, labels, depth = render(rng)
        Image.fromarray(image).save(root / "images" / f"{i:03d}.png")
        Image.fromarray(labels).save(root / "labels" / f"{i:03d}.png")
        np.save(root / "depth" / f"{i:03d}.npy", depth)
    return root
