"""Small files of a run that were damaged or made up: one line, never a traceback."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from curation.dataset import Dataset
from curation.errors import ConfigError, DatasetError
from pipelines.audit.seal import write_seal
from pipelines.cli.app import main
from pipelines.operate.status import status_of
from pipelines.run.run_record import read_run
from tests.pipelines.audited_run import copied_run

ODD = [None, True, -1, 10**30, 1.5, "", "../..", "/etc", "x" * 300, "[/red]\x1b", [], [None], {}]


def ends(capsys, *words) -> int:
    """Run a verb; give its exit status, when it ended with at most one line of error."""
    with patch.object(sys, "argv", ["curate", *words]), pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err.splitlines()
    assert len(said) <= 1, said
    return int(ended.value.code or 0)


def mutated(value, rng):
    """The same JSON with one value, somewhere, another."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[rng.integers(len(keys))]
        changed = value.copy()
        if rng.random() < 0.1:
            del changed[key]
        else:
            changed[key] = mutated(value[key], rng)
        return changed
    return ODD[rng.integers(len(ODD))]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    run = copied_run(tmp_path_factory.mktemp("damaged"))
    write_seal(str(run), read_run(str(run)))
    return run


@pytest.mark.parametrize("seed", range(6))
def test_audit_verbs__mutated_records(seed, work, capsys):
    rng = np.random.default_rng(seed)
    files = (p for p in work.rglob("*.json") if "certificate" not in p.parts)  # of another test
    small = sorted(p for p in files if p.stat().st_size)
    favored = [p for p in small if p.name in ("run.json", "_stage.json", "_manifest.json")]
    for number in range(6):
        file = (work / "run.json", favored[rng.integers(len(favored))])[number % 2]
        before = file.read_bytes()
        file.write_text(json.dumps(mutated(json.loads(before), rng), indent=1) + "\n")
        verbs = [
            ("stats", str(work)),
            ("sql", str(work), "select count(*) from decisions"),
            ("explain", "00.jpg", "--work", str(work)),
            ("status", str(work)),
        ]
        for words in verbs:
            ends(capsys, *words)
        assert ends(capsys, "verify", str(work)) == 1, f"{file} {file.read_text()[:200]}"
        if number == 0:
            ends(capsys, "report", str(work), "--out", str(work / "page.html"))
            ends(capsys, "card", str(work), "--out", str(work / "card"))
        file.write_bytes(before)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x.parquet", "..", "", "a\0b"])
def test_open__shards_lie_in_their_folder(name, tmp_path):
    folder = copied_run(tmp_path) / "manifest"
    manifest = json.loads((folder / "_manifest.json").read_text())
    manifest["shards"][0]["name"] = name
    (folder / "_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="shards lie below the folder of their manifest"):
        Dataset.open(str(folder))


@pytest.mark.parametrize("folder", ["../elsewhere", "/etc", "work/../..", ""])
def test_read_run__folders_lie_below_the_work_folder(folder, tmp_path):
    work = copied_run(tmp_path)
    record = json.loads((work / "run.json").read_text())
    record["manifest"] = folder
    (work / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="a folder below the work folder is wanted"):
        read_run(str(work))


GARBAGE = [
    b"\xff\xfe\x00garbage\n",
    b"[1, 2]\n",
    b'{"time": "late", "event": "shard"}\n',
    b'{"event": "run_finished"}\n',
    b'{"time": 1e999, "event": "shard", "rows_in": 1}\n',
    b'{"time": 5.0, "event": "stage_started", "stage": 7, "total": "x"}\n',
    b"[" * 5000 + b"\n",
]
SOUND = b'{"time": 1.0, "event": "run_started", "recipe": "r"}\n'


@pytest.mark.parametrize("garbage", GARBAGE)
def test_status_of__garbage_among_events(garbage, tmp_path):
    (tmp_path / "events").mkdir()
    file = tmp_path / "events" / "1.jsonl"
    file.write_bytes(SOUND + garbage + b'{"time": 2.0, "event": "shard", "rows_in": 3}\n{"ti')
    found = status_of(str(tmp_path), now=3.0)
    assert (found.state, found.rows, found.unreadable_events) == ("running", 3, 1)
    file.write_bytes(garbage)
    with pytest.raises(DatasetError, match="none of the 1 lines of its events can be read"):
        status_of(str(tmp_path))


def test_clean__garbage_among_events(work, capsys):
    (work / "events").mkdir(exist_ok=True)
    (work / "events" / "1.jsonl").write_bytes(SOUND + b"".join(GARBAGE))
    assert ends(capsys, "clean", str(work), "--dry-run") == 0
    assert ends(capsys, "status", str(work)) == 0


def test_status_of__nothing(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DatasetError, match="start one with `curate run RECIPE"):
            status_of(str(path))


def test_run__events_that_cannot_be_written(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: r\npool:\n  - ingest: {{images: {tmp_path}/images}}\n")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "events").write_text("a file")
    assert ends(capsys, "run", str(recipe), "--work", str(tmp_path / "w"), "--json") in (1, 2)
