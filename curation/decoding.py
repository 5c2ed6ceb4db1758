"""Decodes the live images of a shard for filters, in a few threads, one image at a time each."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from curation.stage import Shard, reject
from embedder.errors import ImageError
from embedder.images import Pixels, blur_boxes, decode

UNREADABLE = "unreadable"
"""Reason of rows whose image does not decode."""

T = TypeVar("T")


def measure_images(
    shard: Shard,
    measure: Callable[[Pixels], T],
    *,
    threads: int,
    decode: Callable[[bytes], Pixels] = decode,
) -> list[T | None]:
    """Call `measure` with the pixels of each live row; None for rows that are dropped.

    Faces are blurred where an earlier stage found some. Rows that do not decode are rejected as
    unreadable. Memory: `threads` decoded images.
    """
    live = np.flatnonzero(shard.alive)
    row = partial(_measure_row, shard, measure, decode)
    results: list[T | None] = [None] * shard.num_rows
    unreadable = np.zeros(shard.num_rows, bool)
    with ThreadPoolExecutor(threads) as pool:
        for index, result in zip(live, pool.map(row, live), strict=True):
            if isinstance(result, ImageError):
                unreadable[index] = True
            else:
                results[index] = result
    reject(shard, unreadable, UNREADABLE)
    return results


def _measure_row(
    shard: Shard, measure: Callable[[Pixels], T], decode: Callable[[bytes], Pixels], row: int
) -> T | ImageError:
    try:
        pixels = decode(shard.table["image"][int(row)].as_py() or b"")
    except ImageError as error:
        return error
    if "boxes" in shard.table.column_names:
        pixels = blur_boxes(pixels, shard.table["boxes"][int(row)].as_py() or ())
    return measure(pixels)
