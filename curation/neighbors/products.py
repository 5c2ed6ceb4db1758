"""Fast approximate cosines with a known error, in the best precision that the device has.

Only pairs that may matter are then scored exactly (`vectors.exact_similarities`).
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

_SMALL = 20_000
"""Below this many rows, importing torch costs more than it saves."""
_BUFFER_NUMBERS = 1 << 15
"""Converted at a time: they stay in the cache, and on one thread."""


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
        return cls("bfloat16") if _has_bfloat16() else cls()

    def band(self, width: int) -> float:
        """The largest possible error of one cosine.

        bfloat16 keeps 8 bits: each factor is off by at most 2^-9 of itself, so are the result
        and the bound; sums of float32 add at most 2^-24 a term, and normalising a few more.
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

        return prepared[torch.from_numpy(numbers).to(self.device)]

    def above(self, left: Any, right: Any, bound: float | np.ndarray) -> tuple[np.ndarray, ...]:
        """Row numbers, column numbers and approximate cosines of the pairs above a bound.

        left: (N, D), right: (M, D), both prepared; bound: of all pairs, or (N,) float32 of those
        of each row. Gives three (H,) arrays.
        """
        if self.precision == "float32":
            scores = left @ right.T  # (N, M)
            rows, columns = np.nonzero(scores > np.reshape(bound, (-1, 1)))
            return rows, columns, scores[rows, columns]
        import torch

        scores = _products(left, right)
        limits = torch.as_tensor(bound, dtype=torch.float32, device=self.device).reshape(-1, 1)
        limits = (limits - limits.abs() * 2.0**-8).to(scores.dtype)  # not above the bounds
        rows, columns = (scores > limits).nonzero(as_tuple=True)
        values = scores[rows, columns].float()
        return rows.cpu().numpy(), columns.cpu().numpy(), values.cpu().numpy()

    def kth_highest(self, left: Any, right: Any, k: int) -> np.ndarray:
        """(N,) float32: the k-th highest approximate cosine of each row with the columns."""
        if self.precision == "float32":
            return np.asarray(np.partition(left @ right.T, -k, axis=1)[:, -k])
        return np.asarray(_products(left, right).topk(k, dim=1).values[:, -1].float().cpu().numpy())


FLOAT32 = Products()
"""The plainest: NumPy, single precision."""


def _products(left: Any, right: Any) -> Any:
    """(N, M) bfloat16: products of all rows, on sides that are padded to few shapes.

    The kernels prepare themselves anew for every shape, which takes longer than multiplying.
    """
    return (_padded(left) @ _padded(right).T)[: len(left), : len(right)]


def _padded(rows: Any) -> Any:
    import torch

    more = -len(rows) % (32 if len(rows) <= 256 else 128)
    return torch.nn.functional.pad(rows, (0, 0, 0, more)) if more else rows


def _prepare_bfloat16(vectors: np.ndarray, device: str) -> Any:
    """Unit rows in bfloat16, block by block in a buffer that stays in the cache."""
    import torch

    raw = torch.from_numpy(np.require(vectors, requirements=["C", "W"]))
    prepared = torch.empty(raw.shape, dtype=torch.bfloat16)
    step = max(1, _BUFFER_NUMBERS // max(1, raw.shape[1]))
    buffer = torch.empty((step, raw.shape[1]))
    for start in range(0, len(raw), step):
        block = raw[start : start + step]
        rows = buffer[: len(block)].copy_(block)
        if raw.dtype == torch.float32:
            rows.div_(rows.abs().amax(dim=1, keepdim=True))
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
        prepared[start : start + len(block)].copy_(rows)
    return prepared.to(device)


@cache
def _has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
