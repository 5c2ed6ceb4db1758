import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from curation.dataset import Dataset
from curation.errors import ConfigError
from embedder.images import encode_jpeg, resize
from pipelines.audit import forget as forgetting
from pipelines.audit.explain import explain
from pipelines.audit.forget import JOURNAL, forget
from pipelines.audit.seal import write_seal
from pipelines.audit.verify import verify
from pipelines.cli import audit
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.run_record import read_run
from pipelines.run.whole_run import run_recipe
from pipelines.web.report.page import write_page
from pipelines.web.serving.catalog_file import catalog_of
from tests.pipelines.audit.test_explain import id_of
from tests.pipelines.audited_run import copied_run, finished_run, picture, write_files


def defects(work):
    return [defect for one in verify(str(work)) for defect in one.defects]


def ids_everywhere(work):
    """Every id that some table or tar still holds as a row of its own."""
    found = set()
    for path in work.rglob("_manifest.json"):
        dataset = Dataset.open(str(path.parent))
        if "id" in dataset.columns and all(
            (path.parent / shard.name).exists() for shard in dataset.manifest.shards
        ):
            found |= set(dataset.read(["id"])["id"].to_pylist())
    for path in work.rglob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {name.rpartition(".")[0] for name in tar.getnames()}
    return found


@pytest.fixture
def work(tmp_path):
    copy = copied_run(tmp_path)
    write_seal(str(copy), read_run(str(copy)))
    return copy


def kept_id():
    rows = Dataset.open(str(finished_run() / "manifest")).read(["id", "source_set"]).to_pylist()
    return next(row["id"] for row in rows if row["source_set"] == "web")


def test_forget__row_is_gone_from_everywhere_and_accounts_hold(work):
    gone = [kept_id(), id_of("edited.jpg"), id_of("1.jpg", "taken"), id_of("2.jpg", "bench")]
    before = ids_everywhere(work)
    done = forget(str(work), "ids", gone)
    assert {row["id"] for row in done.rows} == set(gone)
    assert ids_everywhere(work) == before - set(gone)
    assert defects(work) == []
    assert Dataset.open(str(work / "manifest")).num_rows == 15
    assert done.content_digest == Dataset.open(str(work / "manifest")).manifest.content_digest
    assert not (work / JOURNAL).exists()


def test_forget__others_are_still_where_the_index_says(work):
    forget(str(work), "ids", [kept_id()])
    for row in Dataset.open(str(work / "manifest")).read(["id", "source_set"]).to_pylist():
        flow = "pool" if row["source_set"] == "web" else row["source_set"]
        (life,) = [one for one in explain(row["id"], str(work)) if one["flow"] == flow]
        with open(life["packed"]["file"], "rb") as tar:  # noqa: PTH123
            tar.seek(life["packed"]["offset"])
            assert tar.read(2) == b"\xff\xd8"


def test_forget__near_takes_copies_too(work):
    done = forget(str(work), "urls", ["01.jpg", "copy.jpg"], near=True)
    wanted = {id_of(name) for name in ("01.jpg", "edited.jpg", "00.jpg", "copy.jpg")}
    assert {row["id"] for row in done.rows} == wanted
    assert not wanted & ids_everywhere(work)
    assert defects(work) == []


def test_forget__by_hash_finds_all_equal_files(work):
    images = Dataset.open(str(next((work / "work" / "pool").glob("02-*")) / "images"))
    rows = images.read(["id", "sha256"]).to_pylist()
    sha256 = next(row["sha256"] for row in rows if row["id"] == id_of("copy.jpg"))
    done = forget(str(work), "hashes", [sha256.upper()])
    assert {row["id"] for row in done.rows} == {id_of("copy.jpg"), id_of("00.jpg")}
    assert defects(work) == []
    assert (work / "forgotten" / "sha256.txt").read_text() == sha256 + "\n"


