import json
import sys
from dataclasses import replace

import pytest
import typer
from small_pictures import picture
from test_settling import PLAIN_CPU, needs_bfloat16

from curation.errors import StageError
from embedder.images import encode_jpeg
from pipelines.cli import operate
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.preflight import NodeFacts, Preflight, preflight
from pipelines.run.recipe import load_recipe
from pipelines.run.whole_run import run_recipe
from tests.pipelines.commands import Here

RECIPE = """
name: small
sets: {}
pool:
  - ingest: {images: "IMAGES"}
  - canonicalize: {blocklists: {sha256: {bad: "LIST"}}}
  - embed: {encoders: {copy: lite-copy}}
  - near_dedup: {embeddings: copy, max_component_share: 1.0}
  - select: {embeddings: copy}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(encode_jpeg(picture(1)))
    (tmp_path / "bad.txt").write_text("")
    text = RECIPE.replace("IMAGES", str(tmp_path / "images"))
    (tmp_path / "r.yaml").write_text(text.replace("LIST", str(tmp_path / "bad.txt")))
    return tmp_path / "r.yaml"


def checked_of(recipe, work):
    return load_recipe(str(recipe), {"work": str(work)})


def test_preflight__workers_that_are_alike_pass_and_leave_nothing(recipe, tmp_path):
    work = tmp_path / "work"
    found = preflight(checked_of(recipe, work), str(work), LocalEngine(2), None)
    assert (found.refusals, found.warnings, found.differences) == ([], [], [])
    first, second, driver = found.nodes.values()
    assert first == second
    assert not work.exists()
    facts = first.facts
    assert {"space of copy (lite-copy)", "version of torch"} <= set(facts)
    pixels = {name: value for name, value in facts.items() if name.startswith("pixels of ")}
    assert len(pixels) == 7
    assert pixels["pixels of jpeg"] == pixels["pixels of jpeg, progressive"]
    assert len(set(pixels.values())) == 6  # profiles and turns are seen
    assert set(driver.facts) == {f"path {tmp_path}/images", f"path {tmp_path}/bad.txt"}


def test_preflight__what_is_missing_or_broken_is_one_line_with_its_nodes(recipe, tmp_path, capsys):
    (tmp_path / "bad.txt").write_text("no hash\n")
    (tmp_path / "images" / "1.jpg").unlink()
    (tmp_path / "images").rmdir()
    words = (str(recipe), str(tmp_path / "work"), Here())
    with pytest.raises(typer.Exit):
        operate.preflight(*words, json=True)
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    missing, broken = found["refusals"]
    assert missing.startswith(f"{tmp_path}/images is missing (on ")
    assert broken.startswith("stage canonicalize does not open: ConfigError: ")
    with pytest.raises(typer.Exit):
        operate.preflight(*words)
    assert capsys.readouterr().out.count("REFUSED ") == 2


def test_print_preflight__a_table_of_what_is_everywhere(recipe, tmp_path, capsys):
    operate.preflight(str(recipe), str(tmp_path / "work"), Here())
    out = capsys.readouterr().out
    assert "space of copy" in out
    assert "may run on 1 nodes" in out


def test_differences__pixels_refuse_versions_warn():
    facts = {"pixels of webp": "a", "version of pillow": "12", "vectors of copy": "v"}
    nodes = {name: NodeFacts(facts) for name in ("a", "b")}
    nodes["c"] = NodeFacts({**facts, "version of pillow": "13", "vectors of copy": "w"})
    found = Preflight(nodes)
    assert found.refusals == []
    assert found.warnings == [
        "version of pillow: 12 on a, b; 13 on c",
        "vectors of copy: v on a, b; w on c",
    ]
    nodes["c"] = replace(nodes["c"], facts={**facts, "pixels of webp": "b"}, problems=("no disk",))
    nodes["d"] = NodeFacts(facts, ("no disk",))
    assert Preflight(nodes).refusals == [
        "no disk (on c, d)",
        "pixels of webp: a on a, b, d; b on c",
    ]


# --- two nodes ------------------------------------------------------------------------------------


@pytest.fixture
def unlike(tmp_path):
    """Two nodes on loopback: the second has a plainer CPU and another timm."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.shutdown()
    package = tmp_path / "packages" / "timm-0.0.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n")
    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    env = {**PLAIN_CPU, "PYTHONPATH": str(package.parent)}
    cluster.add_node(**node, env_vars=env)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@needs_bfloat16
@pytest.mark.slow
def test_preflight__nodes_that_differ_are_named(unlike, recipe, tmp_path):
    from pipelines.engines.ray_engine import RayEngine

    engine = RayEngine(address=unlike.address)
    found = preflight(checked_of(recipe, tmp_path / "w"), str(tmp_path / "w"), engine, None)
    first, second, _ = found.nodes
    precision = f"precision of copy (lite-copy): bfloat16 on {first}; float32 on {second}"
    assert precision in found.refusals
    (timm,) = (line for line in found.warnings if line.startswith("version of timm"))
    assert timm.endswith(f"0.0.1 on {second}")
    recipe.write_text(recipe.read_text().replace("lite-copy}", "lite-copy}, precision: float32"))
    found = preflight(checked_of(recipe, tmp_path / "w"), str(tmp_path / "w"), engine, None)
    assert found.refusals == []
    assert timm in found.warnings
    found = preflight(checked_of(recipe, "memory://w"), "memory://w", engine, None)
    other = "the work folder memory://w is another folder here than the driver's"
    assert found.refusals == [f"{other} (on {first}, {second})"]  # each process has its own
    with pytest.raises(StageError, match=r"the work folder memory://w is another folder .* \(on "):
        run_recipe(str(recipe), "memory://w", engine, quiet=True)
