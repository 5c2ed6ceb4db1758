"""From a joined threshold graph to a verdict on each row, back in its own shard.

Rows of components travel by component (`Gather`), are judged together (`Review`), and their
verdicts travel on by the pool's shards. Only labels, one number a row, pass through the driver.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation import storage
from curation.errors import StageError
from curation.exchange import Exchange
from curation.neighbors.dedup.components import component_sizes, connected_components
from curation.neighbors.join.join import Joined
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import RowFiles, map_array, write_array
from curation.neighbors.rows.shard_batches import BatchExchange
from curation.pool import Pool
from curation.stage import Engine

_ROWS_PER_BUCKET = (1 << 15, 1 << 18)
"""At least and at most: few rows have several buckets, so that several workers judge them."""
_BUCKETS = 1 << 12
"""So many at most, as long as buckets are not too large."""
_ID = pa.binary(16)


@dataclass(frozen=True)
class Graph:
    """The components of a joined threshold graph."""

    joined: Joined
    labels_path: str

    @property
    def files(self) -> RowFiles:
        """The arranged rows."""
        return self.joined.join.files

    def labels(self, partition: int) -> np.ndarray:
        """(N,) int64: label of the component of each row of one partition."""
        start, size = self.files.starts[partition], self.files.size(partition)
        return map_array(self.labels_path, "int64", 8 * start, (size,))


@dataclass(frozen=True)
class Sizes:
    """How large components are."""

    num_components: int
    """Components of at least two rows."""
    num_members: int
    """Rows in them."""
    largest: int


def connect(joined: Joined, path: str) -> tuple[Graph, Sizes]:
    """Label the components of a join; labels are written to a file by position."""
    labels = connected_components(joined.join.files.num_rows, joined.edges())
    sizes = component_sizes(labels)
    with storage.open_whole(path) as file:
        for start in range(0, len(labels), 1 << 20):
            file.write(labels[start : start + (1 << 20)].astype(np.int64).tobytes())
    many = sizes[sizes > 1]
    largest = int(many.max()) if len(many) else min(1, len(labels))
    return Graph(joined, path), Sizes(len(many), int(many.sum()), largest)


def check_largest(sizes: Sizes, num_rows: int, max_share: float) -> None:
    """Guard against chains that join half of the pool.

    Raises:
        StageError: a component is larger than the share allowed, and than 1,000 rows.
    """
    allowed = max(1000, int(max_share * num_rows))
    if sizes.largest > allowed:
        raise StageError(
            f"the largest component holds {sizes.largest} of {num_rows} rows, allowed are "
            f"{allowed}: raise the threshold, use linkage 'representative', or allow it with "
            "max_component_share (--max-component-share)"
        )


class Judge(ABC):
    """Decides on the members of whole components."""

    def is_published(self, members: pa.Table) -> np.ndarray:
        """(M,) bool: members that come first in their component, whatever their size."""
        return np.zeros(members.num_rows, bool)

    @abstractmethod
    def judge(self, members: pa.Table, files: RowFiles) -> tuple[pa.Table, dict[str, Any]]:
        """Give verdicts (with set, shard, row, position, keep and more), and figures.

        members: rows sorted by label, published ones first, then by pixels and bytes downwards,
        then by id.
        """


@dataclass(frozen=True)
class Reviewed:
    """Verdicts on the rows of components, by run of shards of the pool."""

    verdicts: Exchange
    num_buckets: int
    facts: tuple[dict[str, Any], ...]
    folder: str

    def read(self, batch: int) -> pa.Table:
        """Verdicts on rows of one batch of shards."""
        return self.verdicts.read(batch, self.num_buckets)

    def dropped(self) -> Iterator[np.ndarray]:
        """Positions of dropped rows, a bucket at a time: (B,) int64."""
        for bucket in range(self.num_buckets):
            path = dropped_path(self.folder, bucket)
            yield np.frombuffer(storage.read_bytes(path), np.int64)


def review(graph: Graph, judge: Judge, folder: str, pool: Pool, engine: Engine) -> Reviewed:
    """Bring the members of each component together, judge them, and send verdicts to shards."""
    files = graph.files
    num_buckets = 1 + files.num_rows // int(np.clip(files.num_rows // _BUCKETS, *_ROWS_PER_BUCKET))
    members = Exchange(storage.join(folder, "members"), num_buckets)
    gather = _Gather(graph, members)
    run_file_tasks(engine, gather, files.num_partitions, members.folder, "gather components")
    verdicts = BatchExchange.of(pool, storage.join(folder, "verdicts"))
    work = _Review(files, judge, members, verdicts, files.num_partitions)
    facts = run_file_tasks(engine, work, num_buckets, verdicts.folder, "judge components")
    return Reviewed(verdicts, num_buckets, tuple(facts), verdicts.folder)


def dropped_path(folder: str, bucket: int) -> str:
    """File of the positions that one bucket's review dropped."""
    return storage.join(folder, f"dropped-{bucket:06d}.bin")


