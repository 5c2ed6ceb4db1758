"""What only Ray does: a cluster's nodes that die and join, needs and limits, wrong addresses."""

import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_pictures import picture

from curation.dataset import Dataset
from curation.errors import ConfigError, EngineError
from curation.stage import Resources, Task
from embedder.images import encode_jpeg
from pipelines.engines.local_engine import LocalEngine
from pipelines.engines.ray_engine import RayEngine
from pipelines.run.recipe import load_recipe
from pipelines.run.runner import RecipeRun
from pipelines.run.stage_runner import Silent
from tests.pipelines.commands import fails

ray = pytest.importorskip("ray")

RECIPE = """
name: small
rows_per_shard: 4
sets: {}
pool:
  - ingest: {images: "IMAGES"}
  - canonicalize
  - embed: {encoders: {copy: lite-copy}}
  - near_dedup: {embeddings: copy, max_component_share: 1.0}
  - select: {embeddings: copy}
"""


SHUFFLED = """
name: small
sets: {}
pool:
  - ingest: {images: "IMAGES", rows_per_shard: 99}
  - canonicalize: {max_side: 96}
  - exact_dedup
  - embed: {encoders: {copy: lite-copy}}
  - near_dedup:
      embeddings: copy
      threshold: 0.995
      max_component_share: 1.0
      comparison: {method: lists}
  - select: {embeddings: copy}
"""


@pytest.fixture(scope="module", autouse=True)
def _tests_travel():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers lack tests/


@pytest.fixture(scope="module")
def engine():
    # Room for another engine, however much memory other tests hold at the moment.
    ray.init(num_cpus=3, _memory=64 << 30, include_dashboard=False, log_to_driver=False)
    yield RayEngine(2, attempts=2, first_pause_s=0.05)
    ray.shutdown()


@dataclass(frozen=True)
class Needs(Task[int, None, int]):
    needed: Resources = Resources()

    @property
    def resources(self):
        return self.needed

    def __call__(self, item, opened):
        return item


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (Resources(cpus=1000), "needs 1000 CPUs and 0 GPUs, the largest of 1 nodes"),
        (Resources(gpus=9), "needs 1 CPUs and 9 GPUs"),
    ],
)
def test_map__needs_that_no_node_meets_are_refused(engine, needed, words):
    with pytest.raises(ConfigError, match=words):
        list(engine.map(Needs(needed), [1], "greedy"))


def test_map__a_stage_that_declares_more_memory_than_there_is_still_runs(engine):
    assert dict(engine.map(Needs(Resources(memory=1 << 50)), [1, 2], "large")) == {1: 1, 2: 2}


@dataclass(frozen=True)
class Process(Needs):
    def __call__(self, item, opened):
        return os.getpid()


def test_map__a_stage_that_needs_more_or_less_memory_runs_in_the_same_processes(engine):
    used = [
        {process for _, process in engine.map(Process(Resources(memory=m << 20)), [1, 2], "same")}
        for m in (64, 128, 32)
    ]
    assert len(set().union(*used)) <= 2  # those of the first stage


@dataclass(frozen=True)
class Leaks(Task[int, None, int]):
    """One item holds ever more memory, which its worker never gives back."""

    resources = Resources(memory=1 << 20)
    leaked = []

    def __call__(self, item, opened):
        while item == 3:
            self.leaked.append(np.ones(1 << 21))  # 16 MiB
        return item


def test_map__an_item_that_takes_all_memory_is_stopped_and_named(engine):
    results = []
    with pytest.raises(EngineError, match=r"1 of 6 .*\(3\): MemoryLimitError: its worker held"):
        results.extend(engine.map(Leaks(), range(6), "leak"))
    assert sorted(item for item, _ in results) == [0, 1, 2, 4, 5]


