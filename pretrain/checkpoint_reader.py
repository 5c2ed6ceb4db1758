"""Read tensors that `torch.distributed.checkpoint` wrote, and nothing else.

Its own reader unpickles `.metadata`, and whatever that file declares to be no tensor: either runs
what a foreign checkpoint holds. Here only the classes that describe tensors are built, and what
they claim is held against the files before anything is allocated.
"""

import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.serialization import _get_layout

METADATA = ".metadata"

_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (kinds.__name__, kind.__name__): kind
        for kind in (
            kinds.Metadata,
            kinds.MetadataIndex,
            kinds.TensorStorageMetadata,
            kinds.ChunkStorageMetadata,
            kinds.TensorProperties,
            kinds.StorageMeta,
            kinds._MEM_FORMAT_ENCODING,
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    **{
        (module, name): PurePosixPath
        for module in ("pathlib", "pathlib._local")  # the second is Python 3.13's own name
        for name in ("PosixPath", "WindowsPath")
    },
}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Give one of the classes that describe tensors, or a type of numbers."""
        found = _ALLOWED.get((module, name))
        if found is None and module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            found = vars(torch)[name]
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")
        return found


class TensorReader(FileSystemReader):
    """Reads the tensors of one folder, whose metadata is known to describe nothing else."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._known = read_metadata(folder)

    def read_metadata(self) -> Metadata:
        """Give what was read; without the arguments by which torch would look for other files."""
        self._known.storage_meta = StorageMeta(load_id=self.load_id)
        return self._known


def read_metadata(folder: Path) -> Metadata:
    """Read which tensors a checkpoint holds, and where.

    Raises:
        ValueError: the file is damaged, or describes something else than the tensors beside it.
    """
    with (folder / METADATA).open("rb") as file:
        try:
            found = _TensorUnpickler(file).load()
            _check(folder, found)
        except OSError:
            raise
        except Exception as error:  # damaged pickles raise over ten types
            detail = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{METADATA}: {detail}") from error
    return found  # type: ignore[no-any-return]


def _check(folder: Path, metadata: Metadata) -> None:
    """Hold what is claimed against the files."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    for name, tensor in metadata.state_dict_metadata.items():
        if type(name) is not str or type(tensor) is not TensorStorageMetadata:
            raise ValueError(f"{name!r} is no tensor")
        num_bytes = tensor.size.numel() * tensor.properties.dtype.itemsize
        if not 0 <= num_bytes <= sum(sizes.values()):
            raise ValueError(f"{name} is said to have {num_bytes:,} bytes, more than the files")
    for part in metadata.storage_data.values():
        end = part.offset + part.length
        if not 0 <= part.offset <= end <= sizes.get(part.relative_path, -1):
            raise ValueError(f"{part.relative_path} does not reach byte {end:,}")
        if getattr(part, "transform_descriptors", None):
            raise ValueError(f"{part.relative_path} is packed, as no checkpoint of ours is")
