"""What is asked: pairs or images drawn from every part of a score's range."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from curation.errors import ConfigError
from pipelines.audit.lookup import find_rows
from pipelines.audit.work_folder import WorkFolder
from pipelines.web.serving.catalog import Catalog


class Kind(StrEnum):
    """Which threshold is calibrated."""

    dedup = "dedup"
    leaks = "leaks"
    nsfw = "nsfw"


SCORES = {
    Kind.dedup: "near_dedup.similarity",
    Kind.leaks: "leaks.similarity",
    Kind.nsfw: "nsfw.nsfw_score",
}
"""The score that each threshold is held against."""


@dataclass(frozen=True)
class Question:
    """One row to rate, with the image that it is compared with."""

    flow: str
    id: str
    score: float
    twin: str | None = None
    twin_flow: str | None = None

    @property
    def key(self) -> str:
        """The same for a pair, whichever of its images is asked about."""
        return "~".join(sorted(one for one in (self.id, self.twin) if one))


@dataclass(frozen=True)
class Stratum:
    """A part of the score's range."""

    low: float
    high: float
    rows: int
    """Rows whose score lies there."""
    questions: tuple[Question, ...]
    """Drawn from them at random."""


@dataclass(frozen=True)
class Sample:
    """Questions from the whole range of a score."""

    kind: Kind
    strata: tuple[Stratum, ...]
    threshold: float | None
    """The run's own."""


def draw(
    catalog: Catalog,
    work: WorkFolder,
    kind: Kind,
    bins: int,
    per_bin: int,
    rng: np.random.Generator,
) -> Sample:
    """Draw questions from equal bins of the score's range.

    Raises:
        ConfigError: the run has no such score.
    """
    name = SCORES[kind]
    if name not in catalog.scores:
        raise ConfigError(
            f"{work.path}: has no '{name}' to calibrate '{kind}' by; "
            f"there are: {', '.join(catalog.scores) or 'no scores'}"
        )
    edges = [float(edge) for edge in np.linspace(*catalog.ends(name), bins + 1)]
    ranks = [*(catalog.rank(name, edge) for edge in edges[:-1]), catalog.size(name)]
    strata = []
    for number in range(bins):
        first, rows = ranks[number], ranks[number + 1] - ranks[number]
        chosen = np.sort(rng.choice(rows, min(per_bin, rows), replace=False)) + first
        found = (_question(catalog, work, kind, int(rank)) for rank in chosen)
        asked = tuple(one for one in found if one is not None)
        strata.append(Stratum(edges[number], edges[number + 1], rows, asked))
    limits = catalog.scores[name].thresholds
    return Sample(kind, tuple(strata), limits[0] if limits else None)


def _question(catalog: Catalog, work: WorkFolder, kind: Kind, rank: int) -> Question | None:
    """The question about one row; None where its image, or its twin's, may not be shown."""
    name = SCORES[kind]
    row = catalog.at_rank(name, rank)
    flow, row_id, score = row["flow"], row["id"], float(row["scores"][name])
    stage = work.stage(flow, catalog.scores[name].stage)
    if row["hidden"] or stage is None:
        return None
    if kind is Kind.nsfw:
        return Question(flow, row_id, score)
    verdicts = find_rows(stage.decisions, stage.shard_of(row_id, flow), [row_id]).to_pylist()
    verdict = next((one for one in verdicts if one["twin"]), None)
    if verdict is None:
        return None
    twin_flow = verdict.get("twin_set") or flow
    twin = catalog.find(twin_flow, verdict["twin"])
    if twin is None or twin["hidden"]:
        return None
    return Question(flow, row_id, score, verdict["twin"], twin_flow)
