"""The accounts: one receipt a shard, rows in = rows out + dropped, enforced.

A shard's receipt is its commit: written after its files, whole or not at all. A stage's
`_stage.json` is the commit of the stage.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from curation import storage
from curation.config import Settings, parse_settings
from curation.dataset import Dataset, ShardInfo, commit, write_shard
from curation.errors import LedgerError
from curation.schema import ID, SOURCE_COLUMNS, decision_schema
from curation.stage import DECISIONS, ColumnValues, Figures, Shard, Stage, StageFolder

RECEIPTS = "_receipts"
STAGE_FILE = "_stage.json"
SHARD_FAILED = "shard_failed"
"""Reason of the rows of a shard that kept failing, where the run accepts some."""


class Receipt(Settings):
    """What became of one shard."""

    index: int
    """Number of the shard."""
    rows_in: int
    """Live rows before the stage."""
    rows_out: int
    """Live rows after it."""
    dropped: dict[str, int]
    """Rows dropped, by reason."""
    outputs: dict[str, ShardInfo]
    """The shard's file in each output."""
    counters: dict[str, float] = {}
    """Figures that add up over shards."""
    failure: str | None = None
    """Why the shard failed, where that was accepted: all its rows are dropped."""


class StageRecord(Settings):
    """What a finished stage did: the commit of the stage."""

    stage: str
    """Name of the stage."""
    version: int
    """Version of the stage."""
    key: str
    """Digest of version, settings and inputs: the same key, the same content."""
    settings: dict[str, Any]
    """The settings it ran with."""
    rows_in: int
    """Live rows before."""
    rows_out: int
    """Live rows after."""
    dropped: dict[str, int]
    """Rows dropped, by reason."""
    outputs: dict[str, str]
    """Content digest of each output."""
    counters: dict[str, float] = {}
    """Figures that add up over shards."""
    figures: dict[str, Any] = {}
    """Figures of the whole stage, such as measured recall."""
    seconds: float = 0.0
    """Wall time of the run that finished it."""
    failed_shards: dict[int, str] = {}
    """Shards that kept failing and were accepted, with the cause."""


def commit_shard(stage: Stage, folder: StageFolder, shard: Shard) -> Receipt:
    """Write a shard's outputs and decisions, then its receipt.

    Raises:
        LedgerError: the stage used a reason that it does not list, or left a column out.
    """
    dropped = dict(sorted(Counter(reason for reason in shard.reasons if reason).items()))
    _check_reasons(stage, dropped)
    tables = {name: _output_table(shard, name, schema) for name, schema in stage.outputs().items()}
    tables[DECISIONS] = decision_table(stage, folder.stage, shard)
    receipt = Receipt(
        index=shard.index,
        rows_in=shard.num_rows,
        rows_out=int(shard.alive.sum()),
        dropped=dropped,
        outputs={
            name: write_shard(folder.output(name), shard.index, table)
            for name, table in tables.items()
        },
        counters=shard.counters,
    )
    storage.write_json(receipt_path(folder, shard.index), receipt.model_dump(mode="json"))
    return receipt


def commit_failed_shard(
    stage: Stage, folder: StageFolder, index: int, ids: pa.ChunkedArray, cause: str
) -> Receipt:
    """Account for a shard that kept failing: every row is dropped, with `shard_failed`."""
    shard = Shard(pa.table({ID: ids}), index)
    shard.reasons[:] = SHARD_FAILED
    for field in stage.decision_columns():
        shard.note(field.name, [None] * shard.num_rows)
    tables = {name: schema.empty_table() for name, schema in stage.outputs().items()}
    tables[DECISIONS] = decision_table(stage, folder.stage, shard)
    receipt = Receipt(
        index=index,
        rows_in=shard.num_rows,
        rows_out=0,
        dropped={SHARD_FAILED: shard.num_rows} if shard.num_rows else {},
        outputs={name: write_shard(folder.output(name), index, t) for name, t in tables.items()},
        failure=cause,
    )
    storage.write_json(receipt_path(folder, index), receipt.model_dump(mode="json"))
    return receipt


def decision_table(stage: Stage, stage_name: str, shard: Shard) -> pa.Table:
    """The decisions on a shard: a row for every row that came in."""
    rows = shard.num_rows
    columns: dict[str, ColumnValues] = {
        ID: shard.ids,
        "stage": pa.array([stage_name] * rows, pa.string()),
        "keep": pa.array(shard.alive),
        "reason": pa.array(shard.reasons.tolist(), pa.string()),
        "score": _to_arrow(shard.scores.astype(np.float32), pa.float32()),
        "threshold": _to_arrow(shard.thresholds.astype(np.float32), pa.float32()),
    }
    for field in stage.decision_columns():
        if field.name not in shard.notes:
            raise LedgerError(f"stage '{stage_name}' promised the column '{field.name}'")
        columns[field.name] = _to_arrow(shard.notes[field.name], field.type)
    return pa.table(columns, schema=decision_schema(stage.decision_columns()))


def finished_shards(folder: StageFolder) -> dict[int, Receipt]:
    """Receipts of the shards that were committed, by index."""
    root = storage.join(folder.path, RECEIPTS)
    paths = [storage.join(root, name) for name in storage.list_files(root, ".json")]
    receipts = storage.gather(read_receipt, paths, root)
    return {receipt.index: receipt for receipt in receipts}


def read_receipt(path: str) -> Receipt:
    """Read one receipt."""
    return parse_settings(Receipt, storage.read_json(path), path)