def write_shards(folder: Path, order, cuts) -> None:
    """Pictures as Parquet files of other sizes and in another order; the last ten are copies."""
    files = [encode_jpeg(picture(n % 30, 96), 90 - n // 30) for n in range(40)]
    folder.mkdir()
    for number, rows in enumerate(np.split(order, cuts)):
        names = pa.array([f"http://a.example/{row}.jpg" for row in rows])
        columns = {"url": names, "image": pa.array([files[row] for row in rows])}
        pq.write_table(pa.table(columns), folder / f"{number}.parquet")


def test_run__content_does_not_depend_on_engine_workers_shards_or_their_order(engine, tmp_path):
    write_shards(tmp_path / "one", np.arange(40), [])
    order = np.random.default_rng(0).permutation(40)
    write_shards(tmp_path / "many", order, [3, 4, 25])
    runs = [
        ("one", 99, LocalEngine()),
        ("many", 7, LocalEngine(2)),
        ("one", 9, engine),
        ("many", 11, RayEngine(1)),
    ]
    found = set()
    for number, (source, rows, runner) in enumerate(runs):
        recipe = tmp_path / f"{number}.yaml"
        text = SHUFFLED.replace("IMAGES", str(tmp_path / source))
        recipe.write_text(text.replace("rows_per_shard: 99", f"rows_per_shard: {rows}"))
        manifest = manifest_of(recipe, tmp_path / f"{number}", runner, Silent()).manifest
        found.add((manifest.content_digest, manifest.num_rows))
    assert len(found) == 1
    assert 3 < found.pop()[1] < 40


def test_verb__an_address_where_no_ray_answers_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "1.jpg").write_bytes(encode_jpeg(picture(1)))
    words = ("ingest", "--images", tmp_path, "--out", tmp_path / "rows")
    line = fails(2, *words, "--address", "127.0.0.1:9")
    assert "no Ray answers at 127.0.0.1:9" in line
    monkeypatch.setenv("RAY_ADDRESS", "nowhere.invalid:6379")
    assert "no Ray answers at nowhere.invalid:6379" in fails(2, *words, "--engine", "ray")


# --- three nodes ----------------------------------------------------------------------------------


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args=_node(include_dashboard=False))
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def _node(**options):
    return {"num_cpus": 1, "object_store_memory": 80 << 20, **options}


@dataclass(frozen=True)
class WhereAmI(Task[int, None, str]):
    def __call__(self, item, opened):
        time.sleep(0.2)
        return ray.get_runtime_context().get_node_id()


@pytest.mark.slow
def test_map__nodes_that_join_are_used(cluster):
    engine = RayEngine(address=cluster.address)
    nodes = set()
    for number, (_, node) in enumerate(engine.map(WhereAmI(), range(100), "grow")):
        if number == 5:
            cluster.add_node(**_node())
        nodes.add(node)
    assert len(nodes) == 2
    assert (engine.workers, engine.workers_per_node) == (2, 1)


class Killer(Silent):
    """Kills a node when embed has finished a shard, another when near_dedup is at work."""

    def __init__(self, cluster, nodes, work):
        self._cluster, self._nodes, self._work = cluster, nodes, work
        self.killed = []

    def advanced(self, stage, receipt):
        if stage == "embed" and not self.killed:
            self._kill(stage)

    def started(self, stage, total, done):
        if stage == "near_dedup":
            threading.Thread(target=self._kill_at_work, daemon=True).start()

    def _kill_at_work(self):
        while not any(self._work.glob("work/pool/*near_dedup*/_scratch/**/*.json")):
            time.sleep(0.01)
        self._kill("near_dedup")

    def _kill(self, stage):
        self.killed.append(stage)
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)


def manifest_of(recipe, work: Path, engine, watcher) -> Dataset:
    work.mkdir()
    record = RecipeRun(load_recipe(str(recipe), {"work": str(work)}), str(work), engine, watcher)
    return Dataset.open(f"{work}/{record.run().manifest}")


def digest_of(recipe, work: Path, engine, watcher) -> str:
    return manifest_of(recipe, work, engine, watcher).manifest.content_digest


@pytest.mark.slow
def test_run__nodes_that_die_during_embed_and_near_dedup_change_nothing(cluster, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(96):
        data = encode_jpeg(picture(number % 80, 128), 90 - number // 2)
        (tmp_path / "images" / f"{number}.jpg").write_bytes(data)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("IMAGES", str(tmp_path / "images")))
    nodes = [cluster.add_node(**_node()) for _ in range(2)]
    work = tmp_path / "ray"
    killer = Killer(cluster, nodes, work)
    found = digest_of(recipe, work, RayEngine(address=cluster.address), killer)
    assert killer.killed == ["embed", "near_dedup"]
    assert found == digest_of(recipe, tmp_path / "local", LocalEngine(), Silent())
