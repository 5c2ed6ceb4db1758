"""The live rows of a flow of stages: side-cars that lie shard by shard beside each other.

Shard i of every side-car belongs to shard i of the images. Each decisions table holds only rows
that were alive before its stage, so the last one alone says what is alive now.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.dataset import Dataset
from curation.digest import digest_of
from curation.errors import LedgerError, SchemaError
from curation.schema import ID, KEEP, column_type


@dataclass(frozen=True)
class Pool:
    """Side-cars by name, and the decisions that say which rows are alive."""

    name: str
    """Name of the flow: "pool", or that of a seed set or benchmark."""
    layers: dict[str, Dataset]
    """Side-cars by output name, oldest first; a later one hides columns of earlier ones."""
    decisions: Dataset | None = None
    """The last stage's decisions; None means that every row is alive."""

    @classmethod
    def of(cls, dataset: Dataset, name: str = "pool") -> "Pool":
        """A pool of one data set, all of whose rows are alive."""
        return cls(name, {name: dataset})

    def with_stage(self, outputs: dict[str, Dataset], decisions: Dataset) -> "Pool":
        """The pool after a stage: its side-cars on top, its decisions in force."""
        return replace(self, layers={**self.layers, **outputs}, decisions=decisions)

    def with_layer(self, name: str, side_car: Dataset) -> Self:
        """The pool with one more side-car on top."""
        return replace(self, layers={**self.layers, name: side_car})

    def only(self, layer: str) -> "Pool":
        """The live rows with the columns of one side-car, such as one of several embeddings.

        Raises:
            SchemaError: there is no such side-car.
        """
        if layer not in self.layers:
            raise SchemaError(
                f"{self.name}: no side-car '{layer}'; there are: {', '.join(self.layers)}"
            )
        return replace(self, layers={layer: self.layers[layer]})

    @property
    def has_rows(self) -> bool:
        """Whether a stage has made rows yet; not so before ingest."""
        return bool(self.layers)

    def layer(self, name: str) -> Dataset:
        """One side-car.

        Raises:
            SchemaError: there is no such side-car.
        """
        return self.only(name).layers[name]

    def datasets(self) -> list[Dataset]:
        """All that is read of it: side-cars and decisions."""
        return [*self.layers.values(), *([self.decisions] if self.decisions else [])]

    def locate(self, index: int) -> tuple["Pool", int]:
        """The flow that a shard belongs to, and its number there."""
        return self, index

    @property
    def columns(self) -> list[str]:
        """Names of all columns, id first."""
        names = [name for layer in self.layers.values() for name in layer.columns]
        return list(dict.fromkeys([ID, *names]))

    @property
    def num_shards(self) -> int:
        """Number of shards, the same for every side-car."""
        return self._rows().num_shards

    @property
    def num_rows(self) -> int:
        """Live rows."""
        return int(self.shard_rows().sum())

    def shard_rows(self) -> np.ndarray:
        """(S,) int64: live rows of each shard."""
        infos = self._rows().manifest.shards
        counts = [info.num_rows if self.decisions is None else info.num_kept for info in infos]
        return np.array(counts, np.int64)

    def fingerprint(self, columns: Sequence[str] | None = None) -> str:
        """Digest of the live rows, of the side-cars that give the columns, and of their shards."""
        used = self._layers_of(self.columns if columns is None else columns)
        parts = [self.layers[name].manifest.content_digest for name in sorted(used)]
        if self.decisions is not None:
            parts.append(self.decisions.manifest.content_digest)
        layout = [shard.num_rows for shard in self._rows().manifest.shards]
        return digest_of(self.name, parts, layout)

    def read(self, index: int, columns: Sequence[str]) -> pa.Table:
        """Live rows of one shard: id, then the columns asked for, in their first order.

        Raises:
            SchemaError: no side-car has a column.
        """
        wanted = [name for name in dict.fromkeys(columns) if name != ID]
        live = self.live_ids(index)
        arrays = self.read_columns(index, wanted, live)
        return pa.table({ID: live, **{name: arrays[name] for name in wanted}})

    def read_columns(
        self, index: int, columns: list[str], live: pa.ChunkedArray
    ) -> dict[str, pa.ChunkedArray]:
        """Columns of one shard for some of its ids, given in the shard's order."""
        arrays: dict[str, pa.ChunkedArray] = {}
        for layer, names in self._layers_of(columns).items():
            arrays.update(_read_layer(self.layers[layer], index, names, live))
        return arrays

    def live_ids(self, index: int) -> pa.ChunkedArray:
        """Ids of the live rows of one shard, in order."""
        if self.decisions is None:
            return self._rows().read_shard(index, [ID])[ID]
        verdicts = self.decisions.read_shard(index, [ID, KEEP])
        return verdicts.filter(verdicts[KEEP])[ID]

    def _layers_of(self, columns: Sequence[str]) -> dict[str, list[str]]:
        """Which side-car gives which columns: the latest that has them."""
        found: dict[str, list[str]] = {}
        for column in columns:
            if column == ID:
                continue
            having = [name for name, layer in self.layers.items() if column in layer.columns]
            if not having:
                raise SchemaError(
                    f"{self.name}: column '{column}' is missing; an earlier stage must add it; "
                    f"there are: {', '.join(self.columns)}"
                )
            found.setdefault(having[-1], []).append(column)
        return found

    def _rows(self) -> Dataset:
        return self.decisions if self.decisions is not None else next(iter(self.layers.values()))


