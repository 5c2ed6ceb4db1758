"""Which way to compare: how rows are laid out, and which join runs over them."""

from collections.abc import Sequence

from curation.errors import ConfigError, StageError
from curation.neighbors.join import Join, Joined, join_exhaustively
from curation.neighbors.partition import IdRanges, Scattered, arrange
from curation.neighbors.products import Products
from curation.neighbors.row_files import RowFiles
from curation.neighbors.vectors import VectorSource, check_spaces, check_widths
from curation.pool import Pool
from curation.stage import Engine, StageInputs

EXHAUSTIVE_LIMIT = 200_000
"""Rows up to which all are compared with all."""

_ROWS_PER_PARTITION = 25_000


def sources_of(
    inputs: StageInputs,
    names: Sequence[str],
    layer: str,
    column: str,
    *,
    assume_same_space: bool,
) -> tuple[VectorSource, ...]:
    """The pool's vectors, then those of the named sets, all of one space.

    Raises:
        ConfigError: there is no set of a name.
        SpaceError: embeddings of different spaces.
    """
    pools = [inputs.pool, *(_set_of(inputs, name) for name in names)]
    sources = tuple(VectorSource(pool, layer, column) for pool in pools)
    check_spaces(sources, assume_same_space=assume_same_space)
    return sources


def lay_out(sources: Sequence[VectorSource], folder: str, engine: Engine) -> RowFiles:
    """Arrange the rows of all sources for joins.

    Raises:
        StageError: more rows than can be compared exhaustively.
    """
    num_rows = sum(source.pool.num_rows for source in sources)
    if num_rows > EXHAUSTIVE_LIMIT:
        raise StageError(
            f"{num_rows} rows are to be compared; up to {EXHAUSTIVE_LIMIT} are allowed until the "
            "partitioned comparison lands"
        )
    count = 1 + num_rows // _ROWS_PER_PARTITION
    return arrange(sources, Scattered(count), range(count + 1), folder, engine)


def lay_out_queries(source: VectorSource, rows: RowFiles, folder: str, engine: Engine) -> RowFiles:
    """Arrange queries in the order of their ids.

    Raises:
        SpaceError: their width differs from that of the rows that they search.
    """
    count = 1 + source.pool.num_rows // _ROWS_PER_PARTITION
    queries = arrange([source], IdRanges(count), range(count + 1), folder, engine)
    check_widths([(source.dataset.path, queries.width), ("the pool", rows.width)])
    return queries


def self_join(
    files: RowFiles, threshold: float, folder: str, engine: Engine, active: str | None = None
) -> Joined:
    """Join arranged rows with themselves above a threshold."""
    join = Join(files, threshold, folder, Products.best_for(files.num_rows), active)
    return join_exhaustively(join, engine)


def _set_of(inputs: StageInputs, name: str) -> Pool:
    if name not in inputs.sets:
        known = ", ".join(sorted(inputs.sets)) or "none"
        raise ConfigError(f"there is no set '{name}'; there are: {known}")
    return inputs.sets[name]
