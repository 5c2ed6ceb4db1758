"""Texts from strangers in the terminal: shown as they are, and obeyed by nothing."""

import contextlib
import json
import logging
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.ledger import Receipt, StageRecord
from curation.schema import make_id
from pipelines.audit.funnel import FunnelRow
from pipelines.cli.app import main
from pipelines.operate import console
from tests.pipelines.audited_run import HOSTILE, finished_run

NASTY = (
    "[red]cc[/red][/b] :smile: \x1b[31m\x07\r\n\t\x9b2J\u202egpj.exe\u2066\u200b\u2028\x00[link=x]"
)
SHOWN = (
    r"[red]cc[/red][/b] :smile: \x1b[31m\x07\r\n\t\x9b2J\u202egpj.exe\u2066\u200b\u2028\x00[link=x]"
)
OBEYED = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What no line may hold, apart from its end."""


def unwrapped(text: str) -> str:
    """A table's text without its lines and folds."""
    return re.sub(r"[\s\u2500-\u257f]", "", text)


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


@pytest.mark.parametrize(
    "print_it",
    [
        lambda: console.print_rows((NASTY, "n"), [(NASTY, 1), ([NASTY], 2.5)], NASTY),
        lambda: console.print_pairs({NASTY: NASTY, "lines": [NASTY, 3]}, title=NASTY),
        lambda: console.print_line(NASTY),
        lambda: console.print_funnel(
            [FunnelRow("pool", NASTY, 3, 1, {f"leak:{NASTY}": 2}, 2)], title=NASTY
        ),
        lambda: console.print_marks({NASTY: {"planted": 2, "caught": 1}}),
    ],
)
def test_print__hostile_texts_as_they_are(print_it, capsys, wide):
    print_it()
    shown = capsys.readouterr().out
    assert not OBEYED.search(shown)
    assert unwrapped(SHOWN) in unwrapped(shown)


def test_print_error__one_line(capsys):
    console.print_error(f"{NASTY}: no such file")
    shown = capsys.readouterr().err
    assert shown.startswith("curate: [red]cc[/red][/b] :smile: \\x1b[31m")
    assert shown.count("\n") == 1
    assert not OBEYED.search(shown)


def test_print_json__stays_json(capsys):
    value = {NASTY: [NASTY, float("nan"), float("-inf"), b"\xff", "\udc80"], "n": {1: (2, 3)}}
    console.print_json(value)
    shown = capsys.readouterr().out

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(shown, parse_constant=refuse)
    assert found[NASTY] == [NASTY, None, None, "b'\\xff'", "\udc80"]
    assert found["n"] == {"1": [2, 3]}
    assert not OBEYED.search(shown)


@pytest.mark.parametrize(
    "text", ["", "naïve café", "写真 一覧", "a\u3000b\xa0c", "🦆", "\\x1b[31m"]
)
def test_visible__leaves_texts_alone(text):
    assert console.visible(text) == text


def test_log_lines__hostile_texts(capsys):
    with patch.object(logging.root, "handlers", []):
        console.set_up_logging(False)
        try:
            raise ValueError(NASTY)
        except ValueError:
            logging.getLogger("curation").warning("left out: %s", NASTY, exc_info=True)
    shown = capsys.readouterr().err
    assert SHOWN in shown.splitlines()[0]
    assert not OBEYED.search(shown)


def watch_hostile_names() -> None:
    """What a terminal is sent while stages and training with hostile names go on."""
    watcher = console.ConsoleWatcher()
    watcher.started(NASTY, 2, 0)
    for index in range(2):
        watcher.advanced(NASTY, Receipt(index=index, rows_in=1, rows_out=1, dropped={}, outputs={}))
    record = StageRecord(
        stage=NASTY,
        version=1,
        key="",
        settings={},
        rows_in=2,
        rows_out=1,
        dropped={f"leak:{NASTY}": 1},
        outputs={},
    )
    watcher.finished(NASTY, record, False)
    training = console.TrainingWatcher(2)
    training({"step": 1, "loss": 0.5})
    training.close()