def finish_stage(
    stage: Stage,
    folder: StageFolder,
    key: str,
    receipts: Iterable[Receipt],
    *,
    expected_rows: int | None,
    figures: Figures | None = None,
    seconds: float = 0.0,
) -> StageRecord:
    """Check the accounts of all shards, commit every output, then the stage.

    Raises:
        LedgerError: rows in differ from rows out plus rows dropped, or from what was alive.
    """
    receipts = sorted(receipts, key=lambda receipt: receipt.index)
    totals = _add_up(folder.stage, receipts, expected_rows)
    failed = {receipt.index: receipt.failure for receipt in receipts if receipt.failure}
    written = {
        name: _commit_output(stage, folder, name, schema, receipts)
        for name, schema in _all_outputs(stage).items()
    }
    record = StageRecord(
        stage=folder.stage,
        version=stage.version,
        key=key,
        settings=stage.model_dump(mode="json"),
        outputs={name: dataset.manifest.content_digest for name, dataset in written.items()},
        figures=dict(figures or {}),
        seconds=round(seconds, 3),
        failed_shards=failed,
        **totals,
    )
    storage.remove_partials(folder.path)
    storage.write_json(storage.join(folder.path, STAGE_FILE), record.model_dump(mode="json"))
    storage.remove(folder.scratch)
    return record


def read_stage(folder: StageFolder) -> StageRecord | None:
    """The record of a finished stage, or None where it has not finished."""
    path = storage.join(folder.path, STAGE_FILE)
    if not storage.exists(path):
        return None
    return parse_settings(StageRecord, storage.read_json(path), path)


def open_outputs(stage: Stage, folder: StageFolder) -> dict[str, Dataset]:
    """The data sets of a finished stage, by output name."""
    return {name: Dataset.open(folder.output(name)) for name in _all_outputs(stage)}


def _all_outputs(stage: Stage) -> dict[str, pa.Schema]:
    return {**stage.outputs(), DECISIONS: decision_schema(stage.decision_columns())}


def _commit_output(
    stage: Stage, folder: StageFolder, name: str, schema: pa.Schema, receipts: list[Receipt]
) -> Dataset:
    shards = [receipt.outputs[name] for receipt in receipts]
    attributes = {"stage": folder.stage, **dict(folder.facts), **stage.attributes().get(name, {})}
    failed = {str(one.index): one.failure for one in receipts if one.failure}
    if failed:
        attributes["failed_shards"] = failed
    return commit(folder.output(name), schema, shards, attributes)


class _Totals(TypedDict):
    """Accounts of all shards, as a record holds them."""

    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    counters: dict[str, float]


def _add_up(stage_name: str, receipts: list[Receipt], expected_rows: int | None) -> _Totals:
    rows_in = sum(receipt.rows_in for receipt in receipts)
    rows_out = sum(receipt.rows_out for receipt in receipts)
    dropped: Counter[str] = Counter()
    counters: dict[str, float] = {}
    for receipt in receipts:
        dropped.update(receipt.dropped)
        for name, amount in receipt.counters.items():
            counters[name] = counters.get(name, 0) + amount
    if rows_in != rows_out + sum(dropped.values()):
        raise LedgerError(
            f"stage '{stage_name}': {rows_in} rows in, {rows_out} out, "
            f"{sum(dropped.values())} dropped: they do not add up"
        )
    if expected_rows is not None and rows_in != expected_rows:
        raise LedgerError(
            f"stage '{stage_name}': {expected_rows} rows were alive, {rows_in} were judged"
        )
    return _Totals(
        rows_in=rows_in,
        rows_out=rows_out,
        dropped=dict(sorted(dropped.items())),
        counters=dict(sorted(counters.items())),
    )


def _output_table(shard: Shard, name: str, schema: pa.Schema) -> pa.Table:
    columns = shard.emitted.get(name, {})
    arrays = []
    for field in schema:
        if field.name == ID:
            arrays.append(shard.ids)
        elif field.name in columns:
            arrays.append(_to_arrow(columns[field.name], field.type))
        elif field.name in shard.table.column_names:
            arrays.append(shard.table[field.name].cast(field.type))
        elif field.name in SOURCE_COLUMNS:  # carried along where the input knows it
            arrays.append(pa.nulls(shard.num_rows, field.type))
        else:
            raise LedgerError(f"output '{name}' promised the column '{field.name}'")
    table = pa.table(arrays, schema=schema)
    alive = shard.alive
    if name in shard.whole_outputs or alive.all():
        return table  # a filter would copy a shard's images
    return table.filter(pa.array(alive))


def _to_arrow(values: ColumnValues, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values if values.type == kind else values.cast(kind)
    if isinstance(values, np.ndarray) and values.ndim == 2:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        return pa.array(values, kind, mask=np.isnan(values))
    return pa.array(values, kind)


def _check_reasons(stage: Stage, dropped: dict[str, int]) -> None:
    known = {SHARD_FAILED, *(reason.partition(":")[0] for reason in stage.reasons)}
    for reason in dropped:
        if reason not in stage.reasons and reason.partition(":")[0] not in known:
            raise LedgerError(f"stage '{stage.name()}' dropped rows for '{reason}', unlisted")


def receipt_path(folder: StageFolder, index: int) -> str:
    """Where the receipt of a shard lies."""
    return storage.join(folder.path, RECEIPTS, f"{index:05d}.json")
