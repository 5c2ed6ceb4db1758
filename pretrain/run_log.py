"""What a run writes for people and machines: log.jsonl and bad_images.jsonl."""

import json
import math
from pathlib import Path
from typing import Any

from curation.errors import ConfigError
from pretrain.batch import BadImage
from pretrain.distributed import any_rank, barrier, gather_lists, rank
from pretrain.errors import TrainingError

Record = dict[str, Any]


class RunLog:
    """JSON lines below the run's folder; lines after the resumed step are dropped."""

    def __init__(self, out: Path, step: int, *, tensorboard: bool = False) -> None:
        self.path = out / "log.jsonl"
        self._bad_path = out / "bad_images.jsonl"
        bad, lines = read_lines(self._bad_path), read_lines(self.path)
        self._bad = {record.get("id") for record in bad}
        self._board = _open_tensorboard(out) if tensorboard and rank() == 0 else None
        kept = [record for record in lines if record.get("step", 0) <= step]
        self.last_step = kept[-1].get("step", 0) if kept else 0
        barrier()  # all have read
        if rank() == 0:
            _rewrite(self.path, kept)
            if self._bad_path.is_file():
                _rewrite(self._bad_path, bad)

    def records(self) -> list[Record]:
        """Steps that are logged so far."""
        barrier()  # the first process has dropped those after the resumed step
        return read_lines(self.path)

    @property
    def num_bad(self) -> int:
        """Different images so far that could not be read."""
        return len(self._bad)

    def add(self, record: Record) -> None:
        """Append one record."""
        _append(self.path, record)
        self.last_step = record["step"]
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, record["step"])

    def add_bad(self, images: list[BadImage]) -> None:
        """List the bad images of all processes, each once; every process must call this."""
        if not any_rank(bool(images)):
            return
        for name, reason in gather_lists(images):
            if name not in self._bad:
                self._bad.add(name)
                if rank() == 0:
                    _append(self._bad_path, {"id": name, "reason": reason})


def read_lines(path: Path) -> list[Record]:
    """Read JSON lines; none where there is no file. A half-written last line is left out.

    Raises:
        TrainingError: another line is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [
        _record(path, number, line) for number, line in enumerate(lines, 1) if line[-1:] == b"\n"
    ]


def _record(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise TrainingError(f"{path}: line {number} is damaged; remove it")
    return record


def _line(record: Record) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Put null for what is no number: JSON has no word for it."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "run.tensorboard needs the tensorboard package: pip install tensorboard, or set it to "
            "false"
        ) from error
    return SummaryWriter(str(out / "tensorboard"))


def _rewrite(path: Path, records: list[Record]) -> None:
    """Leave whole lines alone, or the file as it was."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text("".join(map(_line, records)))
        partial.replace(path)
    except OSError as error:
        raise _no_writing(path, error) from error


def _append(path: Path, record: Record) -> None:
    try:
        with path.open("a") as file:
            file.write(_line(record))
    except OSError as error:
        raise _no_writing(path, error) from error


def _no_writing(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{path}: cannot be written: {error.strerror}; make room, and the same command goes on "
        "from the last checkpoint"
    )
