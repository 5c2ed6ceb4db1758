"""What a stage is, and what an engine offers it.

A `ShardStage` judges each row from its own shard; a `DatasetStage` needs to see all rows and is
handed an engine. Both drop rows only through `reject`, and both are frozen settings: their fields
are their keys in YAML.
"""

import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, Self, TypeAlias, TypeVar, cast

import numpy as np
import pyarrow as pa

from curation import storage
from curation.config import Settings
from curation.errors import LedgerError
from curation.pool import Pool
from curation.schema import ID

Item = TypeVar("Item")
Opened = TypeVar("Opened")
Result = TypeVar("Result")

Json = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
"""What JSON can hold."""
Figures = Mapping[str, Json]
"""What a stage reports besides its rows, by name."""
ColumnValues: TypeAlias = pa.Array | pa.ChunkedArray | np.ndarray | Sequence[Json | bytes]
"""A value for each row."""

DECISIONS = "decisions"
ABOUT = "about"
"""Attribute of what single verbs write: a digest of the images that the rows are about."""
DEVICE_BUSY_S = "device_busy_s"
"""Counter of seconds in which a worker's GPU, or its cores as one, computed on batches."""


@dataclass(frozen=True)
class Resources:
    """What one running task needs."""

    cpus: float = 1
    """Cores."""
    gpus: float = 0
    """Devices."""
    memory: int = 1 << 30
    """Bytes at its peak."""
    time_limit_s: float = field(default=4 * 3600.0, compare=False)
    """Seconds after which one item is taken to hang: it is stopped, which counts as a failure."""


class Task(ABC, Generic[Item, Opened, Result]):
    """Work on one item, sent to workers by path and settings, never with data.

    Subclasses are frozen data classes that pickle small.
    """

    @property
    def resources(self) -> Resources:
        """What one item needs while it is worked on."""
        return Resources()

    def open(self) -> Opened:
        """Make what a worker needs for all of its items, such as a model. Called once a worker."""
        return cast(Opened, None)  # a task without this opens nothing: its `Opened` is None

    def name_of(self, item: Item) -> str:
        """What messages call an item: itself, or the first part of a tuple."""
        return str(item[0] if isinstance(item, tuple) else item)[:120]

    @abstractmethod
    def __call__(self, item: Item, opened: Opened) -> Result:
        """Do the work on one item. The result is small: it travels to the driver."""


class Engine(ABC):
    """Runs tasks: in this process, or on a cluster."""

    retries: int = 0
    """Failures so far that were tried again."""
    time_limit_s: float | None = None
    """Seconds that any item may take, in place of what its task declares."""

    def limit_s(self, needed: Resources) -> float:
        """Seconds that an item of a task with these needs may take."""
        return self.time_limit_s or needed.time_limit_s

    @property
    @abstractmethod
    def workers(self) -> int:
        """Tasks of one core that run at once, as far as is known."""

    @property
    def workers_per_node(self) -> int:
        """Those of one machine at most: they share its memory."""
        return self.workers

    @property
    def is_one_machine(self) -> bool:
        """Whether all work is done on one, which has one set of files and libraries."""
        return True

    def everywhere(self, task: Task[None, Opened, Result], label: str) -> list[tuple[str, Result]]:
        """Run a task once in every local worker, or on every node that meets its needs.

        Gives where, and the result. Nothing is retried: an error of one is the error of all.
        """
        return [(platform.node(), task(None, task.open()))]

    @abstractmethod
    def map(
        self, task: Task[Item, Opened, Result], items: Sequence[Item], label: str
    ) -> Iterator[tuple[Item, Result]]:
        """Run a task on every item; give results as they finish, in any order.

        A failing item is retried; the others go on.

        Raises:
            EngineError: after all others finished, if items still failed; names them.
        """


