"""Probes turned around: for each partition, which rows come to which of its lists.

A visit is a pair (list, position) of 12 bytes, never a copy of a vector. `Invert` tasks, one a
partition of visitors, write their visits sorted by list with an offset table, so that a partition
reads its visitors by range. N rows, P partitions, V visits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.routes import Routes
from curation.neighbors.rows.row_files import RowFiles
from curation.stage import Engine


@dataclass(frozen=True)
class Probes:
    """Files of visits, by the partition that the visitors live in."""

    files: RowFiles
    """The rows that are visited."""
    folder: str
    num_sources: int
    """Partitions that the visitors live in."""

    def path(self, partition: int) -> str:
        """File of the visits made by the rows of one partition."""
        return storage.join(self.folder, f"visits-{partition:06d}.bin")

    def write(self, partition: int, lists: np.ndarray, positions: np.ndarray) -> None:
        """Write visits. lists: (V,) int32, positions: (V,) int64 of the visitors."""
        order = np.argsort(lists, kind="stable")
        lists = lists[order]
        bounds = np.searchsorted(lists, self.files.list_starts)  # (P + 1,)
        columns = {"bounds": bounds, "positions": positions[order], "lists": lists}
        write_columns(self.path(partition), columns)

    def of(self, partition: int) -> tuple[np.ndarray, np.ndarray]:
        """Lists (V,) int32 and visitors (V,) int64 that come to one partition, by list."""
        lists, positions = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for source in range(self.num_sources):
            file = ColumnFile.open(self.path(source))
            start, stop = file["bounds"][partition : partition + 2].tolist()
            some = file.read(["positions", "lists"], start, stop)
            positions.append(some[0])
            lists.append(some[1])
        found = np.concatenate(lists)
        order = np.argsort(found, kind="stable")
        return found[order], np.concatenate(positions)[order]


@dataclass(frozen=True)
class _Invert(FileTask[None, None]):
    visits: Probes
    rows_of: Any
    """Gives the numbers of the rows of a partition that go visiting."""
    margin: float

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        files = self.visits.files
        rows = self.rows_of(item)
        who, lists = (
            Routes.read(files.path("routes", item), files.size(item)).take(rows).within(self.margin)
        )
        self.visits.write(item, lists, rows[who] + files.starts[item])
        return TaskResult([self.visits.path(item)], None)


def invert(files: RowFiles, rows_of: Any, margin: float, folder: str, engine: Engine) -> Probes:
    """Turn the visits of some rows around that are no farther than a margin.

    rows_of: a picklable function of a partition that gives row numbers in it, (M,) int64.
    """
    visits = Probes(files, folder, files.num_partitions)
    work = _Invert(visits, rows_of, margin)
    run_file_tasks(engine, work, files.num_partitions, folder, "turn visits around")
    return visits
