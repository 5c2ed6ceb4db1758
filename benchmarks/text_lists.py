"""How fast text lists of URLs are read: CPU seconds for a million rows of each kind.

python benchmarks/text_lists.py            # build/text-lists holds the lists
"""

import csv
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from curation.sources.columns import TEXTS
from curation.sources.text_lists import rewrite

ROWS = 1_000_000
FOLDER = Path("build/text-lists")


def rows() -> Iterator[tuple[str, str]]:
    for i in range(ROWS):
        url = f"http://host{i % 997}.example/photos/{i:09d}/image-{i * 7919 % 1_000_003}.jpg"
        yield url, f'photo {i}, a "thing"'


def write_csv(file: TextIO) -> None:
    csv.writer(file).writerows([("url", "alt"), *rows()])


def write_tsv(file: TextIO) -> None:
    file.write("url\talt\n")
    file.writelines(f"{url}\t{alt}\n" for url, alt in rows())


def write_jsonl(file: TextIO) -> None:
    lines = ({"url": url, "alt": alt, "width": 640} for url, alt in rows())
    file.writelines(json.dumps(line) + "\n" for line in lines)


WRITERS: dict[str, Callable[[TextIO], None]] = {
    "tsv": write_tsv,
    "csv": write_csv,
    "jsonl": write_jsonl,
}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for kind, write in WRITERS.items():
        path = FOLDER / f"list.{kind}"
        with path.open("w", newline="") as file:
            write(file)
        start = time.process_time()
        columns = {name: name for name in TEXTS.names}
        tally = rewrite(str(path), str(path.with_suffix(".parquet")), columns, ())
        seconds = time.process_time() - start
        print(f"{kind}: {tally['rows']:,} rows, {seconds:.1f} s, {ROWS / seconds:,.0f} rows/s")


if __name__ == "__main__":
    main()
