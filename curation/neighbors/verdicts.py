"""The last phase: verdicts met with the shards of the pool, which they become decisions of."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation.ledger import Receipt, commit_shard, finished_shards
from curation.neighbors.partition import read_bad_rows
from curation.neighbors.review import Reviewed, id_bytes
from curation.pool import Pool
from curation.schema import ids_from_bytes
from curation.stage import DatasetStage, Engine, Shard, StageFolder, Task, reject

BASE = "base"
"""The `twin_set` of a twin that an earlier delivery kept."""


@dataclass(frozen=True)
class Verdicts:
    """What the phases before found out about the rows of a pool."""

    bad_folder: str
    """Where the rows without direction are listed."""
    threshold: float = 0.0
    """Of duplicates."""
    duplicates: Reviewed | None = None
    leak_threshold: float = 0.0
    leaks: Reviewed | None = None
    set_names: tuple[str, ...] = ()
    """Names of the sets, in the order of their numbers from 1."""

    @property
    def first_base(self) -> int:
        """Number of the first set of rows that an earlier delivery kept, if there is one."""
        return 1 + len(self.set_names)


@dataclass(frozen=True)
class _DecideShard(Task[int, Receipt]):
    """One shard of the pool: verdicts to decisions, and its receipt."""

    stage: DatasetStage
    pool: Pool
    folder: StageFolder
    verdicts: Verdicts

    def __call__(self, item: int, opened: Any) -> Receipt:
        shard = Shard(self.pool.read(item, []), item)
        bad = np.zeros(shard.num_rows, bool)
        bad[read_bad_rows(self.verdicts.bad_folder, 0, item)] = True
        notes = _Notes(shard, bad)
        reject(shard, bad, "bad_vector")
        if self.verdicts.duplicates is not None:
            notes.add_duplicates(self.verdicts.duplicates.read(item), self.verdicts)
        if self.verdicts.leaks is not None:
            notes.add_leaks(
                self.verdicts.leaks.read(item),
                self.verdicts.set_names,
                self.verdicts.leak_threshold,
            )
        for field in self.stage.extras():
            shard.note(field.name, notes.columns[field.name])
        return commit_shard(self.stage, self.folder, shard)


def decide_shards(
    stage: DatasetStage, pool: Pool, folder: StageFolder, verdicts: Verdicts, engine: Engine
) -> None:
    """Commit every shard that has no receipt yet."""
    done = finished_shards(folder)
    waiting = [index for index in range(pool.num_shards) if index not in done]
    for _ in engine.map(_DecideShard(stage, pool, folder, verdicts), waiting, folder.stage):
        pass


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
        self._shard.judge(self.columns["similarity"], of.threshold)
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
        self._shard.judge(scores, thresholds)
        for number, name in enumerate(set_names, start=1):
            leaked = np.zeros(self._shard.num_rows, bool)
            leaked[rows[numbers == number]] = True
            reject(self._shard, leaked, f"leak:{name}")
        self._set(rows, "twin", _hex(verdicts["twin"]))
        self._set(rows, "twin_set", [set_names[number - 1] for number in numbers])
        direct = verdicts["direct"].to_pylist()
        self._set(rows, "path", ["direct" if one else "chain" for one in direct])

    def _set(self, rows: np.ndarray, column: str, values: list[Any]) -> None:
        self.columns[column][rows] = np.array(values, object)


def _hex(column: pa.ChunkedArray) -> list[Any]:
    return list(ids_from_bytes(id_bytes(column)).to_pylist())
