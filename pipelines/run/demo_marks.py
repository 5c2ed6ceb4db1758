"""Marks a run of the demo against its truth: what was planted, what was caught."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from curation import storage
from curation.dataset import Dataset
from curation.identity import normalize_url
from curation.schema import make_id
from curation.stage import DECISIONS
from pipelines.run.demo_site import INNOCENT
from pipelines.run.run_record import RunRecord

_COPY_REASONS = ("duplicate_bytes", "duplicate_pixels", "near_duplicate")


@dataclass(frozen=True)
class Fate:
    """Where and why a row was dropped."""

    reason: str
    twin: str | None


def mark(record: RunRecord, work: str, truth_file: Path) -> dict[str, dict[str, Any]]:
    """How many of each kind were planted and caught, and how many innocents fell as copies.

    A copy and its original are one pair: it is caught if one of them was dropped and named the
    other as its twin.
    """
    truth = pq.read_table(truth_file).to_pylist()
    fates = _fates(record, work)
    marks: dict[str, dict[str, Any]] = {}
    partner = {row["twin_url"]: row["url"] for row in truth if row["twin_url"]}
    for row in truth:
        tally = marks.setdefault(row["kind"], {"planted": 0, "caught": 0, "missed": []})
        tally["planted"] += 1
        if row["kind"] == INNOCENT:
            caught = _wrongly_dropped(row["url"], partner, fates)
        else:
            caught = _is_caught(row, fates)
        tally["caught"] += caught
        if caught == (row["kind"] == INNOCENT):
            tally["missed"].append(row["url"])
    return marks


def _is_caught(row: dict[str, str], fates: dict[str, Fate]) -> bool:
    if row["twin_url"]:
        pair = (_id(row["url"]), _id(row["twin_url"]))
        return _fell_to(*pair, fates) or _fell_to(*pair[::-1], fates)
    fate = fates.get(_id(row["url"]))
    return fate is not None and fate.reason == row["expected"]


def _wrongly_dropped(url: str, partner: dict[str, str], fates: dict[str, Fate]) -> bool:
    fate = fates.get(_id(url))
    if fate is None or not (fate.reason in _COPY_REASONS or fate.reason.startswith("leak:")):
        return False
    return url not in partner or fate.twin != _id(partner[url])


def _fell_to(one: str, other: str, fates: dict[str, Fate]) -> bool:
    """Whether `one` was dropped as a copy of `other`."""
    fate = fates.get(one)
    return fate is not None and fate.reason in _COPY_REASONS and fate.twin == other


def _fates(record: RunRecord, work: str) -> dict[str, Fate]:
    """Every dropped id of the pool's own stages."""
    fates: dict[str, Fate] = {}
    for entry in record.pool:
        decisions = Dataset.open(storage.join(work, entry.folder, DECISIONS))
        columns = [c for c in ("id", "keep", "reason", "twin") if c in decisions.columns]
        for row in decisions.read(columns).to_pylist():
            if not row["keep"]:
                # a repeated source shares the id of the row that is kept: the first fate stays
                fates.setdefault(row["id"], Fate(row["reason"], row.get("twin")))
    return fates


def _id(url: str) -> str:
    try:
        return make_id(normalize_url(url))
    except ValueError:
        return make_id(url)
