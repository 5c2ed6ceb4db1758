"""The last phase: verdicts met with the shards of the pool, which they become decisions of."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation.neighbors.dedup.judge_components import ComponentVerdicts
from curation.neighbors.rows.arrange import read_bad_rows
from curation.neighbors.rows.packed_rows import unpack_rows
from curation.neighbors.rows.shard_batches import DecideBatch, of_shard
from curation.schema import ids_from_bytes
from curation.stage import Shard, reject

BASE = "base"
"""The `twin_set` of a twin that an earlier delivery kept."""


@dataclass(frozen=True)
class Verdicts:
    """What the phases before found out about the rows of a pool."""

    bad_folder: str
    """Where the rows without direction are listed."""
    threshold: float = 0.0
    """Of duplicates."""
    duplicates: ComponentVerdicts | None = None
    leak_threshold: float = 0.0
    leaks: ComponentVerdicts | None = None
    set_names: tuple[str, ...] = ()
    """Names of the sets, in the order of their numbers from 1."""

    @property
    def first_base(self) -> int:
        """Number of the first set of rows that an earlier delivery kept, if there is one."""
        return 1 + len(self.set_names)


Found = tuple[pa.Table | None, pa.Table | None]
"""Verdicts on duplicates, and on leaks."""


@dataclass(frozen=True)
class DecideByVerdicts(DecideBatch[Found, None]):
    """Verdicts to decisions."""

    verdicts: Verdicts

    def read(self, batch: int) -> Found:
        """Verdicts on duplicates and on leaks."""
        duplicates, leaks = self.verdicts.duplicates, self.verdicts.leaks
        return duplicates and duplicates.read(batch), leaks and leaks.read(batch)

    def decide(self, shard: Shard, found: Found, opened: None) -> None:
        """Drop rows without direction, duplicates and leaks; say of each what it is alike to."""
        duplicates, leaks = found
        bad = np.zeros(shard.num_rows, bool)
        bad[read_bad_rows(self.verdicts.bad_folder, 0, shard.index)] = True
        notes = _Notes(shard, bad)
        reject(shard, bad, "bad_vector")
        if duplicates is not None:
            notes.add_duplicates(of_shard(duplicates, shard.index), self.verdicts)
        if leaks is not None:
            names, threshold = self.verdicts.set_names, self.verdicts.leak_threshold
            notes.add_leaks(of_shard(leaks, shard.index), names, threshold)
        for field in self.stage.decision_columns():
            shard.note(field.name, notes.columns[field.name])


class _Notes:
    """The columns that a stage adds, for one shard; a row of no component stands for itself."""

    def __init__(self, shard: Shard, bad: np.ndarray) -> None:
        self._shard = shard
        none = np.full(shard.num_rows, None, object)
        own = np.array(shard.ids.to_pylist(), object)
        self.columns: dict[str, np.ndarray] = {
            "component": np.where(bad, none, own),
            "component_size": np.where(bad, none, np.ones(shard.num_rows, object)),
            "twin": none.copy(),
            "twin_set": none.copy(),
            "similarity": np.full(shard.num_rows, np.nan, np.float32),
            "path": none.copy(),
        }

    def add_duplicates(self, verdicts: pa.Table, of: Verdicts) -> None:
        """Take component, twin and cosine of the members of components; drop who must go."""
        rows = np.asarray(verdicts["row"])
        from_base = np.asarray(verdicts["twin_set"]) >= of.first_base
        dropped = np.zeros(self._shard.num_rows, bool)
        dropped[rows] = ~verdicts["keep"].to_numpy(zero_copy_only=False)
        self._set(rows, "component", _hex(verdicts["component"]))
        self._set(rows, "component_size", verdicts["component_size"].to_pylist())
        self._set(rows, "twin", _hex(verdicts["twin"]))
        self._set(rows[from_base], "twin_set", [BASE] * int(from_base.sum()))
        self.columns["similarity"][rows] = np.asarray(verdicts["similarity"])
        self._shard.record_score(self.columns["similarity"], of.threshold)
        reject(self._shard, dropped, "near_duplicate")

    def add_leaks(self, verdicts: pa.Table, set_names: tuple[str, ...], threshold: float) -> None:
        """Drop leaks, each for the set of its nearest benchmark image, which becomes the twin."""
        rows = np.asarray(verdicts["row"])
        numbers = np.asarray(verdicts["twin_set"])
        self.columns["similarity"][rows] = np.asarray(verdicts["similarity"])
        thresholds = self._shard.thresholds.copy()
        thresholds[rows] = threshold
        scores = self._shard.scores.copy()
        scores[rows] = self.columns["similarity"][rows]
        self._shard.record_score(scores, thresholds)
        for number, name in enumerate(set_names, start=1):
            leaked = np.zeros(self._shard.num_rows, bool)
            leaked[rows[numbers == number]] = True
            reject(self._shard, leaked, f"leak:{name}")
        self._set(rows, "twin", _hex(verdicts["twin"]))
        self._set(rows, "twin_set", [set_names[number - 1] for number in numbers])
        direct = verdicts["direct"].to_pylist()
        self._set(rows, "path", ["direct" if one else "chain" for one in direct])

    def _set(self, rows: np.ndarray, column: str, values: list[str] | list[int]) -> None:
        self.columns[column][rows] = np.array(values, object)


def _hex(column: pa.ChunkedArray) -> list[str]:
    return list(ids_from_bytes(unpack_rows(column)).to_pylist())
