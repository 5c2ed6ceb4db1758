"""One space of embeddings, whatever the driver has and whichever worker comes to a shard."""

import dataclasses
import os
import shutil
import sys
from dataclasses import dataclass

import pytest
import torch
from small_pictures import image_row, picture, pool_of

from curation.dataset import Dataset
from curation.errors import ConfigError, SpaceError
from curation.stage import StageFolder, StageInputs, Task
from curation.stages.embed import Embed
from embedder.checkpoint import save_backbone
from embedder.encoder import load_encoder
from embedder.encoders.torch_trunk import fastest_precision
from embedder.images import encode_jpeg
from embedder.vit import VisionTransformer, ViTConfig
from pipelines.cli.build import embed
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.previous_runs import PreviousRuns
from pipelines.run.recipe import load_recipe
from pipelines.run.run_record import read_run
from pipelines.run.runner import RecipeRun
from pipelines.run.settling import Settling
from pipelines.run.stage_runner import Silent, run_stage
from tests.pipelines.commands import Here

PLAIN_CPU = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
"""Has oneDNN, and so torch, do without the instructions for bfloat16: it is slower then."""
needs_bfloat16 = pytest.mark.skipif(
    fastest_precision("cpu") != "bfloat16", reason="this CPU has one kind of precision only"
)
RECIPE = """
name: small
rows_per_shard: 3
sets: {}
pool:
  - ingest: {images: "IMAGES"}
  - canonicalize
  - embed: {encoders: {copy: lite-copy}}
  - near_dedup: {embeddings: copy, max_component_share: 1.0}
  - select: {embeddings: copy}
"""


@dataclass(frozen=True)
class Process(Task[None, None, int]):
    def __call__(self, item, opened):
        return os.getpid()


@pytest.fixture
def become_plain(monkeypatch):
    """Makes this process take its CPU for a plainer one; oneDNN itself has looked before."""
    load_encoder("lite-copy", precision="bfloat16").trunk.run_empty(1)
    return lambda: [monkeypatch.setenv(*one) for one in PLAIN_CPU.items()]


@pytest.fixture
def apart(become_plain):
    """Two workers, and a driver whose CPU multiplies otherwise."""
    engine = LocalEngine(2, attempts=2, first_pause_s=0.01)
    assert len({process for _, process in engine.everywhere(Process(), "start")}) == 2
    become_plain()
    return engine


def settled(engine, folder, stage=None):
    stage = stage or Embed(encoders={"copy": "lite-copy"})
    return Settling(engine, f"{folder}/settled.json").settle(stage)


def run(recipe, work, engine, base=None):
    work.mkdir(exist_ok=True)
    checked = load_recipe(str(recipe), {"work": str(work)})
    RecipeRun(checked, str(work), engine, Silent(), base).run()
    return read_run(str(work))


def write_recipe(folder, name="images"):
    (folder / name).mkdir()
    for number in range(9):
        (folder / name / f"{name}-{number}.jpg").write_bytes(encode_jpeg(picture(number)))
    (folder / f"{name}.yaml").write_text(RECIPE.replace("IMAGES", str(folder / name)))
    return folder / f"{name}.yaml"


def embeddings_of(work, record):
    (entry,) = (one for one in record.pool if one.stage == "embed")
    return Dataset.open(f"{work}/{entry.folder}/copy"), entry


def test_everywhere__each_worker_runs_once(tmp_path):
    for number in (1, 3):
        found = LocalEngine(number).everywhere(Process(), "look")
        assert len({process for _, process in found}) == len(dict(found)) == number


@needs_bfloat16
def test_settle__the_space_is_that_of_the_workers_not_of_the_driver(apart, tmp_path):
    assert load_encoder("lite-copy").precision == "float32"
    stage = settled(apart, tmp_path)
    assert stage.precision == "bfloat16"
    assert '"precision":"bfloat16"' in stage.model_dump_json()
    assert stage.attributes()["copy"]["precision"] == "bfloat16"
    assert stage.fingerprint() == load_encoder("lite-copy", precision="bfloat16").space
    assert settled(LocalEngine(), tmp_path / "other").precision == "float32"


@needs_bfloat16
def test_run__one_that_goes_on_elsewhere_embeds_nothing_again(become_plain, tmp_path):
    recipe, work = write_recipe(tmp_path), tmp_path / "work"
    first, entry = embeddings_of(work, run(recipe, work, LocalEngine()))
    assert (first.attributes["precision"], entry.record.settings["precision"]) == ("bfloat16",) * 2
    (work / "run.json").unlink()
    shutil.rmtree(next((work / "work" / "pool").glob("*near_dedup*")))
    become_plain()
    second, again = embeddings_of(work, run(recipe, work, LocalEngine()))
    assert (again.folder, again.record) == (entry.folder, entry.record)
    assert second == first


