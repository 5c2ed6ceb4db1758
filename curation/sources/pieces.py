"""The parts that a source is cut into."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A part of a source that one task reads."""

    file: str
    """Path of the file, or of the folder that `names` lie in."""
    row_group: int | None = None
    """For Parquet: which row group."""
    names: tuple[str, ...] = ()
    """For folders of images: relative paths."""
    num_rows: int = 0
    """Rows in the piece, as far as is known before it is read."""
    name: str = ""
    """Name of the file below the source's root, where rows are called by it."""
    kind: str = ""
    """What else the file is than a list or a table of images."""
