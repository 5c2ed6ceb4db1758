"""Checks the accounts of a run: receipts against verdicts, and rows from stage to stage."""

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from curation import storage
from curation.dataset import MANIFEST, Dataset
from curation.ledger import RECEIPTS, STAGE_FILE, Receipt, read_receipt, read_stage
from curation.schema import ID, KEEP
from curation.stage import DECISIONS, StageFolder
from embedder.errors import one_line
from pipelines.audit.verify_dataset import (
    NAMED,
    UNREADABLE,
    Checked,
    check_form,
    is_present,
    verify_dataset,
)
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL


def verify_stage(work: WorkFolder, stage: FinishedStage, checked: Checked) -> None:
    """Check a stage: its record, its outputs, and its accounts shard by shard."""
    record, done = read_stage(StageFolder(stage.path, stage.name)), stage.entry.record
    if record is None:
        checked.blame(STAGE_FILE, "is missing")
    elif record != done:
        checked.blame(STAGE_FILE, "differs from what run.json says of the stage")
    if done.rows_in != done.rows_out + sum(done.dropped.values()):
        checked.blame(STAGE_FILE, "rows in are not rows out plus dropped")
    for name, digest in done.outputs.items():
        path = storage.join(stage.path, name)
        deletable = name == "raw" and work.making(stage.flow, "images") is not None
        checked.include(verify_dataset(path, may_be_deleted=deletable), name)
        try:
            if Dataset.is_finished(path) and Dataset.open(path).manifest.content_digest != digest:
                checked.blame(name, "content digest is not the one in the stage's record")
        except UNREADABLE:
            pass  # its manifest was named already
    names = (name.rpartition("/") for name in storage.walk_files(stage.path))
    datasets = {folder for folder, _, file in names if file == MANIFEST}
    for name in sorted(datasets - set(stage.entry.record.outputs)):  # such as hits
        checked.include(verify_dataset(storage.join(stage.path, name)), name)
    _check_receipts(stage, checked)


def _check_receipts(stage: FinishedStage, checked: Checked) -> None:
    """Each shard's receipt against its files; their sums against the stage's record."""
    receipts = _read_receipts(stage, checked)
    decisions = stage.decisions
    if len(receipts) != decisions.num_shards:
        checked.blame(RECEIPTS, f"{len(receipts)} receipts for {decisions.num_shards} shards")
    dropped: Counter[str] = Counter()
    for receipt in receipts:
        dropped.update(receipt.dropped)
        if receipt.index < decisions.num_shards:
            _check_receipt(stage, receipt, checked)
    done = stage.entry.record
    totals = (sum(r.rows_in for r in receipts), sum(r.rows_out for r in receipts), dict(dropped))
    if totals != (done.rows_in, done.rows_out, done.dropped):
        checked.blame(RECEIPTS, "the receipts do not add up to the stage's record")


def _read_receipts(stage: FinishedStage, checked: Checked) -> list[Receipt]:
    root = storage.join(stage.path, RECEIPTS)
    receipts = []
    for name in storage.list_files(root, ".json"):
        try:
            receipts.append(read_receipt(storage.join(root, name)))
            check_form(storage.join(root, name), checked)
        except UNREADABLE as error:
            checked.blame(f"{RECEIPTS}/{name}", f"cannot be read: {one_line(error)}")
    return receipts


def _check_receipt(stage: FinishedStage, receipt: Receipt, checked: Checked) -> None:
    """One shard's receipt against the verdicts and the manifests."""
    name = f"{RECEIPTS}/{receipt.index:05d}.json"
    for output, info in receipt.outputs.items():
        shards = stage.output(output).manifest.shards
        if receipt.index >= len(shards) or shards[receipt.index] != info:
            checked.blame(name, f"says of '{output}' another thing than its manifest")
    try:
        verdicts = stage.decisions.read_shard(receipt.index, [KEEP, "reason"])
    except UNREADABLE:
        return  # named already, where the shard's bytes were checked
    kept = pc.sum(verdicts[KEEP]).as_py() or 0
    fallen = verdicts.filter(pc.invert(verdicts[KEEP]))["reason"].to_pylist()
    reasons = dict(sorted(Counter(fallen).items(), key=str))
    if (verdicts.num_rows, kept) != (receipt.rows_in, receipt.rows_out):
        checked.blame(name, "its rows are not those of the verdicts")
    if reasons != dict(sorted(receipt.dropped.items(), key=str)):
        checked.blame(name, "its reasons are not those of the verdicts")


def check_rows_between_stages(work: WorkFolder, flow: str, checked: Checked) -> None:
    """Rows that a stage judges are those that the one before let live; outputs hold no others."""
    before: FinishedStage | None = None
    for stage in work.stages(flow):
        for part, (first, number) in stage.ranges.items():
            joins = stage.is_union and part != POOL and (before is None or not before.is_union)
            source = work.stages(part)[-1] if joins else before  # a set joins after its last stage
            if source is not None:
                start = source.ranges[part][0]
                for shard in range(number):
                    _compare(source, start + shard, stage, first + shard, checked)
        _check_outputs(stage, checked)
        before = stage


def _compare(
    source: FinishedStage, from_shard: int, stage: FinishedStage, shard: int, checked: Checked
) -> None:
    """The ids that one stage kept are the ids that the next one judged, in the same order."""
    verdicts = source.decisions.read_shard(from_shard, [ID, KEEP])
    alive = verdicts.filter(verdicts[KEEP])[ID]
    judged = stage.decisions.read_shard(shard, [ID])[ID]
    checked.rows += len(judged)
    if not judged.equals(alive):
        gone = _missing(alive, judged)
        more = _missing(judged, alive)
        said = f"lost {', '.join(gone)}" if gone else f"gained {', '.join(more)}"
        if not gone and not more:
            said = "changed the order of its rows"
        checked.blame(f"{source.name} to {stage.name}, shard {shard}", said)


def _check_outputs(stage: FinishedStage, checked: Checked) -> None:
    """Side-cars hold the rows that the stage kept, or all that came in."""
    shards = stage.decisions.num_shards
    for name in stage.entry.record.outputs:
        if name == DECISIONS or not stage.has(name):
            continue
        output = stage.output(name)
        if output.num_shards != shards or not is_present(output) or ID not in output.columns:
            continue
        for shard in range(shards):
            verdicts = stage.decisions.read_shard(shard, [ID, KEEP])
            held = output.read_shard(shard, [ID])[ID]
            kept = verdicts.filter(verdicts[KEEP])[ID]
            if not (held.equals(kept) or held.equals(verdicts[ID])):
                checked.blame(f"{stage.name}/{name}, shard {shard}", "holds other rows than judged")


def _missing(wanted: pa.ChunkedArray, held: pa.ChunkedArray) -> list[str]:
    """A few ids of the first that the second lacks."""
    found: list[str] = wanted.filter(pc.invert(pc.is_in(wanted, held.combine_chunks()))).to_pylist()
    return found[:NAMED]
