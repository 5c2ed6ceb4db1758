"""A finished run of a few dozen small images, made once a test session, for what audits it."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np

from embedder.encoder import EncoderMemory, Thresholds
from embedder.images import encode_jpeg, resize
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.recipe import load_recipe
from pipelines.run.runner import RecipeRun
from pipelines.run.stage_runner import Silent

HOSTILE = "<img src=x onerror=alert(1)>&\"'[red]cc[/red][/b]\x1b[31m\u202e.jpg"
"""The path of a file, which must be shown as text."""

RECIPE = """
name: audited
rows_per_shard: 16
sets:
  bench: {images: "${work}/sets/bench"}
  seeds: {images: "${work}/sets/seeds"}
  taken: {images: "${work}/sets/taken"}
pool:
  - ingest: {images: "${work}/images"}
  - canonicalize
  - quality: {min_side: 16}
  - exact_dedup
  - embed: {encoders: {copy: lite-copy}}
  - near_dedup: {embeddings: copy, max_component_share: 0.5}
  - leaks: {embeddings: copy, against: [bench]}
  - retrieve:
      embeddings: copy
      clusters: 4
      seeds:
        - {set: seeds, rule: sample, k: 6}
  - select: {as_is: [taken]}
  - pack: {rows_per_tar: 12}
"""


class TinyEncoder:
    """16 x 16 pixels without their mean: enough for small edits, and made without torch."""

    name, space, license = "lite-copy", "tiny", "none"
    width, batch_size, device = 768, 8, "cpu"
    thresholds = Thresholds(0.93, 0.9)
    parts, memory = {"weights": "tiny"}, EncoderMemory(0, 0)

    def preprocess(self, pixels):
        return resize(pixels, 16, 16).astype(np.float32)

    def encode(self, batch):
        flat = batch.reshape(len(batch), -1)
        flat = flat - flat.mean(axis=1, keepdims=True)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)


@functools.cache
def finished_run() -> Path:
    """The work folder; copy it before changing anything."""
    work = Path(tempfile.mkdtemp(prefix="audited-"))
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    write_images(work)
    (work / "recipe.yaml").write_text(RECIPE)
    checked = load_recipe(str(work / "recipe.yaml"), {"work": str(work)})
    with patch("curation.stages.embed._load", lambda *_: TinyEncoder()):
        RecipeRun(checked, str(work), LocalEngine(), Silent()).run()
    return work


def copied_run(target: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished_run(), target / "run"))


def write_images(work: Path) -> None:
    """24 pictures with copies of some, a leak, a flat one, a broken one; and three sets."""
    rng = np.random.default_rng(0)
    pictures = [picture(rng) for _ in range(40)]
    pool = {f"{number:02d}.jpg": encode_jpeg(pictures[number]) for number in range(24)}
    pool["copy.jpg"] = pool["00.jpg"]
    pool["edited.jpg"] = encode_jpeg(resize(pictures[1], 72, 72), 60)
    pool["leak.jpg"] = encode_jpeg(pictures[24], 70)
    pool["flat.jpg"] = encode_jpeg(np.full((64, 64, 3), 90, np.uint8))
    pool["broken.jpg"] = pool["02.jpg"][:200]
    pool[HOSTILE] = encode_jpeg(pictures[30])
    sets = {"bench": pictures[24:28], "seeds": pictures[31:34], "taken": pictures[34:37]}
    write_files(work / "images", pool)
    for name, some in sets.items():
        files = {f"{number}.jpg": encode_jpeg(one) for number, one in enumerate(some)}
        write_files(work / "sets" / name, files)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a new folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def picture(rng: np.random.Generator) -> np.ndarray:
    """96 x 96 pixels of colored blobs and bars, unlike any other."""
    coarse = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
    image = resize(coarse, 96, 96).copy()
    for _ in range(6):
        x, y = rng.integers(0, 70, 2)
        width, height = rng.integers(8, 40, 2)
        image[y : y + height, x : x + width] = rng.integers(0, 255, 3)
    return image
