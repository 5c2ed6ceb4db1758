"""Hits of seed sets: found by search or by cluster, written by id, and told to the pool's shards.

Q seeds, K images of each, C clusters, H hits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation import storage
from curation.config import Settings
from curation.dataset import ShardInfo, commit, write_shard
from curation.exchange import Exchange
from curation.neighbors.clusters.centroids import Centroids, copy_centroids, train_centroids
from curation.neighbors.dedup.judge_components import id_bytes, ids_array
from curation.neighbors.index.vector_index import VectorIndex, search_in
from curation.neighbors.kernels.id_hashes import hash_ids
from curation.neighbors.kernels.k_means import assign_exactly
from curation.neighbors.kernels.selection import ranks_within
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import RowFiles, write_array
from curation.neighbors.rows.shard_batches import BatchExchange, DecideBatch, of_shard
from curation.neighbors.search.matching import Matching
from curation.neighbors.search.search import Search
from curation.pool import Pool
from curation.schema import ids_from_bytes, schema_of
from curation.stage import Engine, Shard, reject

HITS = "hits"
HIT_COLUMNS = ("id", "seed_set", "rule", "seed_id", "rank", "similarity", "cluster")

_HITS_PER_SHARD = 1 << 18
_ROWS_PER_BUCKET = 1 << 18
_SPARE = 4
"""With on_collision next: candidates a seed are so many times k, and a few."""


class SeedRule(Settings):
    """How one seed set draws from the pool."""

    set: str
    """Name of the seed set."""
    rule: Literal["sample", "cluster"]
    """sample: nearest images of each seed. cluster: images of the clusters that seeds fall into."""
    k: int = Field(default=4, ge=1, le=10_000)
    """sample: images a seed."""
    per_cluster: int = Field(default=10_000, ge=1)
    """cluster: images from each cluster, at most."""
    min_hits: int = Field(default=4, ge=1)
    """cluster: seeds that a cluster must hold (the paper's "more than 3")."""
    cap: int = Field(default=1_000_000, ge=1)
    """cluster: images of the set, at most."""


@dataclass(frozen=True)
class Retrieval:
    """The search for hits of some seed sets in an arranged pool."""

    rules: tuple[SeedRule, ...]
    index: VectorIndex
    """The pool."""
    queries: tuple[RowFiles, ...]
    """The seeds of each rule's set, in the order of their ids."""
    num_clusters: int
    on_collision: Literal["keep", "next"]
    seed: int
    scratch: str
    given_centroids: str | None = None
    """Centroids of an earlier `cluster`."""

    @property
    def pool(self) -> RowFiles:
        """The arranged rows of the pool."""
        return self.index.files

    @property
    def num_buckets(self) -> int:
        """Buckets over which clusters are spread."""
        return 1 + self.pool.num_rows // _ROWS_PER_BUCKET

    def numbered(self, rule: str) -> list[int]:
        """Numbers of the sets that follow a rule."""
        return [number for number, one in enumerate(self.rules) if one.rule == rule]

    def run(self, hits: "HitFiles", engine: Engine) -> dict[str, Any]:
        """Find all hits; give the figures of each set."""
        if not self.pool.num_rows:
            for item in range(hits.num_items):
                hits.write(item, _no_hits())
            return {"sets": {}}
        figures = {}
        for number in self.numbered("sample"):
            figures[self.rules[number].set] = self._sample(number, hits, engine)
        if self.numbered("cluster"):
            figures |= self._cluster(hits, engine)
        return {"sets": figures}

    def candidates_of(self, number: int) -> int:
        """Neighbours to look for: k, or more where taken ones are passed over."""
        wanted = self.rules[number].k
        if self.on_collision == "next":
            wanted = _SPARE * wanted + _SPARE
        return max(1, min(wanted, self.pool.num_rows))

    def _sample(self, number: int, hits: "HitFiles", engine: Engine) -> dict[str, Any]:
        rule, folder = self.rules[number], storage.join(self.scratch, f"search-{number}")
        k = self.candidates_of(number)
        search, figures = search_in(self.index, self.queries[number], k, folder, engine)
        if self.on_collision == "next":
            figures |= Matching(search, rule.k).run(engine)
        work = _SampleHits(self, search, hits, number)
        facts = run_file_tasks(
            engine, work, search.queries.num_partitions, f"{search.folder}/hits", "write hits"
        )
        found = sum(fact["hits"] for fact in facts)
        wanted = rule.k * search.queries.num_rows
        counts = {"seeds": search.queries.num_rows, "hits": found, "shortfall": wanted - found}
        return {**counts, **figures}

    def _cluster(self, hits: "HitFiles", engine: Engine) -> dict[str, Any]:
        folder = storage.join(self.scratch, "clusters")
        centroids = self._centroids(folder, engine)
        counts = {n: self._count(n, centroids, folder, engine) for n in self.numbered("cluster")}
        hot_path = storage.join(folder, "hot.bin")
        hot = np.stack([counts[n] >= self.rules[n].min_hits for n in counts])  # (sets, C)
        write_array(hot_path, hot)
        clusters = Exchange(storage.join(folder, "by-cluster"), self.num_buckets)
        assign = _AssignRows(self.pool, centroids, hot_path, len(hot), clusters)
        run_file_tasks(
            engine, assign, self.pool.num_partitions, clusters.folder, "assign to clusters"
        )
        figures = {}
        for line, number in enumerate(counts):
            choose = _Choose(self, number, line, hot_path, centroids.count, clusters)
            chosen = choose.run(engine)
            bound = cap_bound(choose, self.rules[number].cap)
            facts = run_file_tasks(
                engine,
                _ClusterHits(choose, hits, bound),
                self.num_buckets,
                f"{choose.folder}/hits",
                "write hits",
            )
            figures[self.rules[number].set] = {
                "seeds": self.queries[number].num_rows,
                "clusters": int(hot[line].sum()),
                "before_cap": chosen,
                "hits": sum(fact["hits"] for fact in facts),
            }
        return figures

    def _centroids(self, folder: str, engine: Engine) -> Centroids:
        if self.given_centroids is None:
            return train_centroids(self.pool, self.num_clusters, folder, engine, seed=self.seed)
        return copy_centroids(self.given_centroids, self.pool.width, folder)

    def _count(self, number: int, centroids: Centroids, folder: str, engine: Engine) -> np.ndarray:
        """(C,) int64: seeds of one set in each cluster."""
        work = _CountSeeds(self.queries[number], centroids, f"{folder}/seeds-{number}")
        items = self.queries[number].num_partitions
        run_file_tasks(engine, work, items, work.folder, "count seeds")
        counts = [np.frombuffer(storage.read_bytes(work.path(i)), np.int64) for i in range(items)]
        return np.asarray(np.sum(counts, axis=0))


@dataclass(frozen=True)
class HitFiles:
    """Hits on their way to runs of the pool's shards, and to shards of their own by id."""

    by_run: BatchExchange
    by_id: Exchange
    first_items: tuple[int, ...]
    """Number of the first item of each set; at the end, that of all items."""
    set_names: tuple[str, ...]

    @classmethod
    def planned(cls, retrieval: Retrieval, pool: Pool) -> "HitFiles":
        """Number the items that will write hits, and choose the shards of the hits."""
        counts, expected = [], 0
        for rule, queries in zip(retrieval.rules, retrieval.queries, strict=True):
            sample = rule.rule == "sample"
            counts.append(queries.num_partitions if sample else retrieval.num_buckets)
            most = rule.k * queries.num_rows if sample else rule.cap
            expected += min(most, rule.k * queries.num_rows if sample else retrieval.pool.num_rows)
        folder = storage.join(retrieval.scratch, "hits")
        return cls(
            BatchExchange.of(pool, storage.join(folder, "by-run")),
            Exchange(storage.join(folder, "by-id"), 1 + expected // _HITS_PER_SHARD),
            tuple(int(first) for first in np.cumsum([0, *counts])),
            tuple(rule.set for rule in retrieval.rules),
        )

    @property
    def num_items(self) -> int:
        """Items that write hits."""
        return self.first_items[-1]

    def write(self, item: int, hits: pa.Table) -> list[str]:
        """Write one item's hits to both exchanges; give the files."""
        leading = id_bytes(hits["id"])[:, :4].copy().view(">u4")[:, 0].astype(np.uint64)
        buckets = (leading * np.uint64(self.by_id.num_buckets)) >> np.uint64(32)
        self.by_run.send(item, hits)
        self.by_id.write(item, hits, buckets.astype(np.int64))
        return [self.by_run.mapped_path(item), self.by_id.mapped_path(item)]


def write_hits(hits: HitFiles, folder: str, engine: Engine, attributes: dict[str, Any]) -> None:
    """Write the hits as a data set: sorted by id, set, seed and rank."""
    buckets = hits.by_id.num_buckets
    work = _WriteHits(hits, folder)
    facts = run_file_tasks(
        engine, work, buckets, f"{hits.by_id.folder}/written", "write hits by id"
    )
    infos = [ShardInfo.model_validate(fact) for fact in facts]
    commit(folder, schema_of(HIT_COLUMNS), infos, attributes)


@dataclass(frozen=True)
class _WriteHits(FileTask[None, dict[str, Any]]):
    """One shard of the hits."""

    hits: HitFiles
    folder: str

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        rows = self.hits.by_id.read(item, self.hits.num_items)
        rows = rows.take(pa.array(_order_of(rows, self.hits.set_names)))
        info = write_shard(self.folder, item, readable_hits(rows, self.hits.set_names))
        return TaskResult([storage.join(self.folder, info.name)], info.model_dump(mode="json"))


def _order_of(rows: pa.Table, set_names: Sequence[str]) -> np.ndarray:
    """(H,) hits by id, name of the set, seed and rank; Arrow's sort by texts takes their square."""
    ids, seeds = (np.ascontiguousarray(id_bytes(rows[one])).view(">u8") for one in ("id", "seed"))
    seeds = np.where((np.asarray(rows["cluster"]) < 0)[:, None], seeds, 0)  # (H, 2)
    names = np.argsort(np.argsort(np.array([*set_names, ""], object), kind="stable"))
    sets = names[np.asarray(rows["set"])]
    return np.lexsort((np.asarray(rows["rank"]), seeds[:, 1], seeds[:, 0], sets, *ids.T[::-1]))


def readable_hits(rows: pa.Table, set_names: Sequence[str]) -> pa.Table:
    """Hits with the columns that people read."""
    names = np.array([*set_names, ""], object)
    columns = {
        "id": ids_from_bytes(id_bytes(rows["id"])),
        "seed_set": names[np.asarray(rows["set"])],
        "rule": np.where(np.asarray(rows["cluster"]) < 0, "sample", "cluster").astype(object),
        "seed_id": _hex_or_null(rows),
        "rank": rows["rank"],
        "similarity": rows["similarity"],
        "cluster": _null_below_zero(rows["cluster"]),
    }
    return pa.table(columns, schema=schema_of(HIT_COLUMNS))


def _hex_or_null(rows: pa.Table) -> pa.Array:
    ids = np.array(ids_from_bytes(id_bytes(rows["seed"])).to_pylist(), object)
    ids[np.asarray(rows["cluster"]) >= 0] = None
    return pa.array(ids, pa.string())


def _null_below_zero(column: pa.ChunkedArray) -> pa.Array:
    values = np.asarray(column)
    return pa.array(values, pa.int32(), mask=values < 0)


def hit_table(
    pool: RowFiles,
    positions: np.ndarray,
    number: int,
    ranks: np.ndarray,
    similarities: np.ndarray,
    *,
    seeds: np.ndarray | None = None,
    clusters: np.ndarray | None = None,
) -> pa.Table:
    """Hits as they travel. seeds: (H, 16) uint8 ids; clusters: (H,) or None for sample hits."""
    count = len(positions)
    shards, rows = pool.places(positions)
    seeds = np.zeros((count, 16), np.uint8) if seeds is None else seeds
    clusters = np.full(count, -1) if clusters is None else clusters
    return pa.table(
        {
            "id": ids_array(pool.gather("ids", positions)),
            "shard": shards,
            "row": rows,
            "set": np.full(count, number, np.int32),
            "seed": ids_array(seeds),
            "rank": ranks.astype(np.int32),
            "similarity": similarities.astype(np.float32),
            "cluster": clusters.astype(np.int32),
        }
    )


def _no_hits() -> pa.Table:
    none = np.empty(0, np.int64)
    empty = RowFiles("", 0, "float16", (0,), (0,))
    return hit_table(empty, none, 0, none, none)


@dataclass(frozen=True)
class _SampleHits(FileTask[None, dict[str, Any]]):
    """The hits of the seeds of one partition."""

    retrieval: Retrieval
    search: Search
    hits: HitFiles
    number: int

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        search, k = self.search, self.retrieval.rules[self.number].k
        positions, similarities = search.nearest(item)
        if self.retrieval.on_collision == "next":
            chosen = Matching(search, k).chosen(item)
        else:
            chosen = (positions >= 0) & (np.arange(search.k) < k)
        seeds, columns = np.nonzero(chosen)
        table = hit_table(
            search.rows,
            np.asarray(positions[seeds, columns]),
            self.number,
            1 + ranks_within(seeds),
            np.asarray(similarities[seeds, columns]),
            seeds=search.queries.ids(item)[seeds],
        )
        files = self.hits.write(self.hits.first_items[self.number] + item, table)
        return TaskResult(files, {"hits": table.num_rows})


@dataclass(frozen=True)
class _CountSeeds(FileTask[None, None]):
    """Seeds of one partition in each cluster."""

    queries: RowFiles
    centroids: Centroids
    folder: str

    def path(self, item: int) -> str:
        return storage.join(self.folder, f"counts-{item:06d}.bin")

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        nearest, _ = assign_exactly(self.queries.vectors(item), self.centroids.load())
        write_array(self.path(item), np.bincount(nearest, minlength=self.centroids.count))
        return TaskResult([self.path(item)], None)


@dataclass(frozen=True)
class _AssignRows(FileTask[None, None]):
    """Rows of one partition of the pool that lie in clusters which some set draws from."""

    pool: RowFiles
    centroids: Centroids
    hot_path: str
    num_sets: int
    clusters: Exchange

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        nearest, cosines = assign_exactly(self.pool.vectors(item), self.centroids.load())
        hot = np.logical_or.reduce(_read_hot(self.hot_path, self.num_sets), axis=0)
        rows = np.flatnonzero(hot[nearest])
        columns = {
            "position": rows + self.pool.starts[item],
            "cluster": nearest[rows],
            "similarity": cosines[rows],
        }
        self.clusters.write(item, pa.table(columns), nearest[rows] % self.clusters.num_buckets)
        return TaskResult([self.clusters.mapped_path(item)], None)


def _read_hot(path: str, num_sets: int) -> np.ndarray:
    return np.frombuffer(storage.read_bytes(path), bool).reshape(num_sets, -1)


@dataclass(frozen=True)
class _Choose(FileTask[None, dict[str, Any]]):
    """What one set takes from the clusters of one bucket: the rows with the smallest hash."""

    retrieval: Retrieval
    number: int
    line: int
    """Line of the set in the table of hot clusters."""
    hot_path: str
    num_clusters: int
    clusters: Exchange

    @property
    def folder(self) -> str:
        return storage.join(self.clusters.folder, f"set-{self.number}")

    def run(self, engine: Engine) -> int:
        """Choose in every bucket; give the number chosen, before the cap."""
        buckets = self.retrieval.num_buckets
        facts = run_file_tasks(engine, self, buckets, self.folder, "draw from clusters")
        return sum(fact["rows"] for fact in facts)

    def path(self, bucket: int) -> str:
        """File of what was chosen in one bucket."""
        return storage.join(self.folder, f"chosen-{bucket:06d}.arrow")

    def read(self, bucket: int) -> pa.Table:
        """What was chosen in one bucket: position, cluster, similarity, rank, lot."""
        with storage.open_read(self.path(bucket)) as file:
            return pa.ipc.open_file(file).read_all()

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        rows = self.clusters.read(item, self.retrieval.pool.num_partitions)
        hot = np.frombuffer(storage.read_bytes(self.hot_path), bool)
        hot = hot.reshape(-1, self.num_clusters)[self.line]
        rows = rows.filter(pa.array(hot[np.asarray(rows["cluster"])])).combine_chunks()
        rule, seed = self.retrieval.rules[self.number], self.retrieval.seed
        ids = self.retrieval.pool.gather("ids", np.asarray(rows["position"]))
        draw = hash_ids(ids, "draw", rule.set, seed)
        order = np.lexsort((draw, np.asarray(rows["cluster"])))
        ranks = ranks_within(np.asarray(rows["cluster"])[order])
        taken = ranks < rule.per_cluster
        lots = hash_ids(ids, "cap", rule.set, seed)[order][taken]
        rows = rows.take(pa.array(order[taken])).append_column("rank", pa.array(ranks[taken] + 1))
        rows = rows.append_column("lot", pa.array(lots))
        with storage.open_whole(self.path(item)) as file, pa.ipc.new_file(file, rows.schema) as out:
            out.write_table(rows)
        return TaskResult([self.path(item)], {"rows": rows.num_rows})


def cap_bound(choose: _Choose, cap: int) -> int:
    """Lots up to this one stay, so that at most `cap` rows do; holds `cap` lots at a time."""
    lots = np.empty(0, np.uint64)
    for bucket in range(choose.retrieval.num_buckets):
        lots = np.sort(np.concatenate([lots, np.asarray(choose.read(bucket)["lot"])]))
        if len(lots) > cap:
            lots = lots[:cap]
    return int(lots[-1]) if len(lots) == cap else (1 << 64) - 1


@dataclass(frozen=True)
class _ClusterHits(FileTask[None, dict[str, Any]]):
    """The hits of one set in one bucket of clusters, after the cap."""

    choose: _Choose
    hits: HitFiles
    bound: int

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        rows = self.choose.read(item)
        rows = rows.filter(pa.array(np.asarray(rows["lot"]) <= np.uint64(self.bound)))
        table = hit_table(
            self.choose.retrieval.pool,
            np.asarray(rows["position"]),
            self.choose.number,
            np.asarray(rows["rank"]),
            np.asarray(rows["similarity"]),
            clusters=np.asarray(rows["cluster"]),
        )
        files = self.hits.write(self.hits.first_items[self.choose.number] + item, table)
        return TaskResult(files, {"hits": table.num_rows})


@dataclass(frozen=True)
class DecideByHits(DecideBatch[Any, None]):
    """Images are kept where hit, with their best hit."""

    hits: HitFiles

    def read(self, batch: int) -> pa.Table:
        """All hits."""
        return self.hits.by_run.read(batch, self.hits.num_items)

    def decide(self, shard: Shard, found: pa.Table, opened: None) -> None:
        """Drop what was not hit; say of the rest which hit was the best."""
        rows = of_shard(found, shard.index)
        self._count(shard, rows)
        best = best_hits(rows)
        readable = readable_hits(best, self.hits.set_names)
        where = np.asarray(best["row"])
        missed = np.ones(shard.num_rows, bool)
        missed[where] = False
        reject(shard, missed, "not_retrieved")
        for field in self.stage.decision_columns():
            values = np.full(shard.num_rows, None, object)
            values[where] = np.array(readable[field.name].to_pylist(), object)
            shard.note(field.name, values.tolist())

    def _count(self, shard: Shard, rows: pa.Table) -> None:
        """Count hits, and those beyond the first of an image: by one set, and by others."""
        pairs = np.stack([np.asarray(rows["set"]), np.asarray(rows["row"])], axis=1)
        different = np.unique(pairs, axis=0)
        images = np.unique(pairs[:, 1])
        shard.count("hits", len(pairs))
        shard.count("collisions_within_sets", len(pairs) - len(different))
        shard.count("collisions_between_sets", len(different) - len(images))


def best_hits(rows: pa.Table) -> pa.Table:
    """One hit a row of the shard: sample before cluster, nearest, first set, smallest seed."""
    seeds = id_bytes(rows["seed"]).view(">u8").reshape(-1, 2)
    order = np.lexsort(
        (
            *(seeds[:, 1], seeds[:, 0]),
            np.asarray(rows["set"]),
            -np.asarray(rows["similarity"]),
            np.asarray(rows["cluster"]) >= 0,
            np.asarray(rows["row"]),
        )
    )
    numbers = np.asarray(rows["row"])[order]
    return rows.take(pa.array(order[ranks_within(numbers) == 0]))
