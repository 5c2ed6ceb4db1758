import hashlib

import pytest

from curation.merkle import path_to_root, root, root_of_path

LEAVES = [f"leaf {number}" for number in range(9)]


def by_definition(leaves):
    """RFC 6962, section 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0].encode()).digest()
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\1" + by_definition(leaves[:k]) + by_definition(leaves[k:])).digest()


@pytest.mark.parametrize("number", range(10))
def test_root__is_that_of_the_rfc(number):
    assert root(LEAVES[:number]) == by_definition(LEAVES[:number]).hex()


def test_root__known_values():
    """The first two of Google's reference tests of certificate transparency."""
    assert root([""]) == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    both = "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"
    assert root(["", "\0"]) == both


@pytest.mark.parametrize("number", range(1, 10))
def test_path_to_root__leads_every_leaf_to_the_root(number):
    leaves = LEAVES[:number]
    for index, leaf in enumerate(leaves):
        path = path_to_root(leaves, index)
        assert len(path) <= 4
        assert root_of_path(leaf, index, number, path) == root(leaves)
        assert root_of_path("another", index, number, path) != root(leaves)


def test_path_to_root__of_many_is_short():
    leaves = [str(number) for number in range(5000)]
    path = path_to_root(leaves, 4321)
    assert len(path) <= 13
    assert root_of_path("4321", 4321, 5000, path) == root(leaves)
    assert root_of_path("4321", 4320, 5000, path) != root(leaves)
