"""Pseudo-random numbers of rows: hashes of their ids, so that a draw depends on nothing else."""

import hashlib

import numpy as np
from numpy.typing import ArrayLike


def hash_ids(ids: np.ndarray, *salts: int | str) -> np.ndarray:
    """(N,) uint64: a hash of (salts, id) for each row; the same on every machine.

    ids: (N, 16) uint8, which are hashes themselves: mixing their halves with the salt is enough.
    """
    key = hashlib.blake2b(repr(salts).encode(), digest_size=16).digest()
    first, second = np.frombuffer(key, np.uint64)
    halves = np.ascontiguousarray(ids).view(np.uint64).reshape(-1, 2)
    return _mix(_mix(halves[:, 0] ^ first) ^ halves[:, 1] ^ second)


def _mix(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(numbers ^ (numbers >> np.uint64(31)))


def share_bound(share: ArrayLike) -> np.ndarray:
    """(...) uint64: the hash up to which a share of all rows lies; all of them from 1 on."""
    return np.asarray(np.minimum(1.0, share) * float(2**64 - 2**11), np.uint64)
