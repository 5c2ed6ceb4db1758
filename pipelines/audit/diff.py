"""What changed between two builds, and why: `curate diff`."""

from collections.abc import Mapping

from curation.dataset import Dataset
from curation.errors import DatasetError
from pipelines.audit.tables import Row, Tables
from pipelines.audit.work_folder import WorkFolder
from pipelines.run.run_record import RunRecord

Diff = Row

_EXAMPLES = 5
_COMPARED = ("seed_set", "rule", "seed_id", "rank", "similarity", "source_set", "sha256")
"""Columns of the manifest in which an image that both builds hold may differ."""


def diff(old: str, new: str) -> Diff:
    """Settings, rows and images that differ between two finished runs.

    Raises:
        DatasetError: no finished run with a manifest in one of the folders.
    """
    before, after = WorkFolder(old.rstrip("/")), WorkFolder(new.rstrip("/"))
    manifests = [_manifest(before), _manifest(after)]
    digests = [one.manifest.content_digest for one in manifests]
    return {
        "old": before.path,
        "new": after.path,
        "same": digests[0] == digests[1],
        "content_digests": digests,
        "rows": [one.num_rows for one in manifests],
        "settings": changed_settings(before.record, after.record),
        "versions": _changed(before.record.versions, after.record.versions),
        "stages": changed_stages(before.record, after.record),
        **_changed_images(before, after),
    }


def changed_settings(before: RunRecord, after: RunRecord) -> list[Row]:
    """Settings of the pool's stages that differ, stages that were added or taken out."""
    old = {entry.stage: entry.record.settings for entry in before.pool}
    new = {entry.stage: entry.record.settings for entry in after.pool}
    found: list[Row] = []
    for stage in dict.fromkeys([*old, *new]):
        if stage not in old or stage not in new:
            change = "added" if stage in new else "taken out"
            found.append({"stage": stage, "setting": "", "old": "", "new": change})
            continue
        found += [{"stage": stage, **change} for change in _changed(old[stage], new[stage])]
    if before.seed != after.seed:
        found.append({"stage": "", "setting": "seed", "old": before.seed, "new": after.seed})
    return found


def changed_stages(before: RunRecord, after: RunRecord) -> list[Row]:
    """Rows that each stage of the pool dropped for each reason, where the numbers differ."""
    old = {(e.stage, why): n for e in before.pool for why, n in e.record.dropped.items()}
    new = {(e.stage, why): n for e in after.pool for why, n in e.record.dropped.items()}
    return [
        {"stage": stage, "reason": why, "old": old.get((stage, why), 0), "new": count}
        for stage, why in dict.fromkeys([*old, *new])
        if old.get((stage, why), 0) != (count := new.get((stage, why), 0))
    ]


def _changed(old: Mapping[str, object], new: Mapping[str, object]) -> list[Row]:
    return [
        {"setting": name, "old": old.get(name), "new": new.get(name)}
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _changed_images(before: WorkFolder, after: WorkFolder) -> Diff:
    """Images that left and came, each with what the other build did with them."""
    with Tables() as tables:
        for name, work in (("old", before), ("new", after)):
            if not tables.add(f"{name}_manifest", _manifest(work)):
                empty = ", ".join(f"null as {column}" for column in ("id", *_COMPARED))
                tables.run(f"create temp view {name}_manifest as select {empty} where false")
            stages = work.all_stages()
            order = [{"place": number} for number in range(len(stages))]
            if not tables.add(f"{name}_decisions", *(s.decisions for s in stages), labels=order):
                raise DatasetError(f"{work.path}: its stages hold no decisions")
        left, came = _moved(tables, "old", "new"), _moved(tables, "new", "old")
        same = " and ".join(f"o.{c} is not distinct from n.{c}" for c in _COMPARED)
        stayed = tables.first(
            f"select count(*) as rows, count(*) filter (where not ({same})) as changed "
            "from old_manifest o join new_manifest n using (id)"
        )
    return {"left": left, "came": came, "stayed": stayed["rows"], "changed": stayed["changed"]}


def _moved(tables: Tables, one: str, other: str) -> list[Row]:
    """Images of one build that the other lacks, counted by where the other dropped them."""
    return tables.rows(
        f"with gone as (select id from {one}_manifest anti join {other}_manifest using (id)), "
        f"fate as (select d.id, arg_min(d.stage, d.place) as stage, "
        f"arg_min(d.reason, d.place) as reason from {other}_decisions d "
        "semi join gone using (id) where not d.keep group by d.id) "
        "select coalesce(stage, 'not listed') as stage, reason, count(*) as rows, "
        f"(list(gone.id order by gone.id))[1:{_EXAMPLES}] as examples "
        "from gone left join fate using (id) group by all order by rows desc, stage, reason"
    )


def _manifest(work: WorkFolder) -> Dataset:
    if work.manifest is None:
        raise DatasetError(f"{work.path}: its recipe has no 'select', so there is no manifest")
    return work.manifest
