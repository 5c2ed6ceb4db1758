"""Images that cannot be decoded: an evaluation leaves them out, names and counts them."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from curation.errors import ConfigError
from curation.sources.shards import StoredImage
from embedder.errors import ImageError
from embedder.images import Pixels

logger = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.01
"""A larger share of images that cannot be decoded is an error."""


class Reading:
    """Reads images; in place of one that cannot be decoded it gives gray, and remembers."""

    def __init__(self, images: Sequence[StoredImage]) -> None:
        self._images = images
        self.is_bad = torch.zeros(len(images))  # (N,): of those that were read so far

    def readers(self) -> list[Callable[[], Pixels]]:
        """What gives the pixels of each image when it is called."""
        return [partial(self._read, index) for index in range(len(self._images))]

    def _read(self, index: int) -> Pixels:
        try:
            return self._images[index].pixels()
        except ImageError as error:
            if not self.is_bad[index]:
                logger.warning("left out: %s", error)
            self.is_bad[index] = 1
            return np.full((64, 64, 3), 128, np.uint8)

    def good(self, is_bad: Tensor) -> list[int]:
        """Indices of the images that were read. is_bad: (N,), over all processes.

        Raises:
            ConfigError: more than `MAX_BAD_SHARE` of them are bad.
        """
        check_bad_images([self._images[i].path for i in is_bad.nonzero()[:, 0]], len(is_bad))
        good: list[int] = (is_bad == 0).nonzero()[:, 0].tolist()
        return good


def check_bad_images(bad: Sequence[str], total: int) -> None:
    """Accept a few images that cannot be decoded. bad: their paths.

    Raises:
        ConfigError: more than `MAX_BAD_SHARE` of all, with the first one's name.
    """
    if len(bad) > MAX_BAD_SHARE * total:
        raise ConfigError(
            f"{bad[0]}: cannot be decoded, as {len(bad):,} of {total:,} images there; at most "
            f"{MAX_BAD_SHARE:.0%} may be left out: repair or remove them"
        )
