"""`curate stats` on a manifest of 50 million rows, against plain DuckDB and against a budget.

    python benchmarks/stats.py --rows 50e6 --folder /tmp/stats

Builds a synthetic manifest on the spot (about 4 GB for 50 M rows), asks `curate stats` in a process
of its own, asks the same questions in plain DuckDB, and looks single ids up as `curate explain`
does. Prints seconds and peak memory. Budget at 50 M rows on 2 cores: 20 s, 2 GB, 1.3 times DuckDB.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from curation.dataset import Dataset, ShardInfo, commit
from curation.schema import schema_of
from curation.stages.select import MANIFEST_COLUMNS
from pipelines.audit.lookup import find_rows

ROWS_PER_SHARD = 100_000

SHARD = """
copy (
  select
    printf('%08x', ((i::hugeint << 32) // {rows})::bigint) || substr(md5(i::varchar), 9) as id,
    'https://' || 'h' || (floor(pow(20000, random()))::int) || '.example.org/a/' || i || '.jpg'
      as source,
    case when random() < 0.9 then 'web' else 'taken' end as source_set,
    null::varchar as alt, null::varchar as page,
    case when random() < 0.05 then 'CC-BY-4.0' end as license,
    (320 + 192 * random())::int as width, (320 + 192 * random())::int as height,
    (400 + 4000 * random())::int as original_width,
    (400 + 4000 * random())::int as original_height,
    case when random() < 0.9 then 'JPEG' else 'PNG' end as format,
    (20000 + 500000 * random())::bigint as num_bytes,
    sha256(i::varchar) as sha256, md5('p' || i) as pixel_hash, sha256('q' || i) as phash,
    'seeds' || (floor(30 * random() * random()))::int as seed_set,
    case when i % 3 = 0 then 'cluster' else 'sample' end as rule,
    null::varchar as seed_id, (32 * random())::int as rank,
    (0.4 + 0.6 * random())::float as similarity, (100000 * random())::int as cluster
  from range({start}, {stop}) t(i)
) to '{path}' (format parquet, compression zstd, row_group_size 8192)
"""

NUMBERS = [
    *("width", "height", "original_width", "original_height", "num_bytes"),
    *("rank", "similarity", "cluster"),
]


def build(folder: Path, rows: int) -> None:
    if Dataset.is_finished(str(folder)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect(config={"threads": 2})
    infos = []
    for index, start in enumerate(range(0, rows, ROWS_PER_SHARD)):
        path = folder / f"shard-{index:05d}.parquet"
        stop = min(start + ROWS_PER_SHARD, rows)
        connection.execute(SHARD.format(rows=rows, start=start, stop=stop, path=path))
        size = path.stat().st_size
        content = f"{index:064x}{stop - start:x}"
        infos.append(
            ShardInfo(
                name=path.name,
                num_rows=stop - start,
                num_bytes=size,
                sha256=f"{index:064x}",
                content=content,
            )
        )
    commit(str(folder), schema_of(MANIFEST_COLUMNS), infos)


def ask_stats(folder: Path) -> tuple[float, float]:
    """Seconds and peak gigabytes of `curate stats` in its own process."""
    code = (
        "import resource, sys\n"
        "from pipelines.audit.stats import stats_of\n"
        "stats_of(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    began = time.monotonic()
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.monotonic() - began, int(done.stdout) / 1e6


def ask_duckdb(folder: Path) -> float:
    """Seconds of the same questions, asked as an analyst would."""
    began = time.monotonic()
    connection = duckdb.connect(config={"threads": 2, "memory_limit": "1500MB"})
    source = f"read_parquet('{folder}/*.parquet')"
    columns = ", ".join(
        f"count({c}), min({c}), max({c}), avg({c}), "
        f"approx_quantile({c}, [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])"
        for c in NUMBERS
    )
    connection.execute(f"select {columns} from {source}").fetchall()
    for name in ("source_set", "license", "format", "seed_set", "rule"):
        connection.execute(f"select {name}, count(*) from {source} group by 1").fetchall()
    host = "split_part(source, '/', 3)"
    query = f"select {host}, count(*) n from {source} group by 1 order by n desc limit 20"
    connection.execute(query).fetchall()
    return time.monotonic() - began


def look_up(folder: Path, rows: int) -> float:
    """Seconds to find one row by its id, at worst of 20."""
    dataset = Dataset.open(str(folder))
    worst = 0.0
    for place in range(0, rows, max(rows // 20, 1)):
        shard = place // ROWS_PER_SHARD
        row_id = pq.read_table(dataset.shard_path(shard), columns=["id"])["id"][
            place % ROWS_PER_SHARD
        ].as_py()
        began = time.monotonic()
        assert find_rows(Dataset.open(str(folder)), shard, [row_id]).num_rows == 1
        worst = max(worst, time.monotonic() - began)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=float, default=50e6)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    rows = int(options.rows)
    began = time.monotonic()
    build(options.folder, rows)
    built = time.monotonic() - began
    plain = min(ask_duckdb(options.folder) for _ in range(2))
    runs = [ask_stats(options.folder) for _ in range(2)]
    seconds, memory = min(one[0] for one in runs), max(one[1] for one in runs)
    result = {
        "rows": rows,
        "built_s": round(built, 1),
        "stats_s": round(seconds, 2),
        "stats_peak_gb": round(memory, 2),
        "duckdb_s": round(plain, 2),
        "ratio": round(seconds / plain, 2),
        "lookup_s": round(look_up(options.folder, rows), 3),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
