"""One look at every scene before a head is trained: what counts, what is left out, what is refused.

A head trains for hours; a mask that cannot be meant, or a photo that cannot be decoded, is found
here and not in the middle.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from curation.errors import ConfigError
from embedder.encoder import available_cpus
from embedder.errors import ImageError
from pretrain.distributed import any_rank, rank, sum_over_ranks, world_size
from pretrain.evaluation.bad_images import check_bad_images
from pretrain.evaluation.targets import Scene, Targets

logger = logging.getLogger(__name__)

_AT_ONCE = 64
"""Scenes that are held."""


class Surveyed(NamedTuple):
    """The scenes that can be used, and what their targets hold."""

    scenes: list[Scene]
    totals: Tensor
    """(K,) int64: the sum of all tallies."""
    bad_images: int
    """Scenes left out because their image cannot be decoded."""


def survey(scenes: Sequence[Scene], tally: Callable[[Targets], Tensor], width: int) -> Surveyed:
    """Look at each scene once, each process at its share: all get the same answer.

    tally: what is counted of a target, (width,) int64.

    Raises:
        ConfigError: a target cannot be meant or does not fit its image, or too many images are bad.
    """
    totals, bad = torch.zeros(width, dtype=torch.int64), torch.zeros(len(scenes))
    mine = range(rank(), len(scenes), world_size())
    refusal: ConfigError | None = None
    with ThreadPoolExecutor(available_cpus()) as pool:
        try:
            for start in range(0, len(mine), _AT_ONCE):
                part = mine[start : start + _AT_ONCE]
                found = list(pool.map(_look_at, [scenes[i] for i in part]))
                bad[list(part)] = torch.tensor([float(values is None) for values in found])
                totals += sum(tally(values) for values in found if values is not None)
        except ConfigError as error:
            refusal = error
    if any_rank(refusal is not None):  # all processes stop, or none
        raise refusal or ConfigError("another process met a scene that it refuses")
    is_bad = sum_over_ranks(bad).bool().tolist()
    check_bad_images([str(scenes[i].path) for i, one in enumerate(is_bad) if one], len(scenes))
    good = [scene for scene, one in zip(scenes, is_bad, strict=True) if not one]
    return Surveyed(good, sum_over_ranks(totals), sum(is_bad))


def _look_at(scene: Scene) -> Targets | None:
    """The target of a scene, or None where its image is bad."""
    try:
        pixels = scene.pixels()
    except ImageError as error:
        logger.warning("left out: %s", error)
        return None
    return scene.values_for(pixels)
