"""What a run writes for people and machines: log.jsonl and bad_images.jsonl."""

import json
from pathlib import Path
from typing import Any

from pretrain.batch import BadImage

Record = dict[str, Any]


class RunLog:
    """JSON lines below the run's folder; lines after the resumed step are dropped."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "log.jsonl"
        self._bad_path = out / "bad_images.jsonl"
        kept = [record for record in read_lines(self.path) if record["step"] <= step]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._bad = {record["id"] for record in read_lines(self._bad_path)}

    @property
    def num_bad(self) -> int:
        """Different images so far that could not be read."""
        return len(self._bad)

    def add(self, record: Record) -> None:
        """Append one record."""
        _append(self.path, record)

    def add_bad(self, images: tuple[BadImage, ...]) -> None:
        """List bad images, each once."""
        for name, reason in images:
            if name not in self._bad:
                self._bad.add(name)
                _append(self._bad_path, {"id": name, "reason": reason})


def read_lines(path: Path) -> list[Record]:
    """Read JSON lines; none where there is no file. A half-written last line is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _append(path: Path, record: Record) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
