"""DuckDB over our Parquet: bounded memory, only the columns asked for, texts only as parameters."""

import contextlib
import functools
import glob
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from curation import storage
from curation.dataset import Dataset
from curation.errors import ConfigError, DatasetError, StorageError
from embedder.errors import one_line

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from numpy.typing import NDArray

Row: TypeAlias = dict[str, Any]
"""Values by name of column."""
Json: TypeAlias = "dict[str, Json] | list[Json] | str | float | bool | None"
Value: TypeAlias = "str | float | bool | Sequence[str] | Sequence[int] | None"
"""What a query takes as a parameter."""

_MEMORY = "1500MB"
_THREADS = 2
_AS_NAMED = "hive_partitioning = false"
"""Folders called KEY=VALUE on the way to a file give its rows no columns."""


class Tables:
    """Some Parquet files as named views of one DuckDB connection."""

    def __init__(self, connection: "DuckDBPyConnection | None" = None) -> None:
        """connection: to a shared database in memory; to one of its own by default."""
        self._connection = connection or _database()
        self._is_shared = connection is not None
        self._connection.execute("set enable_progress_bar = false")
        self._remote = False
        self._files: dict[str, list[str]] = {}

    def __enter__(self) -> "Tables":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def add(
        self,
        name: str,
        *datasets: Dataset,
        labels: Sequence[Row] = (),
        shards: Sequence[int] | None = None,
    ) -> bool:
        """Make a view of the rows of some data sets, by name of column; False without files.

        labels: constant columns of each data set, such as the flow that its rows are of.
        shards: only these shards of it, as far as they hold rows.
        """
        parts = []
        for number, dataset in enumerate(datasets):
            files = _files_of(dataset, shards)
            if files:
                self._reach(dataset)
                extra = "".join(
                    f", {quoted(value)} as {column}"
                    for column, value in (labels[number] if labels else {}).items()
                )
                listed = ", ".join(quoted(file) for file in files)
                parts.append(f"select *{extra} from read_parquet([{listed}], {_AS_NAMED})")
        if not parts:
            return False
        self._files[name] = [file for one in datasets for file in _files_of(one, shards)]
        self.run(f"create or replace temp view {name} as {' union all by name '.join(parts)}")
        return True

    def confine(self, folder: str) -> None:
        """Let queries read nothing but what lies below a folder, and change no setting."""
        assert not self._is_shared, "others would be confined, too"
        below = f"{storage.full_path(folder)}/"
        allowed = ", ".join(quoted(one) for one in (below, glob.escape(below)))
        self.run(f"set allowed_directories = [{allowed}]")
        self.run("set enable_external_access = false")
        self.run("set lock_configuration = true")

    def attach(self, file: str, name: str) -> None:
        """Open a DuckDB file for writing; new tables are made in it."""
        self.run(f"attach {quoted(storage.full_path(file))} as {named(name)}")
        self.run(f"use {named(name)}")

    def run(self, query: str, parameters: Sequence[Value] = ()) -> "DuckDBPyConnection":
        """Run a statement."""
        with duckdb_errors():
            return self._connection.execute(query, list(parameters))

    def files(self, name: str) -> list[str]:
        """Files of a view that `add` made."""
        return self._files[name]

    def columns(self, name: str) -> dict[str, str]:
        """Names and DuckDB types of a view's columns."""
        return {row["column_name"]: row["column_type"] for row in self.rows(f"describe {name}")}

    def rows(self, query: str, parameters: Sequence[Value] = ()) -> list[Row]:
        """Run a query whose result is small; give its rows."""
        return list(self.batches(query, parameters))

    def batches(self, query: str, parameters: Sequence[Value] = ()) -> Iterator[Row]:
        """Run a query; give its rows one by one, without holding them all."""
        result = self.run(query, parameters)
        names = [column[0] for column in result.description or ()]
        block = [()]
        while block:
            with duckdb_errors():  # a damaged file may show only here
                block = result.fetchmany(1024)
            for values in block:
                yield dict(zip(names, values, strict=True))

    def columns_of(self, query: str, parameters: Sequence[Value] = ()) -> "dict[str, NDArray[Any]]":
        """Run a query; give its columns as NumPy arrays."""
        import numpy as np

        result = self.run(query, parameters)
        with duckdb_errors():
            return {name: np.asarray(values) for name, values in result.fetchnumpy().items()}

    def first(self, query: str, parameters: Sequence[Value] = ()) -> Row:
        """Run a query with one row."""
        return self.rows(query, parameters)[0]

    def _reach(self, dataset: Dataset) -> None:
        """Let DuckDB read object stores through fsspec."""
        if not storage.is_local(dataset.path) and not self._remote:
            import fsspec

            self._connection.register_filesystem(fsspec.filesystem(dataset.path.split("://")[0]))
            self._remote = True


