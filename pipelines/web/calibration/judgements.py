"""What people said of the questions, in a Parquet file that grows by a row a click."""

import datetime
import threading
from dataclasses import dataclass

import pyarrow as pa

from curation import storage
from pipelines.web.calibration.questions import Question

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("kind", pa.string()),
        ("flow", pa.string()),
        ("id", pa.string()),
        ("twin_set", pa.string()),
        ("twin", pa.string()),
        ("score", pa.float32()),
        ("positive", pa.bool_()),
        ("judged_at", pa.timestamp("ms", tz="UTC")),
    ]
)
"""`positive`: a copy, or to be dropped; null: the judge could not tell."""


@dataclass(frozen=True)
class Judgements:
    """The answers of one file; the last word on a question counts."""

    path: str
    lock: threading.Lock

    @classmethod
    def at(cls, path: str) -> "Judgements":
        """Those of a file, which need not be there yet."""
        return cls(path, threading.Lock())

    def read(self) -> dict[str, bool | None]:
        """Answer by the key of its question."""
        if not storage.exists(self.path):
            return {}
        table = storage.read_parquet(self.path, ["key", "positive"])
        pairs = zip(table["key"].to_pylist(), table["positive"].to_pylist(), strict=True)
        return dict(pairs)

    def add(self, kind: str, question: Question, positive: bool | None) -> None:
        """Write one answer behind the others; the file is whole at any time."""
        row = {
            "key": question.key,
            "kind": kind,
            "flow": question.flow,
            "id": question.id,
            "twin_set": question.twin_flow,
            "twin": question.twin,
            "score": question.score,
            "positive": positive,
            "judged_at": datetime.datetime.now(datetime.UTC),
        }
        with self.lock:
            added = pa.Table.from_pylist([row], SCHEMA)
            if storage.exists(self.path):
                added = pa.concat_tables([storage.read_parquet(self.path).cast(SCHEMA), added])
            storage.write_parquet(self.path, added)
