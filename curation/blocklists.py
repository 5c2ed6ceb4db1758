"""Lists of known-bad hashes: exact ones (MD5, SHA-256) and perceptual ones (PDQ, by distance)."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache

import numpy as np
from pydantic import Field

from curation import storage
from curation.config import Settings
from curation.errors import ConfigError
from curation.stage import Shard, reject
from curation.unpacking import text_lines

logger = logging.getLogger(__name__)

_CHUNKS = 16
"""A PDQ hash is 16 chunks of 16 bits. Two hashes at most 31 bits apart agree in one chunk but for
at most one bit (pigeonhole), so looking up 17 variants of each chunk finds every match."""
_BATCH = 64


class Blocklists(Settings):
    """Files of hashes, one hexadecimal hash a line; `#` begins a comment; .gz and others unpack."""

    md5: dict[str, str] = {}
    """Name of a list -> file with MD5 digests of original files."""
    sha256: dict[str, str] = {}
    """Name of a list -> file with SHA-256 digests of original files."""
    pdq: dict[str, str] = {}
    """Name of a list -> file with PDQ hashes of pictures."""
    pdq_distance: int = Field(31, ge=0, le=31)
    """Pictures whose PDQ hashes differ in at most this many of 256 bits are the same."""
    min_phash_quality: int = Field(50, ge=0, le=100)
    """PDQ hashes of lower quality say nothing: flat pictures resemble each other."""

    def fingerprint(self) -> str:
        """Digest of the files' content."""
        digest = hashlib.sha256()
        for files in (self.md5, self.sha256, self.pdq):
            for name, path in sorted(files.items()):
                digest.update(f"{name}\n".encode())
                digest.update(storage.read_bytes(path))
        return digest.hexdigest()

    def load(self) -> "BlockIndex":
        """Read all lists.

        Raises:
            ConfigError: a line is no hash; names the file and the line.
            StorageError: a file cannot be read.
        """
        return BlockIndex(
            self,
            [(name, ExactHashes(_read_hashes(path, 16))) for name, path in self.md5.items()],
            [(name, ExactHashes(_read_hashes(path, 32))) for name, path in self.sha256.items()],
            [(name, PdqHashes(_read_hashes(path, 32))) for name, path in self.pdq.items()],
        )


class ExactHashes:
    """A set of digests, of which millions are looked up by their first eight bytes."""

    def __init__(self, digests: np.ndarray) -> None:
        keys = _leading_words(digests)
        order = np.argsort(keys, kind="stable")
        self._keys, self._digests = keys[order], digests[order]

    def contains(self, digests: np.ndarray) -> np.ndarray:
        """(N,) bool for (N, 16 or 32) uint8 digests."""
        keys = _leading_words(digests)
        starts = np.searchsorted(self._keys, keys, "left")
        stops = np.searchsorted(self._keys, keys, "right")
        found = np.zeros(len(digests), bool)
        for row in np.flatnonzero(stops > starts):
            same = self._digests[starts[row] : stops[row]] == digests[row]
            found[row] = same.all(axis=1).any()
        return found