@dataclass(frozen=True)
class UnionPool(Pool):
    """The live rows of several flows behind each other: their shards keep their order.

    A column that a part lacks reads as null there.
    """

    parts: tuple[Pool, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Names of all columns of all parts."""
        own = [name for layer in self.layers.values() for name in layer.columns]
        inherited = [name for part in self.parts for name in part.columns]
        return list(dict.fromkeys([ID, *inherited, *own]))

    @property
    def num_shards(self) -> int:
        """Shards of all parts."""
        return sum(part.num_shards for part in self.parts)

    def only(self, layer: str) -> "UnionPool":
        """The live rows with one side-car of every part."""
        return replace(self, parts=tuple(part.only(layer) for part in self.parts), layers={})

    @property
    def has_rows(self) -> bool:
        """Whether any part has rows."""
        return any(part.has_rows for part in self.parts)

    def layer(self, name: str) -> Dataset:
        """One side-car of the first part, which speaks for all: they passed the same stages."""
        return self.parts[0].layer(name)

    def datasets(self) -> list[Dataset]:
        """Those of all parts, and what came after them."""
        return [*super().datasets(), *(one for part in self.parts for one in part.datasets())]

    def shard_rows(self) -> np.ndarray:
        """(S,) int64: live rows of each shard."""
        if self.decisions is not None:
            return super().shard_rows()
        return np.concatenate([part.shard_rows() for part in self.parts]).astype(np.int64)

    def fingerprint(self, columns: Sequence[str] | None = None) -> str:
        """Digest of the parts, and of what came after them."""
        parts = []
        for part in self.parts:
            having = None if columns is None else [c for c in columns if c in part.columns]
            parts.append(part.fingerprint(having))
        own = [layer.manifest.content_digest for layer in self.layers.values()]
        decided = self.decisions.manifest.content_digest if self.decisions is not None else ""
        return digest_of(self.name, parts, own, decided)

    def live_ids(self, index: int) -> pa.ChunkedArray:
        """Ids of the live rows of one shard, in order."""
        if self.decisions is not None:
            return super().live_ids(index)
        part, local = self.locate(index)
        return part.live_ids(local)

    def read_columns(
        self, index: int, columns: list[str], live: pa.ChunkedArray
    ) -> dict[str, pa.ChunkedArray]:
        """Columns of one shard, from what came after the union or from the part itself."""
        own = [c for c in columns if any(c in layer.columns for layer in self.layers.values())]
        arrays = super().read_columns(index, own, live)
        part, local = self.locate(index)
        inherited = [c for c in columns if c not in own and c in part.columns]
        arrays.update(part.read_columns(local, inherited, live))
        for name in columns:
            if name not in arrays:
                arrays[name] = pa.chunked_array([pa.nulls(len(live), column_type(name))])
        return arrays

    def locate(self, index: int) -> tuple[Pool, int]:
        """The part that a shard belongs to, and its number there."""
        for part in self.parts:
            if index < part.num_shards:
                return part, index
            index -= part.num_shards
        raise IndexError(f"{self.name} has {self.num_shards} shards")


def _read_layer(
    layer: Dataset, index: int, names: list[str], live: pa.ChunkedArray
) -> dict[str, pa.ChunkedArray]:
    """Columns of one side-car's shard for the live ids; of no live rows, only their types."""
    if len(live) == 0:
        with layer.open_shard(index) as file:
            empty = file.schema_arrow.empty_table()
        return {name: empty[name] for name in names}
    table = layer.read_shard(index, [ID, *names])
    if not table[ID].equals(live):
        rows = pc.index_in(live, value_set=table[ID].combine_chunks())
        if rows.null_count:
            missing = live.filter(pc.is_null(rows))[0].as_py()
            raise LedgerError(f"{layer.shard_path(index)}: row {missing} is alive but missing")
        table = table.take(rows)
    return {name: table[name] for name in names}
