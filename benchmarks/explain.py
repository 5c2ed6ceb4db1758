"""`curate explain` on a finished run of 50 million rows: how long one image's life takes.

    python benchmarks/explain.py --rows 50e6 --folder /tmp/explain

Builds a synthetic run on the spot, in the default layout of 10,000 rows a shard (5,000 shards in
every stage; about 25 GB and 20 minutes for 50 M rows): the tables of twelve stages from ingest to
pack, hits, manifest, the index of the packed shards, and three sets, one of a million seeds; images
and vectors, which `explain` never reads, are left out. Then it asks for rows of every fate, by id
and by the first digits of one, and for seeds, each in a process of its own, as a user does. Two
of the ids go to DuckDB, which asks the same tables. Budget at 50 M rows on 2 cores: 1 s.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from curation import storage
from curation.dataset import ShardInfo, commit
from curation.ledger import StageRecord
from curation.schema import FETCH_COLUMNS, ID, IMAGE_COLUMNS, column_type, ids_from_bytes, schema_of
from curation.stage import DECISIONS
from curation.stages.pack import INDEX_COLUMNS
from curation.stages.select import MANIFEST_COLUMNS
from pipelines.run.run_record import RUN_FILE, RunRecord, StageEntry

ROWS_PER_SHARD = 10_000
SET_ROWS, SEED_ROWS = 5_000, 1_000_000
SHARDS_PER_HITS = 38
"""Shards of the pool whose hits lie in one file: about as many rows as `retrieve` puts there."""
SETS = ("bench", "seeds", "taken")
HIT_COLUMNS = (ID, "seed_set", "rule", "seed_id", "rank", "similarity", "cluster")
ROW_COLUMNS = (ID, "source", "source_set", "alt", "page", "license")
EXTRAS: dict[str, tuple[str, ...]] = {
    "quality": ("short_side", "aspect", "contrast", "entropy", "sharpness"),
    "exact_dedup": ("twin",),
    "nsfw": ("nsfw_score",),
    "near_dedup": ("component", "component_size", "twin", "twin_set", "similarity", "path"),
    "leaks": ("twin", "twin_set", "similarity", "path"),
    "retrieve": ("seed_set", "rule", "seed_id", "rank", "similarity", "cluster"),
    "select": ("twin",),
}
DROPPED = {
    "ingest": (0.01, "duplicate_source"),
    "download": (0.12, "http_404"),
    "canonicalize": (0.01, "truncated"),
    "quality": (0.05, "too_small"),
    "exact_dedup": (0.06, "duplicate_bytes"),
    "nsfw": (0.01, "nsfw"),
    "embed": (0.0, ""),
    "near_dedup": (0.25, "near_duplicate"),
    "leaks": (0.002, "leak:bench"),
    "retrieve": (0.6, "not_retrieved"),
    "select": (0.001, "duplicate_in_union"),
    "pack": (0.0, ""),
}
"""Share of the rows that each stage drops, and why."""
SIDE_CARS = {
    "ingest": {"rows": ROW_COLUMNS},
    "download": {"fetches": FETCH_COLUMNS},
    "canonicalize": {"images": IMAGE_COLUMNS},
    "select": {"manifest": MANIFEST_COLUMNS},
    "pack": {"packed": INDEX_COLUMNS},
}
SET_STAGES = ("ingest", "canonicalize", "embed")
UNION = ("select", "pack")

Infos = dict[str, dict[str, ShardInfo]]
"""Stage -> output -> what was written of one shard."""


@dataclass(frozen=True)
class Flow:
    """The pool, or one of the sets."""

    name: str
    rows: int
    shards: int
    first: int = 0
    """Number of its first shard in the union."""

    def ids(self, shard: int) -> pa.Array:
        """Sorted ids of one shard: the shard's range of the id space, evenly filled."""
        rng = np.random.default_rng([SETS.index(self.name) if self.name in SETS else 9, shard])
        number = self.rows // self.shards
        low, high = -(-(shard << 32) // self.shards), -(-((shard + 1) << 32) // self.shards)
        leading = np.sort(rng.integers(low, high, number)).astype(">u4")
        rest = rng.integers(0, 256, (number, 12), np.uint8)
        return ids_from_bytes(np.concatenate([leading.view(np.uint8).reshape(-1, 4), rest], 1))


SEEDS = Flow("seeds", SEED_ROWS, 100)


@dataclass(frozen=True)
class Values:
    """Made-up values of rows, by column."""

    ids: pa.Array
    flow: str
    rng: np.random.Generator

    def column(self, name: str) -> pa.Array:
        """One of our columns."""
        kind, n = column_type(name), len(self.ids)
        if name == ID:
            return self.ids
        if name in ("twin", "component", "seed_id"):
            return self.ids.take(pa.array(self.rng.permutation(n)))
        if name == "source":
            short = pa.compute.utf8_slice_codeunits(self.ids, 0, 16)
            host = pa.array([f"https://h{h}.example.org/a/" for h in range(1000)])
            hosts = host.take(pa.array(self.rng.integers(0, 1000, n)))
            return pa.compute.binary_join_element_wise(hosts, short, ".jpg", "")
        if name in ("sha256", "phash", "pixel_hash"):
            size = 16 if name == "pixel_hash" else 32
            data = self.rng.integers(0, 256, (n, size), np.uint8)
            halves = [ids_from_bytes(data[:, at : at + 16]) for at in range(0, size, 16)]
            return pa.compute.binary_join_element_wise(*halves, "")
        if pa.types.is_string(kind):
            return self._text(name, n)
        if pa.types.is_large_binary(kind):
            return pa.array([b""] * n, kind)
        if pa.types.is_floating(kind):
            return pa.array(self.rng.random(n), kind)
        if pa.types.is_integer(kind):
            return pa.array(self.rng.integers(1, 4000, n), kind)
        return pa.nulls(n, kind)

    def _text(self, name: str, n: int) -> pa.Array:
        known = {
            "source_set": ["web" if self.flow == "pool" else self.flow],
            "status": ["ok"],
            "content_type": ["image/jpeg"],
            "format": ["JPEG", "PNG"],
            "seed_set": ["seeds"],
            "rule": ["sample"],
        }
        if name not in known:
            return pa.nulls(n, pa.string())
        return pa.array(known[name]).take(pa.array(self.rng.integers(0, len(known[name]), n)))

    def table(self, names: tuple[str, ...]) -> pa.Table:
        """Some of our columns."""
        return pa.table({name: self.column(name) for name in names}, schema_of(names))


def write(folder: Path, index: int, table: pa.Table, tar: str = "") -> ShardInfo:
    """Write a shard as the product does, but for the digest of its rows, which nothing reads."""
    name = f"shard-{index:05d}.parquet"
    num_bytes, sha256 = storage.write_parquet(str(folder / name), table)
    keep = pa.compute.sum(table["keep"]).as_py() if "keep" in table.column_names else None
    return ShardInfo(
        name=name,
        num_rows=table.num_rows,
        num_bytes=num_bytes,
        sha256=sha256,
        content=f"{index:064x}{table.num_rows:x}",
        num_kept=keep,
        companion={tar: sha256} if tar else {},
    )


def judge(stage: str, values: Values) -> tuple[pa.Table, np.ndarray]:
    """Decisions of a stage, and who stays."""
    share, reason = DROPPED[stage]
    keep = values.rng.random(len(values.ids)) >= share
    names = (ID, *EXTRAS.get(stage, ()))
    columns = dict(zip(names, values.table(names).columns, strict=True)) | {
        "stage": pa.array([stage] * len(keep)),
        "keep": pa.array(keep),
        "reason": pa.array(np.where(keep, None, reason).astype(object), pa.string()),
        "score": values.column("score"),
        "threshold": pa.array(np.full(len(keep), 0.6), pa.float32()),
    }
    order = (ID, "stage", "keep", "reason", "score", "threshold", *EXTRAS.get(stage, ()))
    return pa.table({name: columns[name] for name in order}, schema_of(order)), keep


def write_shards(root: Path, flow: Flow, stages: tuple[str, ...], shard: int) -> Infos:
    """One shard of every table of a flow; stages that the flow joins later, at its place there."""
    rng = np.random.default_rng([7, flow.first, shard])
    ids, infos = flow.ids(shard), dict[str, dict[str, ShardInfo]]()
    for stage in stages:
        folder = root / folder_of("pool" if stage in UNION else flow.name, stage)
        place = flow.first + shard if stage in UNION else shard
        table, keep = judge(stage, Values(ids, flow.name, rng))
        infos[stage] = {DECISIONS: write(folder / DECISIONS, place, table)}
        ids = ids.filter(pa.array(keep))
        for output, names in SIDE_CARS.get(stage, {}).items():
            made = Values(ids, flow.name, rng).table(names)
            tar = f"shard-{place:05d}.tar" if output == "packed" else ""
            infos[stage][output] = write(folder / output, place, made, tar)
    return infos


def write_hits(root: Path, number: int, files: range) -> ShardInfo:
    """One shard of the hits, sorted by id: three seeds for each row that retrieval kept."""
    rng = np.random.default_rng([8, number])
    folder = root / folder_of("pool", "retrieve")
    kept = [_kept(folder / DECISIONS / f"shard-{index:05d}.parquet") for index in files]
    ids = pa.concat_arrays(kept)
    ids = ids.take(pa.array(np.repeat(np.arange(len(ids)), 3)))
    seeds = SEEDS.ids(number % SEEDS.shards)
    values = {
        "seed_set": pa.array(["seeds"] * len(ids)),
        "rule": pa.array(["sample"] * len(ids)),
        "seed_id": seeds.take(pa.array(rng.integers(0, len(seeds), len(ids)))),
    }
    made = Values(ids, "pool", rng)
    columns = {name: values[name] if name in values else made.column(name) for name in HIT_COLUMNS}
    return write(folder / "hits", number, pa.table(columns, schema_of(HIT_COLUMNS)))


def _kept(file: Path) -> pa.Array:
    table = pa.parquet.read_table(file, columns=[ID, "keep"])
    return table.filter(table["keep"])[ID].combine_chunks()


def folder_of(flow: str, stage: str) -> str:
    where = "pool" if flow == "pool" else f"sets/{flow}"
    return f"work/{where}/{stage}"


def build(root: Path, rows: int) -> None:
    """The whole run, unless it is there."""
    if (root / RUN_FILE).exists():
        return
    pool = Flow("pool", rows, max(rows // ROWS_PER_SHARD, 1), first=1)
    flows = [Flow("bench", SET_ROWS, 1), SEEDS, Flow("taken", SET_ROWS, 1), pool]
    written: dict[tuple[str, str], dict[str, list[ShardInfo]]] = {}
    for flow in flows:
        stages = tuple(DROPPED) if flow is pool else SET_STAGES
        if flow.name == "taken":
            stages += UNION
        with ProcessPoolExecutor(2) as processes:
            job = partial(write_shards, root, flow, stages)
            for infos in processes.map(job, range(flow.shards), chunksize=20):
                for stage, outputs in infos.items():
                    own = "pool" if stage in UNION else flow.name
                    mine = written.setdefault((own, stage), {})
                    for output, info in outputs.items():
                        mine.setdefault(output, []).append(info)
    groups = [range(at, min(at + SHARDS_PER_HITS, pool.shards)) for at in _starts(pool.shards)]
    with ProcessPoolExecutor(2) as processes:
        hits = processes.map(partial(write_hits, root), range(len(groups)), groups)
        written["pool", "retrieve"]["hits"] = list(hits)
    entries = {key: commit_stage(root, *key, outputs) for key, outputs in written.items()}
    select = written["pool", "select"]["manifest"]
    publish(root, select)
    record = RunRecord(
        recipe="synthetic",
        recipe_file="benchmarks/explain.py",
        seed=0,
        pool=tuple(entries["pool", stage] for stage in DROPPED),
        sets={name: tuple(entries[name, stage] for stage in SET_STAGES) for name in SETS},
        roles={"bench": ("leaks",), "seeds": ("retrieve",), "taken": ("select",)},
        as_is=("taken",),
        manifest="manifest",
        packed=f"{folder_of('pool', 'pack')}/packed",
    )
    storage.write_json(str(root / RUN_FILE), record.model_dump(mode="json"))


def _starts(shards: int) -> range:
    return range(0, shards, SHARDS_PER_HITS)


def commit_stage(
    root: Path, flow: str, stage: str, outputs: dict[str, list[ShardInfo]]
) -> StageEntry:
    """Manifests of a stage's outputs, and its entry in the record of the run."""
    folder = folder_of(flow, stage)
    digests = {}
    for output, infos in outputs.items():
        schema = pa.parquet.read_schema(root / folder / output / infos[0].name)
        made = commit(str(root / folder / output), schema, infos, {"stage": stage})
        digests[output] = made.manifest.content_digest
    rows_in = sum(info.num_rows for info in outputs[DECISIONS])
    rows_out = sum(info.num_kept or 0 for info in outputs[DECISIONS])
    record = StageRecord(
        stage=stage,
        version=1,
        key=f"{stage}-{flow}",
        settings={"source_set": "web" if flow == "pool" else flow} if stage == "ingest" else {},
        rows_in=rows_in,
        rows_out=rows_out,
        dropped={DROPPED[stage][1]: rows_in - rows_out} if rows_in > rows_out else {},
        outputs=digests,
        seconds=1.0,
    )
    return StageEntry(stage=stage, folder=folder, record=record)


def publish(root: Path, infos: list[ShardInfo]) -> None:
    """The manifest as `curate run` publishes it: here by links to the files of `select`."""
    target = root / "manifest"
    target.mkdir()
    for info in infos:
        source = root / folder_of("pool", "select") / "manifest" / info.name
        (target / info.name).hardlink_to(source)
    commit(str(target), schema_of(MANIFEST_COLUMNS), infos, {})


def some_rows(root: Path, number: int) -> list[str]:
    """Ids of rows all over the pool; every third of the finished set."""
    rng = np.random.default_rng(1)
    found = []
    for place in range(number):
        folder = root / (folder_of("pool", "ingest") + "/rows" if place % 3 else "manifest")
        files = sorted(folder.glob("*.parquet"))
        file = files[(2 * place + 1) * len(files) // (2 * number)]
        table = pa.parquet.read_table(file, columns=[ID])
        found.append(table[ID][int(rng.integers(len(table)))].as_py())
    return found


def ask_explain(root: Path, text: str) -> tuple[float, float, dict[str, Any]]:
    """Seconds and peak gigabytes of `curate explain` in its own process, and the first life."""
    code = (
        "import resource, sys\n"
        "from pipelines.cli.audit import explain\n"
        "explain(sys.argv[1], sys.argv[2], json=True)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, text, str(root)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.monotonic() - began, int(done.stderr) / 1e6, json.loads(done.stdout)[0]


def ask_duckdb(root: Path, row_id: str) -> float:
    """Seconds of the same tables asked by an analyst who knows the id."""
    began = time.monotonic()
    connection = duckdb.connect(config={"threads": 2, "memory_limit": "1500MB"})
    for stage in DROPPED:
        for output in (DECISIONS, *SIDE_CARS.get(stage, {})):
            files = f"{root}/{folder_of('pool', stage)}/{output}/*.parquet"
            query = f"select * from read_parquet('{files}') where id = ?"
            connection.execute(query, [row_id]).fetchall()
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=float, default=50e6)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=20)
    options = parser.parse_args()
    build(options.folder, int(options.rows))
    ids = some_rows(options.folder, options.images)
    ways = {
        "by id": ids,
        "by 10 digits": [row_id[:10] for row_id in ids],
        "a seed": [SEEDS.ids(shard)[7].as_py() for shard in range(0, 100, 10)],
    }
    for way, texts in ways.items():
        asked = [ask_explain(options.folder, text) for text in texts]
        seconds = sorted(one[0] for one in asked)
        line = {
            "rows": int(options.rows),
            "asked": way,
            "median_s": round(statistics.median(seconds), 3),
            "worst_s": round(seconds[-1], 3),
            "peak_gb": round(max(one[1] for one in asked), 2),
            "fates": len({one[2]["fate"] for one in asked}),
        }
        if way == "by id":
            line["duckdb_s"] = round(min(ask_duckdb(options.folder, t) for t in texts[:2]), 2)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