def test_watchers__hostile_stages_on_a_terminal():
    driver, terminal = pty.openpty()
    code = "from tests.pipelines.operate.test_console import watch_hostile_names as w; w()"
    environment = {
        **os.environ,
        "COLUMNS": "400",
        "TERM": "dumb",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    child = subprocess.Popen([sys.executable, "-c", code], stderr=terminal, env=environment)
    os.close(terminal)
    sent = b""
    with contextlib.suppress(OSError):  # a closed terminal says EIO
        while block := os.read(driver, 1 << 16):
            sent += block
    os.close(driver)
    assert child.wait() == 0
    shown = sent.decode()
    assert unwrapped(SHOWN) in unwrapped(shown)
    assert "\u202e" not in shown
    assert "\x1b[31m" not in shown


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory) -> Path:
    """A finished run whose folder, and one of whose files, has a hostile name."""
    parent = tmp_path_factory.mktemp("runs")
    return Path(shutil.copytree(finished_run(), parent / NASTY.replace("\x00", "")))


@pytest.fixture(scope="module")
def hostile_rows(tmp_path_factory) -> Path:
    """Foreign Parquet with hostile texts in every column, and in a column's name."""
    path = tmp_path_factory.mktemp("foreign") / "rows.parquet"
    texts = [f"{NASTY}{number % 2}" for number in range(8)]
    columns = dict.fromkeys(("source", "alt", "source_set", "license", NASTY), texts)
    pq.write_table(pa.table({"id": [make_id(str(n)) for n in range(8)], **columns}), path)
    return path


VERBS = [
    ("stats", "RUN"),
    ("stats", "RUN", "--by", "source"),
    ("stats", "RUN", "--by", NASTY.replace("\x00", "")),
    ("stats", "ROWS"),
    ("stats", "ROWS", "--by", "alt"),
    ("stats", "ROWS", "--by", "host"),
    ("sql", "RUN"),
    ("sql", "RUN", 'select source, 1 as "[/red]\x1b" from rows order by source'),
    ("sql", "RUN", "selec [/red]\x1b[31m"),
    ("explain", HOSTILE, "--work", "RUN"),
    ("explain", "[/red]\x1b[31m\u202e", "--work", "RUN"),
    ("verify", "RUN"),
    ("verify", "ROWS"),
    ("verify", "RUN/manifest", "--shard", "[/red]\x1b[31m"),
    ("diff", "RUN", "RUN"),
    ("status", "RUN"),
    ("clean", "RUN", "--dry-run"),
    ("report", "RUN", "--out", "RUN/page.html"),
    ("card", "RUN", "--out", "RUN/card"),
    ("forget", "RUN", "--ids", "RUN/names.txt"),
    ("dedup", "ROWS", "--out", "RUN/verdicts"),
    ("run", "RUN/recipe.yaml", "--work", "RUN"),
    ("run", "[/red]\x1b[31m\u202e", "--work", "RUN"),
    ("serve", "RUN", "--port", "[/red]\x1b[31m\u202e"),
    ("[/red]\x1b[31m\u202e",),
    ("status", "--[/red]\x1b[31m\u202e"),
]


@pytest.mark.parametrize(
    "words", VERBS, ids=lambda words: words[0].encode("unicode_escape").decode()
)
def test_every_verb__hostile_names(words, hostile_run, hostile_rows, capsys):
    (hostile_run / "names.txt").write_text(f"{NASTY}\n[/red]\x1b[31m\n")
    given = [w.replace("RUN", str(hostile_run)).replace("ROWS", str(hostile_rows)) for w in words]
    for options in ([], ["--json"]):
        command = patch.object(sys, "argv", ["curate", *given, *options])
        with command, pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert not OBEYED.search(out + err), out + err
        if options and not ended.value.code:
            json.loads(out)