@needs_bfloat16
def test_run__with_a_base_takes_its_precision(become_plain, tmp_path):
    run(write_recipe(tmp_path), tmp_path / "base", LocalEngine())
    recipe = write_recipe(tmp_path, "more")
    become_plain()
    base = PreviousRuns.open(str(tmp_path / "base"))
    record = run(recipe, tmp_path / "next", LocalEngine(), base)
    assert embeddings_of(tmp_path / "next", record)[0].attributes["precision"] == "bfloat16"
    assert record.pool[3].record.dropped == {"near_duplicate": 9}


def backbone(path, seed):
    torch.manual_seed(seed)
    config = ViTConfig(width=16, depth=1, heads=2, patch=14, image_size=28)
    save_backbone(VisionTransformer(config), path)
    return Embed(encoders={"copy": f"dinov2:{path}"}, precision="float32")


@pytest.mark.parametrize("workers", [1, 2])
def test_open__a_worker_with_other_weights_is_refused_in_one_line(tmp_path, workers):
    stage = backbone(tmp_path / "b.safetensors", 0).informed(LocalEngine())
    other = backbone(tmp_path / "c.safetensors", 1).informed(LocalEngine())
    expected = dataclasses.replace(other.facts()["copy"], name=stage.facts()["copy"].name)
    pool = pool_of(tmp_path / "rows", [image_row(n) for n in range(4)])
    folder = StageFolder(str(tmp_path / "out"), "embed")
    held = stage.knowing({"copy": expected})
    with pytest.raises(SpaceError, match=r"\(cpu\): 'dinov2:.*weights .* in place of ") as error:
        run_stage(held, StageInputs(pool), folder, LocalEngine(workers), Silent())
    assert "\n" not in str(error.value)
    assert "precision" not in str(error.value)


def test_facts__of_the_same_precision_are_those_before_it_was_a_setting():
    """Embeddings that were made before stay comparable: the digest is over the same values."""
    stage = Embed(encoders={"semantic": "lite-semantic"}, precision="float32")
    assert stage.fingerprint() == load_encoder("lite-semantic", precision="float32").space
    assert stage.fingerprint() == "d133faa56c7801652463080460a2eeb7"


@needs_bfloat16
@pytest.mark.parametrize("recorded", [True, False], ids=["new", "before it was recorded"])
def test_embed__like_takes_the_precision_of_what_is_there(become_plain, tmp_path, recorded):
    pool_of(tmp_path / "rows", [image_row(n) for n in range(3)])
    rows, one = str(tmp_path / "rows"), str(tmp_path / "one")
    embed(rows, one, "lite-copy", engine=Here())
    first = Dataset.open(str(tmp_path / "one"))
    if not recorded:
        manifest = tmp_path / "one" / "_manifest.json"
        manifest.write_text(manifest.read_text().replace('"precision": "bfloat16",', ""))
    become_plain()
    embed(rows, str(tmp_path / "two"), like=one, engine=Here())
    second = Dataset.open(str(tmp_path / "two"))
    assert second.attributes["space"] == first.attributes["space"]
    changes = ["precision=float32"]
    with pytest.raises(SpaceError, match=r"is in space .* gives .* here \(float32\)"):
        embed(rows, str(tmp_path / "three"), like=one, changes=changes, engine=Here())


# --- two nodes ------------------------------------------------------------------------------------


@pytest.fixture
def two_kinds():
    """A cluster of two nodes on loopback, one of them with a plainer CPU."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.shutdown()
    head = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20, env_vars=dict(PLAIN_CPU))
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@needs_bfloat16
@pytest.mark.slow
def test_settle__nodes_of_two_kinds_are_refused_or_held_to_one(two_kinds, tmp_path):
    from pipelines.engines.ray_engine import RayEngine

    engine = RayEngine(address=two_kinds.address)
    words = r"precision auto is bfloat16 on .* \(.*\); float32 on .* \(.*\); set `precision`"
    with pytest.raises(ConfigError, match=words):
        settled(engine, tmp_path)
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("copy: lite-copy}", "copy: lite-copy}, PRECISION"))
    recipe.write_text(recipe.read_text().replace("PRECISION", "precision: float32"))
    here, _ = embeddings_of(tmp_path / "here", run(recipe, tmp_path / "here", LocalEngine()))
    there, _ = embeddings_of(tmp_path / "there", run(recipe, tmp_path / "there", engine))
    assert here.attributes == there.attributes
    stage = Embed(encoders={"copy": "lite-copy"}, precision="float32")
    facts = stage.informed(engine).facts()["copy"]
    held = stage.knowing({"copy": dataclasses.replace(facts, space="", parts=(("head", "old"),))})
    pool = pool_of(tmp_path / "rows", [image_row(n) for n in range(4)])
    folder = StageFolder(str(tmp_path / "out"), "embed")
    with pytest.raises(
        SpaceError, match=r"'lite-copy' embeds into another space .*in place of old"
    ):
        run_stage(held, StageInputs(pool), folder, engine, Silent())
