import json

import numpy as np
import pyarrow as pa
import pytest
from small_pictures import picture

from curation.dataset import write_dataset
from curation.errors import ConfigError
from curation.ledger import StageRecord
from embedder.images import decode, encode_jpeg, resize
from pipelines.operate.events import read_events
from pipelines.operate.hardware import ClusterSpec, read_cluster
from pipelines.operate.planner import Sample, plan_stages
from pipelines.run.run_record import RunRecord, StageEntry
from tests.pipelines.commands import fails, succeeds

RECIPE = """
name: small
sets: {}
pool:
  - ingest: {images: "IMAGES"}
  - canonicalize
  - exact_dedup
  - select
  - pack
"""


NEEDED = {"ingest": {"images": "x"}, "near_dedup": {"embeddings": "x"}}
"""Settings without which a stage cannot be."""


def usage_of(stage: str, rows: int, item_s: float, **other: float) -> dict[str, float | str]:
    usage = {"stage": stage, "rows_in": rows, "seconds": item_s + 1, "item_s": item_s}
    memory = {"peak_bytes": 1 << 30, "grown_bytes": 1 << 20}
    return {**usage, "cpu_s": item_s, **memory, **other}


def sample_of(work, *stages: tuple[str, int, float]) -> Sample:
    entries = [
        StageEntry(
            stage=name,
            folder=name,
            record=StageRecord(
                stage=name,
                version=1,
                key="",
                settings=NEEDED.get(name, {}),
                rows_in=rows,
                rows_out=rows,
                dropped={},
                outputs={},
                seconds=item_s + 1,
            ),
        )
        for name, rows, item_s in stages
    ]
    record = RunRecord(recipe="x", recipe_file="x", seed=0, pool=tuple(entries))
    return Sample(record, str(work), tuple(usage_of(*stage) for stage in stages))


def test_plan_stages__tells_what_a_stage_costs_once_from_what_a_row_costs(tmp_path):
    small = sample_of(tmp_path, ("quality", 100, 1.2), ("embed", 50, 0.5))
    large = sample_of(tmp_path, ("quality", 400, 1.8), ("embed", 200, 2.0))
    a, embed = plan_stages(small, large, 1_000_000, ClusterSpec())
    assert (a.rows, embed.rows) == (1e6, 5e5)  # half of the rows reach it, as in the sample
    assert a.wall_s == pytest.approx(1 + 1.0 + 0.002 * 1e6)
    assert embed.wall_s == pytest.approx(1 + 0.01 * 5e5)
    assert (embed.limited_by, embed.gpu_hours) == ("cores", 0)

    a, embed = plan_stages(small, large, 1_000_000, read_cluster("2x8xV100", 40))
    assert a.wall_s == pytest.approx(2 + 0.002 * 1e6 / 80)
    assert embed.wall_s == pytest.approx(1 + 0.01 * 5e5 / (16 * 120))
    assert (embed.limited_by, embed.core_hours) == ("devices", 0)
    assert embed.uncertainty == 1.0  # a stated rate


def test_plan_stages__what_looks_at_images_is_planned_to_read_them(tmp_path):
    rows = pa.table({"id": ["a"], "image": [b"x" * 1000]})
    images = write_dataset(str(tmp_path / "canonicalize" / "images"), [rows], rows.schema)
    size = sum(shard.num_bytes for shard in images.manifest.shards)

    def planned(*names: str, settings: dict[str, object]) -> list[float]:
        sample = sample_of(tmp_path, *((name, 10, 0.1) for name in ("canonicalize", *names)))
        first, *others = sample.record.pool
        made = first.replace(record=first.record.replace(outputs={"images": ""}))
        others = [one.replace(record=one.record.replace(settings=settings)) for one in others]
        record = sample.record.replace(pool=(made, *others))
        plans = plan_stages(*(Sample(record, sample.work, sample.usage),) * 2, 10, None)
        return [plan.network_bytes for plan in plans[1:]]

    for name in ("relevance", "quality", "nsfw", "faces", "embed", "pack"):
        assert planned(name, settings={}) == [size]
    assert planned("exact_dedup", settings={}) == [0]
    without_text = {"max_text": None, "seeds": ["s"], "embeddings": "copy"}
    assert planned("relevance", settings=without_text) == [0]