class Shard:
    """The live rows of one shard on their way through a stage.

    A stage reads `table`, adds side-car columns with `emit`, notes scores with `record_score` and
    `note`, and drops rows with `reject`.
    """

    def __init__(self, table: pa.Table, index: int) -> None:
        self.table = table
        self.index = index
        self.reasons = np.full(table.num_rows, None, dtype=object)
        self.scores = np.full(table.num_rows, np.nan)
        self.thresholds = np.full(table.num_rows, np.nan)
        self.notes: dict[str, ColumnValues] = {}
        self.emitted: dict[str, dict[str, ColumnValues]] = {}
        self.whole_outputs: set[str] = set()
        self.counters: dict[str, float] = {}

    @property
    def num_rows(self) -> int:
        """Rows that came in."""
        return int(self.table.num_rows)

    @property
    def ids(self) -> pa.ChunkedArray:
        """Ids of all rows that came in."""
        return self.table[ID]

    @property
    def alive(self) -> np.ndarray:
        """(N,) bool: rows not rejected so far."""
        return np.array([reason is None for reason in self.reasons], dtype=bool)

    def values(self, column: str) -> list[Any]:
        """A column as Python values."""
        return list(self.table[column].to_pylist())

    def array(self, column: str) -> np.ndarray:
        """A numeric column as an array."""
        return np.asarray(self.table[column].to_numpy())

    def part(self, rows: slice) -> "Shard":
        """Some of the rows, to be judged on trial: what is dropped there stays here."""
        part = Shard(self.table[rows], self.index)
        part.reasons[:] = self.reasons[rows]
        for output, columns in self.emitted.items():
            part.emitted[output] = {name: values[rows] for name, values in columns.items()}
        return part

    def record_score(self, scores: np.ndarray, threshold: float | np.ndarray) -> None:
        """Record the score that decides, and its threshold. scores: (N,), NaN where unknown.

        Rows that were dropped before keep the score that they were dropped for.
        """
        alive = self.alive
        self.scores[alive] = np.asarray(scores, np.float64)[alive]
        self.thresholds[alive] = np.broadcast_to(threshold, alive.shape)[alive]

    def note(self, column: str, values: ColumnValues) -> None:
        """Add one of the stage's own columns to the decisions, with a value (or None) per row."""
        self._check_length(column, values)
        self.notes[column] = values

    def emit(
        self, output: str, columns: Mapping[str, ColumnValues], *, rejected_too: bool = False
    ) -> None:
        """Add columns to a side-car, with a value per row that came in.

        Rows rejected by the end of the stage are left out, unless `rejected_too`.
        """
        for name, values in columns.items():
            self._check_length(name, values)
        self.emitted.setdefault(output, {}).update(columns)
        if rejected_too:
            self.whole_outputs.add(output)

    def count(self, counter: str, amount: float = 1) -> None:
        """Add to a counter of the run summary."""
        self.counters[counter] = self.counters.get(counter, 0) + amount

    def _check_length(self, column: str, values: ColumnValues) -> None:
        if len(values) != self.num_rows:
            raise LedgerError(
                f"column '{column}' has {len(values)} values for {self.num_rows} rows"
            )


def reject(shard: Shard, bad: np.ndarray | Sequence[bool], reason: str) -> None:
    """Drop rows for a reason; a row that was dropped before keeps its first reason.

    bad: (N,) bool over the rows that came in.
    """
    bad = np.asarray(bad, dtype=bool)
    if bad.shape != (shard.num_rows,):
        raise LedgerError(f"reject('{reason}') got {bad.shape} flags for {shard.num_rows} rows")
    shard.reasons[bad & shard.alive] = reason


@dataclass(frozen=True)
class StageFolder:
    """Where a stage writes. With `primary`, that output lies at the root, for single verbs."""

    path: str
    stage: str
    primary: str | None = None
    elsewhere: tuple[tuple[str, str], ...] = ()
    """Outputs that lie in folders of their own: their names, and where."""
    facts: tuple[tuple[str, Json], ...] = ()
    """What a single verb knows of all that it writes: attributes and their values."""
    deleted_after_use: tuple[str, ...] = ()
    """Outputs whose files may be gone, since the run that made them needs them no more."""

    def output(self, name: str) -> str:
        """Folder of one output."""
        for other, path in self.elsewhere:
            if name == other:
                return path
        if name == self.primary:
            return self.path
        return storage.join(self.path, f"_{name}" if self.primary else name)

    @property
    def scratch(self) -> str:
        """Folder for what the stage needs until it has finished."""
        return storage.join(self.path, "_scratch")


@dataclass(frozen=True)
class StageInputs:
    """What a `DatasetStage` may read."""

    pool: Pool
    sets: dict[str, Pool] = field(default_factory=dict)
    """Benchmarks, seed sets and sets taken as they are, by name."""
    seed: int = 0
    base: tuple[Pool, ...] = ()
    """What the same stage kept in earlier deliveries, for stages that compare with them."""
    followers: tuple["ShardStage", ...] = ()
    """Filters right behind this one, which look at the images that it decodes."""
    shared_scores: str | None = None
    """Folder of what one of several filters measured for those behind it."""


@dataclass(frozen=True)
class Limit:
    """What a score must be for a row to stay: `Limit("short_side", ">=", "min_side", "too_small")`.

    A score that is not known (NaN) passes, and so does any where the setting is null.
    """

    score: str
    """Column of the decisions."""
    keeps: Literal["<", "<=", ">", ">="]
    """How the score of a row that stays compares with the setting."""
    setting: str
    """Field of the stage that holds the threshold."""
    reason: str
    """Why the others are dropped."""

    def judge(self, shard: "Shard", scores: np.ndarray, threshold: float | None) -> None:
        """Record the scores of a shard, and drop the rows that are beyond a threshold."""
        if threshold is not None:
            shard.record_score(scores, threshold)
            reject(shard, _BEYOND[self.keeps](scores, threshold), self.reason)


