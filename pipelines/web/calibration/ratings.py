"""What people said of the questions, in a Parquet file that grows by a row a click."""

import datetime
import threading
from dataclasses import dataclass, field

import pyarrow as pa

from curation import storage
from pipelines.web.calibration.questions import Question

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "kind", "flow", "id", "twin_set", "twin")),
        ("score", pa.float32()),
        ("positive", pa.bool_()),
        ("judged_at", pa.timestamp("ms", tz="UTC")),
    ]
)
"""`positive`: a copy, or to be dropped; null: whoever was asked could not tell."""
Answers = dict[str, bool | None]
"""Answer by the key of its question."""


@dataclass(frozen=True)
class Ratings:
    """The answers of one file, which need not be there yet; the last word on a question counts."""

    path: str
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> Answers:
        """All answers."""
        if not storage.exists(self.path):
            return {}
        table = storage.read_parquet(self.path, ["key", "positive"])
        return dict(zip(*(column.to_pylist() for column in table.columns), strict=True))

    def add(self, kind: str, question: Question, positive: bool | None) -> None:
        """Write one answer behind the others; the file is whole at any time."""
        now = datetime.datetime.now(datetime.UTC)
        row = {"key": question.key, "kind": kind, "positive": positive, "judged_at": now}
        row |= {**vars(question), "twin_set": question.twin_flow}
        with self._lock:
            added = pa.Table.from_pylist([row], SCHEMA)
            if storage.exists(self.path):
                added = pa.concat_tables([storage.read_parquet(self.path).cast(SCHEMA), added])
            storage.write_parquet(self.path, added)
