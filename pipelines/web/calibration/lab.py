"""One calibration: its questions, its answers, and what follows from them."""

from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from pipelines.audit.tables import Row, opened
from pipelines.audit.work_folder import WorkFolder
from pipelines.run.run_record import POOL
from pipelines.web.calibration.curves import Effects, Floats, Point, by_bin, curve
from pipelines.web.calibration.questions import SCORES, Kind, Question, Sample
from pipelines.web.calibration.ratings import Answers, Ratings
from pipelines.web.serving.catalog import Catalog

_STEPS = 25


@dataclass(frozen=True)
class Lab:
    """A sample and its answers."""

    work: WorkFolder
    catalog: Catalog
    sample: Sample
    ratings: Ratings
    seed: int

    @cached_property
    def questions(self) -> list[Question]:
        """Every pair or image once, bins in turn, so that few answers already tell of all bins."""
        turns = zip_longest(*(stratum.questions for stratum in self.sample.strata))
        flat = [question for turn in turns for question in turn if question is not None]
        return list({question.key: question for question in flat}.values())

    @cached_property
    def effects(self) -> Effects:
        """What each threshold does, counted in the whole run."""
        low, high = self.sample.strata[0].low, self.sample.strata[-1].high
        steps = {round(float(one), 6) for one in np.linspace(low, high, _STEPS)}
        if self.sample.threshold is not None:
            steps.add(self.sample.threshold)
        thresholds = np.array(sorted(steps), np.float64)
        return effects_of(self.catalog, self.work, self.sample.kind, thresholds)

    def next(self, answers: Answers) -> int | None:
        """Number of the first question without an answer."""
        return next((n for n, one in enumerate(self.questions) if one.key not in answers), None)

    def points(self, answers: Answers) -> list[Point]:
        """Precision, recall and removals by threshold."""
        return curve(self.sample, answers, self.effects, np.random.default_rng(self.seed))

    def figures(self) -> Row:
        """Everything, for machines."""
        answers, effects = self.ratings.read(), self.effects
        names = ("threshold", "above", "removed")
        counted = zip(*(getattr(effects, f).tolist() for f in vars(effects)), strict=True)
        return {
            "kind": str(self.sample.kind),
            "threshold": self.sample.threshold,
            "questions": len(self.questions),
            "answered": sum(one.key in answers for one in self.questions),
            "bins": [asdict(one) for one in by_bin(self.sample, answers)],
            "curve": [asdict(point) for point in self.points(answers)],
            "removals": [dict(zip(names, one, strict=True)) for one in counted],
        }


def effects_of(catalog: Catalog, work: WorkFolder, kind: Kind, thresholds: Floats) -> Effects:
    """Rows above each threshold, and rows that it would drop, by the scores that the run kept.

    A duplicate falls only if another image of its group stays. Groups are those of each row's most
    similar other row, which is what the run keeps: pairs beyond it may join groups further, so
    the true number is this or a little more.
    """
    name = SCORES[kind]
    size = catalog.size(name)
    above = np.array([size - catalog.rank(name, float(t), ">") for t in thresholds], np.int64)
    removed = _merged(work, thresholds) if kind is Kind.dedup else above
    return Effects(thresholds, above, removed)


def _merged(work: WorkFolder, thresholds: Floats) -> NDArray[np.int64]:
    """(T,) rows of the pool less their groups, of the pairs above each threshold."""
    import pandas as pd
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    stage = work.deciding(POOL, "component")
    with opened(stage.decisions if stage else None) as tables:
        if tables is None:
            return np.zeros(len(thresholds), np.int64)
        pairs = tables.columns_of(
            "select id, twin, similarity::double as similarity from rows where twin is not null"
        )
    codes, names = pd.factorize(np.concatenate([pairs["id"], pairs["twin"]]))
    left, right = codes.reshape(2, -1)  # (2, pairs)
    removed = []
    for threshold in thresholds:
        near = pairs["similarity"] > threshold
        graph = coo_array((np.ones(near.sum()), (left[near], right[near])), (len(names),) * 2)
        removed.append(len(names) - connected_components(graph, directed=False)[0])
    return np.array(removed, np.int64)
