import numpy as np
import pyarrow as pa
import pytest

from curation.neighbors.dedup import judge_components as module
from curation.neighbors.dedup.component_rules import COMPONENT_RULES
from curation.neighbors.dedup.judge_components import (
    JudgeDuplicates,
    JudgeLeaks,
    judge_components,
)
from pipelines.engines.local_engine import LocalEngine
from tests.curation.neighbors.dedup.conftest import THRESHOLD, crowd


def judged(one, judge, folder):
    """Verdicts on the pool by id, summaries, and positions of dropped rows."""
    pool = one.pools[0]
    verdicts, summaries = judge_components(one.graph, judge, str(folder), pool, LocalEngine())
    table = pa.concat_tables(
        [verdicts.read(batch) for batch in range(verdicts.verdicts.num_buckets)]
    )
    ids = {
        (shard, row): row_id
        for shard in range(pool.num_shards)
        for row, row_id in enumerate(pool.live_ids(shard).to_pylist())
    }
    rows = {ids[row["shard"], row["row"]]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows
    dropped = np.concatenate(list(verdicts.dropped())).tolist()
    return rows, [one for summary in summaries for one in np.atleast_1d(summary)], sorted(dropped)


@pytest.mark.parametrize("bucket_rows", [(16, 32), (1 << 15, 1 << 18)])
def test_judge_duplicates__keeps_the_largest_original_of_each_component(
    made, tmp_path, monkeypatch, bucket_rows
):
    monkeypatch.setattr(module, "_BUCKET_ROWS", bucket_rows)
    pixels = np.random.default_rng(3).integers(1, 5, 160)
    one = made(crowd(0), original_width=pixels, original_height=np.ones(160, int))
    judge = JudgeDuplicates(COMPONENT_RULES["components"], THRESHOLD)
    rows, worst, dropped = judged(one, judge, tmp_path)
    labels, hexes = one.labels(), [row.tobytes().hex() for row in one.ids]
    names = one.pools[0].live_ids(0).to_pylist() + one.pools[0].live_ids(1).to_pylist()
    size_of = dict(zip(names, pixels.tolist(), strict=True))
    lowest, goes = {}, []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        if len(own) == 1:
            assert hexes[own[0]] not in rows
            continue
        best = min(own, key=lambda n: (-size_of[hexes[n]], hexes[n]))
        lowest[hexes[best]] = one.cosines[best, own].min()
        goes += [int(n) for n in own if n != best]
        for n in own:
            row = rows[hexes[n]]
            assert row["keep"] == (n == best)
            assert (row["component"].hex(), row["component_size"]) == (hexes[best], len(own))
    assert dropped == sorted(goes)
    found = {worst_one["component"]: worst_one["lowest_similarity"] for worst_one in worst}
    assert min(found.values()) == pytest.approx(min(lowest.values()), rel=1e-6)
    assert all(lowest[name] == pytest.approx(cosine, rel=1e-6) for name, cosine in found.items())


@pytest.mark.parametrize("tile", [(3, 2), (1 << 12, 1 << 10)])
def test_judge_leaks__drops_components_with_an_image_and_names_the_nearest(
    made, tmp_path, monkeypatch, tile
):
    monkeypatch.setattr(module, "_TILE", tile)
    one = made(crowd(0), crowd(0)[10:30] + np.float16(0.1), crowd(0)[60:80])
    rows, leaking, dropped = judged(one, JudgeLeaks(THRESHOLD), tmp_path)
    labels, hexes = one.labels(), [row.tobytes().hex() for row in one.ids]
    with_image = {label for label in labels if (one.sets[labels == label] > 0).any()}
    goes = [n for n in range(len(labels)) if one.sets[n] == 0 and labels[n] in with_image]
    assert dropped == goes
    assert set(rows) == {hexes[n] for n in goes}
    alone = [label for label in with_image if (labels == label).sum() == 1]
    assert sum(leaking) == len(with_image) - len(alone)
    for n in goes:
        images = np.flatnonzero((labels == labels[n]) & (one.sets > 0))
        top = one.cosines[n, images].max()
        row = rows[hexes[n]]
        nearest = [m for m in images if one.cosines[n, m] >= top - 1e-6]
        assert row["twin"].hex() in {hexes[m] for m in nearest}
        assert row["twin_set"] in {one.sets[m] for m in nearest}
        assert row["similarity"] == pytest.approx(top, rel=1e-6)
        assert row["direct"] == (top > np.float32(THRESHOLD))
        assert not row["keep"]
