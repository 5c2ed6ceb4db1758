"""Random generators that depend on what is drawn, never on who draws it or when.

A stream is named by the run's seed, its purpose and counters such as a position in the data, so
that any step can be repeated by any process without stored generator states.
"""

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a stream is for; numbers are part of the format and never reused."""

    CROPS = 1
    MASK_TARGETS = 2
    MASK_BLOCKS = 3
    SAMPLING = 4
    SUBSTITUTE = 5
    DEPTH = 6
    ORDER = 7
    VIEW_EDITS = 8
    VIEW_PAIRS = 9


def stream(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """Open the stream of a purpose at some counters."""
    return np.random.default_rng([seed, int(purpose), *counters])


def torch_stream(seed: int, purpose: Purpose, *counters: int) -> torch.Generator:
    """Open a stream for torch, on the CPU."""
    entropy = np.random.SeedSequence([seed, int(purpose), *counters])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
