"""A Merkle tree (RFC 6962) over texts in their order: one digest for all, a short path for each.

Whoever holds only the root can check one leaf of a million with twenty hashes, and no other leaf.
"""

import hashlib
from collections.abc import Sequence

_LEAF, _NODE = b"\0", b"\1"
"""Leaves and nodes are hashed apart, so that none can be passed off as the other."""


def root(leaves: Sequence[str]) -> str:
    """The digest over all leaves, as hex."""
    nodes = _hashed(leaves)
    while len(nodes) > 1:
        nodes = _above(nodes)
    return (nodes[0] if nodes else hashlib.sha256().digest()).hex()


def path_to_root(leaves: Sequence[str], index: int) -> list[str]:
    """What a leaf is hashed with on its way to the root, from below, as hex."""
    nodes, path = _hashed(leaves), list[str]()
    while len(nodes) > 1:
        if index ^ 1 < len(nodes):
            path.append(nodes[index ^ 1].hex())
        nodes, index = _above(nodes), index >> 1
    return path


def root_of_path(leaf: str, index: int, number: int, path: Sequence[str]) -> str:
    """The root that a leaf and its path lead to. index: its place among `number` leaves."""
    node, last, others = _hash(_LEAF, leaf.encode()), number - 1, iter(path)
    while last:
        if index ^ 1 <= last:
            other = bytes.fromhex(next(others))
            node = _hash(_NODE, other + node if index & 1 else node + other)
        index, last = index >> 1, last >> 1
    return node.hex()


def _hashed(leaves: Sequence[str]) -> list[bytes]:
    return [_hash(_LEAF, leaf.encode()) for leaf in leaves]


def _above(nodes: list[bytes]) -> list[bytes]:
    """Pairs hashed together; the last one of an odd number goes up as it is."""
    pairs = zip(nodes[::2], nodes[1::2], strict=False)
    above = [_hash(_NODE, left + right) for left, right in pairs]
    return [*above, nodes[-1]] if len(nodes) % 2 else above


def _hash(kind: bytes, data: bytes) -> bytes:
    return hashlib.sha256(kind + data).digest()