@dataclass(frozen=True)
class _Gather(FileTask[None, None]):
    """The members of components among one partition's rows, by component."""

    graph: Graph
    members: Exchange

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        files = self.graph.files
        twins, similarities = self.graph.joined.best(item)
        rows = np.flatnonzero(twins >= 0)
        labels = np.asarray(self.graph.labels(item)[rows])
        table = files.rows(item).take(pa.array(rows)).drop_columns(["first", "list"])
        columns = {
            "label": pa.array(labels),
            "position": pa.array(rows + files.starts[item]),
            "id": ids_array(files.ids(item)[rows]),
            "twin": ids_array(files.gather("ids", np.asarray(twins[rows]))),
            "twin_set": pa.array(self._sets_of(np.asarray(twins[rows]))),
            "similarity": pa.array(np.asarray(similarities[rows])),
        }
        for name, values in columns.items():
            table = table.append_column(name, values)
        # Those of neighbouring labels are judged together: their vectors lie near each other.
        buckets = labels * self.members.num_buckets // files.num_rows
        self.members.write(item, table, buckets)
        return TaskResult([self.members.mapped_path(item)], None)

    def _sets_of(self, twins: np.ndarray) -> np.ndarray:
        """(M,) int16: the twins' sets, where rows of several are joined for duplicates; else 0."""
        if self.graph.joined.join.apart is None:
            return np.zeros(len(twins), np.int16)
        return self.graph.files.sets(twins)


@dataclass(frozen=True)
class _Review(FileTask[None, dict[str, Any]]):
    """The judgement of the components of one bucket."""

    files: RowFiles
    judge: Judge
    members: Exchange
    verdicts: BatchExchange
    num_items: int

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        members = self.members.read(item, self.num_items)
        order = rule_order(members, self.judge.is_published(members))
        members = members.take(pa.array(order)).combine_chunks()
        verdicts, facts = self.judge.judge(members, self.files)
        of_pool = verdicts.filter(pa.array(np.asarray(verdicts["set"]) == 0))
        keep = of_pool["keep"].to_numpy(zero_copy_only=False)
        path = dropped_path(self.verdicts.folder, item)
        write_array(path, np.asarray(of_pool["position"])[~keep])
        self.verdicts.send(item, of_pool.drop_columns(["set", "position"]))
        return TaskResult([path, self.verdicts.mapped_path(item)], facts)


def rule_order(members: pa.Table, published: np.ndarray) -> np.ndarray:
    """(M,) order of members: by label, published, most original pixels, most bytes, smallest id.

    published: (M,) bool. Size is unknown (0) where a source does not record it; then the smallest
    id alone decides.
    """
    ids = id_bytes(members["id"]).view(">u8").reshape(-1, 2)
    keys = [np.asarray(members[name]) for name in ("num_bytes", "pixels", "label")]
    return np.lexsort((ids[:, 1], ids[:, 0], -keys[0], -keys[1], ~published, keys[2]))


def ids_array(ids: np.ndarray) -> pa.Array:
    """(N, 16) uint8 as N binaries of 16 bytes."""
    raw = np.ascontiguousarray(ids)
    return pa.FixedSizeBinaryArray.from_buffers(_ID, len(raw), [None, pa.py_buffer(raw)])


def id_bytes(column: pa.ChunkedArray) -> np.ndarray:
    """(N, 16) uint8: what `ids_array` packed."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], _ID)
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    return data[16 * array.offset :][: 16 * len(array)].reshape(-1, 16)
