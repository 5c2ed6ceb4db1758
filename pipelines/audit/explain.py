"""One image's whole life: where it came from, every verdict on it, and where it lies now."""

import re

import numpy as np

from curation import storage
from curation.errors import DatasetError
from curation.exchange import bucket_of_id
from curation.identity import file_source, normalize_url
from curation.schema import ID, make_id
from pipelines.audit.lookup import find_rows
from pipelines.audit.tables import Row, select
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL

Life = Row

_SHOWN_HITS = 10
_BULKY = ("image", "raw", "embedding")
_DECIDED = (ID, "stage", "keep", "reason", "score", "threshold")


def explain(text: str, work: str) -> list[Life]:
    """The life of an image in every flow that knows it.

    text: an id, its first 8 digits or more, a URL, or the path of a file below its set's folder.

    Raises:
        DatasetError: no finished run there, or the run never saw the image.
    """
    folder = WorkFolder(work.rstrip("/"))
    lives = [
        explain_row(folder, flow, row_id)
        for flow in folder.flows
        for row_id in ids_in(folder, flow, text.strip())
    ]
    if not lives:
        raise DatasetError(
            f"{text}: this run has never seen it; give an id (8 to 32 hex digits), a URL of its "
            "list, or the path of a file below its set's folder"
        )
    return lives


def possible_ids(text: str, set_names: list[str]) -> list[str]:
    """Ids that a text may stand for: an id, a URL or its normal form, a file of some set."""
    if re.fullmatch("[0-9a-fA-F]{32}", text):
        return [text.lower()]
    found = [make_id(text)]
    try:
        found.append(make_id(normalize_url(text)))
    except ValueError:
        found += [make_id(file_source(name, text)) for name in set_names]
    return list(dict.fromkeys(found))


def fate(verdicts: list[Row]) -> str:
    """What became of a row, in a few words."""
    last = verdicts[-1]
    if not last["keep"]:
        return f"dropped by {last['stage']}: {last['reason']}"
    return f"kept by every stage up to {last['stage']}"


def ids_in(folder: WorkFolder, flow: str, text: str) -> list[str]:
    """Ids of a flow that the text stands for."""
    first = folder.stages(flow)[0]
    settings = first.entry.record.settings
    wanted = possible_ids(text, [settings.get("source_set") or flow])
    if re.fullmatch("[0-9a-fA-F]{8,31}", text):  # 8 digits tell the shard
        shard = first.shard_of(text.lower().ljust(32, "0"))
        ids = first.decisions.read_shard(shard, [ID])[ID].to_pylist()
        return sorted({one for one in ids if one.startswith(text.lower())})
    return [i for i in wanted if find_rows(first.decisions, first.shard_of(i), [i], []).num_rows]


def explain_row(folder: WorkFolder, flow: str, row_id: str) -> Life:
    """The life of a row that a flow surely holds."""
    verdicts = []
    for stage in path_of(folder, flow):
        rows = find_rows(stage.decisions, stage.shard_of(row_id, flow), [row_id]).to_pylist()
        rows.sort(key=lambda row: not row["keep"])  # two where the list held its URL repeatedly
        verdicts += [_verdict(stage, row) for row in rows[:2]]
    life: Life = {"id": row_id, "flow": flow, "fate": fate(verdicts)}
    life["origin"] = side_car_row(folder, flow, "rows", row_id)
    life["fetch"] = side_car_row(folder, flow, "fetches", row_id)
    life["image"] = side_car_row(folder, flow, "images", row_id)
    life["verdicts"] = verdicts
    life["sources"] = _sources_of_twins(folder, verdicts, flow)
    life["hits"] = _hits(folder, flow, row_id)
    if verdicts[-1]["keep"] and flow in (POOL, *folder.record.as_is):
        life["manifest"] = _in_manifest(folder, flow, row_id)
        life["packed"] = place_in_tar(folder, flow, row_id)
        if life["manifest"]:
            life["fate"] = "in the set"
    return life


def path_of(folder: WorkFolder, flow: str) -> list[FinishedStage]:
    """The stages that a flow passes: its own, then those of the union where it joins."""
    own = folder.stages(flow)
    if flow == POOL or flow not in folder.record.as_is:
        return own
    return [*own, *(stage for stage in folder.stages(POOL) if stage.is_union)]


