"""Fast approximate cosines with a known error, in the best precision that the device has.

Only pairs that may matter are then scored exactly (`vectors.exact_similarities`).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedder.cpu import multiplies

_SMALL = 20_000
"""Below this many rows, importing torch costs more than it saves."""
_BUFFER_NUMBERS = 1 << 19
"""Converted at a time: few enough for a cache, and enough that threads do not wait for Python."""
_MAXIMA = 16
"""Columns for each of the k highest that are looked through one by one."""
_GPU_FILES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
"""Made by the drivers of NVIDIA, of AMD, and of Linux inside Windows."""


@dataclass(frozen=True)
class Products:
    """Block products in one precision: "float32" by NumPy, "bfloat16" by torch."""

    precision: str = "float32"
    device: str = "cpu"

    @classmethod
    def best_for(cls, num_rows: int) -> "Products":
        """The fastest on this machine for a self-join of so many rows."""
        if num_rows < _SMALL:
            return cls()
        if _has_gpu():
            return cls("bfloat16", "cuda")
        # elsewhere than in hardware it is slower than float32
        return cls("bfloat16") if multiplies("bfloat16") else cls()

    def band(self, width: int) -> float:
        """The largest possible error of one cosine.

        bfloat16 keeps 8 bits: each factor is off by at most 2^-9 of itself, so are the result
        and the bound; sums of float32 add at most 2^-24 a term, and normalizing a few more.
        """
        sums = (width + 8) * 2.0**-24
        return sums if self.precision == "float32" else 4.2 * 2.0**-9 + sums

    def prepare(self, vectors: np.ndarray) -> Any:
        """Unit rows in this precision. vectors: (N, D) float16 or float32."""
        if self.precision == "bfloat16":
            return _prepare_bfloat16(vectors, self.device)
        rows = vectors.astype(np.float32)
        rows /= np.abs(rows).max(axis=1, keepdims=True, initial=1e-30)  # squares stay finite
        rows /= np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
        return rows

    def rows(self, prepared: Any, numbers: np.ndarray) -> Any:
        """Some of the prepared rows."""
        if self.precision == "float32":
            return prepared[numbers]
        import torch

        return prepared.index_select(0, torch.from_numpy(numbers).to(self.device))

    def scores(self, left: Any, right: Any) -> Any:
        """(N, M) approximate cosines. left: (N, D), right: (M, D), both prepared."""
        return left @ right.T if self.precision == "float32" else _products(left, right)

    def above(self, left: Any, right: Any, bound: float | np.ndarray) -> tuple[np.ndarray, ...]:
        """Row numbers, column numbers and approximate cosines of the pairs above a bound.

        left: (N, D), right: (M, D), both prepared; bound: of all pairs, or (N,) float32 of those
        of each row. Gives three (H,) arrays.
        """
        return self.higher(self.scores(left, right), bound)

    def higher(self, scores: Any, bound: float | np.ndarray) -> tuple[np.ndarray, ...]:
        """The same of `scores`: (N, M)."""
        if self.precision == "float32":
            rows, columns = np.nonzero(scores > np.reshape(bound, (-1, 1)))
            return rows, columns, scores[rows, columns]
        import torch

        limits = torch.as_tensor(bound, dtype=torch.float32, device=self.device).reshape(-1, 1)
        limits = (limits - limits.abs() * 2.0**-8).to(scores.dtype)  # not above the bounds
        if np.min(bound, initial=1.0) > 0:  # above zero, bits are ordered as the numbers are
            found = scores.view(torch.int16) > limits.view(torch.int16)
        else:
            found = scores > limits
        rows, columns = np.divmod(_places(found), max(1, scores.shape[1]))
        where = (torch.from_numpy(side).to(self.device) for side in (rows, columns))
        return rows, columns, scores[tuple(where)].float().cpu().numpy()

    def kth_highest(self, scores: Any, k: int) -> np.ndarray:
        """(N,) float32: what the k highest of each row's scores surely reach.

        In long rows a little less than the k-th highest: the k-th highest of the maxima of groups
        of columns, which so many columns reach.
        """
        if self.precision == "float32":
            return np.asarray(np.partition(scores, -k, axis=1)[:, -k])
        groups = scores.shape[1] // (_MAXIMA * k)
        if groups > 1:
            scores = scores[:, : groups * _MAXIMA * k].unflatten(1, (groups, -1)).amax(dim=1)
        return np.asarray(scores.topk(k, dim=1).values[:, -1].float().cpu().numpy())

    def highest(self, scores: Any, k: int) -> np.ndarray:
        """(N, K) float32: the k highest scores of each row, or all where there are fewer."""
        k = min(k, scores.shape[1])
        if self.precision == "float32":
            return np.asarray(-np.partition(-scores, k - 1, axis=1)[:, :k])
        return np.asarray(scores.topk(k, dim=1).values.float().cpu().numpy())


FLOAT32 = Products()
"""The plainest: NumPy, single precision."""


def _products(left: Any, right: Any) -> Any:
    """(N, M) bfloat16: products of all rows, on sides that are padded to few shapes.

    The kernels prepare themselves anew for every shape, which takes longer than multiplying.
    """
    return (_padded(left) @ _padded(right).T)[: len(left), : len(right)]


def _places(found: Any) -> np.ndarray:
    """(H,) int64: where a mask is true, counted through all its rows."""
    if found.is_cuda:
        return np.asarray(found.flatten().nonzero().squeeze(1).cpu().numpy())
    return np.flatnonzero(found.numpy())  # on a CPU six times as fast as torch's


def _padded(rows: Any) -> Any:
    import torch

    step = 32 if len(rows) <= 128 else 64 if len(rows) <= 1024 else 128
    more = -len(rows) % step
    return torch.nn.functional.pad(rows, (0, 0, 0, more)) if more else rows


def _prepare_bfloat16(vectors: np.ndarray, device: str) -> Any:
    """Unit rows in bfloat16, block by block in a buffer that stays in the cache."""
    import torch

    step = max(1, _BUFFER_NUMBERS // max(1, vectors.shape[1]))
    prepared = torch.empty(vectors.shape, dtype=torch.bfloat16)
    raw = np.empty((step, vectors.shape[1]), vectors.dtype)  # torch reads no read-only memory
    buffer = torch.empty(raw.shape)
    for start in range(0, len(vectors), step):
        count = min(step, len(vectors) - start)
        raw[:count] = vectors[start : start + count]
        rows = buffer[:count].copy_(torch.from_numpy(raw[:count]))
        if raw.dtype == np.float32:
            rows.div_(rows.abs().amax(dim=1, keepdim=True))
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
        prepared[start : start + count].copy_(rows)
    return prepared.to(device)


def _has_gpu() -> bool:
    """Whether there is a GPU; torch, of 0.7 GB, is not asked where Linux shows no such device."""
    if sys.platform == "linux" and not any(map(Path.exists, _GPU_FILES)):
        return False
    import torch

    return torch.cuda.is_available()