_BEYOND = {"<": np.greater_equal, "<=": np.greater, ">": np.less_equal, ">=": np.less}


class Stage(Settings, ABC):
    """Settings of a stage, and what it promises."""

    version: ClassVar[int] = 1
    """Raised when the same settings and inputs would give another content."""
    reasons: ClassVar[tuple[str, ...]] = ()
    """All reasons for which this stage drops rows; NAME in `leak:NAME` is a set's name."""
    on_sets: ClassVar[bool] = False
    """Whether benchmarks and seed sets pass this stage too, with the same settings."""
    on_union: ClassVar[bool] = False
    """Whether the stage sees the pool together with the sets taken as they are."""
    compares_with_previous: ClassVar[bool] = False
    """Whether the stage compares its rows with what earlier deliveries kept."""
    limits: ClassVar[tuple[Limit, ...]] = ()
    """What each score is judged by; a stage with one score may leave it to `record_score`."""
    fetches: ClassVar[bool] = False
    """Whether it fetches what URLs name: sets that are no list of URLs do not pass it."""
    judges_images: ClassVar[bool] = False
    """Whether it judges each image by itself, so that a single image can be asked about."""
    compares_rows: ClassVar[bool] = False
    """Whether it compares rows with each other: its time grows faster than their number."""
    runs_on_gpus: ClassVar[bool] = False
    """Whether GPUs do its work where there are any."""
    checks_benchmarks: ClassVar[bool] = False
    """Whether the sets that it names are benchmarks: compared with, and never taken."""
    shows_dropped: ClassVar[Literal["clear", "veiled", "hidden"]] = "clear"
    """How people see what it drops: as it is, blurred until they click, or never."""

    @classmethod
    def name(cls) -> str:
        """The stage's name: that of its file."""
        return cls.__module__.rpartition(".")[2]

    def required_columns(self) -> tuple[str, ...]:
        """Columns that the stage reads."""
        return ()

    def optional_columns(self) -> tuple[str, ...]:
        """Columns that the stage reads where an earlier stage made them, such as face boxes."""
        return ()

    def set_names(self) -> tuple[str, ...]:
        """Names of the benchmarks and seed sets that the stage reads."""
        return ()

    def outputs(self) -> dict[str, pa.Schema]:
        """Side-cars that the stage writes shard by shard, id first."""
        return {}

    def decision_columns(self) -> pa.Schema:
        """The stage's own columns in its decisions."""
        return pa.schema([])

    def output_columns(self) -> dict[str, tuple[str, ...]]:
        """Names of the columns of each output, known without opening any model."""
        made = {name: tuple(schema.names) for name, schema in self.outputs().items()}
        return {**made, DECISIONS: tuple(self.decision_columns().names)}

    def varying_outputs(self) -> tuple[str, ...]:
        """Outputs that differ from run to run (fetch times): not inputs of any key."""
        return ()

    def resources(self) -> Resources:
        """What one shard's task needs."""
        return Resources()

    def settled(self, engine: Engine) -> Self:
        """The stage with settings that depend on the machine, such as `auto`, as they are there.

        Asked once for a work folder, whose later runs keep the answer.
        """
        return self

    def informed(self, engine: Engine) -> Self:
        """The stage with what its key and its outputs need to know of models, told by a worker."""
        return self

    def fingerprint(self) -> str:
        """What the content depends on beside settings and inputs: weights, lists, files."""
        return ""

    def attributes(self) -> dict[str, dict[str, Json]]:
        """What is true of each output as a whole, such as an embedding space."""
        return {}


class ShardStage(Stage):
    """A stage that judges each row from its own shard."""

    def bound(self, inputs: StageInputs) -> Self:
        """The stage with what it reads beside its shard, such as seed sets."""
        return self

    def open(self) -> Any:
        """Make what a worker needs for all shards, such as a model."""
        return None

    def figures(self) -> Figures:
        """Figures for the report, told after all shards."""
        return {}

    @abstractmethod
    def process(self, shard: Shard, opened: Any) -> None:
        """Judge the rows of one shard."""


class DatasetStage(Stage):
    """A stage that must see all rows; it sends its own tasks to the engine."""

    @abstractmethod
    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> Figures:
        """Do the work and commit every shard through `ledger.commit_shard`.

        Gives figures for the report, such as measured recall.
        """
