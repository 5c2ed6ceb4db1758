import numpy as np
import pytest

from curation.config import parse_settings
from curation.errors import ConfigError
from curation.neighbors.index.vector_index import Comparison, build_index, self_join
from curation.neighbors.join import recall
from curation.neighbors.rows.vectors import VectorSource
from curation.stages.near_dedup import NearDedup
from pipelines.engines.local_engine import LocalEngine

WIDTH, THRESHOLD = 64, 0.6


def around(rng, base, least, most):
    """Rows at a cosine between two bounds to given ones."""
    noise = rng.normal(size=base.shape)
    noise -= (noise * base).sum(axis=1, keepdims=True) * base
    cosines = rng.uniform(least, most, (len(base), 1))
    return cosines * base + np.sqrt(1 - cosines**2) * unit(noise)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def singles(rng, count):
    base = unit(rng.normal(size=(count // 2, WIDTH)))
    return np.concatenate([base, around(rng, base, 0.75, 0.95)])


def crowds(rng, count):
    base = unit(rng.normal(size=(count // 20, WIDTH)))
    return around(rng, np.repeat(base, 20, axis=0), 0.75, 0.95)


def strangers(rng, count):
    return unit(rng.normal(size=(count, WIDTH)))


MADE = {
    "one partner each": lambda rng: singles(rng, 1600),
    "crowds": lambda rng: crowds(rng, 1600),
    "mixed": lambda rng: np.concatenate(
        [singles(rng, 600), crowds(rng, 400), strangers(rng, 600), np.ones((3, WIDTH))]
    ),
}


def joined(embed, folder, rows, *, asked, probes=16):
    """Twins by exhaustive comparison and by lists, and the figures. rows: (N, D)."""
    pool = embed(rows)
    raw = np.stack(pool.layers["copy"].read()["embedding"].to_pylist()).astype(np.float64)
    cosines = unit(raw) @ unit(raw).T
    np.fill_diagonal(cosines, -1)
    how = Comparison(method="lists", recall=asked, probes=probes)
    engine, source = LocalEngine(), VectorSource(pool, "copy")
    index = build_index(
        (source,), f"{folder}/rows", engine, comparison=how, seed=0, alike=THRESHOLD
    )
    result, figures = self_join(index, THRESHOLD, f"{folder}/join", engine)
    files, twins = index.files, np.full(len(rows), -1)
    numbers = [np.asarray(files.rows(one)["row"]) for one in range(files.num_partitions)]
    of_position = np.concatenate(numbers)
    for partition, own in enumerate(numbers):
        best = result.best(partition)[0]
        twins[own] = np.where(best < 0, -1, of_position[best])
    return cosines, twins, figures


def found_share(cosines, twins, rows):
    """Share of some rows that have their most similar other row, or one as similar."""
    best = cosines[rows].max(axis=1)
    own = cosines[rows, twins[rows]]
    return float(((twins[rows] >= 0) & (own >= best - 1e-6)).mean())


@pytest.mark.parametrize("made", MADE)
def test_measure_recall__is_the_share_that_exhaustive_comparison_says(embed, tmp_path, made):
    rows = MADE[made](np.random.default_rng(3))
    cosines, twins, figures = joined(embed, tmp_path, rows, asked=0.95)
    partners = (cosines > THRESHOLD).sum(axis=1)
    have = np.flatnonzero(partners)
    assert figures["sampled_rows"] == len(rows)
    assert abs(figures["sampled_twins"] - len(have)) <= 2  # 8-bit cosines at the threshold
    share = found_share(cosines, twins, have)
    assert share >= 0.945
    assert figures["measured_recall"] == pytest.approx(share, abs=0.004)
    single = np.flatnonzero(partners == 1)
    if len(single) > 100:
        said = figures["recall_by_partners"]["1"]
        assert said["rows"] == pytest.approx(len(single), abs=4)
        assert said["recall"] == pytest.approx(found_share(cosines, twins, single), abs=0.006)


def test_measure_recall__pairs_of_crowds_do_not_hide_rows_with_one_partner(embed, tmp_path):
    rng = np.random.default_rng(5)
    rows = np.concatenate([singles(rng, 1200), crowds(rng, 1200)])
    cosines, twins, figures = joined(embed, tmp_path, rows, asked=0.99)
    single = np.flatnonzero((cosines > THRESHOLD).sum(axis=1) == 1)
    assert found_share(cosines, twins, single) >= 0.985
    narrow = joined(embed, tmp_path / "narrow", rows, asked=0.5)
    assert narrow[2]["pair_recall"] > 0.95 > narrow[2]["measured_recall"]
    assert figures["recall_by_partners"].keys() >= {"1", "more"}


def test_measure_recall__draws_rows_until_enough_have_a_twin(embed, tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "_FIRST_ROWS", 100)
    monkeypatch.setattr(recall, "rows_wanted", lambda target: 150)
    rng = np.random.default_rng(7)
    rows = np.concatenate([singles(rng, 800), strangers(rng, 1200)])
    figures = joined(embed, tmp_path, rows, asked=0.9)[2]
    assert 150 <= figures["sampled_twins"] < 250
    assert 300 < figures["sampled_rows"] < 700
    assert figures["recall_at_least"] < figures["measured_recall"]
    pairs = figures["sampled_pairs"] / figures["sampled_rows"] * len(rows) / 2
    assert figures["estimated_pairs"] == pytest.approx(pairs, abs=1)


def test_measure_recall__stops_at_the_most_rows(embed, tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "_FIRST_ROWS", 64)
    monkeypatch.setattr(recall, "_MOST_ROWS", 300)
    rows = strangers(np.random.default_rng(8), 2000)
    rows[0] = rows[1]
    figures = joined(embed, tmp_path, rows, asked=0.99)[2]
    assert 240 < figures["sampled_rows"] < 360
    assert figures["sampled_twins"] < 20


def test_pairs__by_sketches_and_by_whole_rows_are_the_same(monkeypatch):
    rng = np.random.default_rng(9)
    rows = recall.quantize_rows(crowds(rng, 400).astype(np.float32))
    sample = recall._Sample(np.arange(100), rows[:100], recall.Routes.at_home(np.zeros(100)))
    found = []
    for dense in (2, 0):
        monkeypatch.setattr(recall, "_DENSE", dense)
        a, b, _ = recall._AlikeRows.to(sample, THRESHOLD).pairs(rows)
        found.append({(int(row), int(other)) for row, other in zip(a, b, strict=True)})
    exact = unit(rows.astype(float))[:100] @ unit(rows.astype(float)).T
    assert found[1] == {(int(a), int(b)) for a, b in zip(*np.nonzero(exact > 0.6), strict=True)}
    assert found[0] <= found[1]
    assert len(found[0]) > 0.995 * len(found[1])


def test_comparison__the_old_name_of_probes_is_read_with_a_warning(caplog):
    values = {"embeddings": "copy", "comparison": {"visits": 3}}
    assert parse_settings(NearDedup, values, "a.yaml").comparison.probes == 3
    assert "a.yaml: 'visits' is now called 'probes'" in caplog.text
    values["comparison"]["probes"] = 4
    with pytest.raises(ConfigError, match=r"unknown key 'comparison\.visits'"):
        parse_settings(NearDedup, values, "a.yaml")
