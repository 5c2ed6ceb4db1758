"""`curate verify`: checks that a run or a data set is what it says, and names every defect."""

import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from curation import storage
from curation.dataset import Dataset
from curation.lock import LOCK_FILE
from curation.schema import ID
from embedder.errors import one_line
from pipelines.audit.seal import (
    PRETRAIN,
    SEAL_FILE,
    broken_seals,
    covered_files,
    sealed_files,
    sealed_folders,
)
from pipelines.audit.verify_dataset import (
    NAMED,
    UNREADABLE,
    Checked,
    check_form,
    check_unique,
    verify_dataset,
    verify_foreign,
)
from pipelines.audit.verify_stage import check_rows_between_stages, verify_stage
from pipelines.audit.work_folder import WorkFolder
from pipelines.run.run_record import POOL
from pretrain.digests import find_damage


def verify(path: str) -> list[Checked]:
    """Check a work folder, a data set of ours, or any Parquet.

    Raises:
        DatasetError: there is nothing of the kind.
    """
    path = path.rstrip("/")
    if WorkFolder.is_one(path):
        return list(verify_run(WorkFolder(path)))
    if Dataset.is_finished(path):
        checked = verify_dataset(path)
        return [checked, _guarded(f"{path}: ids", partial(check_unique, path))]
    return [verify_foreign(path)]


def verify_run(work: WorkFolder) -> Iterator[Checked]:
    """Check a run: every output of every stage, the accounts between them, and the manifest."""
    try:
        record = work.record
    except UNREADABLE as error:
        yield Checked("run.json", defects=[one_line(error)])
        return
    for flow in work.flows:
        try:
            stages = work.stages(flow)
        except UNREADABLE as error:
            yield Checked(flow, defects=[one_line(error)])
            continue
        for stage in stages:
            yield _guarded(stage.entry.folder, partial(verify_stage, work, stage))
        yield _guarded(
            f"{flow}: rows from stage to stage", partial(check_rows_between_stages, work, flow)
        )
    if record.packed:
        yield _guarded(record.packed, partial(_verify_packed, work))
    if record.manifest:
        yield _guarded(record.manifest, partial(_verify_manifest, work))
    yield _guarded(PRETRAIN, partial(_verify_pretraining, work))
    yield _guarded("seal", partial(_verify_seal, work))
    yield _guarded("other files", partial(_verify_others, work))


def _guarded(where: str, check: Callable[[Checked], None]) -> Checked:
    """Run a check; what keeps it from going on is a defect, too."""
    checked = Checked(where)
    try:
        check(checked)
    except UNREADABLE as error:
        checked.blame("", one_line(error))
    return checked


def _verify_packed(work: WorkFolder, checked: Checked) -> None:
    """Check the packed shards: bytes, and that every image lies where its index says."""
    path = storage.join(work.path, str(work.record.packed))
    checked.include(verify_dataset(path))
    packed = Dataset.open(path)
    check_unique(path, checked)
    for index, info in enumerate(packed.manifest.shards):
        for name in info.companion:
            _check_tar(packed, index, name, checked)
    stage = work.packing
    if stage is not None and packed.num_rows != stage.entry.record.rows_out:
        kept = stage.entry.record.rows_out
        checked.blame("", f"{packed.num_rows:,} images are packed, '{stage.name}' kept {kept:,}")


def _verify_manifest(work: WorkFolder, checked: Checked) -> None:
    """Check the published manifest: bytes, unique ids, and that it is what `select` made."""
    path = storage.join(work.path, str(work.record.manifest))
    checked.include(verify_dataset(path))
    dataset = Dataset.open(path)
    stage = work.making(POOL, "manifest")
    if stage is not None:
        if dataset.manifest.content_digest != stage.entry.record.outputs.get("manifest"):
            checked.blame("", f"content digest is not that of the stage '{stage.name}'")
        if dataset.num_rows != stage.entry.record.rows_out:
            kept = stage.entry.record.rows_out
            checked.blame("", f"holds {dataset.num_rows:,} rows, '{stage.name}' kept {kept:,}")
    check_unique(path, checked)


def _check_tar(packed: Dataset, index: int, name: str, checked: Checked) -> None:
    """Images of the index lie in the tar under their ids, at their offsets, in their sizes."""
    rows = packed.read_shard(index, [ID, "offset", "num_bytes"]).to_pylist()
    told = {f"{row[ID]}.jpg": (row["offset"], row["num_bytes"]) for row in rows}
    try:
        with (
            storage.open_read(storage.join(packed.path, name)) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            held = {m.name: (m.offset_data, m.size) for m in tar if m.name.endswith(".jpg")}
    except (tarfile.TarError, *UNREADABLE) as error:
        checked.blame(name, f"is no readable tar: {one_line(error)}")
        return
    for image in sorted(told.keys() ^ held.keys())[:NAMED]:
        side = "is not in the tar" if image in told else "is not in the index"
        checked.blame(name, f"{image} {side}")
    for image in [one for one in told if one in held and told[one] != held[one]][:NAMED]:
        checked.blame(name, f"{image} lies elsewhere than its index says")


def _verify_seal(work: WorkFolder, checked: Checked) -> None:
    broken = broken_seals(work.path, work.record)
    if broken is None:
        checked.notes.append("this run was never sealed")
        return
    for what in broken:
        checked.blame("", what)
    check_form(storage.join(work.path, SEAL_FILE), checked)


def _verify_pretraining(work: WorkFolder, checked: Checked) -> None:
    """Weights, checkpoints and logs against the digests that training left beside them."""
    folder = storage.local_path(work.path) / PRETRAIN
    if not storage.is_local(work.path) or not folder.is_dir():
        checked.notes.append("there is none")
        return
    checked.files = sum(path.is_file() for path in folder.rglob("*"))
    for line in find_damage(folder):
        checked.blame("", line)


def _verify_others(work: WorkFolder, checked: Checked) -> None:
    """Files that no digest covers: in a folder of a stage or set a defect, elsewhere a note."""
    known = covered_files(work.path, work.record)
    if storage.exists(storage.join(work.path, SEAL_FILE)):
        known |= set(sealed_files(storage.read_json(storage.join(work.path, SEAL_FILE))))
    ours = tuple(f"{folder}/" for folder in sealed_folders(work.record))
    unknown: Counter[str] = Counter()
    for name in storage.walk_files(work.path):
        if name in known or name.rpartition("/")[2] == LOCK_FILE:
            continue
        if name.startswith(ours):
            checked.blame(name, "is no part of the run: neither a manifest nor the seal names it")
        else:
            unknown[name.partition("/")[0]] += 1
    if unknown:
        shown = ", ".join(f"{name} ({count:,})" for name, count in sorted(unknown.items()))
        checked.notes.append(f"not covered by any digest: {shown}")
