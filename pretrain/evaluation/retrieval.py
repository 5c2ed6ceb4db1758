"""Instance retrieval: for each query the database is ranked by cosine; mean average precision.

Folders count images of the query's class as relevant. The revisited Oxford and Paris sets bring
their own truth: easy and hard images, and junk that is taken out of the ranking.

Legend: Q queries, N database images, D width.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from curation.config import Settings
from curation.errors import ConfigError
from pretrain.evaluation.features import Features


@dataclass(frozen=True)
class Truth:
    """Which database images answer a query."""

    relevant: NDArray[np.int64]
    junk: NDArray[np.int64]
    """Taken out of the ranking."""


def average_precision(relevant: NDArray[np.bool_], total: int) -> float:
    """Mean of the precision at each relevant place of a ranking. relevant: (N,) in rank order."""
    places = np.flatnonzero(relevant)
    return float(((np.arange(len(places)) + 1) / (places + 1)).sum() / total)


def trapezoid_precision(relevant: NDArray[np.bool_], total: int) -> float:
    """As the Oxford and Paris evaluation does: precision before and at each place, averaged."""
    places = np.flatnonzero(relevant)
    found = np.arange(len(places))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    return float((0.5 * (before + (found + 1) / (places + 1))).sum() / total)


def rank_database(queries: Tensor, database: Tensor, block_rows: int = 256) -> NDArray[np.int64]:
    """Order the database (N, D) for each query (Q, D), most similar first: (Q, N)."""
    bank = F.normalize(database.float(), dim=1)
    parts = []
    for rows in torch.split(queries, block_rows):
        similarity = F.normalize(rows.float(), dim=1) @ bank.T
        parts.append(similarity.sort(stable=True, dim=1, descending=True).indices)
    return torch.cat(parts).numpy()


def mean_average_precision(
    ranking: NDArray[np.int64], truths: Sequence[Truth], *, trapezoid: bool = False
) -> float:
    """Average over the queries that have any answer. ranking: (Q, N)."""
    precision = trapezoid_precision if trapezoid else average_precision
    found = []
    for order, truth in zip(ranking, truths, strict=True):
        if len(truth.relevant):
            shown = order[~np.isin(order, truth.junk)]
            found.append(precision(np.isin(shown, truth.relevant), len(truth.relevant)))
    if not found:
        raise ConfigError("retrieval: no query has a relevant image in the database")
    return float(np.mean(found))


class RetrievalSettings(Settings):
    """What is told of the rankings of folders."""

    precisions: tuple[PositiveInt, ...] = Field(default=(1, 5, 10), min_length=1)
    """Precision among the first so many."""


def retrieve_classes(
    database: Features, queries: Features, precisions: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Rank training images for test images; those of the same class are relevant.

    A query that lies in the database is no answer to itself: it is taken out of its ranking.
    """
    labels, keys = np.asarray(database.labels), np.asarray(database.keys)
    truths, hits = [], []
    ranking = rank_database(queries.rows, database.rows)  # (Q, N)
    for order, label, key in zip(ranking, queries.labels, queries.keys, strict=True):
        itself = keys == key
        truths.append(Truth(np.flatnonzero((labels == label) & ~itself), np.flatnonzero(itself)))
        hits.append(labels[order[~itself[order]]][: max(precisions)] == label)
    found = {
        f"precision_{k}": float(np.mean([one[:k].mean() for one in hits if len(one)]))
        for k in precisions
    }
    return {"map": mean_average_precision(ranking, truths), **found}


# --- revisited Oxford and Paris -----------------------------------------------------------------


@dataclass(frozen=True)
class Revisited:
    """The images and the truth of revisited Oxford or Paris."""

    images: list[Path]
    queries: list[Path]
    boxes: list[tuple[float, float, float, float]]
    """Left, top, right, bottom of each query, in pixels."""
    easy: list[NDArray[np.int64]]
    hard: list[NDArray[np.int64]]
    junk: list[NDArray[np.int64]]

    def truths(self, protocol: str) -> list[Truth]:
        """Medium: easy and hard images are relevant. Hard: hard ones, and easy ones are junk."""
        rows = zip(self.easy, self.hard, self.junk, strict=True)
        if protocol == "medium":
            return [Truth(np.concatenate([easy, hard]), junk) for easy, hard, junk in rows]
        return [Truth(hard, np.concatenate([junk, easy])) for easy, hard, junk in rows]


def find_revisited(path: str) -> Path | None:
    """The file of the truth, ROOT/gnd_*.pkl, if there is one."""
    return next(iter(sorted(Path(path).glob("gnd_*.pkl"))), None)


def open_revisited(file: Path) -> Revisited:
    """Read ROOT/gnd_*.pkl and find the images it names in ROOT/jpg.

    Raises:
        ConfigError: the file holds code or something else, or images are missing.
    """
    values = _read_plain_pickle(file)
    try:
        names = [*values["imlist"], *values["qimlist"]]
        images = [file.parent / "jpg" / f"{name}.jpg" for name in names]
        rows = values["gnd"]
        numbers = {
            key: [np.asarray(row[key], np.int64).reshape(-1) for row in rows]
            for key in ("easy", "hard", "junk")
        }
        boxes = [tuple(float(x) for x in row["bbx"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: is no truth of revisited Oxford or Paris: {error}") from error
    missing = next((image for image in images if not image.is_file()), None)
    if missing is not None:
        raise ConfigError(f"{missing}: missing; expected {file.parent}/jpg/NAME.jpg")
    count = len(values["imlist"])
    return Revisited(images[:count], images[count:], boxes, **numbers)  # type: ignore[arg-type]


def retrieve_revisited(database: Tensor, queries: Tensor, truth: Revisited) -> dict[str, float]:
    """Mean average precision by the medium and the hard protocol."""
    ranking = rank_database(queries, database)
    return {
        f"map_{protocol}": mean_average_precision(ranking, truth.truths(protocol), trapezoid=True)
        for protocol in ("medium", "hard")
    }


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and arrays; refuses whatever could run code."""

    ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Give one of the few classes that arrays are made of."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, which is not allowed")
        return super().find_class(module, name)


def _read_plain_pickle(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            values = _PlainUnpickler(opened, encoding="latin1").load()
    except Exception as error:  # damaged pickles raise over ten types
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: holds a {type(values).__name__}, expected a dict with 'gnd'")
    return values
