"""Folders whose names mean something to a shell, to SQL or to a URL are folders like any other."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from curation import storage
from curation.errors import ConfigError
from pipelines.audit.diff import diff
from pipelines.audit.explain import explain
from pipelines.audit.sql import ask
from pipelines.audit.stats import count_by_column, stats_of
from pipelines.audit.tables import plain
from pipelines.audit.verify import verify
from pipelines.audit.verify_dataset import prove_shard
from pipelines.audit.work_folder import WorkFolder
from pipelines.web.report.page import render
from pipelines.web.serving.catalog import Catalog, Filter
from pipelines.web.serving.catalog_file import catalog_of
from tests.pipelines.audited_run import finished_run

PLAIN = "run1"
NAMES = [
    "run[1]",
    "run*",
    "run?",
    "[!x]un1",
    "a b",
    'it\'s "one"',
    "a%20b",
    "#1",
    "ünï",
    "k=v",
    "~x",
    "-x",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The same run under every name, side by side."""
    parent = tmp_path_factory.mktemp("runs")
    for name in (PLAIN, *NAMES):
        shutil.copytree(finished_run(), parent / name)
    return parent


def answers(work: str, catalog_file: Path) -> dict[str, object]:
    """What auditors hear of a run."""
    first = ask(work, "select id from manifest order by id", 1).rows[0]["id"]
    with Catalog(catalog_of(work, str(catalog_file))) as catalog:
        images = [catalog.size(), catalog.page(Filter()).total, catalog.values("stage")]
    shard = WorkFolder(work).manifest.manifest.shards[0].name
    return {
        "stats": stats_of(work),
        "of its manifest": stats_of(f"{work}/manifest"),
        "by": count_by_column(work, "host"),
        "sql": ask(
            work,
            "select flow, stage, reason, count(*) from decisions group by all order by all",
            99,
        ).rows,
        "life": explain(first, work),
        "verify": [vars(one) for one in verify(work)],
        "proof": vars(prove_shard(f"{work}/manifest", shard)),
        "diff": diff(work, work),
        "catalog": images,
    }


def without(work: str, found: dict[str, object]) -> str:
    return json.dumps(plain(found), sort_keys=True).replace(json.dumps(work)[1:-1], "WORK")


@pytest.mark.parametrize("name", NAMES)
def test_audit__a_folder_of_any_name(name, runs, tmp_path):
    wanted = answers(str(runs / PLAIN), tmp_path / "wanted")
    work = str(runs / name)
    assert without(work, answers(work, tmp_path / "found")) == without(str(runs / PLAIN), wanted)


def test_catalog_of__a_folder_whose_name_duckdb_takes_apart(runs):
    with pytest.raises(ConfigError, match="--catalog FILE"):
        catalog_of(str(runs / "run?"))
    (runs / "run?" / "_catalog.duckdb").touch()  # of a folder that was renamed
    with pytest.raises(ConfigError, match="--catalog FILE"):
        catalog_of(str(runs / "run?"))
    with Catalog(catalog_of(str(runs / "run[1]"))) as catalog:
        assert catalog.size() == 40


def test_audit__relative_and_odd(runs, monkeypatch):
    monkeypatch.chdir(runs)
    for name in ("run[1]", "~x", "-x"):
        assert ask(name, "select count(*) as n from manifest", 1).rows == [{"n": 17}]


def test_render__a_folder_of_any_name(runs):
    wanted = render(WorkFolder(str(runs / PLAIN))).replace(str(runs / PLAIN), "WORK")
    assert render(WorkFolder(str(runs / "run[1]"))).replace(str(runs / "run[1]"), "WORK") == wanted


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?"])
def test_remove__takes_no_neighbor_of_an_object_store(name):
    root = f"memory://remove-{len(name)}"
    for folder in (PLAIN, name):
        storage.write_bytes(f"{root}/{folder}/work/a", b"x")
    storage.remove(f"{root}/{name}")
    assert storage.list_folders(root) == [PLAIN]


def test_ask__object_store(runs):
    store = fsspec.filesystem("memory")
    for name in (PLAIN, "run[1]"):
        store.put(str(runs / name), f"/asked/{name}", recursive=True)
    found = ask("memory://asked/run[1]", "select count(*) as n from manifest", 1).rows
    assert found == [{"n": 17}]