def test_plan_stages__sets_keep_their_size_and_the_pool_grows(tmp_path):
    def with_set(rows: int, item_s: float) -> Sample:
        pool, val = (sample_of(tmp_path, ("ingest", rows, item_s)) for _ in range(2))
        (entry,) = val.record.pool
        entry = entry.replace(record=entry.record.replace(figures={"share_read": 0.25}))
        record = pool.record.replace(sets={"val": (entry,)})
        return Sample(record, str(tmp_path), val.usage + pool.usage)

    val, pool = plan_stages(with_set(100, 0.1), with_set(400, 0.4), 1e6, None)
    assert (val.stage, pool.stage) == ("val/ingest", "ingest")
    assert (val.rows, pool.rows) == (1600, 1e6)
    assert val.wall_s == pytest.approx(1 + 1.6)


def test_plan_stages__other_work_on_the_machine_does_not_count(tmp_path):
    def disturbed(rows: int, item_s: float, cpu_s: float) -> Sample:
        sample = sample_of(tmp_path, ("embed", rows, item_s))
        return Sample(sample.record, sample.work, ({**sample.usage[0], "cpu_s": cpu_s},))

    alone = plan_stages(disturbed(100, 1, 2), disturbed(400, 4, 8), 10_000, None)[0]
    stretched = plan_stages(disturbed(100, 1, 2), disturbed(400, 12, 8), 10_000, None)[0]
    assert alone.wall_s == pytest.approx(stretched.wall_s) == pytest.approx(1 + 100)
    assert stretched.uncertainty == pytest.approx(2 / 3)


def test_plan_stages__what_compares_pairs_grows_faster_than_its_rows(tmp_path):
    small = sample_of(tmp_path, ("near_dedup", 250, 0.1))
    large = sample_of(tmp_path, ("near_dedup", 1000, 1.6))
    (plan,) = plan_stages(small, large, 10_000, None)
    assert plan.wall_s > 100 * 1.6