def test_forget__tombstones_add_up_and_unknown_is_told(work):
    forget(str(work), "ids", [id_of("03.jpg")])
    done = forget(str(work), "ids", [id_of("04.jpg"), "f" * 32])
    assert done.not_found == ["f" * 32]
    listed = (work / "forgotten" / "ids.txt").read_text().split()
    assert listed == sorted([id_of("03.jpg"), id_of("04.jpg")])
    assert forget(str(work), "ids", [id_of("03.jpg")]).rows == []


@pytest.mark.parametrize("step", ["_forget_in_tars", "_write_run", "_write_tombstones", "_add_up"])
def test_forget__killed_and_run_again(work, monkeypatch, step):
    gone = kept_id()

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(forgetting, step, killed)
        with pytest.raises(KeyboardInterrupt):
            forget(str(work), "ids", [gone])
    forget(str(work), "ids", [gone])
    assert gone not in ids_everywhere(work)
    assert defects(work) == []


def test_forget__report_is_written_anew_and_checkpoints_are_listed(work):
    write_page(str(work), str(work / "report.html"))
    (work / "pretrain").mkdir()
    (work / "pretrain" / "backbone.safetensors").touch()
    gone = kept_id()
    assert gone in (work / "report.html").read_text()
    done = forget(str(work), "ids", [gone])
    assert gone not in (work / "report.html").read_text()
    assert done.checkpoints == [str(work / "pretrain" / "backbone.safetensors")]


def test_forget__command(work, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(kept_id() + "\n\n")
    ids = str(tmp_path / "list.txt")
    audit.forget(str(work), ids)
    assert "content digest now" in capsys.readouterr().out
    audit.forget(str(work), ids, json=True)
    assert json.loads(capsys.readouterr().out)["rows"] == []
    with pytest.raises(ConfigError, match="give one of"):
        audit.forget(str(work))
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(ConfigError, match="names nothing"):
        audit.forget(str(work), ids)


def test_forget__sorted_lists_of_the_server_go_too(work):
    file = Path(catalog_of(str(work)))
    assert defects(work) == []
    forget(str(work), "ids", [id_of("03.jpg")])
    assert not file.exists()


LATER = """
name: later
pool:
  - ingest: {images: "${images}"}
  - canonicalize
  - exact_dedup
  - select
"""


def build(folder, work, base=None):
    """`curate run` in this process; reasons of the pool's dropped rows, and the sources kept."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(LATER.replace("${images}", str(folder / "images")))
    run_recipe(str(recipe), str(work), LocalEngine(), base=base and str(base), quiet=True)
    record = read_run(str(work))
    fallen = {reason for entry in record.pool for reason in entry.record.dropped}
    kept = Dataset.open(str(work / "manifest")).read(["source"])["source"].to_pylist()
    return fallen, {source.rpartition("/")[2] for source in kept}


def test_forget__later_builds_keep_it_out(tmp_path):
    """In the same work folder and in one with it as a base: by id, by bytes, by look."""
    rng = np.random.default_rng(5)
    pixels = [picture(rng) for _ in range(4)]
    files = {f"{n}.jpg": encode_jpeg(one) for n, one in enumerate(pixels)}
    write_files(tmp_path / "images", files)
    first = tmp_path / "first"
    assert build(tmp_path, first)[1] == {"0.jpg", "1.jpg", "2.jpg", "3.jpg"}
    forget(str(first), "ids", [id_of("0.jpg")])
    assert build(tmp_path, first) == (set(), {"1.jpg", "2.jpg", "3.jpg"})  # nothing to do
    (tmp_path / "images" / "elsewhere.jpg").write_bytes(files["0.jpg"])
    (tmp_path / "images" / "smaller.jpg").write_bytes(encode_jpeg(resize(pixels[0], 80, 80), 70))
    (tmp_path / "images" / "new.jpg").write_bytes(encode_jpeg(picture(rng)))
    based = build(tmp_path, tmp_path / "second", first)
    assert based == ({"forgotten", "blocklist:forgotten", "in_base"}, {"new.jpg"})
    again = build(tmp_path, first)
    expected = {"1.jpg", "2.jpg", "3.jpg", "new.jpg"}
    assert again == ({"forgotten", "blocklist:forgotten"}, expected)
    assert defects(first) == defects(tmp_path / "second") == []