def _database() -> "DuckDBPyConnection":
    import duckdb

    return duckdb.connect(
        config={
            "memory_limit": _MEMORY,
            "threads": _THREADS,
            "temp_directory": str(Path(tempfile.gettempdir()) / "curate-duckdb"),
            # nothing is fetched, and no name of a query is looked for among Python's variables
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
        }
    )


@functools.cache
def _shared_database(_pid: int) -> "DuckDBPyConnection":
    return _database()


@contextlib.contextmanager
def opened(dataset: Dataset | None) -> Iterator[Tables | None]:
    """A data set as the view `rows`; None where there is none, or it has no files."""
    if dataset is None:
        yield None
        return
    # one database a process: to start one takes longer than most questions
    shared = storage.is_local(dataset.path)
    with Tables(_shared_database(os.getpid()).cursor() if shared else None) as tables:
        yield tables if tables.add("rows", dataset) else None


def select(dataset: Dataset | None, query: str, parameters: Sequence[Value] = ()) -> list[Row]:
    """Rows of a query on the view `rows` of a data set; none where it has no files."""
    with opened(dataset) as tables:
        return tables.rows(query, parameters) if tables else []


@contextlib.contextmanager
def duckdb_errors() -> Iterator[None]:
    """Turn DuckDB's errors into ours."""
    import duckdb

    try:
        yield
    except duckdb.IOException as error:
        raise StorageError(one_line(error)) from error
    except duckdb.PermissionException as error:
        raise ConfigError(
            f"{one_line(error)}; `curate sql` reads the run alone: --allow-files lets it read more"
        ) from error
    except (duckdb.Error, UnicodeDecodeError) as error:
        raise DatasetError(f"query failed: {one_line(error)}") from error


def quoted(text: Value) -> str:
    """A value as an SQL literal."""
    if text is None:
        return "null"
    if isinstance(text, bool | int | float):
        return str(text)
    return "'" + str(text).replace("'", "''") + "'"


def named(column: str) -> str:
    """A column's name as an SQL identifier."""
    return '"' + column.replace('"', '""') + '"'


def plain(value: Any) -> Any:
    """A value as JSON holds it: numbers that are none become null, other things their text."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def host_of(column: str = "source") -> str:
    """SQL for the host of a URL; null for what is no URL."""
    pattern = "^[a-zA-Z]+://(?:[^/@]*@)?([^/:?#]+)"
    return f"nullif(regexp_extract({column}, '{pattern}', 1), '')"


def _files_of(dataset: Dataset, chosen: Sequence[int] | None = None) -> list[str]:
    """Paths of the shards that hold rows (DuckDB would open the empty ones, too)."""
    shards = dataset.manifest.shards
    numbers = range(len(shards)) if chosen is None else chosen
    filled = [i for i in numbers if shards[i].num_rows]
    if chosen is None:
        filled = filled or list(numbers)[:1]
    return [glob.escape(storage.full_path(dataset.shard_path(i))) for i in filled]