def test_read_cluster__reads_yaml_and_refuses_what_it_does_not_know(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("{nodes: 3, cpus: 4, gpus: 2, gpu_speed: 50}")
    cluster = read_cluster(str(file), 1)
    assert (cluster.cores, cluster.devices) == (12, 6)
    with pytest.raises(ConfigError, match="20x8xV100"):
        read_cluster("20 machines", 1)


def test_read_cluster__reads_a_text_with_what_is_known_of_a_node():
    cluster = read_cluster("20x8xV100,cpus=40,network_gb_s=2.5", None)
    assert (cluster.cores, cluster.devices, cluster.network_gb_s) == (800, 160, 2.5)
    assert read_cluster("4xT4", 6).cores == 6
    with pytest.raises(ConfigError, match="unknown key 'cpu'"):
        read_cluster("20x8xV100,cpu=40", None)
    with pytest.raises(ConfigError, match="'many' is no number"):
        read_cluster("20x8xV100,cpus=many", None)


def test_plan_stages__memory_grows_with_the_rows_of_a_shard_and_not_beyond(tmp_path):
    def measured(rows: int, peak: float) -> Sample:
        sample = sample_of(tmp_path, ("ingest", rows, 0.1), ("embed", rows // 2, 0.1))
        first = sample.record.pool[0]
        record = first.record.replace(settings={"images": "x", "rows_per_shard": 10_000})
        flow = (first.replace(record=record), sample.record.pool[1])
        usage = tuple(
            {**one, "peak_bytes": peak, "grown_bytes": peak - 1e9} for one in sample.usage
        )
        return Sample(sample.record.replace(pool=flow), sample.work, usage)

    small, large = measured(200, 1.0e9), measured(1000, 1.8e9)  # 1 MB a row of ingest, 2 of embed
    ingest, embed = plan_stages(small, large, 1e9, None)
    assert ingest.peak_bytes == pytest.approx(1.8e9 + 9000 * 1e6)
    assert embed.peak_bytes == pytest.approx(1.8e9 + 4500 * 2e6)
    assert plan_stages(small, large, 2000, None)[0].peak_bytes == pytest.approx(2.8e9)


def test_plan_stages__what_compares_lists_may_fill_the_memory_that_it_is_given(tmp_path):
    small, large = (sample_of(tmp_path, ("near_dedup", rows, 0.1)) for rows in (250, 1000))
    (entry,) = large.record.pool
    record = entry.record.replace(settings={"embeddings": "x", "comparison": {"memory_gb": 4.0}})
    large = Sample(
        large.record.replace(pool=(entry.replace(record=record),)), large.work, large.usage
    )
    assert plan_stages(small, large, 1e9, None)[0].peak_bytes == 4e9
    assert plan_stages(small, large, 2000, None)[0].peak_bytes == 1 << 30


def test_plan__measures_a_sample_of_the_users_own_data(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(40):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(encode_jpeg(picture(number)))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("IMAGES", str(tmp_path / "images")))
    words = ("plan", recipe, "--images", "1e9", "--sample", 24)
    plan = json.loads(succeeds(*words, "--json", "--out", tmp_path / "plan.json"))
    rows = plan["stages"]
    assert [row["stage"] for row in rows][:2] == ["ingest", "canonicalize"]
    assert rows[0]["rows"] == 1e9
    assert all(row["core_hours"] > 0 for row in rows)
    packed, images = rows[-1]["disk_bytes"], rows[1]["disk_bytes"]
    assert 0.5 < packed / images < 1.5  # the same images, written once more
    assert all(row["wall_s"] > 0 and row["peak_bytes"] > 1 << 20 for row in rows)
    assert plan["wall_low_s"] < plan["wall_s"] < plan["wall_high_s"]
    assert plan["bottleneck"] in {row["stage"] for row in rows}
    succeeds("run", recipe, "--work", tmp_path / "work", "--plan", tmp_path / "plan.json")
    events = read_events(str(tmp_path / "work"))
    started = [event for event in events if event.event == "stage_started"]
    assert all(event.planned_s > 0 for event in started)
    assert "unknown key 'polo'" in fails(2, *words, "--set", "polo=1")


@pytest.mark.slow
def test_plan__of_1000_images_predicts_10000_on_the_same_machine(shared_data, tmp_path):
    photos = [decode(path.read_bytes()) for path in sorted((shared_data / "photos").glob("*.jpg"))]
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(10_000):
        pixels = photos[number % len(photos)]
        height, width = pixels.shape[:2]
        top, left = rng.integers(0, height // 3), rng.integers(0, width // 3)
        crop = pixels[top : top + 2 * height // 3, left : left + 2 * width // 3]
        data = encode_jpeg(resize(np.ascontiguousarray(crop), 320, 240), 85)
        (tmp_path / "images" / f"{number}.jpg").write_bytes(data)
    recipe = tmp_path / "r.yaml"
    stages = "  - embed: {encoders: {copy: lite-copy}}\n  - near_dedup: {embeddings: copy, "
    text = RECIPE.replace("IMAGES", str(tmp_path / "images"))
    stages = f"{stages}max_component_share: 1.0}}\n  - select: {{embeddings: copy}}"
    recipe.write_text(text.replace("  - select", stages))
    plan = json.loads(succeeds("plan", recipe, "--images", "1e4", "--json"))
    succeeds("run", recipe, "--work", tmp_path / "work")
    events = read_events(str(tmp_path / "work"))
    took = {e.stage: e.seconds for e in events if e.event == "stage_finished"}
    assert plan["wall_s"] == pytest.approx(sum(took.values()), rel=0.25)
    for stage in plan["stages"]:
        if took[stage["stage"]] > 30:
            assert stage["wall_s"] == pytest.approx(took[stage["stage"]], rel=0.35)
    peaks = [e.peak_bytes for e in events if e.event == "stage_finished"]
    assert plan["peak_bytes"] == pytest.approx(max(peaks), rel=0.5)
