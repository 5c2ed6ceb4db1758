"""The components of a joined threshold graph: one label a row, and how large they are."""

from dataclasses import dataclass

import numpy as np

from curation.errors import StageError
from curation.neighbors.join.join import Joined
from curation.neighbors.kernels.components import component_sizes, connected_components
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.row_files import RowFiles

_ALWAYS_ALLOWED = 1000
"""Rows of a component that fail no run, however small the pool."""


@dataclass(frozen=True)
class ThresholdGraph:
    """A join, and where the labels of its components lie."""

    joined: Joined
    labels_path: str

    @property
    def files(self) -> RowFiles:
        """The arranged rows."""
        return self.joined.join.files

    def labels(self, partition: int) -> np.ndarray:
        """(N,): label of the component of each row of one partition, its smallest position."""
        start, stop = self.files.starts[partition : partition + 2]
        return ColumnFile.open(self.labels_path).read(["label"], start, stop)[0]


@dataclass(frozen=True)
class ComponentSizes:
    """How large components are."""

    num_components: int
    """Components of at least two rows."""
    num_members: int
    """Rows in them."""
    largest: int
    """Rows of the largest, which may be a row alone."""


def connect(joined: Joined, path: str) -> tuple[ThresholdGraph, ComponentSizes]:
    """Label the components of a join. path: of the labels, one number a row."""
    labels = connected_components(joined.join.files.num_rows, joined.edges())
    write_columns(path, {"label": labels})
    sizes = component_sizes(labels)
    many = sizes[sizes > 1]
    largest = int(sizes.max(initial=0))
    return ThresholdGraph(joined, path), ComponentSizes(len(many), int(many.sum()), largest)


def largest_allowed(num_rows: int, max_share: float) -> int:
    """Rows that a component may have."""
    return max(_ALWAYS_ALLOWED, int(max_share * num_rows))


def check_largest(
    sizes: ComponentSizes, num_rows: int, max_share: float, proposed: float | None = None
) -> None:
    """Guard against chains that join half of the pool.

    proposed: threshold above which rows have no unrelated ones to speak of, where it is known.

    Raises:
        StageError: a component is larger than the share allowed, and than 1,000 rows.
    """
    allowed = largest_allowed(num_rows, max_share)
    if sizes.largest > allowed:
        named = "" if proposed is None else f" to {proposed:g} (--threshold auto)"
        raise StageError(
            f"the largest component holds {sizes.largest} of {num_rows} rows, allowed are "
            f"{allowed}: raise the threshold{named}, use linkage 'representative', or allow it "
            "with max_component_share (--max-component-share)"
        )
