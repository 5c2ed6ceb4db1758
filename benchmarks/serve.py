"""`curate serve` under four readers at once: how long a page takes.

    python benchmarks/serve.py --folder /tmp/serve

Builds synthetic manifests of 50 M and 2 M rows on the spot (as benchmarks/stats.py does), sorts
each into a catalog, starts `curate serve` on it in a process of its own, and asks over loopback:
pages of one indexed filter (any page, any value), of a range of a score, and, at 2 M rows, of
several filters together. The same questions go to plain DuckDB on the Parquet, one reader. Budget
on 2 cores: 1 s at the 95th percentile.
"""

import argparse
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
from stats import build

READERS = 4
FORMATS, SETS, SEEDS = ("JPEG", "PNG"), ("web", "taken"), [f"seeds{n}" for n in range(30)]

Query = dict[str, Any]


def indexed(rng: random.Random, rows: int) -> Query:
    """One filter, or one range of a score, at any page of it."""
    after = rng.choice([-1, -1, rng.randrange(rows // 50)])
    choices: list[Query] = [
        {"host": f"h{int(20000 ** rng.random())}.example.org", "after": min(after, 400)},
        {"source_set": rng.choice(SETS), "after": after},
        {"seed_set": rng.choice(SEEDS), "after": min(after, rows // 2000)},
        {"format": rng.choice(FORMATS), "after": after},
        {"score": "data.similarity", "low": rng.uniform(0.4, 0.9), "after": after},
        {"score": "data.num_bytes", "high": rng.uniform(3e4, 5e5), "order": "highest"},
        {"after": after},
    ]
    return rng.choice(choices)


def combined(rng: random.Random, rows: int) -> Query:
    """Two to four filters, some in the order of a score; common and rare ones."""
    query: Query = {
        "host": f"h{int(20000 ** rng.random())}.example.org",
        "source_set": rng.choice(SETS),
        "seed_set": rng.choice(SEEDS),
        "format": rng.choice(FORMATS),
    }
    chosen = {name: query[name] for name in rng.sample(sorted(query), rng.randint(1, 3))}
    low = rng.uniform(0.4, 0.95)
    scores: Query = {"score": "data.similarity", "low": low, "high": low + 0.2}
    chosen |= scores | {"order": rng.choice(["lowest", "highest"])}
    return chosen | {"after": -1}


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """`curate serve` on a folder; its address."""
    code = "from pipelines.cli.app import main; main()"
    command = [sys.executable, "-c", code, "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://\S+", line)
        assert address is not None, line
        try:
            yield address.group(0)
        finally:
            print(f"  server: peak {peak_gb(process.pid):.2f} GB", file=sys.stderr)
            process.terminate()


def peak_gb(pid: int) -> float:
    """Peak resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", text)
    return int(found.group(1)) / 1e6 if found else float("nan")


def ask(address: str, query: Query) -> tuple[float, int]:
    """Seconds until a page is read, and its rows."""
    url = f"{address}/api/images?{urllib.parse.urlencode(query)}"
    began = time.perf_counter()
    with urllib.request.urlopen(url) as answer:
        rows = len(json.load(answer)["rows"])
    return time.perf_counter() - began, rows


def read(address: str, queries: list[Query]) -> dict[str, float]:
    """All queries, READERS at a time."""
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda query: ask(address, query), queries))
    seconds = sorted(one for one, _ in found)
    return {
        "median_s": round(statistics.median(seconds), 3),
        "p95_s": round(seconds[int(0.95 * len(seconds))], 3),
        "worst_s": round(seconds[-1], 3),
        "filled": sum(rows > 0 for _, rows in found),
    }


def plain_duckdb(folder: Path, queries: list[Query]) -> float:
    """Median seconds of the same pages straight from the Parquet, as an analyst would ask."""
    connection = duckdb.connect(config={"threads": 2, "memory_limit": "1GB"})
    taken = []
    for query in queries:
        terms, values = ["true"], []
        for name in ("source_set", "seed_set", "format"):
            if name in query:
                terms.append(f"{name} = ?")
                values.append(query[name])
        if "host" in query:
            terms.append("split_part(source, '/', 3) = ?")
            values.append(query["host"])
        order = "id"
        if "score" in query:
            order = query["score"].removeprefix("data.")
            terms.append(f"{order} between ? and ?")
            values += [query.get("low", 0), query.get("high", 1e9)]
        text = f"select * from read_parquet('{folder}/*.parquet') where {' and '.join(terms)}"
        began = time.perf_counter()
        connection.execute(f"{text} order by {order} limit 48", values).fetchall()
        taken.append(time.perf_counter() - began)
    return round(statistics.median(taken), 3)


def measure(folder: Path, rows: int, ways: list[Any], number: int) -> list[dict[str, Any]]:
    from pipelines.web.serving.catalog_file import catalog_of

    build(folder, rows)
    began = time.monotonic()
    file = Path(catalog_of(str(folder)))
    sorted_s = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"  {rows:,} rows sorted in {sorted_s:.0f} s, peak {peak:.2f} GB", file=sys.stderr)
    found = []
    with server(folder) as address:
        for way in ways:
            rng = random.Random(0)
            queries = [way(rng, rows) for _ in range(number)]
            read(address, queries[:20])  # the file comes into the page cache
            plain = plain_duckdb(folder, queries[: 3 if rows > 1e7 else 10])
            found.append(
                {
                    "rows": rows,
                    "filters": way.__name__,
                    **read(address, queries),
                    "duckdb_one_reader_s": plain,
                    "catalog_bytes_a_row": round(file.stat().st_size / rows, 1),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=float, default=50e6, help="of the large manifest")
    parser.add_argument("--queries", type=int, default=400)
    options = parser.parse_args()
    small = measure(options.folder / "small", 2_000_000, [indexed, combined], options.queries)
    large = measure(options.folder / "large", int(options.rows), [indexed], options.queries)
    for row in small + large:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