def _verdict(stage: FinishedStage, row: Row) -> Row:
    extras = {k: v for k, v in row.items() if k not in _DECIDED and v is not None}
    decided = {name: row[name] for name in _DECIDED if name != ID}
    return {**decided, "stage": stage.name, **extras}


def side_car_row(folder: WorkFolder, flow: str, output: str, row_id: str) -> Row | None:
    """What a side-car of the flow says of a row, without bytes and vectors."""
    stage = folder.making(flow, output)
    if stage is None:
        return None
    dataset = stage.output(output)
    names = [name for name in dataset.columns if name not in _BULKY]
    rows = find_rows(dataset, stage.shard_of(row_id, flow), [row_id], names).to_pylist()
    return rows[0] if rows else None


def _sources_of_twins(folder: WorkFolder, verdicts: list[Row], flow: str) -> dict[str, str]:
    """Where the images came from that the verdicts name."""
    found: dict[str, str] = {}
    for row in verdicts:
        for name, of in (("twin", row.get("twin_set")), ("seed_id", row.get("seed_set"))):
            other = row.get(name)
            for where, candidate in _places(folder, of or flow):
                if other and other not in found:
                    origin = side_car_row(where, candidate, "rows", other)
                    if origin:
                        found[other] = origin["source"]
    return found


def _places(folder: WorkFolder, flow: str) -> list[tuple[WorkFolder, str]]:
    """Runs and flows that may hold a twin or a seed: this run's first, then those of its base."""
    places, path = list[tuple[WorkFolder, str]](), [folder]
    while path[-1].record.base is not None and WorkFolder.is_one(path[-1].record.base):
        path.append(WorkFolder(path[-1].record.base))
    for where in path:
        candidates = dict.fromkeys([flow, POOL, *where.record.as_is])
        places += [(where, one) for one in candidates if one in where.flows]
    return places


def _hits(folder: WorkFolder, flow: str, row_id: str) -> list[Row]:
    """Seeds that fetched a row of the pool, or what a seed fetched."""
    hits = None if flow in folder.record.as_is else folder.hits
    if hits is not None and flow == POOL:
        rows = find_rows(hits, bucket_of_id(row_id, hits.num_shards), [row_id]).to_pylist()
        return sorted(rows, key=lambda row: (-row["similarity"], row["seed_set"]))[:_SHOWN_HITS]
    query = "select * from rows where seed_set = ? and seed_id = ? order by rank limit ?"
    return select(hits, query, [flow, row_id, _SHOWN_HITS])


def _in_manifest(folder: WorkFolder, flow: str, row_id: str) -> Row | None:
    """The row of the published manifest, which leaves out the empty shards of `select`."""
    stage = folder.making(POOL, "manifest")
    if stage is None or folder.manifest is None:
        return None
    shard = stage.shard_of(row_id, flow)
    filled = [info.num_rows > 0 for info in stage.output("manifest").manifest.shards]
    if not filled[shard]:
        return None
    place = sum(filled[:shard])
    rows = find_rows(folder.manifest, place, [row_id]).to_pylist()
    return {"file": folder.manifest.manifest.shards[place].name, **rows[0]} if rows else None


def place_in_tar(folder: WorkFolder, flow: str, row_id: str) -> Row | None:
    """The tar that holds an image: tars take neighboring shards in their order."""
    stage, packed = folder.packing, folder.packed
    if stage is None or packed is None:
        return None
    shard = stage.shard_of(row_id, flow)
    kept = [info.num_kept or 0 for info in stage.decisions.manifest.shards]
    if not kept[shard]:
        return None
    ends = np.cumsum([info.num_rows for info in packed.manifest.shards])
    place = int(np.searchsorted(ends, sum(kept[:shard]), side="right"))
    rows = find_rows(packed, place, [row_id]).to_pylist()
    if not rows:
        return None
    tar = next(iter(packed.manifest.shards[place].companion), "")
    return {"file": storage.join(packed.path, tar), **rows[0]}