class PdqHashes:
    """PDQ hashes, found by nearness through one sorted table a chunk (multi-index hashing)."""

    def __init__(self, hashes: np.ndarray) -> None:
        self._words = np.ascontiguousarray(hashes).view("<u8")  # (M, 4)
        chunks = np.ascontiguousarray(hashes).view("<u2")  # (M, 16)
        self._orders = np.argsort(chunks, axis=0, kind="stable").astype(np.int32).T  # (16, M)
        values = np.arange((1 << 16) + 1)
        self._starts = np.stack(  # (16, 65537): where each value's entries begin
            [np.searchsorted(chunks[order, k], values) for k, order in enumerate(self._orders)]
        )
        self._variants = np.concatenate([[0], 1 << np.arange(16)]).astype(np.uint16)

    def within(self, hashes: np.ndarray, distance: int) -> np.ndarray:
        """(N,) bool for (N, 32) uint8: whether an entry lies within a distance of at most 31."""
        hashes = np.ascontiguousarray(hashes)
        parts = [
            self._within(hashes[start : start + _BATCH], distance)
            for start in range(0, len(hashes), _BATCH)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def _within(self, hashes: np.ndarray, distance: int) -> np.ndarray:
        chunks = hashes.view("<u2")  # (B, 16)
        words = hashes.view("<u8")  # (B, 4)
        found = np.zeros(len(hashes), bool)
        for k in range(_CHUNKS):
            variants = chunks[:, k, None] ^ self._variants  # (B, 17)
            starts, stops = self._starts[k, variants], self._starts[k, variants + np.int64(1)]
            sizes = (stops - starts).ravel()
            rows = np.repeat(np.arange(sizes.size), sizes)
            offsets = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            entries = self._orders[k, starts.ravel()[rows] + offsets]
            queries = rows // len(self._variants)
            near = _bits_apart(words[queries], self._words[entries]) <= distance
            found[queries[near]] = True
        return found


@dataclass(frozen=True)
class BlockIndex:
    """All lists, ready to be asked."""

    settings: Blocklists
    md5: list[tuple[str, ExactHashes]]
    sha256: list[tuple[str, ExactHashes]]
    pdq: list[tuple[str, PdqHashes]]

    def names(self, hashes: "RowHashes") -> np.ndarray:
        """(N,) name of the first list that holds a row, or None."""
        settings = self.settings
        names = np.full(len(hashes.sha256), None, dtype=object)
        for name, exact in self.md5:
            _name(names, exact.contains(_digests(hashes.md5, 16)), name)
        for name, exact in self.sha256:
            _name(names, exact.contains(_digests(hashes.sha256, 32)), name)
        for name, near in self.pdq:
            found = near.within(_digests(hashes.phash, 32), settings.pdq_distance)
            clear = np.asarray(hashes.phash_quality) >= settings.min_phash_quality
            _name(names, found & clear, name)
        return names


@dataclass(frozen=True)
class RowHashes:
    """Hashes of some rows as hexadecimal text, in parallel; md5 only where lists ask for it."""

    sha256: list[str]
    phash: list[str]
    phash_quality: list[int]
    md5: list[str]


def reject_listed(shard: Shard, index: BlockIndex, rows: np.ndarray, hashes: RowHashes) -> None:
    """Drop what is on a list, and note which and when; hashes are those of `rows`."""
    names = np.full(shard.num_rows, None, dtype=object)
    names[rows] = index.names(hashes)
    now = datetime.now(UTC)
    listed = names.tolist()
    shard.note("blocklist", listed)
    shard.emit(
        "blocked",
        {"blocklist": listed, "blocked_at": [None if name is None else now for name in listed]},
        rejected_too=True,
    )
    for name in sorted({name for name in listed if name is not None}):
        reject(shard, names == name, f"blocklist:{name}")


def md5_of(data: bytes) -> str:
    """MD5 of a file, as old lists name it."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _name(names: np.ndarray, found: np.ndarray, name: str) -> None:
    names[found & np.array([known is None for known in names], dtype=bool)] = name


def _digests(texts: list[str], width: int) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(-1, width)


def _leading_words(digests: np.ndarray) -> np.ndarray:
    leading: np.ndarray = np.ascontiguousarray(digests[:, :8]).view("<u8")[:, 0]
    return leading


def _bits_apart(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N,) Hamming distances of rows of 64-bit words."""
    differing = np.ascontiguousarray(first ^ second).view(np.uint8)
    bits: np.ndarray = _bits_of_byte()[differing].sum(axis=1)
    return bits


@cache
def _bits_of_byte() -> np.ndarray:
    bits: np.ndarray = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)
    return bits.astype(np.uint16)


def _read_hashes(path: str, width: int) -> np.ndarray:
    """(M, width) uint8."""
    raw = bytearray()
    for number, text in _lines(path):
        try:
            digest = bytes.fromhex(text)
        except ValueError:
            digest = b""
        if len(digest) != width:
            raise ConfigError(
                f"{path}: line {number} is {text[:80]!r}; a hash of {2 * width} hexadecimal "
                "characters is expected"
            )
        raw += digest
    if not raw:
        logger.warning("%s: has no hashes", path)
    return np.frombuffer(bytes(raw), np.uint8).reshape(-1, width)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    for number, line in text_lines(path):
        text = line.partition("#")[0].strip()
        if text:
            yield number, text
