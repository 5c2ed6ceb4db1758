import gzip
import hashlib
import time

import numpy as np
import pyarrow as pa
import pytest

from curation.blocklists import Blocklists, ExactHashes, PdqHashes
from curation.errors import ConfigError, DatasetError, StorageError
from curation.pdq import pdq
from curation.schema import make_id
from curation.stage import Shard
from curation.stages.blocklist import Blocklist
from curation.stages.canonicalize import Canonicalize
from embedder.images import encode_jpeg, resize


def flipped(digest: np.ndarray, bits: list[int]) -> np.ndarray:
    unpacked = np.unpackbits(digest)
    unpacked[bits] ^= 1
    return np.packbits(unpacked)


def picture(seed: int, width: int = 200) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return resize(coarse, width, 150)


def hashes_of(*pictures: np.ndarray) -> dict[str, list]:
    data = [encode_jpeg(one) for one in pictures]
    phashes = [pdq(one) for one in pictures]
    return {
        "id": [make_id(str(i)) for i in range(len(data))],
        "sha256": [hashlib.sha256(one).hexdigest() for one in data],
        "phash": [phash for phash, _ in phashes],
        "phash_quality": [quality for _, quality in phashes],
        "raw": data,
    }


def write(path, *lines: str) -> str:
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_blocklist__each_kind_of_list(tmp_path):
    columns = hashes_of(*(picture(seed) for seed in range(4)))
    near = flipped(
        np.frombuffer(bytes.fromhex(columns["phash"][3]), np.uint8), list(range(0, 93, 3))
    )
    md5 = hashlib.md5(columns["raw"][1]).hexdigest().upper()
    stage = Blocklist(
        lists=Blocklists(
            md5={"old": write(tmp_path / "a.txt", "# a comment", "", f"{md5}  # why")},
            sha256={"exact": write(tmp_path / "b.txt.gz", columns["sha256"][2])},
            pdq={"alike": write(tmp_path / "c.txt", near.tobytes().hex())},
        )
    )
    shard = Shard(pa.table(columns), 0)
    stage.process(shard, stage.open())
    assert shard.reasons.tolist() == [None, "blocklist:old", "blocklist:exact", "blocklist:alike"]
    assert shard.notes["blocklist"] == [None, "old", "exact", "alike"]
    times = shard.emitted["blocked"]["blocked_at"]
    assert [moment is None for moment in times] == [True, False, False, False]


def test_blocklist__flat_pictures_match_nothing_by_looks(tmp_path):
    columns = hashes_of(picture(0))
    lists = Blocklists(pdq={"alike": write(tmp_path / "c.txt", columns["phash"][0])})
    for quality, expected in ((49, None), (50, "blocklist:alike")):
        shard = Shard(pa.table({**columns, "phash_quality": [quality]}), 0)
        stage = Blocklist(lists=lists)
        stage.process(shard, stage.open())
        assert shard.reasons.tolist() == [expected]


def test_canonicalize__stores_nothing_that_is_listed(tmp_path):
    data = [encode_jpeg(picture(0)), encode_jpeg(picture(1)), b"no image"]
    listed = write(tmp_path / "a.txt", hashlib.sha256(data[1]).hexdigest())
    stage = Canonicalize(blocklists=Blocklists(sha256={"bad": listed}))
    ids = [make_id(str(i)) for i in range(3)]
    shard = Shard(pa.table({"id": ids, "raw": pa.array(data, pa.large_binary())}), 0)
    stage.process(shard, stage.open())
    assert shard.reasons.tolist() == [None, "blocklist:bad", "not_an_image"]
    assert shard.notes["blocklist"] == [None, "bad", None]
    assert "images" not in shard.whole_outputs  # so that rejected rows are left out


def test_blocklists__content_of_the_files_is_part_of_the_key(tmp_path):
    lists = Blocklists(md5={"x": write(tmp_path / "a.txt", "0" * 32)})
    before = lists.fingerprint()
    write(tmp_path / "a.txt", "1" * 32)
    assert lists.fingerprint() != before


def test_blocklists__a_bad_line_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"a.txt: line 2 is 'xyz'; a hash of 64"):
        Blocklists(sha256={"x": write(tmp_path / "a.txt", "0" * 64, "xyz")}).load()
    with pytest.raises(ConfigError, match="a hash of 32 hexadecimal"):
        Blocklists(md5={"x": write(tmp_path / "b.txt", "0" * 64)}).load()
    with pytest.raises(StorageError, match="no such file"):
        Blocklists(pdq={"x": str(tmp_path / "none.txt")}).load()
    packed = gzip.compress(b"0" * 32)
    (tmp_path / "cut.gz").write_bytes(packed[:-6])
    with pytest.raises(DatasetError, match=r"cut\.gz: ends early"):
        Blocklists(md5={"x": str(tmp_path / "cut.gz")}).load()
    (tmp_path / "latin.txt").write_bytes(b"\xef\xbb\xbf" + b"0" * 32 + b" # caf\xe9\r\ncaf\xe9\r\n")
    with pytest.raises(ConfigError, match=r"latin\.txt: line 2 is "):
        Blocklists(md5={"x": str(tmp_path / "latin.txt")}).load()


def test_blocklists__a_list_without_hashes_is_told(tmp_path, caplog):
    Blocklists(md5={"x": write(tmp_path / "a.txt", "# nothing")}).load()
    assert caplog.messages == [f"{tmp_path}/a.txt: has no hashes"]


def test_exact_hashes__equal_beginnings_are_told_apart():
    digests = np.zeros((3, 16), np.uint8)
    digests[1, 15], digests[2, 0] = 1, 1
    held = ExactHashes(digests[:2])
    assert held.contains(digests).tolist() == [True, True, False]


@pytest.mark.parametrize("distance", [0, 7, 31])
def test_pdq_hashes__agrees_with_comparing_all(distance):
    rng = np.random.default_rng(distance)
    entries = rng.integers(0, 256, (500, 32), dtype=np.uint8)
    queries = [
        flipped(entries[i], list(rng.choice(256, k, replace=False)))
        for i, k in enumerate(range(64))
    ]
    queries = np.stack(queries)
    bits = np.unpackbits(queries[:, None] ^ entries[None], axis=2).sum(2)
    expected = (bits <= distance).any(axis=1)
    assert PdqHashes(entries).within(queries, distance).tolist() == expected.tolist()
    assert 0 < expected.sum() < 64


def test_pdq_hashes__millions_of_entries():
    rng = np.random.default_rng(0)
    entries = rng.integers(0, 256, (1_000_000, 32), dtype=np.uint8)
    held = PdqHashes(entries)
    queries = rng.integers(0, 256, (200, 32), dtype=np.uint8)
    queries[:50] = [flipped(entries[i], list(range(31))) for i in range(50)]
    began = time.monotonic()
    found = held.within(queries, 31)
    assert found.tolist() == [True] * 50 + [False] * 150
    assert time.monotonic() - began < 20


def test_pdq_hashes__empty_list_and_no_rows():
    held = PdqHashes(np.zeros((0, 32), np.uint8))
    assert held.within(np.zeros((2, 32), np.uint8), 31).tolist() == [False, False]
    assert held.within(np.zeros((0, 32), np.uint8), 31).tolist() == []
